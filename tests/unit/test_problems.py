"""Problems from every form of file, and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data import arithmetic
from megatron_ext.data.demo_text import problem_lines
from megatron_ext.errors import DataError
from megatron_ext.tasks.problems import FormName, Problem, read_problems, unreadable


def _write(path: Path, *rows: Any) -> Path:
    file = path / "some.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return file


OLYMPIAD = {
    "id": 7,
    "question": "How long?",
    "final_answer": ["$45$"],
    "is_multiple_answer": False,
    "unit": "min",
    "error": "1e-1",
    "context": "It runs.",
}
FORMS: list[tuple[FormName, dict[str, Any], Problem]] = [
    ("gsm8k", {"question": "6 and 12?", "answer": "6+12=18\n#### 18"}, Problem("some/000001", "6 and 12?", ("18",), "gsm8k")),
    ("gsm8k", {"id": "a", "question": "6 and 12?", "answer": "1,018"}, Problem("a", "6 and 12?", ("1,018",), "gsm8k")),
    ("math", {"problem": "Half?", "answer": r"\frac12", "unique_id": "u/1"}, Problem("u/1", "Half?", (r"\frac12",), "math")),
    ("math", {"problem": "Half?", "solution": r"It is \boxed{\frac{1}{2}}."}, Problem("some/000001", "Half?", (r"\frac{1}{2}",), "math")),
    (
        "olympiad_bench",
        OLYMPIAD,
        Problem("7", "It runs.\nHow long?", ("$45$",), "olympiad_bench", unit="min", tolerance=Fraction(1, 10)),
    ),
    (
        "olympiad_bench",
        {**OLYMPIAD, "final_answer": ["$1$", "$2$"], "is_multiple_answer": True, "unit": None, "error": None, "context": None},
        Problem("7", "How long?", ("$1$, $2$",), "olympiad_bench", is_list=True),
    ),
    ("amc23", {"id": 3, "question": "How many?", "answer": 27.0, "url": "x"}, Problem("3", "How many?", ("27",), "amc23")),
    ("amc23", {"problem": "How many?", "answer": 2.5}, Problem("some/000001", "How many?", ("2.5",), "amc23")),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "problem"), FORMS)
def test_a_row_of_each_form(tmp_path: Path, form: FormName, row: dict[str, Any], problem: Problem) -> None:
    assert read_problems(_write(tmp_path, row), form) == [problem]


def test_the_problems_of_the_demo(tmp_path: Path) -> None:
    lines = problem_lines("evaluation", arithmetic.evaluation_problem, 20, seed=1)
    problems = read_problems(_write(tmp_path, *lines), "arithmetic")
    assert [(p.id, p.question, p.answers) for p in problems] == [(r["id"], r["question"], (r["answer"],)) for r in map(json.loads, lines)]


GOOD = {"id": "a", "question": "1+1?", "answer": "2"}
BAD: list[tuple[FormName, list[Any], str]] = [
    ("gsm8k", [GOOD, {"id": "b", "question": "2?"}], r"some.jsonl:2: no key 'answer' \(form gsm8k; the keys there are id, question\)"),
    ("gsm8k", [{"question": "", "answer": "2"}], r"some.jsonl:1: 'question' holds nothing, not text"),
    ("gsm8k", [{"question": "1?", "answer": ["2"]}], r"'answer' holds a list, not text"),
    ("gsm8k", [{"question": "1?", "answer": None}], r"no key 'answer'"),
    ("gsm8k", [{**GOOD, "id": 1.5}], r"'id' holds a float"),
    ("gsm8k", ["{"], r"some.jsonl:1: not JSON"),
    ("gsm8k", ["[1]"], r"some.jsonl:1: a JSON list, not an object"),
    ("gsm8k", [], r"no problem in it"),
    ("gsm8k", [GOOD, {**GOOD, "id": "b"}, GOOD], r"1 ids stand more than once: 'a' on lines 1, 3"),
    ("math", [{"problem": "?", "solution": "no box"}], r"no 'answer', and no \\boxed"),
    ("math", [GOOD], r"no key 'problem'"),
    ("amc23", [{"problem": "?", "answer": True}], r"'answer' holds a bool"),
    ("olympiad_bench", [{**OLYMPIAD, "is_multiple_answer": None}], r"no 'is_multiple_answer'"),
    ("olympiad_bench", [{**OLYMPIAD, "final_answer": "45"}], r"no 'final_answer' that is a list"),
    ("olympiad_bench", [{**OLYMPIAD, "final_answer": ["1", "2"]}], r"holds several texts"),
    ("olympiad_bench", [{**OLYMPIAD, "error": "some"}], r"'error' holds 'some', not a number"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "rows", "message"), BAD)
def test_bad_files_are_refused(tmp_path: Path, form: FormName, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_problems(_write(tmp_path, *rows), form)


def test_all_answers_that_no_grader_can_read_are_listed_and_can_be_left_out(tmp_path: Path) -> None:
    broken = [
        {"id": name, "question": "?", "answer": text}
        for name, text in (("b", r"\frac{1}{"), ("c", "x where x is any number you may think of"))
    ]
    path = _write(tmp_path, GOOD, *broken)
    with pytest.raises(DataError, match=r"2 answers that no grader can read[\s\S]*line 2 'b'[\s\S]*line 3 'c'"):
        read_problems(path, "gsm8k")
    assert [problem.id for problem in read_problems(path, "gsm8k", leave_out=frozenset({"b", "c"}))] == ["a"]
    with pytest.raises(DataError, match="leave_out names nobody"):
        read_problems(path, "gsm8k", leave_out=frozenset({"b", "c", "nobody"}))


def test_answers_that_are_empty_are_listed_with_the_others(tmp_path: Path) -> None:
    broken = [{"id": f"e{number}", "question": "?", "answer": text} for number, text in enumerate(("", "  ", "so ####", r"\frac{1}{"))]
    path = _write(tmp_path, GOOD, *broken)
    listed = (
        r"4 answers that no grader can read.*\n  line 2 'e0': \(empty\)\n  line 3 'e1': \(empty\)\n  line 4 'e2': \(empty\)\n  line 5 'e3'"
    )
    with pytest.raises(DataError, match=listed):
        read_problems(path, "gsm8k")
    assert unreadable(path, "gsm8k") == ["e0", "e1", "e2", "e3"]
    assert len(read_problems(path, "gsm8k", leave_out=frozenset(unreadable(path, "gsm8k")))) == 1
    for form, row in (("math", {"problem": "?", "answer": ""}), ("math", {"problem": "?", "solution": r"\boxed{}"})):
        assert len(unreadable(_write(tmp_path, row), form)) == 1
    assert unreadable(_write(tmp_path, {**OLYMPIAD, "final_answer": ["1", " "], "is_multiple_answer": True}), "olympiad_bench") == ["7"]


NUMBERS = (7, -3, 2.5, "7", "-3", "1,018", "0.5", r"\frac{1}{2}", "3/4", "$12$")
NO_NUMBERS = ("see the figure", "", "x", "7 apples", "5 m", "1, 2", "x = 5", "1/0")


def test_a_gold_answer_of_arithmetic_is_a_number(tmp_path: Path) -> None:
    rows = [{"id": str(number), "question": "?", "answer": text} for number, text in enumerate((*NUMBERS, *NO_NUMBERS))]
    path = _write(tmp_path, *rows)
    with pytest.raises(DataError, match=r"8 answers that are no numbers, which form arithmetic wants.*\n  line 11 '10': see the figure"):
        read_problems(path, "arithmetic")
    assert unreadable(path, "arithmetic") == [str(number) for number in range(len(NUMBERS), len(rows))]
    assert unreadable(path, "gsm8k") == ["11"], "another form takes words and units"


def test_ids_that_no_grader_can_read(tmp_path: Path) -> None:
    rows = [{"id": name, "question": "?", "answer": text} for name, text in (("a", "2"), ("b", r"\frac{1}{"), ("c", "3"))]
    assert unreadable(_write(tmp_path, *rows), "gsm8k") == ["b"]
    assert unreadable(_write(tmp_path, rows[0]), "gsm8k") == []
    with pytest.raises(DataError, match="1 ids stand more than once"):
        unreadable(_write(tmp_path, rows[0], rows[0]), "gsm8k")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        read_problems(tmp_path / "none.jsonl", "math")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_problems(tmp_path / "bytes.jsonl", "math")
