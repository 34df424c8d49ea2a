"""The engine of a plan, and how the trainer's weights come to it: in place, or handed over, read back and checked by a canary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import Groups
from megatron_ext.generation.canary import NEW_TOKENS, PROMPT_TOKENS, canary_requests, check_canary, decoded
from megatron_ext.generation.engine import Engine, Generation, generate_all
from megatron_ext.generation.megatron_engine import MegatronEngine
from megatron_ext.rl.batch import Sample
from megatron_ext.rl.update import score
from megatron_ext.tokenizer import Tokenizer
from megatron_ext.training.hooks import say
from megatron_ext.training.state import TrainState

HandOver = Callable[[int], float | None]  # of the weights' version; the canary's largest gap, where there is a canary
BUCKET_BYTES = 1 << 30  # of weights on their way at a time; the largest tensor of Llama-3.1-8B, its embedding, has 1.05 GB
# Largest gap between engine and trainer, in nats, over the canary's tokens. FP32: the bar between our own engine and the trainer is
# 1e-4, vLLM's kernels sum in another order. BF16 has 8 bits: gaps of single tokens up to about 0.1 are reported as usual (NeMo-RL).
LARGEST_GAPS = {"float32": 1e-3, "bfloat16": 0.3}


def make_engine(
    stage: RLStage, state: TrainState, groups: Groups, tokenizer: Tokenizer, files: Mapping[str, bytes], log: Path
) -> tuple[Engine, HandOver]:
    """The engine that the plan names, and what hands it the weights as they are; every rank of a model copy calls both.

    `files` are the tokenizer's, `log` is where an engine in a process of its own writes. `ConfigError` where the engine is missing.
    """
    if stage.plan.engine == "megatron":
        engine = MegatronEngine(state.chunks, stage.model, groups, tokenizer, stage.plan.engine_slots)
        return engine, partial(_in_place, engine)
    return _vllm(stage, state, groups, tokenizer, files, log)


def _in_place(engine: Engine, version: int) -> None:
    engine.update_weights(version, None)


def _vllm(
    stage: RLStage, state: TrainState, groups: Groups, tokenizer: Tokenizer, files: Mapping[str, bytes], log: Path
) -> tuple[Engine, HandOver]:
    from megatron_ext.generation.read_back import ReadableEngine
    from megatron_ext.generation.shared_engine import SharedEngine, hand_over
    from megatron_ext.generation.vllm_engine import VllmEngine, VllmSettings, require_vllm
    from megatron_ext.generation.vllm_process import vllm_process

    require_vllm()
    settings = VllmSettings(
        slots=stage.plan.engine_slots,
        longest_tokens=stage.longest_context_tokens,
        dtype="float32" if stage.precision == "fp32" else "bfloat16",
        memory_share=stage.plan.engine_memory_share,
    )

    def make() -> ReadableEngine:
        if stage.plan.engine == "vllm":
            return VllmEngine(files, stage.model, settings)
        return vllm_process(files, stage.model, settings, log)

    engine = SharedEngine(make, groups)

    def give(version: int) -> float:
        hand_over(engine, state.chunks, stage.model, groups, version, BUCKET_BYTES, getattr(torch, settings.dtype))
        return _canary_gap(engine, stage, state, groups, tokenizer, LARGEST_GAPS[settings.dtype])

    return engine, give


def _canary_gap(engine: Engine, stage: RLStage, state: TrainState, groups: Groups, tokenizer: Tokenizer, largest_gap: float) -> float:
    """The largest gap over the engines of all model copies; `TrainingError` on every rank where it is too large on one."""
    prompt_tokens = min(PROMPT_TOKENS, stage.longest_context_tokens - NEW_TOKENS)
    requests = canary_requests(tokenizer, prompt_tokens)
    speaks = groups.tensor_rank == 0 and groups.pipeline_rank == 0
    answers = generate_all(engine, requests)
    gathered: list[list[Generation]] = [[]] * groups.plan.num_ranks
    dist.all_gather_object(gathered, answers if speaks else [])
    copies = [found for found in gathered if found]
    if groups.rank == 0 and not all(map(decoded, copies)):
        say(
            "the canary's answers all ended with their first token: this time it says nothing of decoding. Where it goes on, and "
            "responses become short, too, the model collapses to its end token"
        )
    samples = [
        Sample(request.prompt, one.tokens, one.logprobs, advantage=0.0, weight=1.0, share=1.0)
        for found in copies
        for request, one in zip(requests, found, strict=True)
    ]
    scored = score(
        state.chunks,
        samples,
        groups,
        temperature=1.0,
        vocab_size=stage.model.vocab_size,
        tokens_per_micro_batch=stage.plan.tokens_per_micro_batch,
        logits_chunk_tokens=stage.plan.logits_chunk_tokens,
    )
    size = len(requests)
    return max(check_canary(found, scored[size * copy : size * (copy + 1)], largest_gap) for copy, found in enumerate(copies))
