"""The one grader of rewards, evaluation and decontamination: a problem and a response in, a verdict out.

`grade` is a plain function that can be pickled, starts nothing and sets no alarm. Algebra on hostile text can take forever, so
responses of a model are graded in workers that can be killed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.tasks.equivalence import Finding, Way, compare
from megatron_ext.tasks.extraction import MOST_ANSWER_CHARACTERS, last_boxed
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.symbolic import AlgebraError

Outcome = Literal["correct", "wrong", "unparseable", "error"]


@dataclass(frozen=True)
class Verdict:
    """How a response was graded.

    `unparseable`: no box, an empty one, or nothing that can be read. `error`: the comparison failed. `answer` is the box's content,
    `way` the means that decided ("box": the box itself did), `why` the reason, '' for a correct answer.
    """

    outcome: Outcome
    answer: str | None
    way: Way | Literal["box"]
    why: str = ""

    @property
    def is_correct(self) -> bool:
        return self.outcome == "correct"


def grade(problem: Problem, text: str) -> Verdict:
    """Grade a response by its last box."""
    answer = last_boxed(text)
    if not answer:
        return Verdict("unparseable", answer, "box", "no box" if answer is None else "an empty box")
    if len(answer) > MOST_ANSWER_CHARACTERS:
        return Verdict("unparseable", answer[:MOST_ANSWER_CHARACTERS], "box", f"more than {MOST_ANSWER_CHARACTERS:,} characters in the box")
    return grade_answer(problem, answer)


def grade_answer(problem: Problem, answer: str) -> Verdict:
    """Grade an answer that is already out of its box; right is what equals one of the problem's answers."""
    findings: list[Finding] = []
    for gold in problem.answers:
        try:
            found = compare(gold, answer, is_list=problem.is_list, unit=problem.unit, tolerance=problem.tolerance)
        except (AlgebraError, RecursionError) as cause:
            return Verdict("error", answer, "math-verify", str(cause))
        if found.same:
            return Verdict("correct", answer, found.way)
        findings.append(found)
    unread = next((found for found in findings if found.same is None), None)
    last = unread or findings[0]
    return Verdict("unparseable" if unread else "wrong", answer, last.way, last.why)
