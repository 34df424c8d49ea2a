"""What a supervisor decides, by tables; tests/slurm/test_supervisor.py has it decide under a real Slurm.

Slurm's refusals and a shared file system that stumbles cannot be had there when they are wanted, so here they are played.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch import job_events, job_queue, supervisor
from megatron_ext.launch.job_events import Ledger, Start
from megatron_ext.launch.job_queue import JobState
from megatron_ext.launch.job_watch import Clock
from megatron_ext.launch.supervisor import Batch, Ending, is_cancelled, put_back, to_exclude


def event(kind: str, start: int, **values: Any) -> dict[str, Any]:
    return {"event": kind, "job_id": 7, "restart_count": start, **values}


@pytest.mark.parametrize(
    ("events", "start", "must"),
    [
        ([], 0, True),
        ([event("end", 0, reason="preempted")], 1, True),  # preempted before its check had passed
        ([event("checked", 0)], 1, False),
        ([{**event("checked", 0), "job_id": 6}], 0, True),
        ([event("checked", 0), event("fault", 0, cause="rank")], 1, True),
        ([event("checked", 0), event("fault", 1, cause="lost", lost_restart_count=0)], 1, True),
        ([event("checked", 0), event("fault", 0, cause="rank"), event("checked", 1)], 2, False),
    ],
)
def test_nodes_are_checked_until_they_pass_and_after_a_fault(events: list[dict[str, Any]], start: int, must: bool) -> None:
    assert job_events.must_check(events, Start(7, start)) is must


@pytest.mark.parametrize(
    ("nodes", "broken", "excluded"),
    [(["a"], ["a"], ["a"]), (["a", "b"], ["b"], ["b"]), (["a", "b"], ["a", "b"], []), (["a", "b", "c"], ["a", "b"], [])],
)
def test_what_is_amiss_on_most_nodes_leaves_none_out(nodes: list[str], broken: list[str], excluded: list[str]) -> None:
    assert to_exclude(nodes, broken) == excluded


def batch_of(folder: Path) -> Batch:
    job = {"run": str(folder), "kind": "train", "stage": "stable", "max_idle_attempts": 3, "save_seconds": 1.0, "signal_seconds": 60}
    clock = Clock(7, folder, 1.0)
    return Batch(job, ["n1"], Ledger(folder, Start(7, 0), ["n1"]), SimpleNamespace(asked=lambda: False), clock, None, 0)  # type: ignore[arg-type]


def state_of(state: str, **values: Any) -> JobState:
    given = {"restart_count": 0, "dependency": "", "comment": "", "excluded_nodes": "", "submitted_at": None, "eligible_at": None}
    return JobState(**{**given, "state": state, "started_at": None, "ends_at": None, "preempted_at": None, **values})


@pytest.mark.parametrize(
    ("refusals", "states", "said", "asked"),
    [
        ([], [], "", 1),
        (["scontrol requeue 7: Socket timed out on send/recv operation"] * 2, [], "", 3),
        (["Requested operation is presently disabled"], [], "cannot requeue itself (Requested operation is presently disabled)", 1),
        ([], ["RUNNING", "COMPLETING"], "cancelled", 0),
    ],
)
def test_a_requeue_is_asked_for_until_it_is_taken_or_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: list[str], states: list[str], said: str, asked: int
) -> None:
    tries: list[int] = []

    def requeue(job_id: int) -> None:
        tries.append(job_id)
        if len(tries) <= len(refusals):
            raise job_queue.SlurmError(refusals[len(tries) - 1])

    left = iter(states)
    monkeypatch.setattr(job_queue, "job_state", lambda _: state_of(next(left, "RUNNING")))
    monkeypatch.setattr(job_queue, "step_ids", lambda *_: [])
    monkeypatch.setattr(job_queue, "requeue", requeue)
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0.0)
    answer = put_back(batch_of(tmp_path))
    assert (answer == said) if said in ("", "cancelled") else (said in answer)
    assert len(tries) == asked


def test_a_job_that_was_preempted_without_a_warning_is_not_taken_for_cancelled(tmp_path: Path) -> None:
    clock = Clock(7, tmp_path, 1.0)
    assert is_cancelled(state_of("COMPLETING"), clock)
    assert not is_cancelled(state_of("COMPLETING", preempted_at=1.0), clock)


def test_a_supervisor_whose_disk_stumbles_puts_its_job_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(_: Batch) -> Ending:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(supervisor, "Inbox", lambda: None)
    monkeypatch.setattr(supervisor, "open_batch", lambda *_: batch_of(tmp_path))
    monkeypatch.setattr(supervisor, "supervise", stumble)
    monkeypatch.setattr(job_queue, "job_state", lambda _: state_of("RUNNING"))
    monkeypatch.setattr(supervisor, "put_back", lambda _: "")
    assert supervisor.main(["job.json"]) == 0
    fault, end = read_json_lines(tmp_path / job_events.EVENTS)
    assert (fault["cause"], end["decision"]) == ("supervisor", "requeue")
    assert "Stale file handle" in fault["words"]
