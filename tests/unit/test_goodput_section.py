"""The report's section on goodput: its rows, when it is there, and that the page names all of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_ext.goodput import Goodput, Interval, Seconds
from megatron_ext.reports import goodput_section as section
from megatron_ext.reports.board import Board
from megatron_ext.reports.goodput_section import goodput_rows, interval_rows, time_spent
from megatron_ext.reports.read import AttemptData, Reading, StageData, gather
from megatron_ext.reports.sections import SECTIONS, provenance
from tests.unit.test_reports import BASE, CORPUS, STABLE, build

LONG_LIFE = Goodput(
    seconds=Seconds(productive=360_000, recomputed=3600, queued=7200, starting=1800, saving=900, idle=300),
    node_seconds=Seconds(productive=360_000, recomputed=3600, queued=7200, starting=1800, saving=900, idle=300).of_nodes(8),
    starts=61, job_starts=61, failures=40, steps=60_000, step_seconds=363_600, saves=100, stall_seconds=900,
)  # fmt: skip
SHORT_LIFE = Goodput(seconds=Seconds(productive=3600), node_seconds=Seconds(productive=3600), starts=1)
INTERVAL = Interval(planned_steps=500, failures=40, step_seconds=6.0, save_seconds=9.0, between_failures_seconds=9000.0)
ONE_FAILURE = dataclasses.replace(INTERVAL, failures=1, between_failures_seconds=None)


def reading(time: Goodput, interval: Interval = INTERVAL) -> Reading:
    corpus, base = StageData("corpus", "done", CORPUS, time=SHORT_LIFE), StageData("base", "not begun", BASE)
    return Reading("t", "g", (corpus, base, StageData("stable", "done", STABLE, time=time, save_interval=interval)))


def test_the_rows_are_what_was_measured(tmp_path: Path) -> None:
    corpus, stable = goodput_rows(reading(LONG_LIFE))
    assert (corpus.stage, corpus.goodput, corpus.starts) == ("corpus", 1.0, 1)
    assert (stable.stage, stable.starts, stable.failures, stable.nodes) == ("stable", 61, 40, 8)
    assert stable.goodput == 360_000 / 366_600
    assert stable.goodput_with_queue == 360_000 / 373_800
    (row,) = interval_rows(reading(LONG_LIFE))
    assert (row.planned_steps, row.planned_seconds, row.failures) == (500, 3000.0, 40)
    assert (row.suggested_seconds, row.suggested_steps) == (pytest.approx(402.49, abs=0.01), 67)
    found = time_spent(Board(reading(LONG_LIFE), tmp_path))
    assert found is not None
    assert found.numbers["goodput"][1]["idle_seconds"] == 300
    of_nodes = (3600 + 8 * 360_000) / (3600 + 8 * 366_600)  # the last row
    for text in ("98.2 %", "96.3 %", "100 h 00 min", f"{100 * of_nodes:.1f} %", "6 min 42 s"):
        assert text in found.html, text


def width_pixels(table: str) -> float:
    """About how wide a table is drawn: its longest words at 8.6 pixels a letter (bold, 14 pixels high), the gaps, the chip of a stage."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", table)]
    return 17 + sum(13 + 8.6 * max(len(re.sub("<.*?>", "", cell)) for cell in column) for column in zip(*rows, strict=True))


def test_every_column_is_seen_on_a_small_screen(tmp_path: Path) -> None:
    """A browser drew such tables 643, 800 and 839 pixels wide."""
    seconds = Seconds(productive=1_123_456, recomputed=43_210, queued=172_345, starting=52_345, saving=39_321, idle=45_678)
    found = time_spent(Board(reading(dataclasses.replace(LONG_LIFE, seconds=seconds, node_seconds=seconds.of_nodes(48))), tmp_path))
    assert found is not None
    tables = re.findall(r"<table>.*?</table>", found.html, re.DOTALL)
    assert [re.findall(r"<caption>(.*?)</caption>", table)[0] for table in tables] == ["Goodput", "Where the time went", "Save interval"]
    page_pixels = 1000 - 2 * 24
    assert max(map(width_pixels, tables)) < page_pixels
    assert sum(map(width_pixels, tables[:2])) - 200 > page_pixels, "as one table, without the second's names, they were cut"


def test_a_suggestion_that_is_missing_is_explained(tmp_path: Path) -> None:
    found = time_spent(Board(reading(LONG_LIFE, ONE_FAILURE), tmp_path))
    assert found is not None
    assert "stable: 1 failure, too few to suggest another interval." in found.html
    assert found.numbers["save_interval"][0]["suggested_steps"] is None


@pytest.mark.parametrize(
    ("time", "shown"),
    [
        (SHORT_LIFE, False),
        (Goodput(), False),
        (dataclasses.replace(SHORT_LIFE, starts=2), True),
        (dataclasses.replace(SHORT_LIFE, job_starts=1), True),
    ],
)
def test_it_is_there_where_a_stage_had_a_job_or_a_second_attempt(time: Goodput, shown: bool, tmp_path: Path) -> None:
    assert (time_spent(Board(reading(time), tmp_path)) is not None) == shown


def test_a_report_reads_it_from_run_folders(tmp_path: Path) -> None:
    runs = build(tmp_path / "runs")  # its stage 'stable' needed two attempts, the first one failed
    found = gather(runs["report"])
    (stable,) = [row for row in goodput_rows(found) if row.stage == "stable"]
    assert (stable.starts, stable.failures) == (2, 1)
    assert [row.planned_steps for row in interval_rows(found)] == [1000] * 4
    assert time_spent in SECTIONS
    assert time_spent(Board(found, tmp_path)) is not None
    assert time_spent(Board(gather(build(tmp_path / "one attempt each", finished=2)["report"]), tmp_path)) is None


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8").partition("**`goodput`**")[2]
    fields = {field.name for row in (section.GoodputRow, section.SaveIntervalRow) for field in dataclasses.fields(row)}
    assert fields - set(re.findall(r"`(\w+)`", text)) == set()


def test_an_attempt_that_left_no_word_was_killed_where_it_cannot_run_any_more(tmp_path: Path) -> None:
    attempts = (AttemptData(1), AttemptData(2))
    words = []
    for state in ("begun", "done"):
        stages = (StageData("stable", state, STABLE, attempts=attempts),)  # type: ignore[arg-type]
        page = provenance(Board(Reading("t", "g", stages), tmp_path)).html
        words.append(re.findall(r"no word \(([a-z, ]+)\)", page))
    assert words == [["killed", "running, or killed"], ["killed", "killed"]]
