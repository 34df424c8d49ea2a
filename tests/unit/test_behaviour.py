r"""Flags of a response as tables, and none that takes long on a long text."""

from __future__ import annotations

import random

import pytest

from megatron_ext.data import arithmetic
from megatron_ext.tasks import behaviour
from megatron_ext.tasks.behaviour import box_first, loops, text_after_box

LOOPS = [
    ("", False),
    ("So 2+2=4. The answer is \\boxed{4}.", False),
    ("\\boxed{4} " + "Solution " * 5, True),
    ("\\boxed{4} " + "Solution " * 4, False),
    ("ha" * 40, True),
]
FIRST = [
    ("", False),
    ("no box", False),
    (r"\boxed{5}", True),
    ("\n\n   " + r"\boxed{5} because", True),
    (r"**Answer:** $\boxed{5}$", True),
    (r"The answer is $\boxed{5}$", True),
    (r"The answer, then, is \boxed{5}", False),
    (r"2+2=4. The answer is \boxed{4}.", False),
    (r"\boxed{5} and then, at length, that \boxed{6}", True),
    (r"We see that five is it, so \boxed{5} and \boxed{6}", False),
    (r"\boxed{5 is never closed", False),
    ("x" * 16 + r"\boxed{5}", True),
    ("x" * 17 + r"\boxed{5}", False),
]
AFTER = [
    ("", False),
    ("no box and more", False),
    (r"so \boxed{5}", False),
    (r"so \boxed{5}.", False),
    (r"so $\boxed{5}$." + "\n\n", False),
    (r"so \[ x = \boxed{5}. \]", False),
    (r"\begin{align*} x = \boxed{5} \end{align*}", False),
    (r"**so \boxed{5}**", False),
    (r"(it is \boxed{5}).</answer>", False),
    (r"so \boxed{5}. Wait", True),
    (r"so \boxed{5} cm", True),
    (r"so \boxed{5} = 4 + 1", True),
    (r"so \boxed{5}. Solution Solution \boxed{5}", False),
    (r"so \boxed{5}. Then \boxed{6 is never closed", True),
    (r"so \boxed{5}\\" + "\nQuestion", True),
]


@pytest.mark.parametrize(("text", "expected"), LOOPS)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) == expected


@pytest.mark.parametrize(("text", "expected"), FIRST)
def test_box_first(text: str, expected: bool) -> None:
    assert box_first(text) == expected


@pytest.mark.parametrize(("text", "expected"), AFTER)
def test_text_after_box(text: str, expected: bool) -> None:
    assert text_after_box(text) == expected


def test_a_worked_solution_of_the_demo_is_without_flags() -> None:
    rng = random.Random(3)
    for _ in range(200):
        text = arithmetic.short(arithmetic.evaluation_problem(rng))
        assert (loops(text), box_first(text), text_after_box(text)) == (False, False, False), text


def test_a_lead_as_long_as_a_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "LEAD_CHARACTERS", 40)
    assert any(box_first(text) != expected for text, expected in FIRST)


def test_a_long_tail_costs_one_pass() -> None:
    assert text_after_box(r"\boxed{5}" + "\\]" * 300_000 + "x")  # quadratic time would take hours
    assert not text_after_box(r"\boxed{5}" + ". " * 300_000)
