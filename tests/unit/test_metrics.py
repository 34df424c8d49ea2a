"""metrics.jsonl: what a later attempt did again counts once, torn lines are tolerated where a kill leaves them, altered ones never."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_ext.errors import RunError
from megatron_ext.metrics import MetricsWriter, read_metrics


def attempt(path: Path, number: int, from_step: int, to_step: int, loss: float) -> None:
    """One attempt that trains from one step to another, validating two sources at the end."""
    writer = MetricsWriter(path, number, from_step)
    for step in range(from_step + 1, to_step + 1):
        writer.write("train", step, {"loss": loss, "tokens": 10 * step})
    for source in ("web", "qa"):
        writer.write("validation", to_step, {"source": source, "loss": loss})
    writer.close()


def test_no_file_holds_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_one_attempt_reads_back_as_written(tmp_path: Path) -> None:
    attempt(tmp_path / "m", 1, 0, 3, 5.0)
    assert [(r["step"], r["tokens"], r["attempt"]) for r in read_metrics(tmp_path / "m", "train")] == [(1, 10, 1), (2, 20, 1), (3, 30, 1)]
    assert [(r["source"], r["step"]) for r in read_metrics(tmp_path / "m", "validation")] == [("web", 3), ("qa", 3)]
    assert [r["kind"] for r in read_metrics(tmp_path / "m")] == ["attempt", "train", "train", "train", "validation", "validation"]


def test_a_later_attempt_supersedes_the_steps_after_its_start(tmp_path: Path) -> None:
    attempt(tmp_path / "m", 1, 0, 5, 5.0)
    attempt(tmp_path / "m", 2, 3, 4, 4.0)
    records = read_metrics(tmp_path / "m", "train")
    assert [(r["step"], r["attempt"], r["loss"]) for r in records] == [(1, 1, 5.0), (2, 1, 5.0), (3, 1, 5.0), (4, 2, 4.0)]
    assert [(r["source"], r["step"]) for r in read_metrics(tmp_path / "m", "validation")] == [("web", 4), ("qa", 4)]


def test_an_attempt_that_starts_over_supersedes_everything(tmp_path: Path) -> None:
    attempt(tmp_path / "m", 1, 0, 5, 5.0)
    attempt(tmp_path / "m", 2, 3, 5, 4.0)
    attempt(tmp_path / "m", 3, 0, 1, 3.0)
    assert [(r["step"], r["attempt"]) for r in read_metrics(tmp_path / "m", "train")] == [(1, 3)]


def test_a_roll_back_supersedes_the_steps_after_its_own(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", 1, 0)
    for loss, steps in ((5.0, (1, 2, 3)), (4.0, (3, 4)), (3.0, (3, 5))):
        if loss < 5:
            writer.write("roll_back", 2, {"at_step": steps[-1]})
        for step in steps:
            writer.write("train", step, {"loss": loss})
    writer.write("skip", 4, {"reason": "loss spike"})
    writer.close()
    records = read_metrics(tmp_path / "m", "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 5.0), (2, 5.0), (3, 3.0), (5, 3.0)]
    assert [r["at_step"] for r in read_metrics(tmp_path / "m") if r["kind"] == "roll_back"] == [4, 5]
    attempt(tmp_path / "m", 2, 4, 5, 2.0)
    records = read_metrics(tmp_path / "m", "train")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 5.0), (2, 5.0), (3, 3.0), (5, 2.0)]
    assert [r["step"] for r in read_metrics(tmp_path / "m", "skip")] == [4]


def test_a_torn_last_line_is_closed_off_by_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "m"
    attempt(path, 1, 0, 2, 5.0)
    with path.open("a") as file:
        file.write('{"attempt": 1, "kind": "train", "st')
    assert [r["step"] for r in read_metrics(path, "train")] == [1, 2]
    attempt(path, 2, 2, 3, 4.0)
    assert [(r["step"], r["attempt"]) for r in read_metrics(path, "train")] == [(1, 1), (2, 1), (3, 2)]
    assert len(path.read_text().splitlines()) == 5 + 1 + 4


def test_a_broken_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m"
    attempt(path, 1, 0, 3, 5.0)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"m:2: not JSON"):
        read_metrics(path)


def test_a_refused_record_leaves_nothing_of_itself(tmp_path: Path) -> None:
    """A bound on the size of files stands for a full disk: the first bytes of the record are taken, the rest are not."""
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 1, 0)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            writer.write("train", 1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    writer.write("train", 1, {"loss": 2.0})
    assert [record["loss"] for record in read_metrics(path, "train")] == [2.0]
