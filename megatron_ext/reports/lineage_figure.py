"""The lineage graph: stages as boxes, left to right, so that every edge points to the right.

All lengths are inches. Boxes are as wide as their text, measured from the font's outlines, so
text cannot overlap; an edge that skips a column runs in a lane above the boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from megatron_ext.config.stages import ConvertStage, RLStage, TokenizerStage, TokenizeStage, TrainStage
from megatron_ext.reports.format import many, rate, tokens
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rl_tables import caps_words
from megatron_ext.reports.rows import JointRow, StageRow
from megatron_ext.reports.style import INK, MUTED, canvas, stage_colours
from megatron_ext.reports.tables import joint_rows, stage_rows

NAME_POINTS, LINE_POINTS = 9.5, 8.0
LINE_HEIGHT, PADDING, GAP, ROW_GAP, LANE, MARGIN = 0.165, 0.11, 0.52, 0.22, 0.13, 0.12


@dataclass(frozen=True)
class Node:
    """A box: its text and its place (left, bottom, width, height)."""

    name: str
    lines: tuple[str, ...]
    layer: int
    left: float
    bottom: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width

    @property
    def middle(self) -> float:
        """Height of the middle."""
        return self.bottom + self.height / 2


@dataclass(frozen=True)
class Layout:
    """Placed nodes, the lane (height) of each parent that has edges across columns, and the drawing's size."""

    nodes: dict[str, Node]
    lanes: dict[str, float]
    width: float
    height: float


def draw_lineage(reading: Reading, path: FilePath) -> bool:
    """Draw the graph; False where the report names no stage."""
    if not reading.stages:
        return False
    layout = place(reading)
    colours = stage_colours(reading)
    with canvas(path, layout.width, layout.height, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, layout.width)
        axes.set_ylim(0, layout.height)
        axes.axis("off")
        for stage in reading.stages:
            for parent, is_start in _edges(reading, stage):
                _draw_edge(axes, layout, parent, stage.name, colours.get(stage.name, MUTED) if is_start else None)
        for stage in reading.stages:
            _draw_node(axes, layout.nodes[stage.name], stage, colours.get(stage.name, MUTED))
    return True


def node_lines(reading: Reading) -> dict[str, tuple[str, ...]]:
    """What stands in each box, the name first."""
    joints = {row.stage: row for row in joint_rows(reading)}
    progress = {row.stage: row for row in stage_rows(reading)}
    lines = {}
    for stage in reading.stages:
        row = progress[stage.name]
        text = [stage.name, *_what(stage, row), *_joint(stage, joints.get(stage.name))]
        if stage.state != "done":
            text.append({"begun": "begun, not done", "not begun": "not begun", "missing": "folder is missing"}[stage.state])
        lines[stage.name] = tuple(text)
    return lines


def place(reading: Reading) -> Layout:
    """Columns by longest path, rows by the parents' rows, boxes by their text."""
    names = [s.name for s in reading.stages]
    parents = {s.name: [p for p, _ in _edges(reading, s)] for s in reading.stages}
    layers = _layers(names, parents)
    columns = _ordered_columns(names, parents, layers)
    lines = node_lines(reading)
    widths = {n: max(_text_width(t, i == 0) for i, t in enumerate(lines[n])) + 2 * PADDING + 0.06 for n in names}
    heights = {n: len(lines[n]) * LINE_HEIGHT + 2 * PADDING for n in names}
    across = [p for p in names if any(p in parents[n] and layers[n] > layers[p] + 1 for n in names)]
    body = max(sum(heights[n] for n in column) + ROW_GAP * (len(column) - 1) for column in columns)
    nodes, left = {}, MARGIN
    for layer, column in enumerate(columns):
        width = max(widths[n] for n in column)
        top = MARGIN + (body + sum(heights[n] for n in column) + ROW_GAP * (len(column) - 1)) / 2
        for n in column:
            nodes[n] = Node(n, lines[n], layer, left, top - heights[n], width, heights[n])
            top -= heights[n] + ROW_GAP
        left += width + GAP + LANE * max(0, len(across) - 2)
    lanes = _lanes(across, parents, nodes)
    height = max(MARGIN + body, *lanes.values()) + MARGIN if lanes else body + 2 * MARGIN
    return Layout(nodes, lanes, max(node.right for node in nodes.values()) + MARGIN, height)


def _lanes(across: list[str], parents: dict[str, list[str]], nodes: dict[str, Node]) -> dict[str, float]:
    """A height for each parent whose edges skip columns: just above what they pass, clear of other lanes."""
    lanes: dict[str, float] = {}
    ends: dict[str, float] = {}
    for parent in across:
        first = nodes[parent].layer
        far = [nodes[n] for n in nodes if parent in parents[n] and nodes[n].layer > first + 1]
        last = max(n.layer for n in far)
        ends[parent] = max(n.left for n in far)
        y = max(n.bottom + n.height for n in nodes.values() if first < n.layer < last) + LANE
        while any(abs(y - lanes[p]) < LANE * 0.9 and ends[p] > nodes[parent].right and ends[parent] > nodes[p].right for p in lanes):
            y += LANE
        lanes[parent] = y
    return lanes


def _edges(reading: Reading, stage: StageData) -> list[tuple[str, bool]]:
    """(parent, whether it gives the weights) for every parent that the report names."""
    known = {s.name for s in reading.stages}
    return [(parent, role == "start") for role, parent in stage.parents.items() if parent in known]


def _layers(names: list[str], parents: dict[str, list[str]]) -> dict[str, int]:
    """Length of the longest path to each stage; a report may name stages in any order."""
    layers: dict[str, int] = {}

    def layer(name: str) -> int:
        if name not in layers:
            layers[name] = 1 + max((layer(p) for p in parents[name]), default=-1)
        return layers[name]

    for name in names:
        layer(name)
    return layers


def _ordered_columns(names: list[str], parents: dict[str, list[str]], layers: dict[str, int]) -> list[list[str]]:
    """Each column in the order of its parents' mean row, so that edges seldom cross."""
    columns: list[list[str]] = []
    row: dict[str, float] = {}

    def mean_row(name: str) -> float:
        near = [row[p] for p in parents[name] if layers[p] == layers[name] - 1]
        return sum(near) / len(near) if near else 0.0

    for layer in range(max(layers.values()) + 1):
        column = sorted((n for n in names if layers[n] == layer), key=mean_row)
        row |= {n: i - (len(column) - 1) / 2 for i, n in enumerate(column)}
        columns.append(column)
    return columns


def _what(stage: StageData, row: StageRow) -> list[str]:
    done, planned, done_steps = row.tokens, row.tokens_planned, row.steps
    match stage.config:
        case TrainStage() as config:
            schedule = config.schedule
            falls = "" if schedule.shape == "constant" else f" \N{RIGHTWARDS ARROW} {rate(schedule.floor)}"
            amount = tokens(done) if done == planned else f"{tokens(done or 0)} of {tokens(planned)}"
            return [f"train \N{MIDDLE DOT} {amount} tokens", f"LR {rate(schedule.peak)}{falls}, {schedule.shape.replace('_', ' ')}"]
        case RLStage() as config:
            reach = f"{config.steps:,}" if done_steps == config.steps else f"{done_steps or 0:,} of {config.steps:,}"
            return [f"RL \N{MIDDLE DOT} {reach} rollout steps", f"cap {caps_words(config.lengths)}, LR {rate(config.learning_rate)}"]
        case TokenizeStage() as config:
            size = [f"{tokens(sum(r.tokens for r in stage.corpus.sources.values()))} training tokens"] if stage.corpus else []
            return [f"tokenize \N{MIDDLE DOT} {many(len(config.sources), 'source')}", *size]
        case TokenizerStage() as config:
            return [f"tokenizer \N{MIDDLE DOT} {config.vocab_size:,} pieces"]
        case ConvertStage() as config:
            return ["convert", config.model_id.rsplit("/", 1)[-1]]
    return [stage.kind] if stage.config is not None and stage.kind != stage.name else []


def _joint(stage: StageData, row: JointRow | None) -> list[str]:
    if row is None:
        return []
    where = "" if not row.lineage_tokens else f" at {tokens(row.lineage_tokens)}"
    how = {"branch": "branch", "weights": "weights only"}[row.start]
    if stage.is_rl or row.learning_rate_before is None or row.learning_rate_after is None:
        return [f"{how}{where}"]
    return [f"{how}{where}", f"joint LR: {rate(row.learning_rate_before)} | {rate(row.learning_rate_after)}"]


def _text_width(text: str, is_name: bool) -> float:
    font = FontProperties(family="DejaVu Sans", weight="bold" if is_name else "normal")
    return float(TextPath((0, 0), text, size=NAME_POINTS if is_name else LINE_POINTS, prop=font).get_extents().width) / 72


def _draw_node(axes: Axes, node: Node, stage: StageData, colour: str) -> None:
    learns = stage.is_training or stage.is_rl
    edge = colour if learns else MUTED
    style = "-" if stage.state == "done" else (0, (4, 2.5))
    box = FancyBboxPatch(
        (node.left, node.bottom), node.width, node.height, boxstyle="round,pad=0,rounding_size=0.05",
        facecolor="white" if learns else "#f6f8fa", edgecolor=edge, linewidth=1.3, linestyle=style, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    if learns:
        bar = Rectangle((node.left, node.bottom + 0.05), 0.055, node.height - 0.1, facecolor=colour, edgecolor="none", zorder=4)
        axes.add_patch(bar)
    for i, text in enumerate(node.lines):
        y = node.bottom + node.height - PADDING - (i + 0.5) * LINE_HEIGHT
        size, weight, ink = (NAME_POINTS, "bold", INK) if i == 0 else (LINE_POINTS, "normal", "#424a53")
        axes.text(node.left + PADDING + 0.04, y, text, fontsize=size, fontweight=weight, color=ink, va="center_baseline", zorder=5)


def _draw_edge(axes: Axes, layout: Layout, parent: str, child: str, start_colour: str | None) -> None:
    begin, end = layout.nodes[parent], layout.nodes[child]
    route: Callable[[Layout, Node, Node], Path] = _curve if end.layer == begin.layer + 1 else _lane
    colour, width = (start_colour, 2.0) if start_colour else ("#b6bec7", 1.0)
    arrow = FancyArrowPatch(
        path=route(layout, begin, end), arrowstyle="-|>", mutation_scale=9 if start_colour else 7,
        color=colour, linewidth=width, shrinkA=0, shrinkB=0, zorder=2 if start_colour else 1, joinstyle="round", capstyle="butt",
    )  # fmt: skip
    axes.add_patch(arrow)


def _curve(layout: Layout, begin: Node, end: Node) -> Path:
    del layout
    half = (end.left - begin.right) / 2
    points = [(begin.right, begin.middle), (begin.right + half, begin.middle), (end.left - half, end.middle), (end.left, end.middle)]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _lane(layout: Layout, begin: Node, end: Node) -> Path:
    """Out to the right, up into the parent's lane, along it, and down before the child's column."""
    y = layout.lanes[begin.name]
    index = list(layout.lanes).index(begin.name)
    out, down = begin.right + 0.16 + LANE * index / 2, end.left - 0.22 - LANE * index / 2
    enter = end.bottom + end.height - 0.16 - 0.06 * index
    corners = [(begin.right, begin.middle), (out, begin.middle), (out, y), (down, y), (down, enter), (end.left, enter)]
    return Path(corners, [Path.MOVETO] + [Path.LINETO] * 5)
