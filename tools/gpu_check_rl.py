"""The part `rl` of `tools.gpu_check`: does reinforcement learning on a GPU compute what it does on a CPU?

packed    packed responses beside one at a time, from the same weights: log-probabilities, and an update's loss and gradient norm
steps     three steps of GRPO on a toy: responses are sampled by the engine, scored by the trainer, and learned from. The
          engine's log-probabilities must be the trainer's before and after the weights have moved, and each step must raise
          what it was told to raise
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.config.stages import TrainStage

PROMPTS, RESPONSES, PROMPT_TOKENS, CAP_TOKENS, STEPS = 8, 4, 40, 64, 3
TOKENS_PER_MICRO_BATCH, LOGITS_CHUNK_TOKENS, LEARNING_RATE = 1024, 256, 3e-4
# What packing may change: loss (absolute, around 0), gradient norm (share). The largest and the mean gap between engine and trainer,
# in nats; the engine computes in BF16 where the trainer computes in FP8. Chosen before any run: to be set from measurement.
PACKED = {"fp32": (1e-4, 2e-3), "bf16": (1e-2, 5e-2), "fp8": (5e-2, 2e-1)}
GAPS = {"fp32": (1e-2, 1e-3), "bf16": (0.3, 0.03), "fp8": (1.0, 0.1)}


@dataclass(frozen=True)
class NoText:
    """Stands for a tokenizer where only numbers are looked at; no token ends a response, and none has a text."""

    eod_id: int = -1
    vocab_size: int = 0

    def decode(self, tokens: Any) -> str:  # noqa: ARG002 - as a tokenizer has it
        """Nothing: there is no text."""
        return ""


def rl(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Both checks as figures, and whether they passed."""
    from megatron_ext.training.state import build_state

    together = packed(stage, groups)
    state = build_state(stage, groups, stage.seed)
    steps = [grpo_step(stage, groups, state, number) for number in range(STEPS)]
    return {"packed": together, "steps": steps, "passed": together["passed"] and all(one["passed"] for one in steps)}


def packed(stage: TrainStage, groups: Any) -> dict[str, Any]:
    """Log-probabilities of a batch and of each text alone; one update twice, of several responses a row and of one."""
    from megatron_ext.training.state import build_state

    samples = _random_samples(stage, CAP_TOKENS // 2)  # with the prompt, no two fit into the longest one's row
    short = [*_random_samples(stage, 1), *samples]
    state = build_state(stage, groups, stage.seed)
    together = np.concatenate(_scores(state, stage, short))
    alone = np.concatenate([_scores(state, stage, [one])[0] for one in short])
    gap = float(np.abs(together - alone).max())
    many, single = (_update(build_state(stage, groups, stage.seed), stage, samples, tokens, 0) for tokens in (TOKENS_PER_MICRO_BATCH, 1))
    loss, norm = PACKED[stage.precision]
    largest, _ = GAPS[stage.precision]
    found = {
        "logprob_difference": gap,
        "loss": [many.loss, single.loss],
        "grad_norm": [many.grad_norm, single.grad_norm],
        "loss_difference": abs(many.loss - single.loss),
        "grad_norm_difference": abs(many.grad_norm / single.grad_norm - 1),
        "tolerances": [largest, loss, norm],
    }
    return {**found, "passed": gap <= largest and found["loss_difference"] <= loss and found["grad_norm_difference"] <= norm}


def _random_samples(stage: TrainStage, shortest_tokens: int) -> list[Any]:
    """Responses of several lengths, every other one of which is to become likelier."""
    generator = np.random.default_rng(stage.seed)
    lengths = generator.integers(shortest_tokens, CAP_TOKENS, PROMPTS)
    prompt_tokens = PROMPT_TOKENS if shortest_tokens > 1 else 1
    texts = [generator.integers(stage.model.vocab_size, size=prompt_tokens + length) for length in lengths]
    return [_sample(text[:prompt_tokens], text[prompt_tokens:], None, 1.0 - 2 * (i % 2)) for i, text in enumerate(texts)]


def grpo_step(stage: TrainStage, groups: Any, state: Any, number: int) -> dict[str, Any]:
    """Sample, compare, update once; a token of the vocabulary's lower half is worth a point."""
    from megatron_ext.config.rl import Sampling
    from megatron_ext.generation.engine import Request, generate_all
    from megatron_ext.generation.megatron_engine import MegatronEngine

    generator = np.random.default_rng(stage.seed + number)
    prompts = generator.integers(stage.model.vocab_size, size=(PROMPTS, PROMPT_TOKENS)).repeat(RESPONSES, axis=0)
    requests = [Request(i, tuple(row.tolist()), CAP_TOKENS, Sampling(), seed=number) for i, row in enumerate(prompts)]
    tokenizer: Any = NoText()
    engine = MegatronEngine(state.chunks, stage.model, groups, tokenizer, slots=PROMPTS * RESPONSES // 2)
    engine.update_weights(number, None)
    answers = generate_all(engine, requests)
    engine.close()
    rewards = np.array([(one.tokens < stage.model.vocab_size // 2).mean() for one in answers]).reshape(PROMPTS, RESPONSES)
    advantages = ((rewards - rewards.mean(axis=1, keepdims=True)) / rewards.std(axis=1, ddof=1, keepdims=True)).reshape(-1).tolist()
    samples = [_sample(row, one.tokens, one.logprobs, better) for row, one, better in zip(prompts, answers, advantages, strict=True)]
    before = _scores(state, stage, samples)
    result = _update(state, stage, samples, TOKENS_PER_MICRO_BATCH, number)
    after = _scores(state, stage, samples)
    gaps = np.abs(np.concatenate(before) - np.concatenate([one.logprobs for one in answers]))
    gain = sum(better * float((new - old).sum()) for better, new, old in zip(advantages, after, before, strict=True))
    largest, mean = GAPS[stage.precision]
    found = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "mean_reward": float(rewards.mean()),
        "engine_gap_largest": float(gaps.max()),
        "engine_gap_mean": float(gaps.mean()),
        "tolerances": [largest, mean],
        "advantage_weighted_gain": gain,
    }
    sound = math.isfinite(result.loss) and math.isfinite(result.grad_norm) and result.grad_norm > 0 and gain > 0
    return {**found, "passed": bool(sound and gaps.max() <= largest and gaps.mean() <= mean)}


def _sample(prompt: Any, response: Any, logprobs: Any, advantage: float) -> Any:
    from megatron_ext.rl.batch import Sample

    tokens = np.asarray(response, dtype=np.int32)
    engine = np.zeros(len(tokens), np.float32) if logprobs is None else logprobs
    return Sample(tuple(prompt.tolist()), tokens, engine, advantage, weight=1.0, share=float(len(tokens)))


def _scores(state: Any, stage: TrainStage, samples: Any) -> Any:
    from megatron_ext.rl.update import score

    return score(state.chunks, samples, state.groups, **_settings(stage, TOKENS_PER_MICRO_BATCH))


def _update(state: Any, stage: TrainStage, samples: Any, tokens_per_micro_batch: int, number: int) -> Any:
    from megatron_ext.config.rl import Objective
    from megatron_ext.rl.update import policy_update

    settings = _settings(stage, tokens_per_micro_batch)
    return policy_update(state, Objective(), samples, **settings, learning_rate=LEARNING_RATE, seed=stage.seed, updates_before=number)


def _settings(stage: TrainStage, tokens_per_micro_batch: int) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "tokens_per_micro_batch": tokens_per_micro_batch,
        "logits_chunk_tokens": LOGITS_CHUNK_TOKENS,
        "vocab_size": stage.model.vocab_size,
    }
