r"""What is decided in a millisecond, and what is refused unread: tables, and the algebra system as the judge of both."""

from __future__ import annotations

import time

import pytest

from megatron_ext.tasks import magnitude, quick_equality, symbolic
from megatron_ext.tasks.magnitude import too_large
from megatron_ext.tasks.quick_equality import quickly_equal

TOO_LARGE = [
    "9^{9^{9^{9}}}", "9^9^9", "{9}^{{9}^{{9}}}", "9^{(9^{9})}", r"9^{\frac{9^{9}}{2}}", "(9^{9})^{9^{9}}", "x^{9^{9}}+1", "9^{9^{9}x}",
    "2^{x+9^{9}}", "(((9^{99})^{99})^{99})^{99}", "9^{12!}", "(10^{8})!", "12!!", "((9!)!)!", r"\binom{10^{9}}{5\cdot 10^{8}}",
    r"\binom{1000000}{500000}", r"\sum_{n=1}^{10^{9}} \frac{1}{n^{2}}", r"\prod_{n=1}^{10^{7}} n", r"\sum_{n=-10^{9}}^{0} n",
    r"\sqrt{" * 30 + "2" + "}" * 30, r"\frac{1}{x+" * 30 + "x" + "}" * 30, "10^{10^{10}}", r"e^{\left(10^{10}\right)!}",
]  # fmt: skip
ANSWERS = [
    "", "5", "-3.25", "x^2+1", "2^{10}", "2^{2009}-1", "1999^{1999}", "3^{2^{5}}", r"2^{\frac{n(n+1)}{2}}", "2^{n+1}-n-2", "e^{x^{2}}",
    r"2^{\frac{1999\cdot 2000}{2}}", "10!", "100!", "n!", "(2n)!", r"\binom{2n}{n}", r"\binom{100}{50}", r"\binom{2022}{1011}",
    r"\sum_{k=1}^{2021} \frac{1}{k}", r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\frac{1}{1+\frac{1}{1+\frac{1}{1+\frac{1}{x}}}}",
    r"\left(\frac{3}{2}\right)^{100}", "(x+1)^{50}", r"\sqrt[3]{2+\sqrt{5}}", "x^{x^{x}}", "2^", "}{", r"\log_{2} 10^{9}",
    r"\int_{0}^{10^{9}} x dx", "123456789012345678901234567890", r"0.000001 \cdot 10^{12}", "9)^(9", "^9", "_",
]  # fmt: skip


@pytest.mark.parametrize("text", TOO_LARGE)
def test_what_nothing_could_write_out_is_refused(text: str) -> None:
    assert too_large(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_not(text: str) -> None:
    assert not too_large(text)


def test_a_bound_that_is_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude, "MOST_BITS", 2**40)
    assert not all(too_large(text) for text in TOO_LARGE)
    monkeypatch.setattr(magnitude, "MOST_BITS", 2**10)
    assert any(too_large(text) for text in ANSWERS)


def test_refusing_takes_one_pass() -> None:
    began = time.process_time()
    for text in ("9^" * 300, "(" * 600, "!" * 600, "9!" * 300, r"\binom" * 100, "^{" * 300, r"\sum_" * 120, "{}" * 300, "x_" * 300):
        too_large(text)
    assert time.process_time() - began < 2  # some ten milliseconds


EQUAL, DIFFERENT, UNDECIDED = True, False, None
PAIRS = [
    ("x^2+5x+6", "(x+2)(x+3)", EQUAL),
    ("x^2+5x+6", "(x+2)(x+4)", DIFFERENT),
    ("(a+b)^{3}", "a^3+3a^2b+3ab^2+b^3", EQUAL),
    ("(a-b)(a+b)", "a^2+b^2", DIFFERENT),
    ("0", "x-x", EQUAL),
    ("6", r"2 \cdot 3", EQUAL),
    (r"\frac{x}{2}+\frac{1}{6}", r"\frac{3x+1}{6}", EQUAL),
    (r"\frac{x^2}{2}-\frac{1}{3}", r"\frac{3x^2-1}{6}", DIFFERENT),
    ("2x", "x+x+y-y", EQUAL),
    ("x-x+1", "y-y+(1)^{2}", EQUAL),
    ("2", r"\frac{4}{2}+x-x", EQUAL),
    ("x", "y", DIFFERENT),
    ("5", r"\sqrt{2}", DIFFERENT),
    (r"\sqrt{12}", r"2\sqrt{3}", UNDECIDED),
    (r"\sqrt{x^2}", "|x|", UNDECIDED),
    (r"\sqrt{x^2}", "x", UNDECIDED),  # equal at every point that is tried, and not equal
    (r"\cos^2 x", r"1-\sin^2 x", UNDECIDED),
    (r"\cos^2 x", r"1+\sin^2 x", DIFFERENT),
    (r"\frac{1}{1+\sqrt{2}}", r"\sqrt{2}-1", UNDECIDED),
    ("5", "(x+1)^{9999}", DIFFERENT),
    ("5", "(x+y+z+w)^{200}", DIFFERENT),
    ("e^x", "e^{x}+10^{-9}", UNDECIDED),  # too near for fifteen digits
    (r"\frac{x^2-1}{x-1}", "x+1", UNDECIDED),
    ("1", r"\int_{0}^{1} e^{x^{x}} dx", UNDECIDED),
    ("1", r"\sum_{n=1}^{\infty} \frac{1}{n^{2}+n}", UNDECIDED),
    ("5", r"\frac{1}{0}", UNDECIDED),
]


def expressions(*texts: str) -> list:
    return [symbolic.expression(text) for text in texts]


@pytest.mark.parametrize(("gold", "answer", "expected"), PAIRS)
def test_what_can_be_said_quickly(gold: str, answer: str, expected: bool | None) -> None:
    assert quickly_equal(*expressions(gold, answer)) is expected
    assert quickly_equal(*expressions(answer, gold)) is expected


SLOW = ("(x+1)^{9999}", "(x+y+z+w)^{200}")  # which the algebra system multiplies out


@pytest.mark.parametrize(
    ("gold", "answer"), [(gold, answer) for gold, answer, expected in PAIRS if expected is not None and answer not in SLOW]
)
def test_the_algebra_system_says_the_same(gold: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = quickly_equal(*expressions(gold, answer))
    monkeypatch.setattr(symbolic, "quickly_equal", lambda *_: None)
    assert symbolic.same(gold, answer) is quick


def test_a_comparison_to_the_last_digit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_equality, "SURE_DIFFERENCE", -1)
    assert any(quickly_equal(*expressions(gold, answer)) is not expected for gold, answer, expected in PAIRS)
