"""The table of names and reshapes against the real models of both sides: names, shapes, bits, and what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.hugging_face import config_from_model
from megatron_ext.config.model import ModelConfig
from megatron_ext.model.weights import Row, table
from tests import ranks
from tests.layouts import CPU, parts, whole

LLAMA = ModelConfig(
    name="llama", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=300,
    max_positions=64,
)  # fmt: skip
MISTRAL, QWEN2, QWEN3 = (replace(LLAMA, family=family) for family in ("mistral", "qwen2", "qwen3"))
SHAPES = {
    "llama": LLAMA,
    "llama, tied": replace(LLAMA, tied_embeddings=True),
    "llama, one group": replace(LLAMA, num_query_groups=1),
    "llama, every head its group": replace(LLAMA, num_query_groups=4, vocab_size=301),
    "llama, wide heads, scaled": replace(LLAMA, head_dim=16, rope_scaling_factor=8.0, rope_base=500_000.0),
    "llama, whole vocabulary": replace(LLAMA, vocab_size=256, tied_embeddings=True),
    "mistral": MISTRAL,
    "mistral, narrow heads": replace(MISTRAL, head_dim=4, hidden_size=36, vocab_size=127),
    "mistral, tied, one layer": replace(MISTRAL, tied_embeddings=True, num_layers=1),
    "qwen2": QWEN2,
    "qwen2, tied, one group": replace(QWEN2, tied_embeddings=True, num_query_groups=1),
    "qwen2, wide heads, three groups": replace(QWEN2, head_dim=12, num_attention_heads=6, num_query_groups=3, hidden_size=24),
    "qwen3": QWEN3,
    "qwen3, tied, wide heads": replace(QWEN3, tied_embeddings=True, head_dim=24, norm_epsilon=1e-6),
    "qwen3, every head its group": replace(QWEN3, num_query_groups=4, vocab_size=129, num_layers=3),
}
TOKENS = np.arange(2 * 12).reshape(2, 12) * 37 % 127  # ids that every vocabulary has
Tensors = dict[str, np.ndarray]


# ---- names and shapes


@functools.cache
def transformers_model(name: str) -> Any:
    """A real model of a shape, with weights that leave nothing symmetric: norms and biases differ from one and zero."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = config_from_model(SHAPES[name], "float32")
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + float(parameter.dim() == 1))
    return made


def saved(name: str) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would write: of tied ones the first."""
    tensors = dict(transformers_model(name).state_dict())
    if SHAPES[name].tied_embeddings:
        assert tensors.pop("lm_head.weight").data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    return tensors


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_real_transformers_model(name):
    rows = table(SHAPES[name])
    listed = [pair for row in rows for pair in zip(row.names, row.shapes, strict=True)]
    assert len(dict(listed)) == len(listed)
    assert dict(listed) == {key: tuple(tensor.shape) for key, tensor in saved(name).items()}


def whole_shapes(groups: Any, models: list[ModelConfig]) -> list[dict[str, tuple[int, ...]]]:
    from megatron_ext.model.build import build_model

    built = [build_model(model, "fp32", groups, 1)[0].sharded_state_dict() for model in models]
    return [{key: tensor.shape for key, tensor in whole([parts(state)]).items()} for state in built]


@functools.cache
def megatron_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    return dict(zip(SHAPES, ranks.run(whole_shapes, CPU, list(SHAPES.values()))[0], strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_keys_layers_and_shapes_are_those_of_the_real_megatron_model(name):
    model, rows = SHAPES[name], table(SHAPES[name])
    assert len({(row.key, row.layer) for row in rows}) == len(rows)
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        stacked = row.shape if row.layer is None else (model.num_layers, *row.shape)
        assert shapes.setdefault(row.key, stacked) == stacked
    assert shapes == megatron_shapes()[name]
    for key in shapes:
        layers = [row.layer for row in rows if row.key == key]
        assert layers in ([None], list(range(model.num_layers)))
    assert sum(np.prod(row.shape) for row in rows) == model.num_parameters


# ---- what they compute

Reshape = Callable[[Row, list[torch.Tensor]], list[torch.Tensor]]


def right(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return row.to_megatron(tensors)


def gate_and_up_swapped(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return row.to_megatron(tensors[::-1] if row.kind == "gate_up" else tensors)


def queries_keys_values_in_a_row(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return tensors if row.kind == "qkv" else row.to_megatron(tensors)


def keys_and_values_swapped(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return row.to_megatron([tensors[0], tensors[2], tensors[1]] if row.kind == "qkv" else tensors)


def padding_in_front(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return row.to_megatron(tensors)[::-1] if row.kind == "rows" else row.to_megatron(tensors)


def every_norm_as_one(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.ones(row.shape)] if row.key.endswith(("q_layernorm.weight", "k_layernorm.weight")) else row.to_megatron(tensors)


def a_later_projection_lost(row: Row, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    pieces = row.to_megatron(tensors)
    return [piece * 0 for piece in pieces] if row.layer and row.key.endswith("linear_proj.weight") else pieces


FAULTS: dict[str, tuple[Reshape, list[str]]] = {
    "gate and up swapped": (gate_and_up_swapped, list(SHAPES)),
    "keys and values swapped": (keys_and_values_swapped, list(SHAPES)),
    "queries, keys, values in a row": (queries_keys_values_in_a_row, [n for n, m in SHAPES.items() if m.num_query_groups > 1]),
    "padding in front": (padding_in_front, [n for n, m in SHAPES.items() if m.padded_vocab_size > m.vocab_size]),
    "no norms of queries and keys": (every_norm_as_one, [n for n, m in SHAPES.items() if m.qk_norm]),
    "a later layer's projection lost": (a_later_projection_lost, [n for n, m in SHAPES.items() if m.num_layers > 1]),
}


def megatron_logits(groups: Any, cases: list[tuple[str, Tensors, Reshape]]) -> list[np.ndarray]:
    """Logits [B, S, P] of Megatron models that hold the given Hugging Face tensors, moved by the given reshape."""
    from megatron_ext.model.build import build_model

    found = []
    tokens = torch.from_numpy(TOKENS)
    for name, tensors, reshape in cases:
        model = build_model(SHAPES[name], "fp32", groups, None)[0].eval()
        fill(model.sharded_state_dict(), SHAPES[name], tensors, reshape)
        with torch.no_grad():
            found.append(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).numpy())
    return found


@torch.no_grad()
def fill(sharded: Any, model: ModelConfig, tensors: Tensors, reshape: Reshape) -> None:
    """Write a model's parameters in place through its sharded state dict, as a checkpoint's loading does."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    megatron = {(row.key, row.layer): torch.cat(reshape(row, [torch.from_numpy(tensors[n]) for n in row.names])) for row in table(model)}
    for entry in nested_values(sharded):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for one in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(one, ShardedTensor):
                axes = one.prepend_axis_num
                tensor = megatron[one.key, one.global_offset[0] if axes else None]
                start = one.global_offset[axes]
                one.data.copy_(tensor[start : start + one.local_shape[0]])


@functools.cache
def largest_differences() -> dict[tuple[str, str], float]:
    """Of logits between transformers and Megatron, by fault ('' for none) and shape."""
    cases = [("", name, right) for name in SHAPES]
    cases += [(fault, name, reshape) for fault, (reshape, names) in FAULTS.items() for name in names]
    tensors = {name: {key: tensor.numpy() for key, tensor in saved(name).items()} for name in SHAPES}
    found = ranks.run(megatron_logits, CPU, [(name, tensors[name], reshape) for _, name, reshape in cases])[0]
    with torch.no_grad():
        expected = {name: transformers_model(name)(torch.from_numpy(TOKENS)).logits.numpy() for name in SHAPES}
    result = {}
    for (fault, name, _), logits_BSP in zip(cases, found, strict=True):
        vocabulary = SHAPES[name].vocab_size
        if not fault:
            assert (logits_BSP[..., vocabulary:] == 0).all()  # the rows behind the vocabulary
        scale = np.abs(expected[name]).max()
        result[fault, name] = float(np.abs(logits_BSP[..., :vocabulary] - expected[name]).max() / scale)
    return result


@pytest.mark.parametrize("name", SHAPES)
def test_the_moved_weights_compute_the_same_logits(name):
    assert largest_differences()["", name] < 1e-5


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_moved_wrongly_are_noticed(fault):
    found = {name: difference for (said, name), difference in largest_differences().items() if said == fault}
    assert sorted(found) == sorted(FAULTS[fault][1])
    assert min(found.values()) > 1e-3, found


# ---- bits

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
AWKWARD = {  # -0.0, a signalling NaN and a negative one with payloads, the smallest number, minus infinity
    torch.float32: [-(2**31), 0x7F800001, -0x3FFFFF, 1, -0x800000],
    torch.bfloat16: [-(2**15), 0x7F81, -0x3F, 1, -0x80],
}


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    limits = torch.iinfo(BITS[dtype])
    drawn = torch.randint(limits.min, limits.max, tuple(shape), dtype=BITS[dtype], generator=torch.Generator().manual_seed(seed))
    flat = drawn.view(-1)
    flat[: len(AWKWARD[dtype])] = torch.tensor(AWKWARD[dtype], dtype=BITS[dtype])[: flat.numel()]
    return drawn.view(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_bit_comes_back(name, dtype):
    for number, row in enumerate(table(SHAPES[name])):
        tensors = [random_bits(shape, dtype, 10 * number + i) for i, shape in enumerate(row.shapes)]
        megatron = torch.cat(row.to_megatron(tensors))
        assert tuple(megatron.shape) == row.shape
        back = row.to_hugging_face(megatron)
        assert all(same_bits(one, other) for one, other in zip(tensors, back, strict=True)), row.key
        assert all(tensor.is_contiguous() for tensor in back)
        assert same_bits(torch.cat(row.to_megatron(back)), megatron)
        assert (megatron[sum(shape[0] for shape in row.shapes) :].view(BITS[dtype]) == 0).all()  # padding: plus zero


@pytest.mark.parametrize("dtype", BITS)
def test_bits_that_change_are_noticed(dtype):
    """The faults: arithmetic that changes no number, a half of another dtype, a neighbour's place."""
    row = table(LLAMA)[1]
    tensor = random_bits(row.shape, dtype, 0)
    assert not same_bits(tensor + 0.0, tensor)
    assert not same_bits(tensor.nan_to_num().to(torch.float16).to(dtype), tensor)
    assert not same_bits(tensor.roll(1), tensor)
    assert not same_bits(tensor.double().to(dtype), tensor)  # a signalling NaN becomes a quiet one


def test_queries_keys_and_values_by_hand():
    """4 heads in 2 groups of 2 channels: a group's two queries, then its key, then its value."""
    row = next(row for row in table(replace(QWEN2, hidden_size=8)) if row.key.endswith("linear_qkv.bias"))
    assert row.shapes == ((8,), (4,), (4,))
    queries, keys, values = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    (megatron,) = row.to_megatron([queries, keys, values])
    assert megatron.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert [part.tolist() for part in row.to_hugging_face(megatron)] == [queries.tolist(), keys.tolist(), values.tolist()]
    matrix = next(row for row in table(replace(QWEN2, hidden_size=8)) if row.key.endswith("linear_qkv.weight"))
    (wide,) = matrix.to_megatron([part[:, None].expand(-1, 8) for part in (queries, keys, values)])
    assert wide.shape == (16, 8)
    assert torch.equal(wide, megatron[:, None].expand(-1, 8))


def test_nothing_is_copied_where_no_number_changes_its_place():
    for row in table(replace(LLAMA, num_query_groups=1)):
        tensors = [torch.randn(shape) for shape in row.shapes]
        pieces = row.to_megatron(tensors)
        if row.kind != "qkv":
            assert all(piece is tensor for piece, tensor in zip(pieces, tensors, strict=False)), row.key
            assert len(pieces) == len(tensors) + (row.shape[0] > sum(shape[0] for shape in row.shapes))
        whole_tensor = torch.cat(pieces)
        place = whole_tensor.data_ptr()
        for part in row.to_hugging_face(whole_tensor):  # with one group even queries, keys and values lie behind one another
            assert part.data_ptr() == place, row.key
            place += part.numel() * part.element_size()


def test_a_tensor_of_another_shape_is_not_moved():
    for row in table(QWEN3):
        tensors = [torch.zeros(shape) for shape in row.shapes]
        with pytest.raises(AssertionError):
            row.to_megatron([*tensors[:-1], torch.zeros(tensors[-1].shape[0] + 1, *tensors[-1].shape[1:])])
        with pytest.raises(AssertionError):
            row.to_megatron(tensors[:-1])
        with pytest.raises(AssertionError):
            row.to_hugging_face(torch.zeros(row.shape[0] + 1, *row.shape[1:]))
