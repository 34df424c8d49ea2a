"""Whether two expressions are equal, where that can be said in a millisecond; None where a computer algebra system must decide.

Polynomials are equal when their difference, multiplied out, is nothing. Other expressions are certainly not equal when their
values at one point differ; that values agree there says nothing.
"""

from __future__ import annotations

import hashlib
from math import comb, prod

import sympy
from sympy.polys.domains import QQ
from sympy.polys.rings import PolyElement, PolyRing

MOST_TERMS = 300  # of a polynomial multiplied out
MOST_NODES = 200  # of an expression whose value is taken
DIGITS, WORKING_DIGITS = 15, 100
SURE_DIFFERENCE = sympy.Float("1e-8")  # relative, and absolute below 1: far more than the rounding of 15 digits
UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)  # their values may take for ever


def quickly_equal(gold: sympy.Expr, answer: sympy.Expr) -> bool | None:
    """Whether they are equal; None where neither way can tell."""
    symbols = gold.free_symbols | answer.free_symbols
    degrees = [_degree(side) for side in (gold, answer)]
    if None not in degrees and comb(max(degree or 0 for degree in degrees) + len(symbols), len(symbols)) <= MOST_TERMS:
        ring = PolyRing(sorted(symbols, key=str) or ["x"], QQ)
        return bool(_polynomial(gold, ring) == _polynomial(answer, ring))
    values = [_value(side) for side in (gold, answer)]
    if values[0] is not None and values[1] is not None and _far_apart(*values):
        return False
    return None


def _degree(side: sympy.Basic) -> int | None:
    """The degree of a polynomial with rational coefficients, before anything cancels; None for anything else."""
    if side.is_Rational:
        return 0
    if side.is_Symbol:
        return 1
    if side.is_Pow:
        base, exponent = side.args
        if exponent == -1 and base.is_Rational and not base.is_zero:  # so a fraction is read
            return 0
        below = _degree(base) if exponent.is_Integer and 0 < exponent <= MOST_TERMS else None
        return None if below is None else below * int(exponent)
    if not side.is_Add and not side.is_Mul:
        return None
    parts = [_degree(part) for part in side.args]
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else sum(known) if side.is_Mul else max(known)


def _polynomial(side: sympy.Basic, ring: PolyRing) -> PolyElement:
    """Multiplied out; sympy's own `expand` leaves x - x as it was read."""
    if side.is_Rational:
        return ring(QQ(side.p, side.q))
    if side.is_Symbol:
        return ring.gens[ring.symbols.index(side)]
    if side.is_Pow:
        base, exponent = side.args
        return ring(QQ(base.q, base.p)) if exponent == -1 else _polynomial(base, ring) ** int(exponent)
    parts = [_polynomial(part, ring) for part in side.args]
    return sum(parts, ring.zero) if side.is_Add else prod(parts, start=ring.one)


def _value(side: sympy.Expr) -> sympy.Expr | None:
    """The value to `DIGITS` digits at a point that the letters' names fix; None where it has none, or not surely so many digits."""
    if side.has(*UNFINISHED) or sum(1 for _ in zip(sympy.preorder_traversal(side), range(MOST_NODES + 1), strict=False)) > MOST_NODES:
        return None
    point = {symbol: _coordinate(str(symbol)) for symbol in side.free_symbols}
    try:
        value = side.evalf(DIGITS, subs=point, maxn=WORKING_DIGITS, strict=True)
        parts = value.as_real_imag()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - sympy raises exceptions of every kind where there is no value, or none so exact
        return None
    return value if all(part.is_Number and part.is_finite for part in parts) else None


def _coordinate(name: str) -> sympy.Float:
    """A number in [0.6, 1.4) for a letter: powers of powers of such stay small, and square roots real."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
    return sympy.Float(0.6 + 0.8 * draw, 30)


def _far_apart(one: sympy.Expr, other: sympy.Expr) -> bool:
    size = max(sympy.Float(1), abs(one), abs(other))
    return bool(abs(one - other) > SURE_DIFFERENCE * size)
