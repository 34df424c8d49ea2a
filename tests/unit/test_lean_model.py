"""The lean forward pass finds the trainer's parameters, not copies, under both of their names; RoPE is Megatron's."""

from __future__ import annotations

import torch

from megatron_ext.generation import lean_model
from megatron_ext.generation.rotary import RotaryTable

LOCAL = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
FUSED = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
OTHERS = (
    "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "self_attention.linear_proj.weight", "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight", "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight",
)  # fmt: skip


def test_a_layers_parameters_under_either_name():
    for norms in (LOCAL, FUSED):
        held = {f"decoder.layers.3.{name}": torch.nn.Parameter(torch.randn(2)) for name in (*norms, *OTHERS)}
        found = vars(lean_model._layer(held, "decoder.layers.3."))
        assert {id(tensor) for tensor in found.values()} == {id(parameter) for parameter in held.values()}
        assert found["attention_norm"] is held[f"decoder.layers.3.{norms[0]}"]
        assert found["mlp_norm"] is held[f"decoder.layers.3.{norms[1]}"]


def test_rotation_is_megatrons_and_leaves_values_alone():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    queries, channels, positions = 3, 8, torch.tensor([0, 5, 70, 6])
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, channels, 2) / channels)
    qkv = torch.randn(4, 2, queries + 2, channels, generator=torch.Generator().manual_seed(0))
    table = RotaryTable(frequencies, queries)
    table.at(positions[:2], 6)  # it grows after this
    found = table.at(positions, 71).rotate(qkv)
    angles = torch.outer(positions.float(), frequencies)
    both = torch.cat((angles, angles), dim=-1)[:, None, None]  # a sequence of four
    expected = _apply_rotary_pos_emb_bshd(qkv[:, :, :-1].reshape(4, 1, -1, channels), both)
    assert torch.allclose(found[:, :, :-1].reshape(expected.shape), expected, atol=1e-6)
    assert torch.equal(found[:, :, -1], qkv[:, :, -1])
    assert not torch.allclose(found[1], qkv[1], atol=1e-2)
    half = table.at(positions, 71).rotate(qkv.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, table.at(positions, 71).rotate(qkv.bfloat16().float()).bfloat16()), "angles and products are FP32"
