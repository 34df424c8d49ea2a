"""Reads files of problems for those who must not import graders, in a process of its own: JSON in, JSON out.

    python -m megatron_ext.tasks.problem_files < sets.json

In: a list of problem sets, as a recipe's JSON has them; the first is trained on. Out: of each the number of problems, what is
wrong with it ('': nothing), and how many of its questions the first set holds too, word for word.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ext.config.base import from_json
from megatron_ext.config.tasks import ProblemSet
from megatron_ext.errors import DataError
from megatron_ext.tasks.problems import Problem, read_problems


def examined(sets: list[ProblemSet]) -> list[dict[str, Any]]:
    """What was found of each set, in their order."""
    found: list[dict[str, Any]] = []
    trained_on: set[str] = set()
    for number, one in enumerate(sets):
        problems, wrong = _read(one)
        questions = {" ".join(problem.question.split()) for problem in problems}
        trained_on = questions if number == 0 else trained_on
        found.append({"problems": len(problems), "wrong": wrong, "shared": len(questions & trained_on) if number else 0})
    return found


def _read(one: ProblemSet) -> tuple[list[Problem], str]:
    try:
        return read_problems(Path(one.path), one.form, leave_out=frozenset(one.leave_out)), ""
    except DataError as refusal:
        return [], str(refusal)


def main() -> None:
    """Answer one request from standard input."""
    sets = [from_json(ProblemSet, values, "a set of problems") for values in json.load(sys.stdin)]
    json.dump(examined(sets), sys.stdout)


if __name__ == "__main__":
    main()
