"""Greedy answers to held-out problems: what the curves of the report are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.rl import Sampling
from megatron_ext.generation.engine import Request
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


def validate(
    actor: Actor, sets: Sequence[HeldOutSet], template: Template, cap_tokens: int, pool: GradingPool[Verdict] | None
) -> list[dict[str, Any]]:
    """One record a set, on rank 0 (whose `pool` grades); nothing on the others. Every rank calls it."""
    found = []
    for one in sets:
        began = time.perf_counter()
        requests = [
            Request(id, row.tokens, cap_tokens, GREEDY, actor.stage.seed, template.stop_strings) for id, row in enumerate(one.prompts.rows)
        ]
        answers = actor.generate(requests)
        if pool is None:
            continue
        rollouts = graded(pool, [row.problem for row in one.prompts.rows], requests, answers, "correct")
        record = responses_record(rollouts)
        found.append(
            {
                "set": one.name,
                **record,
                "num_problems": len(rollouts),
                "num_correct": sum(rollout.is_correct for rollout in rollouts),
                "num_left_out": len(one.prompts.left_out),
                "cap_tokens": cap_tokens,
                "template": template.name,
                "template_version": template.version,
                **outcome_counts(rollouts),
                "seconds": time.perf_counter() - began,
            }
        )
    return found
