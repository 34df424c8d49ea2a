"""The figures of reinforcement learning. Each function draws one PNG, or says by False that there is nothing to draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_ext.reports.figures import smoothing_steps
from megatron_ext.reports.format import percent, rate, token_unit
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_rows import RLCurveRow, RLPoint
from megatron_ext.reports.rl_tables import ALL_SETS
from megatron_ext.reports.style import MUTED, canvas, legend_columns, legend_inches, smooth, stage_colours, stage_lines
from megatron_ext.reports.tables import number, parent_name

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
MOST_MARKS = 14  # of a curve; more of them hide the line, and their intervals each other
SMOOTHED = 5  # validations of a longer curve that its bold line is the centred mean of
CAP_DASHES = 3.0  # points; caps that coincide take turns
BAR_SHARE = 0.025  # of the axis between the bars of two runs
LEAST_GAP = 1e-8  # where two probabilities agree to the last bit, on an axis of powers of ten


@dataclass(frozen=True)
class Look:
    """How a run is drawn in every panel."""

    label: str
    colour: str
    line: str
    marker: str


def looks(reading: Reading) -> dict[str, Look]:
    """Of each run: the colour of its start; its start's name where that tells runs apart."""
    colours, lines = stage_colours(reading), stage_lines(reading)
    starts = [str(parent_name(s)) for s in reading.rl]
    found = {}
    for i, stage in enumerate(reading.rl):
        label = stage.name if len(set(starts)) < len(starts) else f"RL from {starts[i]}"
        label += "" if stage.state == "done" else f" ({'unfinished' if stage.state == 'begun' else stage.state})"
        found[stage.name] = Look(label, colours[stage.name], lines[stage.name], MARKERS[i % len(MARKERS)])
    return found


def draw_curves(reading: Reading, rows: list[RLCurveRow], path: Path) -> bool:
    """Accuracy above, mean length of correct responses below, over rollout steps; one column a set."""
    if not rows:
        return False
    sets = sorted(dict.fromkeys(row.set for row in rows), key=lambda name: name == ALL_SETS)
    of_run = _measured(looks(reading), {row.stage for row in rows})
    width = 10.0 if len(sets) > 1 else 7.2
    names = [look.label for look in of_run.values()] + ["length cap"]
    with canvas(path, width, 5.0 + legend_inches(names, width)) as figure:
        grid = figure.subplots(2, len(sets), sharex=True, squeeze=False)
        for column, name in enumerate(sets):
            above, below = grid[0][column], grid[1][column]
            here = [row for row in rows if row.set == name]
            for row in here:
                _draw_accuracy(above, row.points, of_run[row.stage], list(of_run).index(row.stage))
                _draw_lengths(below, row.points, of_run[row.stage])
            drawn = [stage for stage in reading.rl if any(row.stage == stage.name for row in here)]
            _draw_caps(below, drawn, of_run)
            _draw_cap_changes(above, drawn, of_run)
            above.set_title(_title(name, here))
            _share_axis(above)
            _length_axis(below)
            _step_axis(below)
        grid[0][0].set_ylabel("accuracy")
        grid[1][0].set_ylabel("tokens of correct responses")
        figure.supxlabel(_steps_label(reading), fontsize=9)
        figure.legend(handles=_handles(of_run), loc="outside upper left", ncols=legend_columns(names, width))
    return True


def _measured(of_run: dict[str, Look], measured: set[str]) -> dict[str, Look]:
    """The same looks; runs without a curve say so."""
    return {name: look if name in measured else replace(look, label=f"{look.label}, no validation") for name, look in of_run.items()}


def draw_training(reading: Reading, path: Path) -> bool:
    """What the rollouts and updates of every run say of its health, over rollout steps."""
    stages = [s for s in reading.rl if s.rl]
    if not stages:
        return False
    of_run = looks(reading)
    names = [of_run[s.name].label for s in stages] + ["length cap"]
    with canvas(path, 10.0, 5.0 + legend_inches(names)) as figure:
        grid = figure.subplots(2, 3, sharex=True)
        reward, informative, truncated, entropy, gap, length = grid.flat
        for stage in stages:
            look = of_run[stage.name]
            for axes, name in (
                (reward, "reward_mean"), (informative, "informative_share"), (truncated, "truncated_share"), (entropy, "approx_entropy"),
                (length, "response_tokens_mean"),
            ):  # fmt: skip
                _draw_smoothed(axes, *_series(stage, name), look)
            steps, errors = _series(stage, "token_mult_prob_error")
            _draw_smoothed(gap, steps, np.maximum(errors - 1, LEAST_GAP), look)
        for axes, title in (
            (reward, "mean reward"), (informative, "groups with unequal rewards"), (truncated, "responses cut off by the cap"),
            (entropy, "entropy (nats per token)"), (gap, "engine against trainer (factor \N{MINUS SIGN} 1)"),
            (length, "tokens of responses"),
        ):  # fmt: skip
            axes.set_title(title)
            _step_axis(axes)
        for axes in (informative, truncated):
            _share_axis(axes)
        gap.set_yscale("log")
        gap.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rate(y)))
        _fine_ticks(gap, 10, (1, 2, 5))
        _draw_caps(length, stages, of_run)
        _length_axis(length)
        figure.supxlabel(_steps_label(reading), fontsize=9)
        shown = {s.name: of_run[s.name] for s in stages}
        figure.legend(handles=_handles(shown), loc="outside upper left", ncols=legend_columns(names))
    return True


def _draw_accuracy(axes: Axes, points: tuple[RLPoint, ...], look: Look, place: int) -> None:
    """Few points with their intervals as a band; of many, the last one's as a bar beside the end, bars of other runs beside it."""
    x = np.array([p.step for p in points], dtype=np.float64)
    if 1 < len(points) <= MOST_MARKS:
        axes.fill_between(x, [p.low for p in points], [p.high for p in points], color=look.colour, alpha=0.12, linewidth=0)
    else:
        end = x[-1] + (0 if len(points) == 1 else BAR_SHARE * (place + 1) * (x[-1] - x[0]))
        axes.vlines(end, points[-1].low, points[-1].high, color=look.colour, linewidth=1.4)
    _draw_line(axes, x, np.array([p.accuracy for p in points]), look)


def _draw_lengths(axes: Axes, points: tuple[RLPoint, ...], look: Look) -> None:
    """A step without a correct response breaks the line."""
    y = [np.nan if p.correct_tokens_mean is None else p.correct_tokens_mean for p in points]
    _draw_line(axes, np.array([p.step for p in points], dtype=np.float64), np.array(y), look)


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look) -> None:
    """Every point where they are few; else they are faint, and bold is the mean of `SMOOTHED`, with every so many marked."""
    if len(x) > MOST_MARKS:
        axes.plot(x, y, color=look.colour, alpha=0.25, linewidth=0.7)
        kept = ~np.isnan(y)
        x, y = x[kept], smooth(y[kept], SMOOTHED)
    axes.plot(x, y, **_style(look, len(x)))


def _style(look: Look, num_points: int) -> dict[str, Any]:
    every = max(1, -(-num_points // MOST_MARKS))
    return {"color": look.colour, "linestyle": look.line, "linewidth": 1.6, "marker": look.marker, "markersize": 4.2, "markevery": every}


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, look: Look) -> None:
    if not len(steps):
        return
    axes.plot(steps, values, color=look.colour, alpha=0.22, linewidth=0.7)
    bold = {**_style(look, len(steps)), "marker": look.marker if len(steps) == 1 else ""}
    axes.plot(steps, smooth(values, smoothing_steps(len(values))), **bold)


def _series(stage: StageData, name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(r["step"], v) for r in stage.rl if (v := number(r, name)) is not None]
    return np.array([p[0] for p in pairs], dtype=np.float64), np.array([p[1] for p in pairs], dtype=np.float64)


def _cap_line(stage: StageData) -> tuple[tuple[int, int], ...]:
    """(finished steps, cap) at the end of every stretch under one cap, from 0 on: as sampled, or else as validated."""
    if stage.rl:
        caps = [(int(r["step"]), int(r["cap_tokens"])) for r in stage.rl]
        return ((0, caps[0][1]), *caps)
    return tuple(sorted({(int(r["step"]), int(r["cap_tokens"])) for r in stage.rl_validation}))


def _draw_caps(axes: Axes, stages: list[StageData], of_run: dict[str, Look]) -> None:
    """The cap in force as a dashed staircase; grey where it is the same for all, else dashes of the runs that share it take turns."""
    lines: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for stage in stages:
        if line := _cap_line(stage):
            lines.setdefault(line, []).append(of_run[stage.name].colour)
    for line, colours in lines.items():
        same = [MUTED] if len(lines) == 1 else colours
        x, y = zip(*line, strict=True)
        for place, colour in enumerate(same):
            dashes = (2 * CAP_DASHES * place, (CAP_DASHES, CAP_DASHES * (2 * len(same) - 1)))
            axes.step(x, y, where="pre", color=colour, linestyle=dashes, linewidth=1.1, zorder=1.8)
            if x[-1] == x[0]:
                axes.plot(x, y, color=colour, marker="_", markersize=12)


def _draw_cap_changes(axes: Axes, stages: list[StageData], of_run: dict[str, Look]) -> None:
    """A dotted vertical where a cap changes: a jump of the score there may be the cap's."""
    marks: dict[int, set[str]] = {}
    for stage in stages:
        line = _cap_line(stage)
        for (before, old), (_, new) in pairwise(line):
            if new != old:
                marks.setdefault(before, set()).add(of_run[stage.name].colour)
    for step, colours in marks.items():
        axes.axvline(step, color=colours.pop() if len(colours) == 1 else MUTED, linestyle=(0, (1, 2)), linewidth=1.0, zorder=1.5)


def _share_axis(axes: Axes) -> None:
    """From 0, a little below it so that a curve that stays there is seen; whole percents."""
    top = min(1.05, max(0.1, axes.get_ylim()[1]))
    axes.set_ylim(-0.03 * top, top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y, 0)))


def _length_axis(axes: Axes) -> None:
    """Powers of two, so that short answers and a cap far above them are both seen; a narrow range is labelled evenly."""
    axes.set_yscale("log", base=2)
    _fine_ticks(axes, 2, (1, 1.25, 1.5, 1.75) if axes.get_ylim()[1] < 4 * axes.get_ylim()[0] else (1, 1.5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tokens(y)))


def _fine_ticks(axes: Axes, base: int, multiples: tuple[float, ...]) -> None:
    """Ticks at powers of the base; at multiples of them too where the axis spans few."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=base, subs=multiples if high < base**4 * low else (1,), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())


def _tokens(value: float) -> str:
    """512, 2k, 8k: caps are powers of two, and k is 1,024 where it comes out even."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    size, letter = token_unit(value)
    return f"{value / size:g}{letter}" if value >= 10_000 else f"{value:g}"


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _steps_label(reading: Reading) -> str:
    """The paper's plots count updates; the axis says how they are had from rollout steps."""
    per_step = sorted({s.config.rollouts.updates_per_step for s in reading.rl})
    times = " or ".join(str(number) for number in per_step)
    return f"rollout steps (the paper's plots count updates: {times} per rollout step here)"


def _title(name: str, rows: list[RLCurveRow]) -> str:
    return name if name == ALL_SETS else f"{name} ({rows[0].points[-1].num_problems:,})"


def _handles(of_run: dict[str, Look]) -> list[Line2D]:
    runs = [Line2D([], [], label=look.label, **_style(look, 1)) for look in of_run.values()]
    return [*runs, Line2D([], [], color=MUTED, linestyle=(0, (3, 3)), linewidth=1.1, label="length cap")]
