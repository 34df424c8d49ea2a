r"""What kind of thing an answer is: a scalar, words, a collection, a tuple or interval with its brackets, a union, a matrix, a named value.

`read` turns LaTeX into these, so that order, brackets, names and units are compared by rules, and only scalars need algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_ext.tasks.latex_text import CLOSE, OPEN, balanced, closing, normal, pieces, split_top
from megatron_ext.tasks.units import split_unit

MOST_DEPTH = 6


@dataclass(frozen=True)
class Scalar:
    r"""An expression, in normalised LaTeX without its unit; `multiple` is the factor of words such as million."""

    text: str
    unit: str = ""
    multiple: Fraction = Fraction(1)


@dataclass(frozen=True)
class Words:
    """A name or a word, such as the one of a person or a direction."""

    text: str


@dataclass(frozen=True)
class Collection:
    """Answers of no order: a list without brackets or a set in braces; the same answer twice is once."""

    parts: tuple[Answer, ...]
    is_set: bool = False


@dataclass(frozen=True)
class Bracketed:
    """A tuple, a vector or an interval: parts in order, and the brackets, each one of ( ) [ ]."""

    opening: str
    closing: str
    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Union:
    """Pieces of a set, in no order."""

    parts: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of a matrix or a column vector; `text` is its LaTeX."""

    rows: tuple[tuple[Answer, ...], ...]
    text: str


@dataclass(frozen=True)
class Named:
    """`x = 5`: a name, what it is, and the equation as it stands."""

    name: str
    value: Answer
    text: str


@dataclass(frozen=True)
class Based:
    """A numeral in a base: 2516_8."""

    digits: str
    base: int


Answer = Scalar | Words | Collection | Bracketed | Union | Matrix | Named | Based

NAME_TEXT = (
    r"(?:\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)|(?:\\angle\s*)?(?:\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|varphi|omega|rho|sigma|tau|ell|Delta|Gamma|Omega)|"
    r"[A-Za-z]{1,3}|\\text\s*\{[^{}]*\})'?(?:_(?:\w|\{[^{}]*\}))?(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?)"
)
NAME = re.compile(NAME_TEXT)
MEMBER = re.compile(NAME_TEXT + r"\s*\\in(?![a-zA-Z])\s*")
SET_BUILDER = re.compile(r"\\\{\s*" + NAME_TEXT + r"\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(.*?)\s*\\\}", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SPACED_THOUSANDS = re.compile(r"\d{1,3}(?: \d{3})+")
AND_OR = re.compile(r"\s*(?:,|;)?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*|\s*[,;]\s*")
UNION = re.compile(r"\s*\\cup(?![a-zA-Z])\s*")
EQUALS = re.compile(r"\s*=\s*")
APPROX = re.compile(r"\s*\\approx(?![a-zA-Z])\s*")
ORDER = re.compile(r"\s*(\\le|\\ge|\\ne|<|>)(?![a-zA-Z])\s*")
INSIDE = re.compile(r"\s*[,;]\s*")
MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
ROW, CELL = re.compile(r"\s*\\\\(?:\s*\[[^\]]*\])?\s*"), re.compile(r"\s*&\s*")
BASED = re.compile(r"(-?[0-9A-Fa-f]+)\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*(\d{1,2})\s*\}?\s*\}|(\d))")
WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s.'\u2019-]+[^\W\d_]+)*")
TEXT_NUMBER = re.compile(r"\\text\s*\{\s*([-+]?\d[^{}:]*)\}")  # 12 ways, all of it as text; but no time of day
ARTICLE = re.compile(r"^(?:an?|the) (?=\w{3})")
EMPTY = re.compile(r"\\emptyset|\\\{\s*\\\}|\{\s*\}|(?:\\text\s*\{)?\s*(?:there (?:is|are) )?no (?:real )?solutions?\s*\}?", re.IGNORECASE)
INFINITE, LOW, HIGH = "\\infty", Scalar("-\\infty"), Scalar("\\infty")


def read(text: str, *, comma_separates: bool = False) -> Answer:
    r"""The answer that a box or a problem's file holds.

    `1,234` is a number unless `comma_separates` (the gold answer is a list, so a comma is between two).
    """
    return _read(normal(text), comma_separates, MOST_DEPTH)


def _read(text: str, comma_separates: bool, depth: int) -> Answer:
    if not balanced(text) or depth == 0:
        return Scalar(text)
    if EMPTY.fullmatch(text):
        return Collection((), is_set=True)
    if not comma_separates:
        text = _without_thousands(text)
    text = MEMBER.sub("", text, count=1) if MEMBER.match(text) else text
    if len(sets := split_top(text, UNION)) > 1:
        return Union(tuple(_read(one, comma_separates, depth - 1) for one in sets))
    if len(parts := split_top(text, AND_OR)) > 1:
        return _collection(text, parts, depth)
    for form in (_bracketed, _matrix, _ordered, _equation, _plus_minus):
        if (found := form(text, depth)) is not None:
            return found
    return _scalar(text)


def _without_thousands(text: str) -> str:
    """1,234 as 1234, but within brackets a comma separates: (12,102) is a pair."""
    depth, inside = 0, []
    for position, piece in pieces(text):
        depth += (piece in OPEN and piece != "{") - (piece in CLOSE and piece != "}")
        inside += [depth > 0] * len(piece)
        assert len(inside) == position + len(piece)
    return THOUSANDS.sub(lambda match: match.group() if inside[match.start()] else match.group().replace(",", ""), text)


def _collection(text: str, parts: list[str], depth: int) -> Answer:
    named = NAME.match(text)
    read_parts = _flat([_read(part, False, depth - 1) for part in parts if part])
    if named and read_parts and all(isinstance(part, Named) == (i == 0) for i, part in enumerate(read_parts)):  # x = 1 or 2
        first = read_parts[0]
        assert isinstance(first, Named)
        return Named(first.name, Collection((first.value, *read_parts[1:])), text)
    if read_parts and all(isinstance(part, Bracketed) and _is_half_line(part) for part in read_parts) and " and " not in text:
        return Union(tuple(read_parts))  # x < 1 or x > 3
    return Collection(tuple(read_parts))


def _is_half_line(part: Answer) -> bool:
    return isinstance(part, Bracketed) and (part.parts[0] == LOW or part.parts[-1] == HIGH)


def _flat(parts: list[Answer]) -> list[Answer]:
    flat: list[Answer] = []
    for part in parts:
        flat += part.parts if isinstance(part, Collection) and not part.is_set else [part]
    return flat


def _bracketed(text: str, depth: int) -> Answer | None:
    if match := SET_BUILDER.fullmatch(text):
        return _read(match.group(1), True, depth - 1)
    for opening, close in (("\\langle", "("), ("\\{", "{"), ("(", "("), ("[", "[")):
        if text.startswith(opening) and (end := closing(text, 0)) >= 0:
            ending = next((e for e in ("\\rangle", "\\}", ")", "]") if text[end:] == e), "")
            if not ending:
                return None
            inside = text[len(opening) : end].strip()
            parts = split_top(inside, INSIDE)
            if opening == "\\{":
                return Collection(tuple(_flat([_read(part, True, depth - 1) for part in parts if part])), is_set=True)
            if len(parts) == 1:
                return _read(inside, True, depth - 1) if opening == "(" and ending == ")" else None
            read_parts = tuple(_read(part, True, depth - 1) for part in parts)
            return _interval(close, ")" if ending == "\\rangle" else ending, read_parts)
    if text == "\\mathbb{R}":
        return Bracketed("(", ")", (LOW, HIGH))
    if match := re.fullmatch(r"\\mathbb\{R\} ?\\setminus ?\\\{([^{},]*)\\\}", text):
        return _all_but(_read(match.group(1), True, depth - 1))
    return None


def _interval(opening: str, ending: str, parts: tuple[Answer, ...]) -> Bracketed:
    """At infinity an end is open, whatever is written."""
    if len(parts) == 2 and parts[0] == LOW:
        opening = "("
    if len(parts) == 2 and isinstance(parts[1], Scalar) and parts[1].text.lstrip("+ ") == INFINITE:
        return Bracketed(opening, ")", (parts[0], HIGH))
    return Bracketed(opening, ending, parts)


def _all_but(value: Answer) -> Union:
    return Union((Bracketed("(", ")", (LOW, value)), Bracketed("(", ")", (value, HIGH))))


def _matrix(text: str, depth: int) -> Answer | None:
    match = MATRIX.fullmatch(text)
    if not match:
        return None
    rows = [row for row in split_top(match.group(2).strip(), ROW) if row]
    return Matrix(tuple(tuple(_read(cell, True, depth - 1) for cell in split_top(row, CELL)) for row in rows), text)


def _ordered(text: str, depth: int) -> Answer | None:
    """An inequality of one name between bounds, as the interval it is."""
    sides, signs = split_top(text, ORDER), [match.group(1) for match in ORDER.finditer(text)]
    if len(sides) not in (2, 3) or len(signs) != len(sides) - 1:
        return None
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides, signs = sides[::-1], [{"\\le": "\\ge", "\\ge": "\\le", "<": ">", ">": "<", "\\ne": "\\ne"}[signs[0]]]
    if len(sides) == 3 and all(sign in ("\\ge", ">") for sign in signs):
        sides, signs = sides[::-1], [{"\\ge": "\\le", ">": "<"}[sign] for sign in reversed(signs)]
    if len(sides) == 3 and NAME.fullmatch(sides[1]) and all(sign in ("\\le", "<") for sign in signs):
        bounds = (_read(sides[0], True, depth - 1), _read(sides[2], True, depth - 1))
        return _interval("[" if signs[0] == "\\le" else "(", "]" if signs[1] == "\\le" else ")", bounds)
    if len(sides) != 2 or not NAME.fullmatch(sides[0]) or NAME.fullmatch(sides[1]):
        return None
    bound = _read(sides[1], True, depth - 1)
    if signs[0] == "\\ne":
        return _all_but(bound)
    if signs[0] in ("\\le", "<"):
        return Bracketed("(", "]" if signs[0] == "\\le" else ")", (LOW, bound))
    return Bracketed("[" if signs[0] == "\\ge" else "(", ")", (bound, HIGH))


def _equation(text: str, depth: int) -> Answer | None:
    """`x = 5`, `5 = x`, `x = 10/2 = 5`; of `7/3 \\approx 2.33` the exact side; other equations are scalars."""
    if len(sides := split_top(text, APPROX)) > 1:
        return _read(sides[0] if not NAME.fullmatch(sides[0]) else f"{sides[0]} = {sides[1]}", True, depth - 1)
    sides = split_top(text, EQUALS)
    if len(sides) < 2 or not all(sides):
        return None
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides.reverse()
    if NAME.fullmatch(sides[0]):
        return Named(re.sub(r"\s", "", sides[0]), _read(sides[-1], True, depth - 1), text)
    if not any(re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", side)) for side in sides):  # 2 + 3 = 5
        return _read(sides[-1], True, depth - 1)
    return None


def _plus_minus(text: str, depth: int) -> Answer | None:
    if "\\pm" not in text:
        return None
    plus = text.replace("\\pm", "+").replace("\\mp", "-")
    minus = text.replace("\\pm", "-").replace("\\mp", "+")
    return Collection((_read(plus.lstrip("+ "), True, depth - 1), _read(minus, True, depth - 1)))


def _scalar(text: str) -> Answer:
    if match := BASED.fullmatch(text):
        return Based(match.group(1), int(match.group(2) or match.group(3)))
    if match := TEXT_NUMBER.fullmatch(text):
        text = match.group(1)
    rest, unit, multiple = split_unit(text)
    if unit == "" and multiple == 1 and (words := _words(rest)) is not None:
        return words
    if rest.startswith("(") and closing(rest, 0) == len(rest) - 1:
        rest = rest[1:-1].strip()
    rest = rest.lstrip("+ ") if rest[:1] == "+" else rest
    return Scalar(rest.replace(" ", "") if SPACED_THOUSANDS.fullmatch(rest) else rest, unit, multiple)


def _words(text: str) -> Words | None:
    r"""Words in \text{...}, or bare words of three letters and more."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip(" .()")
    if plain == text.strip(" .()") and not WORDS.fullmatch(plain):
        return None
    if plain and re.fullmatch(r"[^\\^{}=+*/]*", plain) and any(map(str.isalpha, plain)):
        return Words(ARTICLE.sub("", re.sub(r"[\s.,]+", " ", plain).strip().casefold()))
    return None
