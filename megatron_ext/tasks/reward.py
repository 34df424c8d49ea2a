"""Rewards: pure functions of a verdict and of the text it is about.

| name | right | wrong | no box, or not readable | more |
|---|---|---|---|---|
| correct | 1 | -1 | -1 | |
| format | 1 | -0.5 | -1 | -1 for a loop, and for more boxes than one |
| repeat_penalty | 1 | -1 | -1 | -2 for a loop |
| repeat_and_box_penalty | 1 | -1 | -1 | -2 for a loop, and for more boxes than one |

A verdict of `error`, and no verdict in time (None), count as wrong; the pool that grades counts them apart.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_ext.config.tasks import RewardName
from megatron_ext.tasks.extraction import boxes
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.repetition import repeats


def correct(verdict: Verdict | None, text: str) -> float:  # noqa: ARG001 - all rewards have one form
    """1 for a right answer, -1 for anything else."""
    return 1.0 if verdict is not None and verdict.is_correct else -1.0


def with_format(verdict: Verdict | None, text: str) -> float:
    """As `correct`, but -0.5 for a wrong answer in good form: exactly one box, no loop."""
    if len(boxes(text)) != 1 or repeats(text):
        return -1.0
    if verdict is not None and verdict.outcome == "unparseable":
        return -1.0
    return 1.0 if correct(verdict, text) > 0 else -0.5


def repeat_penalty(verdict: Verdict | None, text: str) -> float:
    """As `correct`, but -2 for a text that loops."""
    return -2.0 if repeats(text) else correct(verdict, text)


def repeat_and_box_penalty(verdict: Verdict | None, text: str) -> float:
    """As `correct`, but -2 for a text that loops or holds more boxes than one."""
    return -2.0 if len(boxes(text)) > 1 else repeat_penalty(verdict, text)


REWARDS: dict[RewardName, Callable[[Verdict | None, str], float]] = {
    "correct": correct,
    "format": with_format,
    "repeat_penalty": repeat_penalty,
    "repeat_and_box_penalty": repeat_and_box_penalty,
}
