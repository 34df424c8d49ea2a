"""The report stage: one static page, its figures and summary.json, redrawn whole from run folders each time."""

from __future__ import annotations

import math
from typing import Any

from megatron_ext.attempts import attempting
from megatron_ext.config.base import Json
from megatron_ext.reports import markup
from megatron_ext.reports.board import FIGURES, Board
from megatron_ext.reports.lead import lead
from megatron_ext.reports.notes import notes
from megatron_ext.reports.read import gather
from megatron_ext.reports.rl_verdict import verdict
from megatron_ext.reports.sections import SECTIONS
from megatron_ext.runs import Run, atomic_write, mark_done, write_json

PAGE, SUMMARY = "index.html", "summary.json"
SUMMARY_FORMAT = 1


def run_report(run: Run) -> None:
    """Draw `index.html`, `figures/*.png` and `summary.json` into the report's run folder; safe to repeat.

    Unfinished and missing stages are said on the page; a damaged file raises the error that names it.
    """
    with attempting(run):
        reading = gather(run)
        (run.path / FIGURES).mkdir(parents=True, exist_ok=True)
        board = Board(reading, run.path)
        sections = [section for draw in SECTIONS if (section := draw(board)) is not None]
        remarks, opening, answer = notes(reading), lead(reading), verdict(reading)
        summary: Json = {"format": SUMMARY_FORMAT, "title": reading.title, "graph": reading.graph, "lead": opening, "notes": remarks}
        if answer:
            summary["rl_verdict"] = answer
        for section in sections:
            summary |= section.numbers
        write_json(run.path / SUMMARY, _finite({**summary, "figures": board.drawn}))
        shown = [(s.anchor, s.heading, s.html) for s in sections]
        atomic_write(run.path / PAGE, markup.page(reading.title, [opening, *answer], shown, remarks))
    states = [s.state for s in reading.stages]
    mark_done(run, {"page": PAGE, "figures": len(board.drawn), "stages": len(states), "stages_done": states.count("done")})


def _finite(values: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
