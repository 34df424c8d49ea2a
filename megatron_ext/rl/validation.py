"""Greedy answers to held-out problems: what the curves of the report are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.rl import Sampling
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.grading import graded
from megatron_ext.rl.measures import outcome_counts, responses_record
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.prompts import Prompts
from megatron_ext.tasks.templates import Template
from megatron_ext.tasks.workers import GradingPool

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class HeldOutSet:
    """A validation set, its prompts made."""

    name: str
    prompts: Prompts


@dataclass(frozen=True)
class Asked:
    """A validation under way."""

    sets: tuple[tuple[HeldOutSet, list[Request]], ...]
    cap_tokens: int
    template: Template
    began: float


def ask(actor: Actor, sets: Sequence[HeldOutSet], template: Template, cap_tokens: int) -> Asked:
    """Put all problems to the actor's engine. Every rank calls it."""
    asked = []
    first = 0
    for one in sets:
        rows = enumerate(one.prompts.rows, start=first)
        requests = [Request(id, row.tokens, cap_tokens, GREEDY, actor.stage.seed, template.stop_strings) for id, row in rows]
        first += len(requests)
        asked.append((one, requests))
    found = Asked(tuple(asked), cap_tokens, template, time.perf_counter())
    actor.ask(_all(found))
    return found


def scores(actor: Actor, asked: Asked, pool: GradingPool[Verdict] | None) -> list[dict[str, Any]]:
    """One record a set, on rank 0 (whose `pool` grades); nothing on the others. Every rank calls it, once for what was asked."""
    answers = actor.answers(_all(asked))
    if pool is None:
        return []
    by_id = {one.id: one for one in answers}
    return [_record(one, requests, [by_id[request.id] for request in requests], asked, pool) for one, requests in asked.sets]


def _all(asked: Asked) -> list[Request]:
    return [request for _, requests in asked.sets for request in requests]


def _record(
    one: HeldOutSet, requests: Sequence[Request], answers: Sequence[Generation], asked: Asked, pool: GradingPool[Verdict]
) -> dict[str, Any]:
    rollouts = graded(pool, [row.problem for row in one.prompts.rows], requests, answers, "correct")
    return {
        "set": one.name,
        **responses_record(rollouts),
        "num_problems": len(rollouts),
        "num_correct": sum(rollout.is_correct for rollout in rollouts),
        "num_left_out": len(one.prompts.left_out),
        "cap_tokens": asked.cap_tokens,
        "template": asked.template.name,
        "template_version": asked.template.version,
        **outcome_counts(rollouts),
        "seconds": time.perf_counter() - asked.began,
    }
