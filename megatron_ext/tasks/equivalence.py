r"""Whether an answer is the gold answer: cheap exact rules first, algebra last. Not symmetric: the gold says what was asked for.

- Numbers are compared exactly. A decimal is the same as a fraction or root that it cannot write when it gives at least six
  significant digits, all right. No factor of 100 is forgiven.
- Lists and sets have no order; tuples, vectors and intervals have one, and brackets count. An inequality is its interval.
- `x = 5` is 5, but x = 5 is not y = 5. A unit may be left out or added, but not be another; 5 m is 500 cm.
- A gold in percent may be answered as its number (62.5), its percentage or its value (0.625).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from megatron_ext.tasks import symbolic
from megatron_ext.tasks.answers import Answer, Based, Bracketed, Collection, Matrix, Named, Scalar, Union, Words, read
from megatron_ext.tasks.latex_text import normal
from megatron_ext.tasks.rationals import decimal_places, rational
from megatron_ext.tasks.units import PERCENT, ratio

Way = Literal["exact", "normalised", "value", "structure", "math-verify"]
SIGNIFICANT_DIGITS = 6  # of a decimal that stands for what it cannot write


@dataclass(frozen=True)
class Finding:
    """Whether two answers are the same (None: the answer cannot be read), the last means it took, and why not."""

    same: bool | None
    way: Way
    why: str = ""


def compare(gold: str, answer: str, *, is_list: bool = False, unit: str = "", tolerance: Fraction | None = None) -> Finding:
    """Compare an answer with a gold one; both are LaTeX as they stand in a box.

    `is_list`: the gold holds several answers, between commas. `unit`: the unit of a gold that is written without.
    `tolerance`: the largest absolute difference that is right.
    """
    if gold.strip() == answer.strip():
        return Finding(True, "exact")
    if normal(gold) == normal(answer):
        return Finding(True, "normalised")
    gold_read = _gold(gold, is_list, unit)
    is_many = is_list or isinstance(gold_read, Collection | Bracketed | Union)
    return _same(gold_read, read(answer, comma_separates=is_many), tolerance)


@functools.lru_cache(maxsize=4096)
def _gold(gold: str, is_list: bool, unit: str) -> Answer:
    found = read(gold, comma_separates=is_list)
    with_unit = read(f"0 {unit}" if unit.startswith("^") else f"0\\text{{ {unit} }}") if unit else found
    if isinstance(found, Scalar) and isinstance(with_unit, Scalar) and not found.unit:
        return replace(found, unit=with_unit.unit)
    return found


def is_readable(gold: str, *, is_list: bool = False) -> bool:
    """Whether every part of a gold answer is a number, words of one kind, or something math-verify can read."""
    return bool(gold.strip()) and all(_is_readable(part) for part in _leaves(read(gold, comma_separates=is_list)))


def is_number(gold: str) -> bool:
    """Whether a gold answer is one number by itself: an integer, a decimal, a fraction, plain arithmetic of these, but no unit."""
    leaf = read(gold)
    return isinstance(leaf, Scalar) and not leaf.unit and rational(leaf.text) is not None


def _is_readable(leaf: Answer) -> bool:
    if isinstance(leaf, Scalar):
        return rational(leaf.text) is not None or symbolic.expression(leaf.text) is not None
    return not isinstance(leaf, Words) or len(leaf.text.split()) <= MOST_WORDS


MOST_WORDS = 6


def _leaves(answer: Answer) -> list[Answer]:
    if isinstance(answer, Collection | Bracketed | Union):
        return [leaf for part in answer.parts for leaf in _leaves(part)]
    if isinstance(answer, Matrix):
        return [leaf for row in answer.rows for cell in row for leaf in _leaves(cell)]
    return _leaves(answer.value) if isinstance(answer, Named) else [answer]


# --- structures -----------------------------------------------------------------------------------------


def _same(gold: Answer, answer: Answer, tolerance: Fraction | None) -> Finding:
    if isinstance(gold, Collection) != isinstance(answer, Collection):
        gold, answer = _each_named(gold), _each_named(answer)
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _named(gold, answer, tolerance)
    if isinstance(gold, Collection) != isinstance(answer, Collection):
        gold, answer = _only(gold), _only(answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _matrices(gold, answer, tolerance)
    if isinstance(gold, Collection) and isinstance(answer, Collection):
        return _unordered(gold.parts, answer.parts, tolerance)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _unordered(gold.parts, answer.parts, tolerance)
    if isinstance(gold, Bracketed) and isinstance(answer, Bracketed):
        if (gold.opening, gold.closing) != (answer.opening, answer.closing):
            return Finding(False, "structure", f"brackets {answer.opening}{answer.closing}, not {gold.opening}{gold.closing}")
        return _ordered(gold.parts, answer.parts, tolerance)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _based(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _words(gold, answer)
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _scalars(gold, answer, tolerance)
    return Finding(False, "structure", f"a {_kind(answer)}, not a {_kind(gold)}")


def _kind(answer: Answer) -> str:
    return {"Bracketed": "tuple or interval", "Collection": "list or set"}.get(type(answer).__name__, type(answer).__name__.lower())


def _only(answer: Answer) -> Answer:
    return answer.parts[0] if isinstance(answer, Collection) and len(answer.parts) == 1 else answer


def _each_named(answer: Answer) -> Answer:
    """(p, q) = (4, 9) as p = 4 and q = 9."""
    if not isinstance(answer, Named) or not isinstance(answer.value, Bracketed):
        return answer
    names = answer.name.strip("()").split(",")
    if len(names) < 2 or len(names) != len(answer.value.parts):
        return answer
    return Collection(tuple(Named(name, part, answer.text) for name, part in zip(names, answer.value.parts, strict=True)))


def _named(gold: Answer, answer: Answer, tolerance: Fraction | None) -> Finding:
    if isinstance(gold, Named) and isinstance(answer, Named):
        return _same(gold.value, answer.value, tolerance) if gold.name == answer.name else _equations(gold, answer)
    if isinstance(gold, Named):
        if isinstance(answer, Scalar) and "=" in answer.text:
            return _equations(gold, answer)
        return _same(gold.value, answer, tolerance)
    assert isinstance(answer, Named)
    if isinstance(gold, Scalar) and "=" in gold.text:
        return _equations(gold, answer)
    return _same(gold, answer.value, tolerance)


def _equations(gold: Named | Scalar, answer: Named | Scalar) -> Finding:
    if any(isinstance(one, Named) and not isinstance(one.value, Scalar) for one in (gold, answer)):
        return Finding(False, "structure", "values of another name, or of an equation")
    return _by_algebra(gold.text, answer.text)


def _matrices(gold: Answer, answer: Answer, tolerance: Fraction | None) -> Finding:
    columns = [
        tuple(row[0] for row in m.rows) if isinstance(m, Matrix) and all(len(row) == 1 for row in m.rows) else None for m in (gold, answer)
    ]
    for column, other in ((columns[0], answer), (columns[1], gold)):
        if column and isinstance(other, Bracketed) and (other.opening, other.closing) == ("(", ")"):  # a vector in one line
            return _ordered(column, other.parts, tolerance) if other is answer else _ordered(other.parts, column, tolerance)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return Finding(False, "structure", "a matrix of another shape")
        return _ordered(_cells(gold), _cells(answer), tolerance)
    texts = [one.text if isinstance(one, Matrix | Scalar) else None for one in (gold, answer)]
    if texts[0] is None or texts[1] is None:
        return Finding(False, "structure", f"a {_kind(answer)}, not a {_kind(gold)}")
    return _by_algebra(texts[0], texts[1])


def _cells(matrix: Matrix) -> tuple[Answer, ...]:
    return tuple(cell for row in matrix.rows for cell in row)


def _ordered(gold: tuple[Answer, ...], answer: tuple[Answer, ...], tolerance: Fraction | None) -> Finding:
    if len(gold) != len(answer):
        return Finding(False, "structure", f"{len(answer)} parts, not {len(gold)}")
    way: Way = "structure"
    for number, (one, other) in enumerate(zip(gold, answer, strict=True), start=1):
        found = _same(one, other, tolerance)
        if not found.same:
            return replace(found, why=f"part {number}: {found.why}")
        way = "math-verify" if found.way == "math-verify" else way
    return Finding(True, way)


def _unordered(gold: tuple[Answer, ...], answer: tuple[Answer, ...], tolerance: Fraction | None) -> Finding:
    """Each gold part is answered, and each answer is a gold part; named parts that lose their names keep their order."""
    if _names(gold) > 1 and _names(answer) == 0:
        return _ordered(gold, answer, tolerance)
    if max(len(gold), len(answer)) > MOST_PARTS:
        return _ordered(gold, answer, tolerance)
    unmatched = set(range(len(gold)))
    ways: set[Way] = set()
    for part in answer:
        findings = [(number, _same(one, part, tolerance)) for number, one in _likely_first(gold, part)]
        matching = [(number, found) for number, found in findings if found.same]
        if not matching:
            unreadable = any(found.same is None for _, found in findings)
            return Finding(None if unreadable else False, findings[0][1].way if findings else "structure", "a part that is not asked for")
        unmatched -= {number for number, _ in matching}
        ways |= {found.way for _, found in matching}
    if unmatched:
        return Finding(False, "structure", f"{len(unmatched)} of {len(gold)} parts are missing")
    return Finding(True, "math-verify" if "math-verify" in ways else "structure")


MOST_PARTS = 60  # pairs are compared each with each


def _names(parts: tuple[Answer, ...]) -> int:
    return len({part.name for part in parts if isinstance(part, Named)})


def _likely_first(gold: tuple[Answer, ...], part: Answer) -> list[tuple[int, Answer]]:
    """The gold parts that are written the same, if there are any: the others need not be tried."""
    same = [(number, one) for number, one in enumerate(gold) if one == part]
    return same or list(enumerate(gold))


# --- leaves ---------------------------------------------------------------------------------------------


def _based(gold: Answer, answer: Answer) -> Finding:
    """Numerals are the same digits in the same base; one may leave its base out."""
    digits = [one.digits if isinstance(one, Based) else one.text if isinstance(one, Scalar) else "" for one in (gold, answer)]
    bases = {one.base for one in (gold, answer) if isinstance(one, Based)}
    same = len(bases) == 1 and digits[0].lower() == digits[1].lower()
    return Finding(same, "value", "" if same else "other digits or another base")


def _words(gold: Answer, answer: Answer) -> Finding:
    texts = [one.text if isinstance(one, Words) else f"{one.text} {one.unit}" if isinstance(one, Scalar) else "" for one in (gold, answer)]
    same = texts[0].casefold().strip(" ()") == texts[1].casefold().strip(" ()") != ""
    return Finding(same, "normalised", "" if same else "other words")


def _scalars(gold: Scalar, answer: Scalar, tolerance: Fraction | None) -> Finding:
    factor = Fraction(1)
    if gold.unit and answer.unit and PERCENT not in (gold.unit, answer.unit):
        between = ratio(gold.unit, answer.unit)
        if between is None:
            return Finding(False, "value", f"the unit is {answer.unit}, not {gold.unit}")
        factor = between
    gold_value, value = rational(gold.text), rational(answer.text)
    if gold_value is not None and value is not None:
        return _numbers(gold, gold_value * gold.multiple, answer, value * answer.multiple * factor, tolerance)
    if gold.multiple != answer.multiple or factor != 1 or (PERCENT in (gold.unit, answer.unit) and gold.unit != answer.unit):
        return Finding(False, "value", "another unit or multiple")
    if gold.text.replace(" ", "") == answer.text.replace(" ", ""):
        return Finding(True, "normalised")
    decimal = tolerance is not None or (value is not None and decimal_places(answer.text) is not None)
    if (
        decimal
        and (gold_constant := symbolic.constant(gold.text)) is not None
        and (near := value or symbolic.constant(answer.text)) is not None
    ):
        same = abs(near - gold_constant) <= (tolerance if tolerance is not None else _last_place(answer.text, near))
        return Finding(same, "math-verify", "" if same else "another value")
    return _by_algebra(gold.text, answer.text)


def _numbers(gold: Scalar, gold_value: Fraction, answer: Scalar, value: Fraction, tolerance: Fraction | None) -> Finding:
    allowed = tolerance or Fraction(0)
    if not _terminates(gold_value) and tolerance is None and answer.multiple == 1 and answer.unit != PERCENT:
        allowed = _last_place(answer.text, value)
    near = any(abs(one - gold_value) <= allowed for one in _readings(gold, answer, value))
    return Finding(near, "value", "" if near else "another value")


def _readings(gold: Scalar, answer: Scalar, value: Fraction) -> list[Fraction]:
    """What an answer's number can mean, in the gold's own terms, when one of the two is a percentage."""
    if gold.unit == PERCENT:  # 62.5 % may be given as 62.5 %, 62.5 or 0.625
        return [value] if answer.unit == PERCENT else [value, value * 100]
    if answer.unit == PERCENT:  # 25 % for 0.25; and for 25, which a question after a percentage asks for
        return [value / 100, *([value] if abs(value) > 1 else [])]
    return [value]


def _terminates(value: Fraction) -> bool:
    """Whether a decimal can write it."""
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def _last_place(text: str, value: Fraction) -> Fraction:
    """The last decimal place of a number that gives enough digits to stand for another; 0 for any other text."""
    places = decimal_places(text)
    if places is None or len(str(abs(int(value * 10**places)))) < SIGNIFICANT_DIGITS:
        return Fraction(0)
    return Fraction(1, 10**places)


def _by_algebra(gold: str, answer: str) -> Finding:
    same = symbolic.same(gold, answer)
    return Finding(same, "math-verify", "" if same else "cannot be read" if same is None else "another value")
