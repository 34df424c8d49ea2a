"""Hugging Face -> Megatron -> Hugging Face: every tensor bit-equal, and after training under four ranks what the ranks really hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion import to_hugging_face
from megatron_ext.conversion.to_hugging_face import megatron_to_hf
from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.model import weights
from megatron_ext.provenance import read_manifest
from megatron_ext.tokenizer import load_tokenizer
from tests import ranks
from tests.layouts import CPU, LAYOUTS, parts, toy_stage, train_steps, whole
from tests.small_checkpoints import manifest
from tests.small_models import hugging_face_folder

# Two ranks each of tensor and pipeline parallelism split queries, groups, layers and vocabulary.
FOUR = LAYOUTS["tensor 2 x pipeline 2"]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, odd": ("llama", {"vocab_size": 301, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"vocab_size": 384}),
}
PINNED, ROUTINE, RESHARDED = 1, 2, 3
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Imported:
    """A model's Hugging Face folder, and the checkpoint that was made of it."""

    folder: Path
    checkpoint: Path

    @property
    def model(self) -> ModelConfig:
        """The model that the checkpoint says it is."""
        found: ModelConfig = from_json(ModelConfig, read_manifest(self.checkpoint).model)
        return found


def import_small(path: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Imported:
    family, config = SHAPES[name]
    folder = hugging_face_folder(path / "hf", family, dtype, **config, **changes)
    return Imported(folder, hf_to_megatron(str(folder), path / "imported"))


def export(checkpoint: Path, target: Path, **options: Any) -> Path:
    return megatron_to_hf(checkpoint, target, say=lambda _: None, **options)


def tensors(folder: Path) -> Tensors:
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


def differing(one: Tensors, other: Tensors) -> list[str]:
    """Names of tensors that are not bit-equal, or stand on one side only."""
    return [name for name in {**one, **other} if name not in one or name not in other or bits(one[name]) != bits(other[name])]


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All of a tensor; equality of numbers would take -0.0 for 0.0."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(folder: Path) -> Tensors:
    """What transformers makes of a folder."""
    from transformers import AutoModelForCausalLM

    found: Tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


# ---- without training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_comes_back_to_the_bit(tmp_path, name, dtype):
    given = import_small(tmp_path, name, dtype)
    out = export(given.checkpoint, tmp_path / "out")
    assert {one.dtype for one in tensors(out).values()} == {dtype}
    assert differing(tensors(out), tensors(given.folder)) == []
    assert differing(state(out), state(given.folder)) == []
    assert {path.name for path in given.folder.iterdir()} | {"conversion.json"} == {path.name for path in out.iterdir()}
    assert load_tokenizer(out).identity_hash == load_tokenizer(given.folder).identity_hash


def test_shards_on_both_sides_change_nothing(tmp_path):
    whole_one = import_small(tmp_path / "whole", "qwen3")
    given = import_small(tmp_path / "shards", "qwen3", max_shard_size="30KB")
    assert len(list(given.folder.glob("model-*.safetensors"))) > 3
    out = export(given.checkpoint, tmp_path / "out", shard_bytes=25_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert differing(tensors(out), tensors(whole_one.folder)) == []
    assert differing(state(out), state(whole_one.folder)) == []


# ---- with training


def by_hand(gathered: dict[str, np.ndarray], config: Any) -> Tensors:
    """Hugging Face tensors from Megatron's, written from Megatron's layout alone: no line of it is shared with the table."""
    layer_names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }
    outer = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    found: dict[str, np.ndarray] = {}
    for key, stacked in gathered.items():
        if key in outer:
            found[outer[key]] = stacked[: config.vocab_size] if "norm" not in key else stacked
            continue
        for layer, tensor in enumerate(stacked):
            short, prefix = key.removeprefix("decoder.layers."), f"model.layers.{layer}."
            if short in layer_names:
                found[prefix + layer_names[short]] = tensor
            elif short == "mlp.linear_fc1.weight":
                found[prefix + "mlp.gate_proj.weight"] = tensor[: config.intermediate_size]
                found[prefix + "mlp.up_proj.weight"] = tensor[config.intermediate_size :]
            else:
                what = short.removeprefix("self_attention.linear_qkv.")
                for letter, rows in _ungrouped(config).items():
                    found[f"{prefix}self_attn.{letter}_proj.{what}"] = tensor[rows]
    return {name: torch.tensor(one) for name, one in found.items()}


def _ungrouped(config: Any) -> dict[str, list[int]]:
    """Which rows of Megatron's queries-keys-values are queries, keys, values: group after group, each one its queries, key and value."""
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    at = 0
    for _ in range(config.num_key_value_heads):
        for letter in "q" * (config.num_attention_heads // config.num_key_value_heads) + "kv":
            rows[letter] += range(at, at + config.head_dim)
            at += config.head_dim
    return rows


def train_all(groups: Any, jobs: dict[str, tuple[Imported, Path]]) -> dict[str, Any]:
    """Load each checkpoint, train two steps, save it in both forms; this rank's pieces before and after."""
    from megatron_ext.training.state import sharded_model

    found = {}
    for name, (given, folder) in jobs.items():
        of, state = _loaded(groups, given.model, given.checkpoint)
        before = parts(sharded_model(state))
        train_steps(state, of, range(2))
        _save(state, given, folder, PINNED, "fully_reshardable")
        _save(state, given, folder, ROUTINE, "dp_reshardable")
        found[name] = before, parts(sharded_model(state))
    return found


def reshard_all(groups: Any, jobs: dict[str, tuple[Imported, Path]]) -> None:
    """Load the pinned checkpoints with all of their optimizers and save them again."""
    from megatron_ext.checkpoint.folder import iteration_path
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import load_model, load_optimizer, sharded_state

    for given, folder in jobs.values():
        _, state = _loaded(groups, given.model, iteration_path(folder, ROUTINE))
        loaded = load_state(sharded_state(state, "fully_reshardable", is_loading=True), iteration_path(folder, PINNED))
        load_model(state, loaded)
        load_optimizer(state, loaded)
        _save(state, given, folder, RESHARDED, "fully_reshardable")


def _loaded(groups: Any, model: ModelConfig, checkpoint: Path) -> Any:
    """A stage of the model, and its state with a checkpoint's weights, as a `weights` start loads them."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import build_state, load_model, sharded_model

    of = toy_stage(groups.plan, model=model)
    state = build_state(of, groups, None)
    load_model(state, load_state(sharded_model(state), checkpoint))
    state.optimizer.reload_model_params()
    return of, state


def _save(state: Any, given: Imported, folder: Path, iteration: int, layout: Any) -> None:
    from megatron_ext.checkpoint.save import Target, save_checkpoint
    from megatron_ext.training.state import sharded_state

    facts = {"model": to_json(given.model), "tokenizer_hash": load_tokenizer(given.folder).identity_hash, "optimizer_layout": layout}
    target = Target(folder, iteration, 1, lambda digests: manifest(iteration, files=digests, **facts))
    save_checkpoint(sharded_state(state, layout), target)


@dataclass(frozen=True)
class Trained:
    """A model that was imported, trained by four ranks and saved; its numbers as gathered from the ranks."""

    given: Imported
    checkpoints: Path
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]

    @property
    def config(self) -> Any:
        """As transformers reads it."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.given.folder)

    def export(self, iteration: int, target: Path) -> Path:
        """One of its checkpoints as a Hugging Face folder."""
        return export(self.checkpoints / f"iter_{iteration:07d}", target, tokenizer=self.given.folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every shape, imported, trained and saved by four ranks, and saved again by one."""
    path = tmp_path_factory.mktemp("trained")
    jobs = {name: (import_small(path / name, name), path / name / "checkpoints") for name in SHAPES}
    of_ranks = ranks.run(train_all, FOUR, jobs)
    ranks.run(reshard_all, CPU, jobs)
    return {
        name: Trained(given, folder, *(whole([found[name][i] for found in of_ranks]) for i in (0, 1)))
        for name, (given, folder) in jobs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_after_training_and_a_reshard_every_export_is_what_the_ranks_held(tmp_path, trained, name):
    one = trained[name]
    original = tensors(one.given.folder)
    assert differing(by_hand(one.before, one.config), original) == []
    expected = by_hand(one.after, one.config)
    assert len(differing(expected, original)) == len(original)  # two steps change every tensor
    for iteration in (PINNED, ROUTINE, RESHARDED):
        out = one.export(iteration, tmp_path / f"{iteration}")
        assert differing(tensors(out), expected) == [], iteration
    assert differing(state(out), {**expected, **_tied(expected, one)}) == []


def _tied(expected: Tensors, one: Trained) -> Tensors:
    return {"lm_head.weight": expected["model.embed_tokens.weight"]} if one.given.model.tied_embeddings else {}


# ---- faults


def one_behind_the_other(row: weights.Row, tensor: torch.Tensor) -> list[torch.Tensor]:
    """All queries, then all keys, then all values: right only for one group."""
    return list(torch.split(tensor, [shape[0] for shape in row.shapes]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_wrong_order_of_queries_keys_and_values_is_noticed(tmp_path, trained, monkeypatch, name):
    one = trained[name]
    true: Callable[..., list[torch.Tensor]] = weights.Row.to_hugging_face
    monkeypatch.setattr(
        weights.Row, "to_hugging_face", lambda row, tensor: (one_behind_the_other if row.kind == "qkv" else true)(row, tensor)
    )
    wrong = differing(tensors(one.export(PINNED, tmp_path / "out")), by_hand(one.after, one.config))
    assert wrong
    assert all(any(f"{letter}_proj" in name for letter in "qkv") for name in wrong)


@pytest.mark.slow
def test_a_layer_in_another_place_is_noticed(tmp_path, trained, monkeypatch):
    one = trained["llama"]
    true = to_hugging_face.CheckpointReader.read
    monkeypatch.setattr(
        to_hugging_face.CheckpointReader, "read", lambda reader, key, layer: true(reader, key, {1: 2, 2: 1}.get(layer, layer))
    )
    wrong = differing(tensors(one.export(PINNED, tmp_path / "out")), by_hand(one.after, one.config))
    assert {name.split(".")[2] for name in wrong} == {"1", "2"}
