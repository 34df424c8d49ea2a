r"""What LaTeX asks an algebra system to write out, estimated from the text: some numbers would never be done, and nothing can stop it.

9^{9^9} has 370 million digits, as much as `2^{x+9^9}`, and `(9^9)^{9^9}` and `(10^8)!` have more. Letters count as small numbers. The
estimate is from above, within a few bits a number: what it refuses is too large to be worked with or nearly so, and no answer needs it.
"""

from __future__ import annotations

import re

from megatron_ext.tasks.rationals import rational

MOST_BITS = 2**23  # of one number: 2.5 million digits, some tenths of a second
MOST_COUNT_BITS = 14  # of n in n! and in a binomial coefficient
MOST_TERMS_BITS = 17  # of the limits of a sum or product, which are worked out term by term
MOST_DEPTH = 20  # brackets within brackets: of a continued fraction, say, which takes longer with every level
TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.|\S", re.DOTALL)
CLOSING = {"(": ")", "{": "}", "[": "]"}
TERM_BY_TERM = ("\\sum", "\\prod")
WITH_LIMITS = (*TERM_BY_TERM, "\\int")
BINOMIALS = ("\\binom", "\\dbinom", "\\tbinom")
BITS_OF_A_DIGIT = 3.33


class _TooLarge(Exception):
    """Beyond the bounds."""


def too_large(text: str) -> bool:
    """Whether LaTeX, of bounded length, asks for numbers of more than `MOST_BITS`, or is nested deeper than `MOST_DEPTH`."""
    try:
        _Reader([match.group() for match in TOKEN.finditer(text)]).all()
    except _TooLarge:
        return True
    return False


class _Reader:
    """Bits of each piece of a text, as if all its numbers were multiplied; powers and factorials belong to the piece before them."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def all(self) -> None:
        while self.at < len(self.tokens):  # a closing bracket too many ends a piece
            self.until("")
            self.at += 1

    def until(self, closing: str) -> float:
        """Bits up to a closing bracket, which is left."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _TooLarge
        total = 0.0
        while self.at < len(self.tokens) and self.tokens[self.at] != closing and self.tokens[self.at] not in CLOSING.values():
            total += self.raised()
        self.depth -= 1
        return total

    def raised(self) -> float:
        """Bits of one piece with what is raised or stands behind it."""
        operator = self.tokens[self.at]
        bits = self.piece()
        while self.at < len(self.tokens) and self.tokens[self.at] in ("^", "_", "!"):
            sign = self.tokens[self.at]
            self.at += 1
            if sign == "!":
                bits = _factorial(bits)
            elif sign == "^" and operator not in WITH_LIMITS:
                bits = _bounded(max(bits, 1.0) * self.exponent())
            elif self.at < len(self.tokens) and self.piece() > MOST_TERMS_BITS and operator in TERM_BY_TERM:
                raise _TooLarge
        return bits

    def exponent(self) -> float:
        """The largest size that an exponent can have."""
        start = self.at
        bits = self.raised() if start < len(self.tokens) else 0.0  # 9^9^9 is read from the right
        value = rational(" ".join(self.tokens[start : self.at]))
        if value is not None:
            return max(1.0, float(abs(value))) if abs(value) < MOST_BITS else float(MOST_BITS + 1)
        return 2.0 ** min(bits, 64.0)

    def piece(self) -> float:
        """Bits of a number, a letter, a bracket with its content, a command with its arguments."""
        token = self.tokens[self.at]
        self.at += 1
        if token in CLOSING:
            bits = self.until(CLOSING[token])
            self.at += 1
            return bits
        if token in BINOMIALS and self.at < len(self.tokens):
            count = self.piece()
            if count > MOST_COUNT_BITS:
                raise _TooLarge
            return 2.0**count + (self.piece() if self.at < len(self.tokens) else 0.0)
        if token[-1].isdigit():
            return max(1.0, len(token.lstrip("0.")) * BITS_OF_A_DIGIT)
        return 1.0 if token.isalpha() else 0.0


def _factorial(bits: float) -> float:
    if bits > MOST_COUNT_BITS:
        raise _TooLarge
    return _bounded(2.0**bits * max(bits, 1.0))


def _bounded(bits: float) -> float:
    if bits > MOST_BITS:
        raise _TooLarge
    return bits
