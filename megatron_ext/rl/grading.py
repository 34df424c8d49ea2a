"""Responses to rollouts: text, finish and grade, on rank 0, in worker processes that can be killed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.tasks import RewardName
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.rl.rollouts import Rollout
from megatron_ext.tasks.grading import Verdict, grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.reward import REWARDS
from megatron_ext.tasks.workers import GradingPool

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
