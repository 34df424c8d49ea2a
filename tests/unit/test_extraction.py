"""Boxes: nested, several, none, unterminated, escaped braces; in one pass."""

from __future__ import annotations

import pytest

from megatron_ext.tasks.extraction import boxes, last_boxed

CASES = [
    (r"so \boxed{18}.", "18"),
    (r"\boxed{1} no, wait: \boxed{2} is it, and text after", "2"),
    (r"\boxed{\frac{1}{\sqrt{2^{n_{k}}}}}", r"\frac{1}{\sqrt{2^{n_{k}}}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\{1, 2)}", r"\{1, 2)"),
    (r"\boxed {7} and \fbox{no}", "no"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
    (r"\boxed{6} then \boxed{7", "6"),
    (r"a { stays open, \boxed{8}", "8"),
    (r"} closes nothing, \boxed{9}", "9"),
    (r"\boxed{ {3}", None),
    (r"\boxed{ \boxed{4}", "4"),
    (r"\boxed{a \\} b}", r"a \\"),
    (r"\boxed{}", ""),
    ("the answer is 5", None),
    (r"boxed{5}", None),
    ("17+28=37+8=45. The answer is \\boxed{45}.", "45"),
]


@pytest.mark.parametrize(("text", "content"), CASES)
def test_the_last_balanced_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_boxes_come_in_order_with_their_places() -> None:
    text = r"\boxed{1}, \boxed{\boxed{2}3}"
    assert [(box.content, text[box.start : box.end]) for box in boxes(text)] == [
        ("1", r"\boxed{1}"),
        (r"\boxed{2}3", r"\boxed{\boxed{2}3}"),
    ]


def test_boxes_that_are_never_closed_cost_one_pass() -> None:
    assert boxes(r"\boxed{" * 100_000) == []  # each scanned to the end of the text would take hours
