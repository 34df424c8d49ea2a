"""Responses to rollouts: grade, reward and behaviour, worked out for rank 0 in worker processes that can be killed.

All that reads a text to its end is done in the workers: on one rank it would hold up the step for as long as all GPUs wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.tasks import RewardName
from megatron_ext.errors import DataError
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.generation.stopping import response_text
from megatron_ext.rl.full_grade import FullVerdict, behaviour, full_grade
from megatron_ext.rl.rollouts import Rollout
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.reward import REWARDS
from megatron_ext.tasks.workers import GradingPool, Outcome
from megatron_ext.tokenizer import Tokenizer

RECYCLE_AFTER = 2_000  # answers of one worker: sympy's caches grow
WARM_UP = ((Problem("warm-up", "", ("\\frac{1}{2}",), ""), "\\boxed{x^2 - 1 + 0.5}", "correct"),)


def grading_pool(plan: RLPlan, tell: Callable[[str], None] = lambda _: None) -> GradingPool[Verdict]:
    """The workers of a plan; `tell` gets a line about each that was lost."""
    return GradingPool(
        full_grade,
        workers=plan.grading_workers,
        deadline_seconds=plan.grading_seconds,
        memory_bytes=plan.grading_memory_bytes,
        recycle_after=RECYCLE_AFTER,
        warm_up=WARM_UP,
        tell=tell,
    )


def graded(
    pool: GradingPool[Verdict], problems: Sequence[Problem], requests: Sequence[Request], answers: Sequence[Generation], reward: RewardName
) -> list[Rollout]:
    """One rollout for each answer, in their order."""
    outcomes = pool.grade_all([(problem, one.text, reward) for problem, one in zip(problems, answers, strict=True)])
    rows = zip(problems, requests, answers, outcomes, strict=True)
    return [
        Rollout(
            problem=problem.id,
            prompt=request.prompt,
            cap_tokens=request.cap_tokens,
            generation=one,
            **_found(outcome, one.text, reward),
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
    """The rollouts with the grades and rewards of now, under the cap of `cap_tokens` where one is given: longer ones are cut.

    `DataError` where the file of problems no longer holds one of them.
    """
    if lost := {one.problem for one in rollouts} - set(problems):
        raise DataError(f"the file of problems no longer holds {', '.join(sorted(lost)[:5])}, which these rollouts answer; bring it back")
    cut = [_cut(one, cap_tokens, tokenizer) for one in rollouts]
    outcomes = pool.grade_all([(problems[one.problem], one.generation.text, reward) for one in cut])
    return [replace(one, **_found(outcome, one.generation.text, reward)) for one, outcome in zip(cut, outcomes, strict=True)]


def _found(outcome: Outcome[Verdict], text: str, reward: RewardName) -> dict[str, Any]:
    """The fields of a rollout that its grading gives; one that no worker got done is judged by its text alone."""
    full, ending = outcome.verdict, {"ending": outcome.ending.value, "cause": outcome.cause}
    if not isinstance(full, FullVerdict):
        assert full is None, "another pool's verdict"
        return {**ending, "verdict": None, "reward": REWARDS[reward](None, text), "behaviour": behaviour(text)}
    return {**ending, "verdict": full.plain, "reward": full.reward, "behaviour": full.behaviour}


def _cut(one: Rollout, cap_tokens: int | None, tokenizer: Tokenizer) -> Rollout:
    """As the cap would have left it: an end or a stop string stands at the very end of a response, so what is cut has none."""
    if cap_tokens is None:
        return one
    if one.num_tokens <= cap_tokens:
        return replace(one, cap_tokens=cap_tokens)
    made = one.generation
    shorter = Generation(
        id=made.id,
        tokens=made.tokens[:cap_tokens],
        logprobs=made.logprobs[:cap_tokens],
        weight_versions=made.weight_versions[:cap_tokens],
        finish="length",
        text=response_text(tokenizer, made.tokens[:cap_tokens].tolist()),
    )
    return replace(one, cap_tokens=cap_tokens, generation=shorter)
