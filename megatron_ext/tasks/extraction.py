r"""Where the answer stands in a response: the last balanced \boxed{...}, found in one pass.

Depth does not matter, escaped braces do not count, a box that is never closed is none, and a box inside another belongs to the outer one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\.|[{}]", re.DOTALL)
MOST_ANSWER_CHARACTERS = 2_000  # no answer of the benchmarks has 300; what is longer is a text, and costly to parse


@dataclass(frozen=True)
class Box:
    """The content of one box, and where the whole of it, `\\boxed{` and `}` included, begins and ends in the text."""

    content: str
    start: int
    end: int


def boxes(text: str) -> list[Box]:
    """All balanced boxes that stand in no other balanced box, in order. Linear in the length of the text."""
    open_braces: list[re.Match[str]] = []
    found: list[Box] = []
    for token in TOKEN.finditer(text):
        if token.group().endswith("{") and token.group() != "\\{":
            open_braces.append(token)
        elif token.group() == "}" and open_braces:
            opening = open_braces.pop()
            if len(opening.group()) > 1:
                while found and found[-1].start > opening.start():
                    found.pop()
                found.append(Box(text[opening.end() : token.start()], opening.start(), token.end()))
    return found


def last_boxed(text: str) -> str | None:
    """The content of the last box, boxes directly within it opened; None where there is none."""
    found = boxes(text)
    if not found:
        return None
    content = found[-1].content.strip()
    while (inner := boxes(content)) and inner[0].start == 0 and inner[0].end == len(content):
        content = inner[0].content.strip()
    return content
