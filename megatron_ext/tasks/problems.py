"""Problems with their answers, read strictly from JSONL in the form of each benchmark.

| form | question | answer | id |
|---|---|---|---|
| gsm8k | question | answer: the text after `####`, or all of it | id |
| math (MATH, MATH500, MATH8K) | problem | answer, else the last box of solution | unique_id or id |
| olympiad_bench | context and question | final_answer (a list), with is_multiple_answer, unit, error | id |
| amc23 | question or problem | answer, a number | id |
| arithmetic (the demo's own) | question | answer, a number | id |

Where a file has no id, a problem is named by its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_ext.config.tasks import FormName, ProblemSet
from megatron_ext.errors import DataError
from megatron_ext.tasks.equivalence import is_number, is_readable
from megatron_ext.tasks.extraction import last_boxed

Row = dict[str, Any]
MOST_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """A question and what answers it.

    One of `answers` is enough; each is LaTeX. `is_list`: an answer holds several, between commas, all of which are wanted.
    `unit` is the unit of answers that are written without one, `tolerance` the largest absolute error that is right.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    source: str
    is_list: bool = False
    unit: str = ""
    tolerance: Fraction | None = None


class _Missing(Exception):
    """What a line lacks."""


def stage_problems(problem_set: ProblemSet, folder: Path | None) -> list[Problem]:
    """The problems of a stage's set, as `read_problems`; a relative path is read from `folder`, the text stage's, where there is one."""
    path = Path(problem_set.path)
    return read_problems(folder / path if folder else path, problem_set.form, leave_out=frozenset(problem_set.leave_out))


def read_problems(path: Path, form: FormName, *, leave_out: frozenset[str] = frozenset()) -> list[Problem]:
    """All problems of a file but those whose ids are in `leave_out`; `DataError` names file, line and key of what is wrong.

    Refused: a missing or ill-typed field, an id that stands twice, an answer that is empty, that no grader can read, or in form
    `arithmetic` is no number (all of these are listed), an id to leave out that is not there, a file without problems.
    """
    numbered = _numbered(path, form)
    known = {problem.id for _, problem in numbered}
    if absent := sorted(leave_out - known):
        raise DataError(f"{path}: leave_out names {', '.join(absent[:MOST_LISTED])}, which this file does not hold; correct the ids")
    kept = [(number, problem) for number, problem in numbered if problem.id not in leave_out]
    _refuse_unreadable(path, form, kept)
    if not kept:
        raise DataError(f"{path}: no problem in it; name a JSONL file with one problem a line")
    return [problem for _, problem in kept]


def unreadable(path: Path, form: FormName) -> list[str]:
    """Ids of the problems whose answers `read_problems` would list, for `leave_out`; other errors as there."""
    return list(dict.fromkeys(problem.id for _, problem, _ in _unreadable_answers(form, _numbered(path, form))))


def _numbered(path: Path, form: FormName) -> list[tuple[int, Problem]]:
    """All problems of a file with the numbers of their lines, no id twice."""
    numbered = [(number, _problem(path, form, number, line)) for number, line in _lines(path)]
    _refuse_duplicates(path, numbered)
    return numbered


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise DataError(f"{path}: cannot be read ({cause.strerror}); correct the path of the problems") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"{path}: not UTF-8 (byte {cause.start}); write the problems as UTF-8 JSONL") from cause
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _problem(path: Path, form: FormName, number: int, line: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise DataError(f"{path}:{number}: not JSON ({cause.msg} at character {cause.pos + 1}); write one object a line") from cause
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: a JSON {type(row).__name__}, not an object; write one object a line")
    try:
        return FORMS[form](row, f"{path.stem}/{number:06d}", form)
    except _Missing as cause:
        keys = ", ".join(list(row)[:12]) or "none"
        raise DataError(
            f"{path}:{number}: {cause} (form {form}; the keys there are {keys}); mend the line, or name the file's form"
        ) from None


def _refuse_duplicates(path: Path, numbered: list[tuple[int, Problem]]) -> None:
    lines: dict[str, list[int]] = {}
    for number, problem in numbered:
        lines.setdefault(problem.id, []).append(number)
    twice = [f"'{name}' on lines {', '.join(map(str, found))}" for name, found in lines.items() if len(found) > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} ids stand more than once: {_listed(twice)}; give every problem its own id")


def _refuse_unreadable(path: Path, form: FormName, numbered: list[tuple[int, Problem]]) -> None:
    unread = [
        f"line {number} '{problem.id}': {answer.strip() or '(empty)'}" for number, problem, answer in _unreadable_answers(form, numbered)
    ]
    if unread:
        which = (
            "are no numbers, which form arithmetic wants" if form == "arithmetic" else "no grader can read, so that no response is right"
        )
        raise DataError(
            f"{path}: {len(unread)} answers that {which}:\n  "
            + "\n  ".join(unread)
            + "\nmend them, or leave these problems out by their ids"
        )


def _unreadable_answers(form: FormName, numbered: list[tuple[int, Problem]]) -> list[tuple[int, Problem, str]]:
    return [
        (number, problem, answer)
        for number, problem in numbered
        for answer in problem.answers
        if not (is_number(answer) if form == "arithmetic" else is_readable(answer, is_list=problem.is_list))
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return "; ".join(names[:MOST_LISTED]) + more


# --- forms ----------------------------------------------------------------------------------------------


def _text(row: Row, *keys: str) -> str:
    """The text of the first key that is there."""
    for key in keys:
        if (value := row.get(key)) is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise _Missing(f"'{key}' holds {'nothing' if value == '' else f'a {type(value).__name__}'}, not text")
        return value.strip()
    raise _Missing(f"no key '{keys[0]}'" + (f" (nor {', '.join(keys[1:])})" if keys[1:] else ""))


def _answer(row: Row, key: str) -> str:
    """An answer that is text or a number; 27.0 is 27. What is empty stays so, to be listed with all that no grader can read."""
    value = row.get(key)
    if isinstance(value, str) and not value.strip():
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(row, key)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and "e" in repr(value):
        raise _Missing(f"'{key}' holds {value!r}; write it as text")
    return str(value)


def _id(row: Row, fallback: str, *keys: str) -> str:
    for key in keys:
        if (value := row.get(key)) is not None:
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise _Missing(f"'{key}' holds a {type(value).__name__}, not text or a whole number")
            return str(value)
    return fallback


def _gsm8k(row: Row, fallback: str, source: str) -> Problem:
    answer = _answer(row, "answer").rpartition("####")[2].strip()
    return Problem(_id(row, fallback, "id"), _text(row, "question"), (answer,), source)


def _math(row: Row, fallback: str, source: str) -> Problem:
    question = _text(row, "problem")
    if row.get("answer") is not None:
        answer: str | None = _answer(row, "answer")
    else:
        answer = last_boxed(_text(row, "solution"))
    if answer is None:
        raise _Missing("no 'answer', and no \\boxed{...} in 'solution'")
    return Problem(_id(row, fallback, "unique_id", "id"), question, (answer,), source)


def _olympiad_bench(row: Row, fallback: str, source: str) -> Problem:
    is_list, golds = row.get("is_multiple_answer"), row.get("final_answer")
    if not isinstance(is_list, bool):
        raise _Missing("no 'is_multiple_answer' that is true or false")
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise _Missing("no 'final_answer' that is a list of texts")
    if not is_list and len(golds) > 1:
        raise _Missing("'final_answer' holds several texts, though is_multiple_answer is false")
    context = f"{_text(row, 'context')}\n" if row.get("context") else ""
    unit = _text(row, "unit") if row.get("unit") else ""
    question = context + _text(row, "question")
    answer = ", ".join(golds) if all(gold.strip() for gold in golds) else ""
    return Problem(_id(row, fallback, "id"), question, (answer,), source, is_list, unit, _tolerance(row))


def _tolerance(row: Row) -> Fraction | None:
    if row.get("error") is None:
        return None
    try:
        return Fraction(_answer(row, "error"))
    except (ValueError, ZeroDivisionError):
        raise _Missing(f"'error' holds {row['error']!r}, not a number") from None


def _amc23(row: Row, fallback: str, source: str) -> Problem:
    return Problem(_id(row, fallback, "id"), _text(row, "question", "problem"), (_answer(row, "answer"),), source)


def _arithmetic(row: Row, fallback: str, source: str) -> Problem:
    return Problem(_id(row, fallback, "id"), _text(row, "question"), (_answer(row, "answer"),), source)


FORMS: dict[FormName, Callable[[Row, str, str], Problem]] = {
    "gsm8k": _gsm8k,
    "math": _math,
    "olympiad_bench": _olympiad_bench,
    "amc23": _amc23,
    "arithmetic": _arithmetic,
}
