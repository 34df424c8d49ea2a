"""The figures of training and data. Each function draws one PNG, or says by False that there is nothing to draw."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch, Rectangle

from megatron_ext.reports.format import loss, percent
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.rows import MixtureRow, SourceLossRow, SourceTokensRow
from megatron_ext.reports.style import (
    FAINT,
    MUTED,
    canvas,
    legend_columns,
    legend_inches,
    rate_axis,
    readable_on,
    smooth,
    source_colours,
    stage_colours,
    stage_lines,
    taking_turns,
    token_axis,
)
from megatron_ext.reports.tables import number, origin, parent_name

SMOOTHING_SHARE, SMOOTHING_LEAST = 0.05, 9  # the bold curve: a moving mean over so many of a stage's records
LONGEST_HEADING = 12  # characters over a column of the table of losses
ZOOM_BELOW = 0.4  # branches shorter than this share of the lineage get a panel of their own


def smoothing_steps(num_records: int) -> int:
    """Width of the moving mean, an odd number of recorded steps; a third of them where they are few."""
    return max(1, round(SMOOTHING_SHARE * num_records), min(SMOOTHING_LEAST, num_records // 3)) | 1


def draw_training(reading: Reading, path: Path) -> bool:
    """Training loss above, learning rate below, over lineage tokens; a second column shows short branches enlarged."""
    stages = [s for s in reading.training if s.train]
    if not stages:
        return False
    zoom = _zoom_range(stages)
    columns = 2 if zoom else 1
    with canvas(path, 10.0, 5.2 + legend_inches([s.name for s in stages])) as figure:
        grid = figure.subplots(2, columns, sharex="col", squeeze=False, height_ratios=(2.6, 1), width_ratios=(3, 2)[:columns])
        for column in range(columns):
            losses, rates = grid[0][column], grid[1][column]
            _draw_losses(losses, reading, stages)
            _draw_rates(rates, reading, stages)
            largest = max(s.train[-1]["lineage_tokens"] for s in stages)
            token_axis(rates, largest, "lineage tokens")
        grid[0][0].set_ylabel("training loss (nats per token)")
        grid[1][0].set_ylabel("learning rate")
        handles, _ = grid[0][0].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside upper left", ncols=legend_columns([s.name for s in stages]))
        _fit_losses(grid[0][0], stages, None)
        if zoom:
            grid[0][0].set_title("whole lineage", pad=14)
            grid[0][1].set_title("the branches, enlarged", pad=14)
            grid[1][1].set_xlim(*zoom)
            _fit_losses(grid[0][1], stages, zoom)
            _fit_rates(grid[1][1], stages, zoom)
        for losses, rates in zip(grid[0], grid[1], strict=True):
            _draw_joints(losses, rates, stages)
    return True


def _series(stage: StageData, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(r["lineage_tokens"], v) for r in stage.train if (v := number(r, key)) is not None]
    return np.array([p[0] for p in pairs], dtype=np.float64), np.array([p[1] for p in pairs], dtype=np.float64)


def _zoom_range(stages: list[StageData]) -> tuple[float, float] | None:
    branches = [s for s in stages if s.config.start.kind == "branch" and any(p.name == parent_name(s) for p in stages)]
    if not branches:
        return None
    first = min(s.train[0]["lineage_tokens"] - s.train[0]["tokens"] for s in branches)
    last = max(s.train[-1]["lineage_tokens"] for s in branches)
    begin = min(s.train[0]["lineage_tokens"] - s.train[0]["tokens"] for s in stages)
    end = max(s.train[-1]["lineage_tokens"] for s in stages)
    if last - first >= ZOOM_BELOW * (end - begin):
        return None
    return max(begin, first - 0.45 * (last - first)), last + 0.03 * (last - first)


def _draw_losses(axes: Axes, reading: Reading, stages: list[StageData]) -> None:
    colours, lines = stage_colours(reading), stage_lines(reading)
    for stage in stages:
        x, y = _series(stage, "loss")
        axes.plot(x, y, color=colours[stage.name], alpha=0.22, linewidth=0.7)
        label = stage.name if stage.state == "done" else f"{stage.name} (unfinished)"
        smoothed = smooth(y, smoothing_steps(len(y)))
        axes.plot(x, smoothed, color=colours[stage.name], linestyle=lines[stage.name], linewidth=1.7, label=label)


def _draw_rates(axes: Axes, reading: Reading, stages: list[StageData]) -> None:
    """Siblings that share a schedule lie on one line: their dashes take turns, so that all are seen."""
    colours = stage_colours(reading)
    for stage in stages:
        x, y = _series(stage, "learning_rate")
        same = [
            s.name for s in stages if parent_name(s) and (s.config.start, s.config.schedule) == (stage.config.start, stage.config.schedule)
        ]
        place = same.index(stage.name) if stage.name in same else 0
        dashes = taking_turns(place, max(1, len(same)), 4.0)
        axes.plot(x, y, color=colours[stage.name], linestyle=dashes, linewidth=1.7, dash_capstyle="butt")
    rate_axis(axes)


def _draw_joints(losses: Axes, rates: Axes, stages: list[StageData]) -> None:
    """A dashed vertical at each joint in sight; those that stand too close share one label."""
    left, right = losses.get_xlim()
    drawn = {s.name for s in stages}
    places = sorted({place for s in stages if parent_name(s) in drawn and (place := origin(s)) is not None and left <= place <= right})
    labelled = -math.inf
    for place in places:
        for axes in (losses, rates):
            axes.axvline(place, color=MUTED, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1.5)
        if place - labelled > 0.08 * (right - left):
            at = losses.get_xaxis_transform()
            losses.annotate("joint", (place, 1), (0, 2), xycoords=at, textcoords="offset points", ha="center", color=MUTED, fontsize=8)
            labelled = place


def _fit_losses(axes: Axes, stages: list[StageData], window: tuple[float, float] | None) -> None:
    """Fit the y axis to the smoothed curves: single batches may run out of the frame."""
    seen = []
    for stage in stages:
        x, y = _series(stage, "loss")
        smoothed = smooth(y, smoothing_steps(len(y)))
        seen.append(smoothed if window is None else smoothed[(x >= window[0]) & (x <= window[1])])
    values = np.concatenate(seen)
    if len(values):
        margin = 0.08 * (values.max() - values.min()) or 0.1
        axes.set_ylim(values.min() - margin, values.max() + margin)


def _fit_rates(axes: Axes, stages: list[StageData], window: tuple[float, float]) -> None:
    seen = [y[(x >= window[0]) & (x <= window[1])] for x, y in (_series(s, "learning_rate") for s in stages)]
    largest = max((float(y.max()) for y in seen if len(y)), default=0.0)
    if largest > 0:
        axes.set_ylim(0, 1.12 * largest)


def draw_heldout_mixture(reading: Reading, rows: list[MixtureRow], path: Path) -> bool:
    """Held-out loss of each row's own mixture over the stage's tokens: level, and change since step 0."""
    rows = [row for row in rows if row.points]
    if not rows:
        return False
    colours, lines = stage_colours(reading), stage_lines(reading)
    largest = max(row.points[-1].tokens for row in rows)
    with canvas(path, 10.0, 3.7 + legend_inches([row.stage for row in rows])) as figure:
        level, change = figure.subplots(1, 2)
        for row in rows:
            look = {"color": colours[row.stage], "linestyle": lines[row.stage], "linewidth": 1.7, "marker": "o", "markersize": 4}
            x = [p.tokens for p in row.points]
            level.plot(x, [p.loss for p in row.points], label=row.stage, **look)
            if row.start is not None:
                change.plot(x, [p.loss - row.start for p in row.points], label=row.stage, **look)
        change.axhline(0, color=MUTED, linewidth=0.9, zorder=1.5)
        level.set_title("level")
        level.set_ylabel("held-out loss of own mixture\n(nats per token)")
        change.set_title("change since the start checkpoint")
        change.set_ylabel("change (nats per token)")
        for axes in (level, change):
            token_axis(axes, largest, "tokens of the stage")
        handles, labels = level.get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside upper left", ncols=legend_columns(labels))
    return True


def draw_heldout_sources(rows: list[SourceLossRow], stages: list[str], path: Path) -> bool:
    """A table of losses, shaded along each row: the darker, the lower; the lowest of a row is bold."""
    if not rows:
        return False
    stages = [s for s in stages if any(r.stage == s for r in rows)]
    sources = list(dict.fromkeys(r.source for r in rows))
    cells = {(r.source, r.stage): r for r in rows}
    width, height = 1.7 + (0.95 if len(stages) <= 9 else 0.74) * len(stages), 0.75 + 0.42 * len(sources)
    with canvas(path, max(width, 5.0), height) as figure:
        axes = figure.subplots()
        for i, source in enumerate(sources):
            values = [r.loss for r in rows if r.source == source]
            for j, stage in enumerate(stages):
                _cell(axes, i, j, cells.get((source, stage)), min(values), max(values))
        axes.set_xlim(-0.5, len(stages) - 0.5)
        axes.set_ylim(len(sources) - 0.5, -0.5)
        names = [_two_lines(stage) for stage in stages]
        long = max(len(line) for name in names for line in name.split("\n")) > LONGEST_HEADING
        axes.set_xticks(range(len(stages)), stages if long else names, rotation=25 if long else 0, ha="left" if long else "center")
        axes.set_yticks(range(len(sources)), sources)
        axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return True


def _two_lines(name: str) -> str:
    """A name too long for a column, broken after the underscore nearest to its middle."""
    breaks = [i + 1 for i, letter in enumerate(name[:-1]) if letter == "_"]
    if len(name) <= LONGEST_HEADING or not breaks:
        return name
    at = min(breaks, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:at]}\n{name[at:]}"


def _cell(axes: Axes, row: int, column: int, cell: SourceLossRow | None, lowest: float, highest: float) -> None:
    if cell is None:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#f6f8fa", edgecolor="white", linewidth=2))
        axes.text(column, row, "not\nmeasured", ha="center", va="center", color=MUTED, fontsize=7, linespacing=0.95)
        return
    # The root spreads what is close to the lowest; the first stage of a lineage is often far above the rest.
    share = 1 - math.sqrt((cell.loss - lowest) / (highest - lowest)) if highest > lowest else 0.0
    colour = _blend("#eef5fb", "#1f5f8b", share)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
    best = cell.loss == lowest and highest > lowest
    text = loss(cell.loss) + ("" if cell.measured_by == cell.stage else "\N{DAGGER}")
    axes.text(column, row, text, ha="center", va="center", color=readable_on(colour), fontweight="bold" if best else "normal")


def _blend(light: str, dark: str, share: float) -> str:
    red, green, blue = (float((1 - share) * a + share * b) for a, b in zip(to_rgb(light), to_rgb(dark), strict=True))
    return str(to_hex((red, green, blue)))


def draw_source_tokens(rows: list[SourceTokensRow], path: Path) -> bool:
    """Tokens of each source in each stage: as amounts on the left, as shares of the stage on the right."""
    rows = [row for row in rows if row.stage_tokens]
    if not rows:
        return False
    stages = list(dict.fromkeys(row.stage for row in rows))
    drawn = {source: sum(r.stage_tokens for r in rows if r.source == source) for source in (row.source for row in rows)}
    sources = sorted(drawn, key=lambda source: -drawn[source])
    rows = sorted(rows, key=lambda row: sources.index(row.source))
    colours = source_colours(sources)
    with canvas(path, 10.0, 1.0 + legend_inches(sources) + 0.34 * len(stages)) as figure:
        amounts, shares = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
        for place, stage in enumerate(stages):
            left = share_left = 0.0
            for row in (r for r in rows if r.stage == stage):
                colour = colours[row.source]
                amounts.barh(place, row.stage_tokens, left=left, color=colour, edgecolor="white", linewidth=0.8, height=0.68)
                shares.barh(place, row.measured_share, left=share_left, color=colour, edgecolor="white", linewidth=0.8, height=0.68)
                if row.measured_share >= 0.07:
                    at = share_left + row.measured_share / 2
                    text = percent(row.measured_share, 0)
                    shares.text(at, place, text, ha="center", va="center", fontsize=8, color=readable_on(colour))
                left += row.stage_tokens
                share_left += row.measured_share
        amounts.set_yticks(range(len(stages)), stages)
        amounts.set_ylim(len(stages) - 0.5, -0.5)
        for axes in (amounts, shares):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        largest = max(sum(r.stage_tokens for r in rows if r.stage == stage) for stage in stages)
        token_axis(amounts, largest, "tokens drawn in the stage")
        shares.set_xlim(0, 1)
        shares.xaxis.set_major_formatter(lambda x, _: percent(x, 0))
        shares.set_xlabel("share of the stage's tokens")
        patches = [Patch(facecolor=colour, edgecolor=FAINT, label=name) for name, colour in colours.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=legend_columns(sources))
    return True
