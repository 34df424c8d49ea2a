"""Running models hand over the same Hugging Face tensors, bit for bit, under every layout: what an engine is fed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.model import ModelConfig
from tests import ranks
from tests.layouts import CPU, LAYOUTS
from tests.training_runs import MODEL

ODD = replace(MODEL, vocab_size=300, head_dim=16, rope_base=5e5)  # 84 rows of padding; heads wider than hidden / heads
MODELS = {
    "tied": ODD,
    "untied": replace(ODD, tied_embeddings=False),
    "qwen2": replace(ODD, family="qwen2"),
    "qwen3": replace(ODD, family="qwen3", tied_embeddings=False),
}
NAMES = ("tensor 2", "pipeline 2", "tensor 2 x pipeline 2", "pipeline 2, interleaved", "data 2 x tensor 2")
BUCKET_BYTES = 20_000  # several tensors of a layer; an embedding has 38,400
TOKENS = [[5, 299, 17, 0, 123, 123, 7, 64, 1, 200, 33, 8]]


# ---- what runs on the ranks


def pieces(chunk: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(chunk.sharded_state_dict()):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from (part for part in built if isinstance(part, ShardedTensor))


@torch.no_grad()
def fill(chunks: list[Any], hostile: bool) -> None:
    """Give each weight, norms and biases too, numbers of its own that its name and place alone decide.

    `hostile`: any bits at all, among them -0.0, infinities and NaN of every payload.
    """
    for part in itertools.chain.from_iterable(pieces(chunk) for chunk in chunks):
        axes = part.prepend_axis_num
        digest = hashlib.sha256(f"{part.key}/{part.global_offset[:axes]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        whole = torch.randn(part.global_shape[axes:], generator=generator) * 0.1 + ("norm" in part.key)
        if hostile:
            bits = torch.randint(-(2**31), 2**31, whole.shape, generator=generator).int()
            bits[..., ::3] |= 0x7F800000  # infinity or NaN
            bits[..., ::4] = -(2**31)  # -0.0
            whole = bits.view(torch.float32)
        window = tuple(slice(start, start + size) for start, size in zip(part.global_offset[axes:], part.local_shape, strict=True))
        part.data.copy_(whole[window])


def built(groups: Any, model: ModelConfig, hostile: bool = False) -> list[Any]:
    from megatron_ext.model.build import build_model

    chunks = build_model(model, "fp32", groups, None)
    fill(chunks, hostile)
    return chunks


def handed_over(groups: Any, models: dict[str, ModelConfig], hostile: bool) -> dict[str, Any]:
    """Of each model: bits of its tensors by name, buckets' names, checksums and largest, and logits."""
    from megatron_ext.model.handover import agreed_checksum, hugging_face_buckets
    from megatron_ext.model.logits import logits_BSV

    found = {}
    for label, model in models.items():
        chunks = built(groups, model, hostile)
        tensors, names, checksums = {}, [], []
        for bucket in hugging_face_buckets(chunks, model, groups, BUCKET_BYTES):
            assert len(bucket.tensors) == 1 or bucket.num_bytes <= BUCKET_BYTES
            names.append([name for name, _ in bucket.tensors])
            checksums.append(agreed_checksum(bucket, groups))
            tensors.update({name: tensor.numpy().view(np.int32) for name, tensor in bucket.tensors})
        logits = logits_BSV(chunks, torch.tensor(TOKENS), groups, model.vocab_size).numpy()
        found[label] = {"tensors": tensors, "names": names, "checksums": checksums, "logits": logits}
    return found


@functools.cache
def of_ranks(name: str, hostile: bool = False) -> list[dict[str, Any]]:
    return ranks.run(handed_over, LAYOUTS[name], {"qwen2": MODELS["qwen2"]} if hostile else MODELS, hostile)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["names"] == other["names"]
    assert one["checksums"] == other["checksums"]
    for name, bits in one["tensors"].items():
        assert np.array_equal(bits, other["tensors"][name]), name


# ---- every layout, every rank


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_of_every_layout_gets_the_same_bits(name):
    alone = of_ranks("one rank")[0]
    for of_rank in of_ranks(name):
        for label in MODELS:
            assert_equal(of_rank[label], alone[label])


def test_minus_zero_and_every_nan_arrive_as_they_are():
    alone, *others = [found["qwen2"] for name in ("one rank", "tensor 2 x pipeline 2") for found in of_ranks(name, hostile=True)]
    for other in others:
        assert_equal(other, alone)
    norm = alone["tensors"]["model.norm.weight"]
    nan = np.isnan(norm.view(np.float32))
    assert len(np.unique(norm[nan])) > 5, "NaN of one payload only"
    assert (norm[::4] == -(2**31)).all()


@pytest.mark.parametrize("label", MODELS)
def test_buckets_hold_every_tensor_of_the_table_once_in_its_order(label):
    from megatron_ext.model.weights import table

    found = of_ranks("one rank")[0][label]
    rows = table(MODELS[label])
    assert [name for names in found["names"] for name in names] == [name for row in rows for name in row.names]
    assert {name: bits.shape for name, bits in found["tensors"].items()} == {
        name: shape for row in rows for name, shape in zip(row.names, row.shapes, strict=True)
    }
    assert max(len(names) for names in found["names"]) > 3, "no bucket holds several tensors"
    assert found["names"][0] == ["model.embed_tokens.weight"], "the tensor larger than a bucket is not alone"


# ---- the numbers mean what transformers takes them for


def transformers_logits(model: ModelConfig, bits: dict[str, np.ndarray]) -> np.ndarray:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    config = kinds[model.family](
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads, num_key_value_heads=model.num_query_groups,
        head_dim=model.channels_per_head, max_position_embeddings=model.max_positions, rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base}, tie_word_embeddings=model.tied_embeddings,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    state = {name: torch.from_numpy(values.view(np.float32)) for name, values in bits.items()}
    if model.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state)  # strict: every name and shape
    with torch.no_grad():
        return network.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("label", MODELS)
@pytest.mark.parametrize("name", ["one rank", "tensor 2 x pipeline 2"])
def test_transformers_computes_what_the_running_model_computes(name, label):
    found = of_ranks(name)[0][label]
    assert np.abs(transformers_logits(MODELS[label], found["tensors"]) - found["logits"]).max() < 1e-5


def test_keys_in_the_place_of_values_would_show():
    found = of_ranks("one rank")[0]["untied"]
    swap = {"k_proj": "v_proj", "v_proj": "k_proj"}
    swapped = {name: found["tensors"][".".join(swap.get(part, part) for part in name.split("."))] for name in found["tensors"]}
    assert np.abs(transformers_logits(MODELS["untied"], swapped) - found["logits"]).max() > 1e-2


# ---- faults


def fault(groups: Any, kind: str) -> str:
    """Hand over with a fault; what is said about it."""
    from megatron_ext.errors import CheckpointError
    from megatron_ext.model import handover

    model = MODELS["qwen2"]
    chunks = built(groups, model)
    if kind == "given twice":
        handover._is_owner = lambda _: True
    if kind == "held by no rank":
        true = handover._is_owner
        handover._is_owner = lambda part: true(part) and "final_layernorm" not in part.key
    if kind == "another model":
        model = replace(model, family="llama", num_layers=3)
    if kind == "replicas apart" and groups.data_rank == 1:
        chunks[0].decoder.final_layernorm.weight.data[3] += 1e-6
    try:
        for bucket in handover.hugging_face_buckets(chunks, model, groups, BUCKET_BYTES):
            handover.agreed_checksum(bucket, groups)
    except CheckpointError as refusal:
        return str(refusal)
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("kind", "layout", "said"),
    [
        ("given twice", "tensor 2", "decoder.layers.self_attention.linear_qkv.layer_norm_weight (layer 0) is given twice"),
        ("given twice", "pipeline 2", "embedding.word_embeddings.weight is given twice"),
        ("held by no rank", "pipeline 2", "decoder.final_layernorm.weight is held by no rank"),
        ("another model", "tensor 2", "decoder.layers.self_attention.linear_qkv.bias (layer 3) is not in the table"),
        ("replicas apart", "data 2", "model.norm.weight: the data-parallel replicas have come apart"),
    ],
)
def test_a_fault_is_refused_on_all_ranks(kind, layout, said):
    found = ranks.run(fault, LAYOUTS[layout], kind)
    assert said in found[0]
    assert found == found[:1] * len(found)


# ---- memory


def live_tensors(groups: Any) -> list[int]:
    """How many of the tensors handed over so far are alive while each next one is in the caller's hand."""
    from megatron_ext.model.handover import hugging_face_buckets

    seen: list[Any] = []
    alive = []
    for bucket in hugging_face_buckets(built(groups, MODELS["tied"]), MODELS["tied"], groups, 1):
        seen += [weakref.ref(tensor) for _, tensor in bucket.tensors]
        alive.append(sum(one() is not None for one in seen))
    return alive


def test_what_was_handed_over_is_let_go():
    alive = ranks.run(live_tensors, CPU)[0]
    assert len(alive) == 2 + 4 * 9
    assert max(alive) <= 3, "the caller's tensor, one for the next bucket, and nothing older"
