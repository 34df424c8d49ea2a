"""The paper's own figure for these runs: held-out accuracy and length of right answers over the steps of reinforcement learning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from megatron_ext.reports.coinciding import Curve, alike
from megatron_ext.reports.format import listed
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_axes import length_axis, share_axis, step_axis, steps_label
from megatron_ext.reports.rl_caps import cap_rules, caps_differ, draw_cap_changes, draw_rollout_caps, draw_validation_caps
from megatron_ext.reports.rl_lines import draw_intervals, draw_validations
from megatron_ext.reports.rl_looks import Look, handles, looks, measured, run_names
from megatron_ext.reports.rl_rows import RLCurveRow
from megatron_ext.reports.rl_tables import ALL_SETS
from megatron_ext.reports.style import canvas, legend_columns, legend_inches, say_absent

ROOMY_SETS = 3  # columns up to this number have room for 'problems' in their titles


def draw_curves(reading: Reading, rows: list[RLCurveRow], path: Path) -> bool:
    """Accuracy above, mean length of correct responses below, one column a set. False, and no file, where no run has a curve."""
    if not rows:
        return False
    sets = sorted(dict.fromkeys(row.set for row in rows), key=lambda name: name == ALL_SETS)
    of_run = measured(looks(reading), {row.stage for row in rows})
    stages = [stage for stage in reading.rl if any(row.stage == stage.name for row in rows)]
    separate = any(map(caps_differ, stages))
    caps = cap_rules(separate)
    width = 10.0 if len(sets) > 1 else 7.2
    names = [*(look.label for look in of_run.values()), *caps]
    with canvas(path, width, 5.0 + legend_inches(names, width)) as figure:
        grid = figure.subplots(2, len(sets), sharex=True, squeeze=False)
        for (above, below), name in zip(grid.T, sets, strict=True):
            here = [row for row in rows if row.set == name]
            drawn = [stage for stage in stages if any(row.stage == stage.name for row in here)]
            _draw_accuracy(above, here, drawn, of_run)
            _draw_lengths(below, here, drawn, of_run, separate)
            above.set_title(_title(name, here, len(sets)))
        grid[0][0].set_ylabel("accuracy")
        grid[1][0].set_ylabel("tokens of correct responses")
        figure.supxlabel(steps_label(reading), fontsize=9)
        figure.legend(handles=handles(of_run, caps), loc="outside upper left", ncols=legend_columns(names, width))
    return True


def coinciding(reading: Reading, rows: list[RLCurveRow]) -> str:
    """The runs whose curves lie on one another from end to end, and where; '' where none do."""
    names = run_names(reading)
    found: dict[str, list[str]] = {}
    for what, curves_of in (("accuracy", _accuracies), ("length", _lengths)):
        for name in dict.fromkeys(row.set for row in rows):
            for group in alike(curves_of([row for row in rows if row.set == name])):
                found.setdefault(listed([names[run] for run in group]), []).append(f"{what} on {name}")
    return "; ".join(f"{who} ({listed(where)})" for who, where in found.items())


def _draw_accuracy(axes: Axes, rows: list[RLCurveRow], stages: list[StageData], of_run: dict[str, Look]) -> None:
    draw_intervals(axes, {row.stage: row.points for row in rows}, of_run)
    draw_validations(axes, _accuracies(rows), of_run)
    draw_cap_changes(axes, stages, _colours(of_run))
    share_axis(axes)


def _draw_lengths(axes: Axes, rows: list[RLCurveRow], stages: list[StageData], of_run: dict[str, Look], separate: bool) -> None:
    """`separate`: validations have a cap of their own, drawn beside that of the rollouts."""
    curves = _lengths(rows)
    draw_validations(axes, curves, of_run)
    draw_rollout_caps(axes, stages, _colours(of_run))
    if separate:
        draw_validation_caps(axes, stages, _colours(of_run))
    length_axis(axes)
    step_axis(axes)
    if all(np.isnan(y).all() for _, y in curves.values()):
        say_absent(axes, "no correct response in any validation")


def _accuracies(rows: list[RLCurveRow]) -> dict[str, Curve]:
    return {row.stage: (_steps(row), np.array([p.accuracy for p in row.points], dtype=np.float64)) for row in rows}


def _lengths(rows: list[RLCurveRow]) -> dict[str, Curve]:
    """A step without a correct response breaks the line."""
    return {
        row.stage: (_steps(row), np.array([np.nan if p.correct_tokens_mean is None else p.correct_tokens_mean for p in row.points]))
        for row in rows
    }


def _steps(row: RLCurveRow) -> np.ndarray:
    return np.array([p.step for p in row.points], dtype=np.float64)


def _colours(of_run: dict[str, Look]) -> dict[str, str]:
    return {name: look.colour for name, look in of_run.items()}


def _title(name: str, rows: list[RLCurveRow], num_sets: int) -> str:
    unit = " problems" if num_sets <= ROOMY_SETS else ""
    return name if name == ALL_SETS else f"{name} ({rows[0].points[-1].num_problems:,}{unit})"
