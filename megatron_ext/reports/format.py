"""Numbers as people read them: tokens, learning rates, times, rates. Pure."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"  # what stands in a table where there is no number
_TOKEN_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def token_unit(largest: float) -> tuple[float, str]:
    """Divisor and letter for an axis of tokens: k, M, B or T."""
    return next(((size, letter) for size, letter in _TOKEN_UNITS if largest >= size), (1.0, ""))


def tokens(value: float | None) -> str:
    """20971520000 -> 20.97B."""
    if value is None:
        return NONE
    size, letter = token_unit(abs(value))
    return f"{value / size:.4g}{letter}"


def count(value: float | None) -> str:
    """12345 -> 12,345."""
    return NONE if value is None else f"{value:,.0f}"


def amount(value: float | None) -> str:
    """Tokens to the last one where they are few, else as `tokens`; summary.json has them exactly."""
    return count(value) if value is None or value < 1e8 else tokens(value)


def rate(value: float | None, decimals: int = 2) -> str:
    """A learning rate, or what else is small: 2e-05 -> 2e-5."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def loss(value: float | None) -> str:
    """A loss in nats a token, three decimals."""
    return NONE if value is None else f"{value:.3f}"


def change(value: float | None, decimals: int = 3) -> str:
    """A difference, always with its sign."""
    if value is None:
        return NONE
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}".replace("-", MINUS) if rounded else f"{0:.{decimals}f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share: 0.055 -> 5.5 %."""
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points."""
    return NONE if value is None else change(100 * value, 2)


def flops(value: float | None) -> str:
    """FLOP/s with an SI prefix."""
    return _si(value, "FLOP/s")


def memory(value: float | None) -> str:
    """Bytes as MiB or GiB."""
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def seconds(value: float | None) -> str:
    """A length of time in the two units that matter, to three digits or so: 0.00858 -> 8.58 ms, 3725 -> 1 h 02 min."""
    if value is None:
        return NONE
    if value < 60 and value == round(value):
        return f"{value:.0f} s"
    if value < 0.9995:
        return f"{1000 * value:.{2 if value < 0.01 else 1 if value < 0.1 else 0}f} ms"
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def short_hash(value: str) -> str:
    """The first 12 characters of a hash."""
    return value[:12] or NONE


def many(number: int, one: str, plural: str = "") -> str:
    """1 step, 2 steps."""
    return f"{number:,} {one if number == 1 else plural or one + 's'}"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _si(value: float | None, unit: str) -> str:
    if value is None:
        return NONE
    size, letter = next(((s, x) for s, x in _SI if abs(value) >= s), (1.0, ""))
    return f"{value / size:.3g} {letter}{unit}"
