"""Equivalence by rules: the parts that the file of pairs (test_grading) does not single out."""

from __future__ import annotations

import signal
import threading
from fractions import Fraction

import pytest

from megatron_ext.tasks import equivalence, symbolic
from megatron_ext.tasks.answers import Bracketed, Collection, Matrix, Named, Scalar, Union, Words, read
from megatron_ext.tasks.equivalence import compare, is_readable
from megatron_ext.tasks.latex_text import normal
from megatron_ext.tasks.rationals import rational
from megatron_ext.tasks.units import canonical, ratio, split_unit

SPELLINGS = [
    (r"\dfrac12", r"\frac{1}{2}"), (r"\frac 3{10}", r"\frac{3}{10}"), (r"\left( 1 , 2 \right)", "( 1 , 2 )"), (r"10,\!080", "10,080"),
    (r"\mathrm{cm}", r"\text{cm}"), (r"$5$.", "5"), ("{{5}}", "5"), (r"90^{\circ}", r"90\text{degree}"), (r"\sqrt5", r"\sqrt{5}"),
    ("sqrt(5)", r"\sqrt{5}"), (r"0.\overline{3}", r"\frac{1}{3}"), (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"),
    (r"1 \\ 2", r"1 \\ 2"), (r"a \\[2pt] b", r"a \\ [2pt] b"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "spelling"), SPELLINGS)
def test_one_spelling(text: str, spelling: str) -> None:
    assert normal(text) == spelling


VALUES = [
    ("1,234", None), ("-.5", Fraction(-1, 2)), (r"\frac{1}{2}", Fraction(1, 2)), (r"1\frac{1}{2}", Fraction(3, 2)),
    ("1 1/2", Fraction(3, 2)), ("11/2", Fraction(11, 2)), (r"3\cdot 10^{-2}", Fraction(3, 100)), ("2(3+4)", Fraction(14)),
    ("-2^2", Fraction(-4)), ("1/0", None), ("2^{99999}", None), ("9^9^9", None), ("2 3", None), ("", None), ("x", None), ("1.2.3", None),
    ("(" * 100 + "1" + ")" * 100, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_exact_values(text: str, value: Fraction | None) -> None:
    assert rational(text) == value


def test_kinds() -> None:
    assert read("(1,2]") == Bracketed("(", "]", (Scalar("1"), Scalar("2")))
    assert read(r"x \le 2") == Bracketed("(", "]", (Scalar(r"-\infty"), Scalar("2")))
    assert read(r"\{1,2\}") == Collection((Scalar("1"), Scalar("2")), is_set=True)
    assert read("1,234") == Scalar("1234")
    assert read("1,234", comma_separates=True) == Collection((Scalar("1"), Scalar("234")))
    assert read("x = 5") == Named("x", Scalar("5"), "x = 5")
    assert read(r"\text{East}") == read("East") == Words("east")
    assert isinstance(read(r"(0,1)\cup(2,3)"), Union)
    assert isinstance(read(r"\begin{pmatrix}1&2\end{pmatrix}"), Matrix)


def test_units() -> None:
    assert [canonical(name) for name in ("square inches", "sq. in.", "centimetres", "miles per hour")] == ["in^2", "in^2", "cm", "mi/h"]
    assert split_unit(r"3 \text{ million dollars}") == ("3", "dollar", 10**6)
    assert split_unit("5x") == ("5x", "", 1)
    assert ratio("cm", "m") == 100
    assert ratio("cm^2", "m^2") == 10_000
    assert ratio("cm", "kg") is None


def test_it_is_the_gold_that_says_what_was_asked() -> None:
    assert compare(r"62.5\%", "62.5").same
    assert compare("0.5", "50").same is False
    assert compare("50", "0.5").same is False
    assert compare("x=5", "5").same
    assert compare("y=5", "x=5").same is False


def test_the_means_is_told() -> None:
    ways = [compare(gold, answer).way for gold, answer in (("1/2", "1/2"), (r"\frac12", r"\dfrac{1}{2}"), ("1/2", "0.5"), ("2x", "x+x"))]
    assert ways == ["exact", "normalised", "value", "math-verify"]


def test_what_cannot_be_read() -> None:
    assert compare("5", r"\frac{").same is None
    assert compare("2x", r"\undefined{3}+x").same is None
    assert is_readable(r"\frac{n(n+1)}{2}")
    assert not is_readable("f(x)=ax+b where b is any whole number at all")
    assert not is_readable(r"\frac{1}{")
    assert not is_readable(" ")


def test_algebra_needs_no_main_thread_and_leaves_alarms_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    found: list[bool | None] = []
    thread = threading.Thread(target=lambda: found.append(compare("(x+1)^2", "x^2+2x+1").same))
    thread.start()
    thread.join()
    assert found == [True]
    assert signal.getsignal(signal.SIGALRM) is before


def test_text_of_a_model_is_never_evaluated(tmp_path) -> None:
    mark = tmp_path / "mark"
    attack = f"__import__('os').system('touch {mark}')"
    for answer in (attack, f"\\text{{{attack}}}", f"x+{attack}", f"{attack}^2"):
        assert not compare("x+1", answer).same
    assert not mark.exists()


def test_letters_keep_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    gold, answer = r"\pi(R^2-r^2)+1", r"\pi(r^2-R^2)+1"
    assert compare(gold, answer).same is False
    monkeypatch.setattr(symbolic, "CONVERSION", symbolic.ConversionConfig())  # math-verify's own: both are then 1
    symbolic.expression.cache_clear()
    assert compare(gold, answer).same
    symbolic.expression.cache_clear()


def test_a_huge_power_is_refused_unread() -> None:
    for answer in ("9^{9^{9^9}}", "2^{999999999}", "99999999!"):
        assert compare("5", answer).same is None


def test_a_failure_of_sympy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> bool:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(symbolic, "verify", fails)
    with pytest.raises(symbolic.AlgebraError, match="ZeroDivisionError: by design"):
        equivalence.compare(r"\sqrt{x^2}", "|x|")  # which nothing quicker decides
