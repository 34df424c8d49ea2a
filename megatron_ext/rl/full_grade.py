"""All that is worked out of a response's text: grade, reward, behaviour. What a grading worker runs, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.tasks import RewardName
from megatron_ext.tasks.behaviour import box_first, loops, text_after_box
from megatron_ext.tasks.grading import Verdict, grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.reward import REWARDS


@dataclass(frozen=True)
class Behaviour:
    """What a response does beside being right or wrong: see `tasks.behaviour`."""

    loops: bool
    box_first: bool
    text_after_box: bool


@dataclass(frozen=True)
class FullVerdict(Verdict):
    """A verdict, and what else a worker finds out about a response."""

    reward: float = 0.0
    behaviour: Behaviour = Behaviour(loops=False, box_first=False, text_after_box=False)

    @property
    def plain(self) -> Verdict:
        """The verdict alone."""
        return Verdict(self.outcome, self.answer, self.way, self.why)


def full_grade(problem: Problem, text: str, reward: RewardName) -> FullVerdict:
    """What a worker does with a response."""
    found = grade(problem, text)
    return FullVerdict(found.outcome, found.answer, found.way, found.why, REWARDS[reward](found, text), behaviour(text))


def behaviour(text: str) -> Behaviour:
    """All flags of a response."""
    return Behaviour(loops(text), box_first(text), text_after_box(text))
