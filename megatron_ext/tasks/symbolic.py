r"""Equality of expressions by math-verify: the slow path, for what the rules of `equivalence` leave open.

Its LaTeX grammar is called with the case of letters kept: math-verify's own `parse` lowers them, so that \pi(R^2-r^2) is 0. Its
way to read plain text, an evaluator of Python, is never called. Its time-outs are alarms, which work only in a main thread, and are
switched off: whoever calls this bounds the time from outside.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from megatron_ext.tasks.magnitude import too_large
from megatron_ext.tasks.quick_equality import quickly_equal

MOST_CHARACTERS = 600
DIGITS = 30  # of a constant that a decimal is compared with
# Powers of powers, and exponents that no answer has; `magnitude` finds the less plain ones.
HUGE = re.compile(r"\d\s*\^\s*\{?\s*\d+\s*\^|\^\s*\{?\s*-?\d{5,}|\d{5,}\s*\)?!|!\s*\)?!")
PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}(?:\s+[a-zA-Z]{2,}){2,}")  # which the grammar takes for a product of letters
DECIMAL = re.compile(r"(?<![\w.])(\d*)\.(\d+)")
NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)
FLOAT_ROUNDING, NUMERIC_PRECISION = 6, 15  # math-verify's own; no decimal reaches the first, see `_exact_decimals`

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once a process that its alarms are off


class AlgebraError(Exception):
    """The comparison itself failed, on expressions that could be read."""


@functools.lru_cache(maxsize=4096)
def expression(text: str) -> sympy.Basic | None:
    """Normalised LaTeX as an expression; None where math-verify's grammar cannot read it."""
    if not text or len(text) > MOST_CHARACTERS or HUGE.search(text) or PROSE.search(text) or too_large(text):
        return None
    latex = re.sub(r"(\d+(?:\.\d+)?)\s*\\text\{degree\}", r"(\1 \\cdot \\frac{\\pi}{180})", text)
    latex = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", latex)
    latex = re.sub(r"_\s*\{\s*\\(max|min)\s*\}", r"_{\1}", _exact_decimals(latex))
    try:
        latex = normalize_latex(latex, NORMALIZATION)
        found = latex2sympy(latex, is_real=True, normalization_config=None, conversion_config=CONVERSION)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the grammar raises nothing more special for text that it cannot read
        return None
    return _with_imaginary_unit(found) if isinstance(found, sympy.Basic | sympy.MatrixBase) else None


def _exact_decimals(latex: str) -> str:
    """0.5x as a half of x: two expressions are then equal or not, with no rounding between."""
    return DECIMAL.sub(lambda match: f"{{\\frac{{{int((match[1] or '') + match[2])}}}{{{10 ** len(match[2])}}}}}", latex)


def _with_imaginary_unit(found: sympy.Basic) -> sympy.Basic:
    """The letter i as the imaginary unit."""
    letters = [symbol for symbol in found.free_symbols if str(symbol) == "i"]
    return found.subs(dict.fromkeys(letters, sympy.I)) if letters else found


def same(gold: str, answer: str) -> bool | None:
    """Whether two expressions (or equations, or inequalities) are equal; None where the answer cannot be read.

    `AlgebraError` where sympy fails on them.
    """
    gold_expression, answer_expression = expression(gold), expression(answer)
    if answer_expression is None:
        return None
    if gold_expression is None:
        return False
    try:
        return _same(gold_expression, answer_expression)
    except MemoryError:
        raise
    except Exception as cause:  # sympy raises exceptions of every kind
        raise AlgebraError(f"{type(cause).__name__}: {cause}"[:200]) from cause


def _same(gold: sympy.Basic, answer: sympy.Basic) -> bool:
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq):
        return _same_equation(gold, answer)
    if isinstance(gold, sympy.Eq) or isinstance(answer, sympy.Eq):
        return False  # an equation is no expression; where one names a value, the value was compared
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and (quick := quickly_equal(gold, answer)) is not None:
        return quick
    settings = {"float_rounding": FLOAT_ROUNDING, "numeric_precision": NUMERIC_PRECISION, "timeout_seconds": None}
    return bool(verify(gold, answer, **settings, raise_on_error=True))


def _same_equation(gold: sympy.Eq, answer: sympy.Eq) -> bool:
    """Whether one is a multiple of the other, once denominators are cleared."""
    if gold.free_symbols != answer.free_symbols:
        return False
    gold_side, answer_side = (sympy.expand(sympy.together(side.lhs - side.rhs).as_numer_denom()[0]) for side in (gold, answer))
    if gold_side.is_zero or answer_side.is_zero:
        return bool(gold_side.is_zero and answer_side.is_zero)
    return not sympy.cancel(gold_side / answer_side).free_symbols


def constant(text: str) -> Fraction | None:
    """The value of an expression without letters to `DIGITS` digits; None where it has letters or is not real."""
    found = expression(text)
    if not isinstance(found, sympy.Expr) or found.free_symbols:
        return None
    try:
        value = found.evalf(DIGITS)
    except MemoryError:
        raise
    except Exception as cause:  # as above
        raise AlgebraError(f"{type(cause).__name__}: {cause}"[:200]) from cause
    return Fraction(str(value)) if isinstance(value, sympy.Float | sympy.Integer | sympy.Rational) and value.is_finite else None
