"""Curves of several runs in one panel: smoothed where they are long, in turns where they coincide, intervals behind them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from megatron_ext.reports.coinciding import Curve, marked, stretches
from megatron_ext.reports.figures import smoothing_steps
from megatron_ext.reports.rl_looks import WIDTH_POINTS, Look
from megatron_ext.reports.rl_rows import RLPoint
from megatron_ext.reports.style import MUTED, smooth, taking_turns

MOST_MARKS = 14  # of a curve; more of them hide the line, and their intervals each other
SMOOTHED = 5  # validations of a longer curve that its bold line is the centred mean of
BAR_SHARE = 0.025  # of the axis between the bars of two runs
DASH_POINTS = 4.0  # in line widths; of curves that coincide
FILLS = 0.3  # the most ink that all bands together lay on one spot


def draw_validations(axes: Axes, curves: dict[str, Curve], of_run: dict[str, Look]) -> None:
    """Every point where they are few; else they are faint, and bold is the mean of `SMOOTHED`, with every so many marked."""
    bold = {}
    for name, (x, y) in curves.items():
        if len(x) > MOST_MARKS:
            axes.plot(x, y, color=of_run[name].colour, alpha=0.25, linewidth=0.7)
            kept = ~np.isnan(y)
            x, y = x[kept], smooth(y[kept], SMOOTHED)
        bold[name] = x, y
    _draw_lines(axes, bold, of_run)
    every = max(1, *(-(-len(x) // MOST_MARKS) for x, _ in bold.values()))
    for name, points in marked(bold, every).items():
        axes.plot(*bold[name], linestyle="", markevery=points, **of_run[name].mark)


def draw_steps(axes: Axes, curves: dict[str, Curve], of_run: dict[str, Look]) -> None:
    """Single rollout steps faint, their moving mean bold; a mark only where a run has one step."""
    bold = {}
    for name, (x, y) in curves.items():
        if len(x):
            axes.plot(x, y, color=of_run[name].colour, alpha=0.22, linewidth=0.7)
            bold[name] = x, smooth(y, smoothing_steps(len(y)))
            if len(x) == 1:
                axes.plot(x, y, **of_run[name].mark)
    _draw_lines(axes, bold, of_run)


def draw_intervals(axes: Axes, runs: dict[str, tuple[RLPoint, ...]], of_run: dict[str, Look]) -> None:
    """Few points: a band with thin edges, one for runs that have the same. Many: a bar beside the end, bars of other runs beside it."""
    bands: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for place, (name, points) in enumerate(runs.items()):
        if 1 < len(points) <= MOST_MARKS:
            bands.setdefault(tuple((p.step, p.low, p.high) for p in points), []).append(of_run[name].colour)
        else:
            first, last = points[0].step, points[-1].step
            end = last + (0 if len(points) == 1 else BAR_SHARE * (place + 1) * (last - first))
            axes.vlines(end, points[-1].low, points[-1].high, color=of_run[name].colour, linewidth=1.4)
    for band, colours in bands.items():
        x, low, high = zip(*band, strict=True)
        colour = colours[0] if len(colours) == 1 else MUTED
        axes.fill_between(x, low, high, color=colour, alpha=min(0.12, FILLS / len(bands)), linewidth=0)
        for edge in (low, high):
            axes.plot(x, edge, color=colour, alpha=0.45, linewidth=0.6)


def _draw_lines(axes: Axes, curves: dict[str, Curve], of_run: dict[str, Look]) -> None:
    """Each in its own line style; where several run, dashes in their colours take turns."""
    for name, own in stretches(curves).items():
        x, y = curves[name]
        for part in own:
            count = len(part.names)
            dashes = taking_turns(part.names.index(name), count, DASH_POINTS)
            rule = of_run[name].rule if count == 1 else {"linestyle": dashes, "dash_capstyle": "butt"}
            here = slice(part.first, part.last + 1)
            axes.plot(x[here], y[here], color=of_run[name].colour, linewidth=WIDTH_POINTS, **rule)
