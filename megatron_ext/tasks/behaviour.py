r"""What a response does beside being right or wrong: it loops, begins with its answer, or goes on after it.

A base model that answers first and then repeats itself to the cap can still be graded right by its last box, and is trained to do
so: these flags show it before the scores do. Pure functions of the text.
"""

from __future__ import annotations

import re

from megatron_ext.tasks.extraction import boxes
from megatron_ext.tasks.repetition import repeats

# Room for `The answer is $` and for `**Answer:** $`, but for no working: "2+2=4. The answer is" has 20 characters.
LEAD_CHARACTERS = 16
CLOSING = re.compile(r"(?:[\s.,;:!?$*_'\"\u201d\u2019»)\]}|]|\\[\])>!,;: ]|\\end\s*\{\w{1,20}\*?\}|\\right[)\].|]|</?\w{1,20}>)*")


def loops(text: str) -> bool:
    """Whether some piece of at least 5 characters stands at least 5 times in a row."""
    return repeats(text)


def box_first(text: str) -> bool:
    """Whether the first box begins within the first `LEAD_CHARACTERS`, white space before them aside: no working precedes it."""
    text = text.lstrip()
    found = boxes(text)
    return bool(found) and found[0].start <= LEAD_CHARACTERS


def text_after_box(text: str) -> bool:
    r"""Whether more follows the last box than what closes it: punctuation, dollars, `\]`, the end of an environment or of a tag."""
    found = boxes(text)
    return bool(found) and CLOSING.fullmatch(text, found[-1].end) is None
