"""Rewards as tables; the loop detector against the regular expression that defines it, and on long texts."""

from __future__ import annotations

import random
import re
import sys

import pytest

from megatron_ext.tasks import repetition
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.repetition import repeats
from megatron_ext.tasks.reward import REWARDS, RewardName

RIGHT, WRONG = Verdict("correct", "5", "exact"), Verdict("wrong", "6", "value", "another value")
UNREAD, FAILED = Verdict("unparseable", None, "box", "no box"), Verdict("error", "6", "math-verify", "ValueError")
ONE, TWO, NONE, LOOP = r"so \boxed{5}", r"\boxed{4} or \boxed{5}", "so 5", "again " * 6 + r"\boxed{5}"
TABLE: list[tuple[RewardName, Verdict | None, str, float]] = [
    ("correct", RIGHT, ONE, 1), ("correct", RIGHT, LOOP, 1), ("correct", WRONG, ONE, -1), ("correct", UNREAD, NONE, -1),
    ("correct", FAILED, ONE, -1), ("correct", None, ONE, -1),
    ("format", RIGHT, ONE, 1), ("format", RIGHT, TWO, -1), ("format", RIGHT, LOOP, -1), ("format", WRONG, ONE, -0.5),
    ("format", WRONG, TWO, -1), ("format", UNREAD, NONE, -1), ("format", UNREAD, ONE, -1), ("format", None, ONE, -0.5),
    ("repeat_penalty", RIGHT, LOOP, -2), ("repeat_penalty", RIGHT, TWO, 1), ("repeat_penalty", WRONG, ONE, -1),
    ("repeat_and_box_penalty", RIGHT, ONE, 1), ("repeat_and_box_penalty", RIGHT, TWO, -2), ("repeat_and_box_penalty", UNREAD, NONE, -1),
    ("repeat_and_box_penalty", WRONG, LOOP, -2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verdict", "text", "value"), TABLE)
def test_reward(name: RewardName, verdict: Verdict | None, text: str, value: float) -> None:
    assert REWARDS[name](verdict, text) == value


DEFINITION = re.compile(r"(.{5,})\1{4}", re.DOTALL)  # correct, and quadratic


def _texts(count: int) -> list[str]:
    rng = random.Random(7)
    texts = ["", "abcde" * 4, "abcde" * 5, "abcde" * 4 + "abcd", "xx" + "abcde" * 5 + "yy", "a" * 24, "a" * 25, "ab" * 15, "ab" * 14]
    for _ in range(count):
        piece = "".join(rng.choice("ab") for _ in range(rng.randint(1, 12)))
        before, after = ("".join(rng.choice("ab") for _ in range(rng.randint(0, 9))) for _ in range(2))
        whole = piece * rng.randint(3, 6)
        texts.append(before + whole[: rng.randint(len(whole) // 2, len(whole))] + after)
    return texts


def test_a_loop_is_what_the_definition_says() -> None:
    texts = _texts(3000)
    expected = [DEFINITION.search(text) is not None for text in texts]
    assert [repeats(text) for text in texts] == expected
    assert 200 < sum(expected) < 2800


def test_a_detector_that_wants_four_repeats_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repetition, "TIMES", 4)
    assert any(repeats(text) != (DEFINITION.search(text) is not None) for text in _texts(200))


def _steps(text: str) -> int:
    """Calls of Python functions that a decision takes: what it costs, with no clock."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        repeats(text)
    finally:
        sys.setprofile(None)
    return calls


def _fibonacci(length: int) -> str:
    """Squares at every place and no fifth power: the worst text for a detector of loops."""
    one, other = "a", "ab"
    while len(other) < length:
        one, other = other, other + one
    return other[:length]


def test_twice_the_text_costs_little_more_than_twice() -> None:
    short, long = _steps(_fibonacci(4_000)), _steps(_fibonacci(16_000))
    assert long < 4 * 2 * short  # n log n; quadratic would be 16
    assert not repeats(_fibonacci(30_000))
    assert repeats("word " * 6_000)
