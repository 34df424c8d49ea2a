"""How every figure looks: one type size, colour-blind-safe colours, and the canvas that saves a PNG.

A stage keeps its colour through the whole page: the trunk is grey, each branch has its own hue
(Okabe and Ito's palette); sources have other hues (Paul Tol's muted palette).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_ext.reports.format import rate, token_unit
from megatron_ext.reports.read import Reading
from megatron_ext.reports.tables import parent_name

DPI = 150
INK, MUTED, FAINT = "#1f2328", "#6e7781", "#d8dee4"
TRUNK = ("#4a5058", "#9aa1a9", "#7a6a53", "#c0b283")
BRANCHES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#B15928")
SOURCES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999933",
           "#BBBBBB", "#6B4C3B", "#F4A582")  # fmt: skip
LINES = ("-", "--", "-.", ":")  # one more cycle of the hues a line style

RULES: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.borderaxespad": 0.3,
    "lines.solid_capstyle": "round",
    "text.color": INK,
}


@contextmanager
def canvas(
    path: Path, width_inches: float, height_inches: float, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """A figure in the report's style, saved as a PNG when the block ends well."""
    with matplotlib.rc_context(RULES):
        figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout=layout)
        yield figure
        figure.savefig(path, dpi=DPI, facecolor="white")


def stage_colours(reading: Reading) -> dict[str, str]:
    """Colour of each training stage: greys for what others start from, a hue for each that ends a line. RL has that of its start."""
    parents = {parent_name(s) for s in reading.training}
    trunk = [s.name for s in reading.training if s.name in parents or (s.config.start.kind != "branch" and len(reading.training) > 1)]
    leaves = [s.name for s in reading.training if s.name not in trunk]
    greys = {name: TRUNK[i % len(TRUNK)] for i, name in enumerate(reversed(trunk))}
    colours = greys | {name: BRANCHES[i % len(BRANCHES)] for i, name in enumerate(leaves)}
    free = [colour for colour in TRUNK + BRANCHES if colour not in colours.values()] or list(TRUNK)
    others = [str(parent_name(s)) for s in reading.rl if parent_name(s) not in colours]  # converted models, mostly
    starts = colours | {name: free[i % len(free)] for i, name in enumerate(dict.fromkeys(others))}
    return colours | {s.name: starts[str(parent_name(s))] for s in reading.rl}


def stage_lines(reading: Reading) -> dict[str, str]:
    """Line style of each training stage, and of each RL stage among its like; it changes where the hues start over."""
    colours = stage_colours(reading)
    styles: dict[str, str] = {}
    for stages in (reading.training, reading.rl):
        styles |= _cycled({s.name: colours[s.name] for s in stages})
    return styles


def _cycled(colours: dict[str, str]) -> dict[str, str]:
    seen: list[str] = []
    styles = {}
    for name, colour in colours.items():
        styles[name] = LINES[seen.count(colour) % len(LINES)]
        seen.append(colour)
    return styles


def taking_turns(place: int, count: int, dash_points: float, gap_points: float = 0.0) -> Any:
    """Line style of one of `count` curves on one line: its dashes lie where the others have gaps. Lengths are in line widths."""
    period = dash_points + gap_points
    return "-" if count == 1 and not gap_points else (period * place, (dash_points, count * period - dash_points))


def say_absent(axes: Axes, text: str) -> None:
    """Words where a panel has nothing to draw; what else is drawn there, a cap, stays behind them."""
    look: Any = {"ha": "center", "va": "center", "color": MUTED, "fontsize": 8.5, "zorder": 4}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, bbox={"facecolor": "white", "edgecolor": "none", "pad": 3}, **look)
    if not axes.lines:
        axes.set_yticks([])
        axes.grid(visible=False)


def legend_columns(names: list[str], width_inches: float = 10.0) -> int:
    """How many entries stand side by side over a figure: some 11.5 letters an inch, 8 of them for each line; rows of one length."""
    most = max(1, int(11.5 * width_inches) // (max(map(len, names)) + 8))
    return math.ceil(len(names) / math.ceil(len(names) / most))


def legend_inches(names: list[str], width_inches: float = 10.0) -> float:
    """Height that those entries need."""
    return 0.2 * math.ceil(len(names) / legend_columns(names, width_inches))


def source_colours(names: list[str]) -> dict[str, str]:
    """Colour of each source, in order of first appearance."""
    return {name: SOURCES[i % len(SOURCES)] for i, name in enumerate(dict.fromkeys(names))}


def readable_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (relative luminance, WCAG)."""
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return INK if float(linear @ (0.2126, 0.7152, 0.0722)) > 0.22 else "white"


def token_axis(axes: Axes, largest_tokens: float, label: str) -> None:
    """Label the x axis in thousands, millions or billions of tokens; data stay in tokens."""
    size, letter = token_unit(largest_tokens)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}{letter if x else ''}"))
    axes.set_xlabel(label)


def rate_axis(axes: Axes) -> None:
    """Learning rates from zero, written as in the tables."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rate(y)))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean over `width` values.

    Near the start the window shrinks on both sides, so that a steep first fall is not flattened;
    near the end only its right half is cut, so that the last value is as calm as the others.
    """
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    reach = np.minimum(half, at)
    first, last = at - reach, np.minimum(at + reach, len(values) - 1)
    smoothed: np.ndarray = (sums[last + 1] - sums[first]) / (last - first + 1)
    return smoothed
