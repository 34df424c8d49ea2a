"""The page's section on where the time went, of graphs that had a job or a second attempt, and how often to save."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ext.goodput import Goodput, Seconds, suggestion_words, total
from megatron_ext.reports import format as show
from megatron_ext.reports import markup
from megatron_ext.reports.board import Board, Section, as_json
from megatron_ext.reports.markup import Cell
from megatron_ext.reports.read import Reading, StageData

PARTS = tuple(part.name for part in fields(Seconds))


@dataclass(frozen=True)
class GoodputRow:
    """Where the time of a stage went."""

    stage: str
    starts: int
    failures: int
    nodes: float | None  # mean over its time
    productive_seconds: float
    recomputed_seconds: float
    queued_seconds: float
    starting_seconds: float
    saving_seconds: float
    idle_seconds: float
    node_seconds: float  # of all parts
    goodput: float | None
    goodput_with_queue: float | None


@dataclass(frozen=True)
class SaveIntervalRow:
    """How often a stage saves, and how often its failures suggest."""

    stage: str
    planned_steps: int
    planned_seconds: float | None
    failures: int
    between_failures_seconds: float | None
    save_seconds: float | None
    suggested_steps: int | None
    suggested_seconds: float | None


def time_spent(board: Board) -> Section | None:
    """Parts of every stage's time and of all together; None where no stage had a job or a second attempt."""
    found = [stage for stage in board.reading.stages if stage.time.starts]
    if not any(stage.time.job_starts or stage.time.starts > 1 for stage in found):
        return None
    rows, intervals = goodput_rows(board.reading), interval_rows(board.reading)
    html = markup.paragraph(
        "Goodput is the productive share of the time in which nodes were held. Productive are steps that stand; recomputed, those that "
        "a later attempt or a roll-back did again; starting, the time from a start to the first step; saving, the time that training "
        "waited for saves; idle, the rest: hangs, what a kill left, ending. A queued job holds no nodes. Times are on the clock; those of "
        "the last row are multiplied by each stage's nodes, and the shares of all are of these."
    )
    whole = total(stage.time for stage in found)
    html += markup.table(
        "Goodput",
        ["stage", "#starts", "#failures", "#nodes", "#node-hours", "#goodput", "#with the queue"],
        [*(_share_cells(row, board.name(row.stage)) for row in rows), _share_sums(whole)],
    )
    html += markup.table(  # apart from the shares: together they are wider than a small screen
        "Where the time went",
        ["stage", *(f"#{part}" for part in PARTS)],
        [
            *(_part_cells(board.name(stage.name), stage.time.seconds) for stage in found),
            _part_cells("all, times nodes", whole.node_seconds),
        ],
    )
    if intervals:
        html += markup.table(
            "Save interval",
            ["stage", "#steps", "#time", "#between failures", "#wait for a save", "#suggested steps", "#suggested time"],
            [
                [
                    board.name(r.stage), show.count(r.planned_steps), show.seconds(r.planned_seconds),
                    show.seconds(r.between_failures_seconds), show.seconds(r.save_seconds), show.count(r.suggested_steps),
                    show.seconds(r.suggested_seconds),
                ]
                for r in intervals
            ],
        )  # fmt: skip
        html += markup.paragraph(
            "Suggested is Young's interval, the root of twice the wait for a save times the mean time in the loop between failures "
            f"(1974); it needs two failures. {_silent(board.reading)}",
            "muted",
        )
    return Section("goodput", "Goodput", html, {"goodput": as_json(rows), "save_interval": as_json(intervals)})


def goodput_rows(reading: Reading) -> list[GoodputRow]:
    """Every stage that was started."""
    return [_row(stage) for stage in reading.stages if stage.time.starts]


def interval_rows(reading: Reading) -> list[SaveIntervalRow]:
    """Every stage that was started and saves on its way."""
    rows = []
    for stage in reading.stages:
        found = stage.save_interval
        if found is not None and stage.time.starts:
            rows.append(
                SaveIntervalRow(
                    stage=stage.name,
                    planned_steps=found.planned_steps,
                    planned_seconds=found.planned_seconds,
                    failures=found.failures,
                    between_failures_seconds=found.between_failures_seconds,
                    save_seconds=found.save_seconds,
                    suggested_steps=found.suggested_steps,
                    suggested_seconds=found.suggested_seconds,
                )
            )
    return rows


def _row(stage: StageData) -> GoodputRow:
    time = stage.time
    seconds = {f"{part}_seconds": getattr(time.seconds, part) for part in PARTS}
    return GoodputRow(
        stage=stage.name,
        starts=time.starts,
        failures=time.failures,
        nodes=time.node_seconds.total / time.seconds.total if time.seconds.total else None,
        node_seconds=time.node_seconds.total,
        goodput=time.seconds.goodput,
        goodput_with_queue=time.seconds.goodput_with_queue,
        **seconds,
    )


def _share_cells(row: GoodputRow, name: Cell) -> list[Cell]:
    nodes = show.NONE if row.nodes is None else f"{row.nodes:.3g}"
    shares = [show.percent(row.goodput), show.percent(row.goodput_with_queue)]
    return [name, show.count(row.starts), show.count(row.failures), nodes, _hours(row.node_seconds), *shares]


def _share_sums(time: Goodput) -> list[Cell]:
    nodes = time.node_seconds
    shares = [show.percent(nodes.goodput), show.percent(nodes.goodput_with_queue)]
    return ["all", show.count(time.starts), show.count(time.failures), "", _hours(nodes.total), *shares]


def _part_cells(name: Cell, time: Seconds) -> list[Cell]:
    return [name, *(show.seconds(getattr(time, part)) for part in PARTS)]


def _hours(seconds: float) -> str:
    """Hours, to three digits or so."""
    hours = seconds / 3600
    return show.count(hours) if hours >= 100 else f"{hours:.3g}"


def _silent(reading: Reading) -> str:
    """Why stages have no suggestion, all stages with the same reason together."""
    stages_of: dict[str, list[str]] = {}
    for stage in reading.stages:
        if stage.save_interval is not None and stage.time.starts and stage.save_interval.suggested_steps is None:
            stages_of.setdefault(suggestion_words(stage.save_interval), []).append(stage.name)
    return " ".join(f"{show.listed(stages)}: {words}." for words, stages in stages_of.items())
