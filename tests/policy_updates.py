"""One policy under many parallel layouts: given samples, an update of them, and what must not depend on the layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.rl import Objective
from tests import ranks
from tests.layouts import CPU, INTERLEAVED, RATE, SEED, TWO, Part, parts, toy_stage, whole
from tests.training_runs import MODEL

VOCAB_SIZE = 100  # the model's table is padded to 128: a second tensor-parallel rank holds 64 to 99 and padding
TEMPERATURE = 0.8
TOKENS = 64  # of a micro-batch
PLAIN = Objective(clip_high=0.28)
EVERYTHING = Objective(clip_low=0.1, clip_high=0.2, kl_coefficient=0.3, importance_cap=1.2, mean_over="responses")
NUMBERS: dict[str, Any] = {
    "temperature": TEMPERATURE, "tokens_per_micro_batch": TOKENS, "logits_chunk_tokens": 16, "vocab_size": VOCAB_SIZE,
}  # fmt: skip
LAYOUTS = {
    "one rank": replace(CPU, distributed_optimizer=False),
    "tensor 2": replace(TWO, tensor=2),
    "tensor 2, sequence parallel": replace(TWO, tensor=2, sequence_parallel=True),
    "pipeline 2": replace(TWO, pipeline=2),
    "pipeline 2, interleaved": INTERLEAVED,
    "data 2": TWO,
    "data 2 x tensor 2": replace(CPU, ranks_per_node=4, tensor=2, distributed_optimizer=False),
}


def given(settings: Objective = PLAIN, old: bool = False, seed: int = 0) -> list[Any]:
    """Samples of uneven lengths: one without a token, two that do not count, two of advantage 0; `old` ones are off the current policy."""
    import torch

    from megatron_ext.rl.batch import Sample
    from megatron_ext.rl.objective import response_weights

    rng = np.random.default_rng(seed)
    lengths = np.array([1, 20, 3, 0, 17, 9, 9, 2, 30, 5, 12])
    counted = torch.ones(len(lengths), dtype=torch.bool)
    counted[[2, 8]] = False
    weights, shares = response_weights(settings, torch.from_numpy(lengths), counted)
    samples = []
    for i, length in enumerate(lengths):
        near = [(-4.6 + 0.5 * rng.standard_normal(length)).astype(np.float32) for _ in range(3)]
        prompt = tuple(rng.integers(3, VOCAB_SIZE, size=rng.integers(1, 10)).tolist())
        response = rng.integers(3, VOCAB_SIZE, size=length).astype(np.int32)
        advantage = 0.0 if i in (5, 6) else float(rng.normal())
        samples.append(Sample(prompt, response, near[0], advantage, float(weights[i]), float(shares[i]), near[1] if old else None, near[2]))
    return samples


CASES = {"first": (PLAIN, given(PLAIN)), "later": (EVERYTHING, given(EVERYTHING, old=True)), "one sample": (PLAIN, given(PLAIN)[1:2])}


@dataclass(frozen=True)
class Updated:
    """What an update computed, and the weights after it by name; log-probabilities of each sample before it."""

    loss: float
    grad_norm: float
    statistics: dict[str, float]
    scores: list[np.ndarray]
    weights: dict[str, np.ndarray]


def model(tied: bool = True) -> ModelConfig:
    """The policy: 4 layers, and a vocabulary that is padded."""
    return replace(MODEL, vocab_size=VOCAB_SIZE, tied_embeddings=tied)


def update(
    groups: Any, settings: Objective, samples: Sequence[Any], tied: bool = True, **changes: Any
) -> tuple[Any, list[Any], list[Part], Any]:
    """Build the model from its seed, score the samples and take one step on them."""
    from megatron_ext.distributed import seed_step
    from megatron_ext.rl.update import policy_update, score
    from megatron_ext.training.state import build_state, sharded_model

    stage = toy_stage(groups.plan, model=model(tied))
    stage = replace(stage, optimizer=replace(stage.optimizer, clip_norm=1e9))  # so that gradients can be looked at
    state = build_state(stage, groups, SEED)
    numbers = {**NUMBERS, **changes}
    rest = {name: numbers.pop(name) for name in ("informative_only",) if name in numbers}
    seed_step(groups, SEED, 0)
    scores = score(state.chunks, samples, groups, **numbers)
    result = policy_update(state, settings, samples, learning_rate=RATE, seed=SEED, updates_before=3, **numbers, **rest)
    return result, scores, parts(sharded_model(state)), state


def observe(groups: Any, fault: str = "") -> dict[str, Any]:
    """All cases on this rank; a `fault` is put into the module of the update first."""
    put_in(fault)
    return {name: update(groups, settings, samples)[:3] for name, (settings, samples) in CASES.items()}


def put_in(fault: str) -> None:
    """Break what a check must miss: in this process, which is the test's own."""
    import torch

    from megatron_ext.rl import batch
    from megatron_ext.rl import update as updating

    true_loss, true_batch = updating._loss, updating.micro_batch
    if fault == "a denominator of each micro-batch":

        def mean_of_means(*arguments: Any) -> Any:
            loss, count, report = true_loss(*arguments)
            return loss / count.clamp(min=1), count.clamp(max=1), report

        updating._loss = mean_of_means
    if fault == "attention across sequences":
        true_mask = batch._mask
        batch._mask = lambda sequence_RS: true_mask(torch.zeros_like(sequence_RS))
    if fault == "positions off by one":

        def shifted(samples: Any, rows: Any, shape: Any, *rest: Any) -> Any:
            made = true_batch(samples, rows, shape, *rest)
            last = shape.num_rows * (shape.row_tokens - 1)
            return replace(made, positions_N=torch.where(made.positions_N < last, made.positions_N + shape.num_rows, made.positions_N))

        updating.micro_batch = shifted
    if fault == "one sequence a row":  # none at all: what packing must equal
        batch.packed_rows = lambda lengths, _: [[i] for i, length in enumerate(lengths) if length]


@functools.cache
def observed(name: str, fault: str = "") -> dict[str, Updated]:
    """What the layout of that name computes, with the ranks' parts put together; run once a session."""
    found = ranks.run(observe, LAYOUTS[name], fault)
    cases = {}
    for case in CASES:
        results, scores, weights = zip(*(rank[case] for rank in found), strict=True)
        assert all(one == results[0] for one in results), "ranks report different results"
        assert all(np.array_equal(one, other) for rank in scores for one, other in zip(rank, scores[0], strict=True))
        cases[case] = Updated(results[0].loss, results[0].grad_norm, results[0].statistics, scores[0], whole(list(weights)))
    return cases
