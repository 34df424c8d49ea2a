"""How each run of reinforcement learning is drawn, the same in every panel, and what the legends say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from matplotlib.lines import Line2D

from megatron_ext.reports.read import Reading
from megatron_ext.reports.rl_caps import WIDTH_POINTS as CAP_WIDTH_POINTS
from megatron_ext.reports.style import MUTED, stage_colours, stage_lines
from megatron_ext.reports.tables import parent_name

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
WIDTH_POINTS, MARK_POINTS = 1.6, 4.2


@dataclass(frozen=True)
class Look:
    """How a run is drawn in every panel."""

    label: str
    colour: str
    line: str
    marker: str

    @property
    def rule(self) -> dict[str, Any]:
        """Its line where it runs alone."""
        return {"linestyle": self.line}

    @property
    def mark(self) -> dict[str, Any]:
        """What draws its points."""
        return {"color": self.colour, "marker": self.marker, "markersize": MARK_POINTS}


def looks(reading: Reading) -> dict[str, Look]:
    """Of each run: the colour of its start; its start's name where that tells runs apart."""
    colours, lines = stage_colours(reading), stage_lines(reading)
    names = run_names(reading)
    found = {}
    for i, stage in enumerate(reading.rl):
        label = names[stage.name] if names[stage.name] == stage.name else f"RL from {names[stage.name]}"
        label += "" if stage.state == "done" else f" ({'unfinished' if stage.state == 'begun' else stage.state})"
        found[stage.name] = Look(label, colours[stage.name], lines[stage.name], MARKERS[i % len(MARKERS)])
    return found


def run_names(reading: Reading) -> dict[str, str]:
    """What each run is called in a sentence: what it starts from, or its own name where two start alike."""
    starts = {stage.name: str(parent_name(stage)) for stage in reading.rl}
    return starts if len(set(starts.values())) == len(starts) else {name: name for name in starts}


def measured(of_run: dict[str, Look], names: set[str]) -> dict[str, Look]:
    """The same looks; runs without a curve say so."""
    return {name: look if name in names else replace(look, label=f"{look.label}, no validation") for name, look in of_run.items()}


def handles(of_run: dict[str, Look], rules: dict[str, Any]) -> list[Line2D]:
    """What the legend shows: a line for each run, and one for each kind of cap, by its line style."""
    runs = [Line2D([], [], label=look.label, linewidth=WIDTH_POINTS, **look.mark, **look.rule) for look in of_run.values()]
    return [*runs, *(Line2D([], [], color=MUTED, linestyle=rule, linewidth=CAP_WIDTH_POINTS, label=name) for name, rule in rules.items())]
