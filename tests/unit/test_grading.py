"""The grader: on pairs judged by hand, on the benchmarks' own answers, on text that is no answer.

`grading_pairs.jsonl` holds made-up answers, each judged one by one: equal to the gold but written otherwise, or near it and wrong.
"""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_ext.tasks import equivalence
from megatron_ext.tasks.equivalence import Finding, compare
from megatron_ext.tasks.grading import Verdict, grade, grade_answer
from megatron_ext.tasks.problems import FormName, Problem, read_problems
from tests.benchmark_files import BENCHMARKS

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "grading_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
UNREADABLE = frozenset({"1965", "2045"})  # OlympiadBench: a gold with a condition in prose, and one with letters before its interval
MOST_ERRORS = 0.01
# (gold, answer) -> why the grader judges otherwise than a person does; at most 1 % each way.
KNOWN_ERRORS: dict[tuple[str, str], str] = {}


def _problem(gold: str, **more: object) -> Problem:
    return Problem("p", "?", (gold,), "test", **more)  # type: ignore[arg-type]


def _judged(pair: dict[str, str]) -> Verdict:
    tolerance = Fraction(pair["tolerance"]) if "tolerance" in pair else None
    problem = _problem(pair["gold"], is_list=bool(pair.get("is_list")), unit=pair.get("unit", ""), tolerance=tolerance)
    return grade(problem, f"Thus we have \\boxed{{{pair['answer']}}}, as was asked.")


@pytest.mark.parametrize("same", [True, False], ids=["rewrites", "near_misses"])
def test_pairs_judged_by_hand(same: bool) -> None:
    pairs = [pair for pair in PAIRS if pair["same"] is same]
    wrong = [(pair["gold"], pair["answer"]) for pair in pairs if _judged(pair).is_correct is not same]
    known = [key for key in KNOWN_ERRORS if key in {(pair["gold"], pair["answer"]) for pair in pairs}]
    assert wrong == known
    assert len(wrong) <= MOST_ERRORS * len(pairs)
    assert len(pairs) >= 300


def test_the_pairs_are_distinct_and_of_many_kinds() -> None:
    assert len({(pair["gold"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    assert len({pair["kind"] for pair in PAIRS}) >= 14
    assert all(pair["why"] for pair in PAIRS)


@pytest.mark.parametrize("fault", ["accepts_all", "string_only"])
def test_a_grader_with_a_fault_fails_on_the_pairs(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(equivalence, "_by_algebra", lambda *_: Finding(fault == "accepts_all", "math-verify"))
    errors = Counter(pair["same"] for pair in PAIRS if _judged(pair).is_correct is not pair["same"])
    of_all = Counter(pair["same"] for pair in PAIRS)
    assert any(errors[same] > MOST_ERRORS * of_all[same] for same in (True, False))


def _golds(name: str, form: FormName, leave_out: frozenset[str] = frozenset()) -> list[Problem]:
    path = BENCHMARKS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: set MEGATRON_EXT_BENCHMARKS to a folder with {name}.jsonl")
    return read_problems(path, form, leave_out=leave_out)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "form", "leave_out", "count"),
    [("gsm8k", "gsm8k", frozenset(), 1319), ("math500", "math", frozenset(), 500), ("olympiad_bench", "olympiad_bench", UNREADABLE, 673)],
)
def test_every_gold_answer_of_a_benchmark_is_right(name: str, form: FormName, leave_out: frozenset[str], count: int) -> None:
    problems = _golds(name, form, leave_out)
    assert len(problems) == count
    wrong = [problem.id for problem in problems if not grade(problem, f"So \\boxed{{{problem.answers[0]}}}.").is_correct]
    assert wrong == []


@pytest.mark.shared
@pytest.mark.parametrize(("name", "form", "leave_out"), [("gsm8k", "gsm8k", frozenset()), ("math500", "math", frozenset())])
def test_golds_in_another_spelling_are_right_and_need_no_algebra(name: str, form: FormName, leave_out: frozenset[str]) -> None:
    """Sizes, spaces and commas changed: the text differs, so the rules must decide, and they do without math-verify."""
    ways: Counter[str] = Counter()
    for problem in _golds(name, form, leave_out):
        gold = problem.answers[0]
        answer = gold.replace("\\frac", "\\dfrac").replace("(", "\\left( ").replace(")", "\\right) ").replace("+", " + ")
        if gold.isdigit() and len(gold) > 3:
            answer = f"{int(gold):,}.00"
        verdict = grade_answer(problem, f" {answer}\\,")
        assert verdict.is_correct, (gold, answer, verdict)
        ways[verdict.way] += 1
    assert ways["math-verify"] == 0


@pytest.mark.shared
def test_golds_of_other_problems_are_wrong() -> None:
    problems = _golds("math500", "math")
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        verdict = grade_answer(problem, other.answers[0])
        number = other.answers[0].rpartition("=")[2]
        assert verdict.is_correct == (problem.answers[0] in (other.answers[0], number))
        assert verdict.outcome != "error"


VERDICTS = [
    ("no box at all", Verdict("unparseable", None, "box", "no box")),
    (r"\boxed{}", Verdict("unparseable", "", "box", "an empty box")),
    (r"\boxed{5", Verdict("unparseable", None, "box", "no box")),
    (r"\boxed{5}", Verdict("correct", "5", "exact")),
    (r"\boxed{4} no, \boxed{5}. Done.", Verdict("correct", "5", "exact")),
    (r"\boxed{5} no, \boxed{4}", Verdict("wrong", "4", "value", "another value")),
    (r"\boxed{\frac{5}{1}}", Verdict("correct", r"\frac{5}{1}", "value")),
    (r"\boxed{\foo{5}^}", Verdict("unparseable", r"\foo{5}^", "math-verify", "cannot be read")),
]


@pytest.mark.parametrize(("text", "verdict"), VERDICTS)
def test_verdicts(text: str, verdict: Verdict) -> None:
    assert grade(_problem("5"), text) == verdict


def test_one_of_several_answers_is_enough() -> None:
    problem = Problem("p", "?", (r"\text{no}", "0"), "test")
    assert grade(problem, r"\boxed{0}").is_correct
    assert grade(problem, r"\boxed{No}").is_correct
    assert grade(problem, r"\boxed{1}").outcome == "wrong"


def test_a_failed_comparison_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bool:
        raise equivalence.symbolic.AlgebraError("PolynomialError: by design")

    monkeypatch.setattr(equivalence.symbolic, "same", fails)
    assert grade(_problem("2x"), r"\boxed{x+x}") == Verdict("error", "x+x", "math-verify", "PolynomialError: by design")


def test_it_can_be_sent_to_a_worker() -> None:
    function, problem = pickle.loads(pickle.dumps((grade, _problem("5", tolerance=Fraction(1, 10)))))
    verdict = function(problem, r"\boxed{5.1}")
    assert verdict.is_correct
    assert pickle.loads(pickle.dumps(verdict)) == verdict


PIECES = [
    "\\frac", "{", "}", "(", ")", "[", "]", "\\sqrt", "1", "23", "x", "\\pi", "^", "_", "+", "-", "=", "\\le", "<", ",", " ", "\\text{",
    "cm", "and", "\\pm", "\\cup", "\\{", "\\}", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "%", "\\$", ".5", "i", "\\infty",
    "\\in", "|", ":", "/", "°", "\\left", "\\right.", "\\overline{", "or", "\\mathbb{R}", "\\setminus", "\\approx", "million", "Ⅷ", "٣",
]  # fmt: skip
GOLDS = [
    "5",
    r"\frac{1}{3}",
    "(1,2]",
    r"\{1,2\}",
    "x=5",
    r"\text{east}",
    "2x+1",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    "1,2",
    r"50\%",
    r"3\text{ cm}",
]


def test_no_text_makes_the_rules_fail() -> None:
    rng = random.Random(3)
    outcomes = Counter(
        grade_answer(_problem(rng.choice(GOLDS)), "".join(rng.choices(PIECES, k=rng.randint(1, 12)))).outcome for _ in range(3000)
    )
    assert outcomes["wrong"] > 500
    assert outcomes["unparseable"] > 500
    assert outcomes["correct"] < 60


def test_a_box_too_long_to_be_an_answer() -> None:
    verdict = grade(_problem("5"), "\\boxed{" + "1+" * 5000 + "1}")
    assert (verdict.outcome, len(verdict.answer or "")) == ("unparseable", 2000)


def test_order_counts_where_it_should() -> None:
    assert compare("(1,2)", "(2,1)").same is False
    assert compare("1,2", "2,1").same
