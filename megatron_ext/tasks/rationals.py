r"""Exact values of plain arithmetic in LaTeX: integers, decimals, fractions, mixed numbers, powers, + - \cdot and brackets.

Most answers are of this kind, and two of them are compared without a computer algebra system. Nothing is evaluated but by the
grammar below, and exponents and digits are bounded, so that no text takes long.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOKEN = re.compile(r"\s*(?:(\d+\.\d*|\.\d+|\d+)|(\\frac(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[-+*/^(){}]))")
MOST_CHARACTERS, MOST_BITS, MOST_DEPTH = 300, 4_096, 40
DECIMAL = re.compile(r"[-+]?(\d*)\.(\d*)")


class _NotRational(Exception):
    """The text is no arithmetic, or a value too large."""


def rational(text: str) -> Fraction | None:
    """The value of normalised LaTeX, or None where it is not plain arithmetic (or divides by zero, or is too large)."""
    if not text or len(text) > MOST_CHARACTERS or not any(map(str.isdigit, text)):
        return None
    try:
        return _Reader(_tokens(text)).all()
    except (_NotRational, ZeroDivisionError):
        return None


def decimal_places(text: str) -> int | None:
    """Digits after the point of a text that is one decimal number; None for anything else."""
    match = DECIMAL.fullmatch(text.strip())
    return len(match.group(2)) if match and (match.group(1) or match.group(2)) else None


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    while position < len(text.rstrip()):
        match = TOKEN.match(text, position)
        if not match:
            raise _NotRational
        found.append(match.group(1) or match.group(2))
        position = match.end()
    return found


class _Reader:
    """Recursive descent: sum, product, power, atom."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    def all(self) -> Fraction:
        value = self.sum()
        if self.at < len(self.tokens):
            raise _NotRational
        return value

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        if token not in wanted:
            raise _NotRational
        self.at += 1
        return token

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _NotRational
        value = self.signed()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take("+", "-") == "+" else value - self.product()
        self.depth -= 1
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = sign if self.take("+", "-") == "+" else -sign
        return sign * self.product()

    def product(self) -> Fraction:
        value = self.power()
        while token := self.peek():
            if token in ("\\cdot", "*"):
                self.at += 1
                value = _bounded(value * self.signed_power())
            elif token == "/":
                self.at += 1
                value = _bounded(value / self.signed_power())
            elif token in ("(", "{", "\\frac"):  # juxtaposed: 2(3+4); a mixed number is read by `atom`
                value = _bounded(value * self.power())
            else:
                break
        return value

    def signed_power(self) -> Fraction:
        sign = -1 if self.peek() == "-" and self.take("-") else 1
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take("^")
        exponent = self.group() if self.peek() == "{" else self.atom()
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * size > MOST_BITS:
            raise _NotRational
        return base ** int(exponent)

    def atom(self) -> Fraction:
        token = self.peek()
        if token[:1].isdigit() or token.startswith("."):
            self.at += 1
            return self.mixed(token)
        if token == "\\frac":
            self.take("\\frac")
            return self.group() / self.group()
        if token == "(":
            self.take("(")
            value = self.sum()
            self.take(")")
            return value
        return self.group()

    def mixed(self, number: str) -> Fraction:
        r"""A number, with the fraction that may follow a whole one: 1\frac{4}{5}, and `1 4/5`."""
        value = Fraction(number if number != "." else "0")
        if "." in number:
            return value
        if self.peek() == "\\frac":
            self.take("\\frac")
            top, bottom = self.group(), self.group()
            if bottom and 0 <= top / bottom < 1:
                return value + top / bottom
            return value * (top / bottom)
        rest = self.tokens[self.at : self.at + 3]
        if len(rest) == 3 and rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit() and int(rest[0]) < int(rest[2]):
            self.at += 3
            return value + Fraction(int(rest[0]), int(rest[2]))
        return value

    def group(self) -> Fraction:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise _NotRational
    return value
