"""The axes of the figures of reinforcement learning: shares, lengths, rewards, rollout steps."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_ext.reports.format import percent, rate, token_unit
from megatron_ext.reports.read import Reading


def share_axis(axes: Axes) -> None:
    """From 0, a little below it so that a curve that stays there is seen; whole percents."""
    top = min(1.05, max(0.1, axes.get_ylim()[1]))
    axes.set_ylim(-0.03 * top, top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y, 0)))


def level_axis(axes: Axes, least: float) -> None:
    """At least so much from bottom to top: what hardly moves should look so."""
    low, high = axes.get_ylim()
    lacking = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - lacking, high + lacking)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))


def length_axis(axes: Axes) -> None:
    """Powers of two, so that short answers and a cap far above them are both seen; a narrow range is labelled evenly."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    if high < 2 * low:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(2), middle * math.sqrt(2)
        axes.set_ylim(low, high)
    _fine_ticks(axes, 2, (1, 1.25, 1.5, 1.75) if high < 4 * low else (1, 1.5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: length(y)))


def factor_axis(axes: Axes) -> None:
    """Powers of ten, written as in the tables."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rate(y)))
    _fine_ticks(axes, 10, (1, 2, 5))


def step_axis(axes: Axes) -> None:
    """Whole rollout steps."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))


def steps_label(reading: Reading) -> str:
    """The paper's plots count updates; the axis says how they are had from rollout steps."""
    per_step = sorted({s.config.rollouts.updates_per_step for s in reading.rl})
    times = " or ".join(str(number) for number in per_step)
    return f"rollout steps (the paper's plots count updates: {times} per rollout step here)"


def length(value: float) -> str:
    """512, 1.5k, 8k: caps are powers of two, and k is 1,024 where it comes out even."""
    if value >= 1024 and value % 256 == 0:
        return f"{value / 1024:g}k"
    size, letter = token_unit(value)
    return f"{value / size:g}{letter}" if value >= 10_000 else f"{value:g}"


def _fine_ticks(axes: Axes, base: int, multiples: tuple[float, ...]) -> None:
    """Ticks at powers of the base; at multiples of them too where the axis spans few."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=base, subs=multiples if high < base**4 * low else (1,), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
