"""Responses to rollouts: text, finish and grade, on rank 0, in worker processes that can be killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.tasks import RewardName
from megatron_ext.errors import DataError
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.rl.rollouts import Rollout
from megatron_ext.tasks.grading import Verdict, grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.reward import REWARDS
from megatron_ext.tasks.workers import GradingPool
from megatron_ext.tokenizer import Tokenizer

RECYCLE_AFTER = 2_000  # answers of one worker: sympy's caches grow
WARM_UP = ((Problem("warm-up", "", ("\\frac{1}{2}",), ""), "\\boxed{x^2 - 1 + 0.5}"),)


def grading_pool(plan: RLPlan) -> GradingPool[Verdict]:
    """The workers of a plan."""
    return GradingPool(
        grade,
        workers=plan.grading_workers,
        deadline_seconds=plan.grading_seconds,
        memory_bytes=plan.grading_memory_bytes,
        recycle_after=RECYCLE_AFTER,
        warm_up=WARM_UP,
    )


def graded(
    pool: GradingPool[Verdict], problems: Sequence[Problem], requests: Sequence[Request], answers: Sequence[Generation], reward: RewardName
) -> list[Rollout]:
    """One rollout for each answer, in their order."""
    outcomes = pool.grade_all([(problem, one.text) for problem, one in zip(problems, answers, strict=True)])
    rows = zip(problems, requests, answers, outcomes, strict=True)
    return [
        Rollout(
            problem=problem.id,
            prompt=request.prompt,
            cap_tokens=request.cap_tokens,
            generation=one,
            ending=outcome.ending.value,
            verdict=outcome.verdict,
            cause=outcome.cause,
            reward=REWARDS[reward](outcome.verdict, one.text),
        )
        for problem, request, one, outcome in rows
    ]


def regraded(
    pool: GradingPool[Verdict],
    problems: Mapping[str, Problem],
    rollouts: Sequence[Rollout],
    cap_tokens: int | None,
    tokenizer: Tokenizer,
    reward: RewardName,
) -> list[Rollout]:
    """The rollouts with the grades and rewards of now; longer ones cut at `cap_tokens`, where one is given.

    `DataError` where the file of problems no longer holds one of them.
    """
    if lost := {one.problem for one in rollouts} - set(problems):
        raise DataError(f"the file of problems no longer holds {', '.join(sorted(lost)[:5])}, which these rollouts answer; bring it back")
    cut = [_cut(one, cap_tokens, tokenizer) for one in rollouts]
    outcomes = pool.grade_all([(problems[one.problem], one.generation.text) for one in cut])
    return [
        replace(
            one,
            ending=outcome.ending.value,
            verdict=outcome.verdict,
            cause=outcome.cause,
            reward=REWARDS[reward](outcome.verdict, one.generation.text),
        )
        for one, outcome in zip(cut, outcomes, strict=True)
    ]


def _cut(one: Rollout, cap_tokens: int | None, tokenizer: Tokenizer) -> Rollout:
    """As the cap would have left it: an end or a stop string stands at the very end of a response, so what is cut has none."""
    if cap_tokens is None or one.num_tokens <= cap_tokens:
        return one
    made = one.generation
    shorter = Generation(
        id=made.id,
        tokens=made.tokens[:cap_tokens],
        logprobs=made.logprobs[:cap_tokens],
        weight_versions=made.weight_versions[:cap_tokens],
        finish="length",
        text=tokenizer.decode(made.tokens[:cap_tokens].tolist()),
    )
    return replace(one, cap_tokens=cap_tokens, generation=shorter)
