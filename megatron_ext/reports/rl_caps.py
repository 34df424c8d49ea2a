"""Length caps over rollout steps: those of the rollouts, those that validations ran under, and how figures draw both."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_ext.reports.coinciding import Curve, Stretch, stretches
from megatron_ext.reports.read import StageData
from megatron_ext.reports.style import MUTED, taking_turns

CapLine = tuple[tuple[int, int], ...]  # (finished steps, cap) at the end of every stretch under one cap, from 0 on
DASH_POINTS = 3.0  # in line widths; caps of rollouts that coincide take turns
DASH_DOTTED: Any = (0, (7, 2, 1.5, 2))
WIDTH_POINTS = 1.1


def rollout_caps(stage: StageData) -> CapLine:
    """What responses were sampled under, step by step; before the first step, what was validated under."""
    if stage.rl:
        caps = [(int(r["step"]), int(r["cap_tokens"])) for r in stage.rl]
        return ((0, caps[0][1]), *caps)
    return tuple(sorted({(int(r["step"]), int(r["cap_tokens"])) for r in stage.rl_validation}))


def validation_caps(stage: StageData) -> CapLine:
    """What the drawn validations ran under, where that is a cap of their own; else that of the rollouts, which they follow."""
    if not stage.rl_validation or stage.config.validation.cap_tokens is None:
        return rollout_caps(stage)
    caps = [(int(r["step"]), int(r["cap_tokens"])) for r in stage.rl_validation]
    return ((0, caps[0][1]), *caps, (max(caps[-1][0], stage.rl[-1]["step"] if stage.rl else 0), caps[-1][1]))


def caps_differ(stage: StageData) -> bool:
    """Whether validations ran under another cap than the rollouts at any step."""
    return {cap for _, cap in validation_caps(stage)} != {cap for _, cap in rollout_caps(stage)}


def cap_rules(separate: bool) -> dict[str, Any]:
    """What a legend calls the caps, with the line style of each; `separate`: validations have one of their own."""
    dashed = (0, (DASH_POINTS, DASH_POINTS))
    return {"cap of rollouts": dashed, "cap of validations": DASH_DOTTED} if separate else {"length cap": dashed}


def draw_rollout_caps(axes: Axes, stages: list[StageData], colours: dict[str, str]) -> None:
    """Dashed staircases; grey where the cap is the same for all, else dashes of the runs that share a stretch take turns."""
    lines = {stage.name: line for stage in stages if (line := rollout_caps(stage))}
    if len(set(lines.values())) == 1:
        lines, colours = dict(list(lines.items())[:1]), dict.fromkeys(lines, MUTED)
    stairs = {name: _stairs(line) for name, line in lines.items()}
    for name, parts in stretches(stairs).items():
        for part in parts or [Stretch(0, 0, (name,))]:
            _draw(axes, stairs[name], part, colours[name], taking_turns(part.names.index(name), len(part.names), DASH_POINTS, DASH_POINTS))


def draw_validation_caps(axes: Axes, stages: list[StageData], colours: dict[str, str]) -> None:
    """Dash-dotted staircases; in the colour of a run that has its cap alone, else grey."""
    lines: dict[CapLine, list[str]] = {}
    for stage in stages:
        lines.setdefault(validation_caps(stage), []).append(colours[stage.name])
    for line, own in lines.items():
        stairs = _stairs(line)
        _draw(axes, stairs, Stretch(0, len(stairs[0]) - 1, ()), own[0] if len(own) == 1 < len(stages) else MUTED, DASH_DOTTED)


def draw_cap_changes(axes: Axes, stages: list[StageData], colours: dict[str, str]) -> None:
    """A dotted vertical where the cap of the rollouts changes: a jump of the score there may be the cap's."""
    marks: dict[int, set[str]] = {}
    for stage in stages:
        for (before, old), (_, new) in pairwise(rollout_caps(stage)):
            if new != old:
                marks.setdefault(before, set()).add(colours[stage.name])
    for step, own in marks.items():
        axes.axvline(step, color=own.pop() if len(own) == 1 else MUTED, linestyle=(0, (1, 2)), linewidth=1.0, zorder=1.5)


def _stairs(line: CapLine) -> Curve:
    """The corners of a staircase that stands at each cap up to its step, from the step before."""
    corners = [line[0]]
    for (before, _), (step, cap) in pairwise(line):
        corners += [corner for corner in ((before, cap), (step, cap)) if corner != corners[-1]]
    x, y = zip(*corners, strict=True)
    return np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)


def _draw(axes: Axes, stairs: Curve, part: Stretch, colour: str, rule: Any) -> None:
    x, y = (axis[part.first : part.last + 1] for axis in stairs)
    point: Any = {"marker": "_", "markersize": 12} if len(x) == 1 else {}
    axes.plot(x, y, color=colour, linestyle=rule, linewidth=WIDTH_POINTS, zorder=1.8, **point)
