"""Whether a text loops: a piece of at least 5 characters, at least 5 times in a row.

A run that repeats with period p covers at least four whole blocks that begin at multiples of p, and they are equal. So for each
period only neighbouring blocks are compared, every third pair of them, by prefix hashes: n/3p comparisons, n log n over all
periods. A regular expression with a back-reference needs n squared, which a response of 30,000 characters makes minutes.
"""

from __future__ import annotations

from collections.abc import Callable

SHORTEST, TIMES = 5, 5
MODULUS = (1 << 61) - 1
BASE = 911_382_323  # any large number; equal hashes are confirmed by the text itself


def repeats(text: str) -> bool:
    """Whether some piece of at least `SHORTEST` characters stands at least `TIMES` times in a row."""
    if len(text) < SHORTEST * TIMES:
        return False
    equal = _block_comparison(text)
    for period in range(SHORTEST, len(text) // TIMES + 1):
        for start in range(0, len(text) - 2 * period + 1, 3 * period):
            if text[start] == text[start + period] and equal(start, start + period, period) and _run(text, equal, start, period):
                return True
    return False


def _run(text: str, equal: Callable[[int, int, int], bool], start: int, period: int) -> bool:
    """Whether the two equal blocks from `start` belong to a run of `TIMES` periods."""
    wanted = period * (TIMES - 1)  # places in a row at which the text equals itself one period further
    most = min(wanted, len(text) - start - period)
    forward = _longest(lambda length: equal(start, start + period, length), period, most)
    backward = _longest(lambda length: equal(start - length, start + period - length, length), 0, min(wanted, start))
    first = start - backward
    return forward + backward >= wanted and text[first : first + wanted] == text[first + period : first + period + wanted]


def _longest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest length in [low, high] at which `holds`, which is true at `low` and once false stays so."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _block_comparison(text: str) -> Callable[[int, int, int], bool]:
    """A function (a, b, length) that compares two pieces of a text by their hashes in constant time."""
    prefix, power = [0], [1]
    for character in text:
        prefix.append((prefix[-1] * BASE + ord(character)) % MODULUS)
        power.append(power[-1] * BASE % MODULUS)

    def equal(a: int, b: int, length: int) -> bool:
        return (prefix[a + length] - prefix[b + length] - (prefix[a] - prefix[b]) * power[length]) % MODULUS == 0

    return equal
