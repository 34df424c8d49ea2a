"""An exported checkpoint loads in vLLM and writes what Megatron writes; so do weights that a running model hands over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.conversion.to_hugging_face import megatron_to_hf
from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.model.bucket import Bucket
from megatron_ext.tokenizer import Tokenizer, load_tokenizer
from tests import ranks
from tests.family_models import Case, base, llama3
from tests.layouts import CPU, LAYOUTS, toy_stage
from tests.small_models import VOCAB_SIZE, random_model
from tests.unit import small_tokenizers
from tests.vllm.engine import MOST_TIES, Drawn, differences, engine, greedy_megatron, greedy_vllm

# Heads of 32 channels are the smallest that vLLM's CPU attention takes. 300 tokens are padded to 384.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "rope_parameters": llama3(32.0), "max_position_embeddings": 131_072, "tie_word_embeddings": True},
    # vLLM's Qwen2 has no head_dim of its own
    "qwen2": {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": base(1e6), "rms_norm_eps": 1e-6},
    "qwen3": {**SIZES, "rms_norm_eps": 1e-6},
}
SHARPER = 3.0  # times the random queries and keys: else attention is nearly even, and texts soon go round in circles
SHARPENED = {
    "llama": ("q_proj.weight", "k_proj.weight"),
    "qwen2": ("q_proj.weight", "k_proj.weight"),
    "qwen3": ("q_norm.weight", "k_norm.weight"),
}
HANDED_OVER, EMBEDDING = "llama", "model.embed_tokens.weight"  # to the engine that runs; its embeddings are tied
PROMPTS = ["the quick brown fox", "def add(left, right):\n", "x + y = 12, so", "1234567890 times, then it rests; naïve café"]
BUCKET_BYTES = 60_000
STEPS = 10


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A random model of each family as a checkpoint, with a tokenizer."""
    return {family: checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def checkpoint(family: str, path: Path) -> Path:
    """Tokens that are no text by themselves have the logit 0, and are never the likeliest: so text shows all ids."""
    source = small_tokenizers.hugging_face(path / "hugging_face", VOCAB_SIZE)
    tokenizer, model = load_tokenizer(source), random_model(family, **FAMILIES[family])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(SHARPENED[family]):
                weight.mul_(SHARPER)
        for token in range(VOCAB_SIZE):
            if not tokenizer.decode([token]).isascii() or token in (tokenizer.eod_id, tokenizer.bos_id):
                model.lm_head.weight[token] = 0.0
    model.save_pretrained(source)
    return hf_to_megatron(str(source), path / "checkpoint")


@pytest.fixture(scope="module")
def written(checkpoints) -> dict[str, list[Drawn]]:
    """What Megatron writes with each checkpoint, on one rank."""
    tokenizers = {family: load_tokenizer(path) for family, path in checkpoints.items()}
    work = {family: (str(path), [tokenizers[family].encode(prompt) for prompt in PROMPTS]) for family, path in checkpoints.items()}
    found: dict[str, list[Drawn]] = ranks.run(_write, CPU, work)[0]
    return found


def _write(groups: Any, work: dict[str, tuple[str, list[list[int]]]]) -> dict[str, list[Drawn]]:
    from tests.family_models import loaded

    found = {}
    for family, (path, prompts) in work.items():
        chunks, model = loaded(groups, Case(path, []))
        found[family] = greedy_megatron(chunks, groups, model.vocab_size, prompts)
    return found


def assert_same(vllm: list[Drawn], megatron: list[Drawn], tokenizer: Tokenizer) -> None:
    wrong, ties = differences(vllm, megatron)
    assert not wrong
    print(f"prompts that ended early at a tie: {ties} of {len(vllm)}")
    assert ties <= MOST_TIES
    for theirs, own in zip(vllm, megatron, strict=True):
        assert theirs.text == tokenizer.decode(own.ids) or theirs.ids != own.ids


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != HANDED_OVER])
def test_vllm_writes_what_megatron_writes(family, checkpoints, written, tmp_path):
    folder = megatron_to_hf(checkpoints[family], tmp_path / "exported")
    assert min(len(set(drawn.ids)) for drawn in written[family]) > 10, "the text goes round in circles"
    with engine(folder) as llm:
        assert_same(greedy_vllm(llm, PROMPTS), written[family], load_tokenizer(folder))


# ---- weights of a running model into a running engine


def _train_and_hand_over(groups: Any, path: str, folder: str, prompts: list[list[int]]) -> tuple[list[str], list[Drawn]]:
    """Train a checkpoint for some steps; its buckets go to files, as they would go through a transport; what it writes now."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.config.base import from_json
    from megatron_ext.config.model import ModelConfig
    from megatron_ext.model.handover import agreed_checksum, hugging_face_buckets
    from megatron_ext.provenance import read_manifest
    from megatron_ext.training.state import build_state, load_model, sharded_model
    from tests.layouts import train_steps

    checkpoint = Path(path)
    model = from_json(ModelConfig, read_manifest(checkpoint).model, path)
    stage = toy_stage(groups.plan, model=model)
    state = build_state(stage, groups, None)
    load_model(state, load_state(sharded_model(state), checkpoint))
    state.optimizer.reload_model_params()
    train_steps(state, stage, range(STEPS))
    checksums = []
    for bucket in hugging_face_buckets(state.chunks, model, groups, BUCKET_BYTES):
        if groups.rank == 0:
            torch.save([(name, tensor.clone()) for name, tensor in bucket.tensors], Path(folder) / f"{len(checksums)}.pt")
        checksums.append(agreed_checksum(bucket, groups))
    return checksums, greedy_megatron(state.chunks, groups, model.vocab_size, prompts)


def received(folder: Path, checksums: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all buckets, one bucket in memory at a time; each must be what was sent."""
    for number, checksum in enumerate(checksums):
        bucket = Bucket(tuple(torch.load(folder / f"{number}.pt", weights_only=True)))
        assert bucket.checksum == checksum
        for name, tensor in bucket.tensors:
            yield name, tensor
            if name == EMBEDDING:
                yield "lm_head.weight", tensor  # of tied embeddings vLLM's CPU head keeps a packed copy, which nothing else renews


def test_an_engine_takes_over_the_weights_of_a_running_model(checkpoints, written, tmp_path):
    exported = megatron_to_hf(checkpoints[HANDED_OVER], tmp_path / "exported")
    tokenizer = load_tokenizer(exported)
    (tmp_path / "buckets").mkdir()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found = ranks.run(
        _train_and_hand_over, LAYOUTS["tensor 2 x pipeline 2"], str(checkpoints[HANDED_OVER]), str(tmp_path / "buckets"), prompts
    )
    checksums, trained = found[0]
    assert len(checksums) > 3
    with engine(exported) as llm:
        assert_same(greedy_vllm(llm, PROMPTS), written[HANDED_OVER], tokenizer)
        wrong, _ = differences(greedy_vllm(llm, PROMPTS), trained)
        assert len(wrong) == len(PROMPTS), "training changed nothing that shows"
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": received(tmp_path / "buckets", checksums)})
        llm.reset_prefix_cache()
        wrong, ties = differences(greedy_vllm(llm, PROMPTS), trained)
    assert not wrong
    assert ties <= MOST_TIES
