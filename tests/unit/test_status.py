"""What `status` says of stages whose jobs ended or start again, by run folders as jobs leave them and a queue as Slurm would tell it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ext.launch.job_events import Ledger, Start
from megatron_ext.launch.logs import last_line
from megatron_ext.launch.slurm import Queue, QueuedJob
from megatron_ext.launch.status import status_command, status_text
from megatron_ext.runs import Run, mark_done, write_json
from tests.unit.test_launch_failures import attempt_of, job_log, write_start
from tests.unit.test_tree import line_of, write_all

UNKNOWN = Queue(is_known=False)
KILLED = "rank 1 on n2: Killed"
GIVEN_UP = f"stage 'base' was started 3 times in a row and is not started again. The last fault: {KILLED}. Mend the cause"


def words_of(run: Run, queue: Queue) -> tuple[str, list[str]]:
    """The row of a stage, and what is said of it under the table, without the times."""
    text = status_text(run.path.parent, queue)
    found = [line for line in text.splitlines() if line.startswith(f"{run.name}: ") and "goodput" not in line]
    return line_of(text, run.name), [re.sub(r" at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d:", ":", line) for line in found]


def queue_of(run: Run, state: str, reason: str = "") -> Queue:
    nodes = "n1" if state == "RUNNING" else ""
    return Queue({run.path: QueuedJob(job_id=7, state=state, reason=reason, began="N/A", ends="N/A", nodes=nodes)})


def test_a_cancelled_stage_is_not_said_to_be_stopped_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_all(tmp_path)["base"]
    attempt_of(base, monkeypatch, 0).finish("interrupted", words="asked to stop (SIGTERM)")
    write_start(base, 0, {}, {"decision": "stop", "reason": "cancelled"})
    row, lines = words_of(base, Queue())
    assert row.split()[:2] == ["base", "cancelled"]
    assert lines == ["base: stop: cancelled; a launch goes on from there"]
    write_start(base, 0, {"cause": "rank", "words": KILLED}, {"decision": "stop", "reason": GIVEN_UP}, job_id=8)
    assert "stopped for good" in words_of(base, Queue())[0]
    Ledger(base.path, Start(9, 0), []).append("start")  # launched again, and that job left no word of its end
    assert "attempt 1: interrupted" in words_of(base, Queue())[0]


def test_a_job_that_ended_before_any_attempt_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_all(tmp_path)["base"]
    assert "not started" in words_of(base, Queue())[0]
    log = job_log(base, "n1: module: command not found\n")  # a set-up that fails: no ledger hears of it
    row, lines = words_of(base, Queue())
    assert "failed before it began" in row
    assert lines[0].endswith("slurm-7.log ends: n1: module: command not found")
    assert "not started" in words_of(base, UNKNOWN)[0], "where nobody could be asked, it may still be at it"
    assert "running on n1" in words_of(base, queue_of(base, "RUNNING"))[0]

    write_start(base, 0, {}, {"decision": "requeue", "reason": "preempted"})
    assert "not started" in words_of(base, Queue())[0]
    write_start(base, 1, {"cause": "rank", "words": KILLED}, {"decision": "requeue", "reason": KILLED})
    assert "failed before it began" in words_of(base, Queue())[0]
    attempt_of(base, monkeypatch, 2).finish("failed", error="ValueError: one")
    write_start(base, 2, {"cause": "rank", "words": KILLED}, {"decision": "requeue", "reason": KILLED})
    assert "attempt 1: failed: ValueError" in words_of(base, Queue())[0]
    log.rename(log.with_name("slurm-8.log"))  # of another job, which fails in its set-up after all this
    row, lines = words_of(base, Queue())
    assert "failed before it began" in row
    assert len(lines) == 1, "the ledger's reason is the older job's"


@pytest.mark.parametrize(("state", "reason"), [("PENDING", "BeginTime"), ("RUNNING", "None")])
def test_a_job_that_starts_again_after_a_fault_tells_it(tmp_path: Path, state: str, reason: str) -> None:
    base = write_all(tmp_path)["base"]

    def told() -> list[str]:
        return words_of(base, queue_of(base, state, reason))[1]

    write_start(base, 0, {"cause": "rank", "words": KILLED}, {"decision": "requeue", "reason": KILLED}, job_id=6)
    assert told() == [], "of an older job"
    write_start(base, 0, {"cause": "rank", "words": KILLED}, {"decision": "requeue", "reason": KILLED})
    Ledger(base.path, Start(7, 0), []).append("fault", cause="node", words="left out from now on: n2")
    write_start(base, 1, {"cause": "slow node", "words": "n1: half as fast"}, {})
    assert told() == [f"base: requeue: {KILLED}"]
    write_start(base, 1, {}, {"decision": "requeue", "reason": "63 s left"})
    assert told() == []
    write_start(base, 2, {}, {})  # its node is lost; the next start says so
    write_start(base, 3, {}, {})
    Ledger(base.path, Start(7, 3), []).append("fault", cause="lost", lost_restart_count=2, words="start 2 ended without a word")
    assert told() == ["base: requeue: start 2 ended without a word"]
    mark_done(base, {})
    assert told() == []


def test_the_end_of_a_log_does_not_repeat_the_reason(tmp_path: Path) -> None:
    base = write_all(tmp_path)["base"]
    said = f"0: ModuleNotFoundError: torch\nsrun: error: n2: task 1: Killed\nfault: {KILLED}\nstop: {GIVEN_UP}\n"
    job_log(base, said)
    write_start(base, 0, {"cause": "rank", "words": KILLED}, {"decision": "stop", "reason": GIVEN_UP})
    _, (reason, log) = words_of(base, Queue())
    assert reason == f"base: stop: {GIVEN_UP}"
    assert log.endswith(" ends: 0: ModuleNotFoundError: torch")


@pytest.mark.parametrize(
    ("text", "besides", "found"),
    [
        ("one\n\n  \n", "", "one"),
        ("one\nstop: a\nb\n", "a\nb", "one"),
        ("one\nfault: a; the first traceback is of rank 1: ValueError\n", "a", "fault: a; the first traceback is of rank 1: ValueError"),
        ("requeue: a\n", "a", ""),
        ("0: stop: the model said so\n", "", "0: stop: the model said so"),
    ],
)
def test_the_last_line_is_one_that_says_more_than_the_ledger(tmp_path: Path, text: str, besides: str, found: str) -> None:
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log", besides) == found


def test_without_squeue_the_jobs_that_are_not_shown_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runs = write_all(tmp_path / "runs" / "g")
    status_command(tmp_path / "runs")
    assert "without jobs" not in capsys.readouterr().out
    for name in ("base", "stable"):
        (runs[name].path / "job").mkdir()
        write_json(runs[name].path / "job" / "submitted.json", {"job_id": 7, "submitted_at": 0.0})
    status_command(tmp_path / "runs")
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "without jobs: squeue is not found on this machine"
    assert out.count("without jobs") == 1
    for name in ("base", "stable"):
        mark_done(runs[name], {})
    status_command(tmp_path / "runs")
    assert "without jobs" not in capsys.readouterr().out
