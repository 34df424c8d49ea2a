"""Who owns a run folder: one of two that begin at once, nobody beside a live owner, and a stale one may do nothing more."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_ext import attempts
from megatron_ext.attempts import TAKE_OVER, Attempt, attempting, begin_attempt, live_attempt
from megatron_ext.errors import RunError
from megatron_ext.runs import Run, attempt_numbers, open_run, write_json, write_run
from megatron_ext.snapshot import code_hash
from recipes import demo

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "text", "g", demo.smoke().stage("text"), {})


def test_attempts_count_up_and_record_their_end(run: Run) -> None:
    assert attempt_numbers(run.path) == []
    with attempting(run) as first:
        assert first.log_path == run.path / "attempts" / "1" / "log.txt"
    with pytest.raises(ZeroDivisionError), attempting(run):
        raise ZeroDivisionError("nought")
    assert attempt_numbers(run.path) == [1, 2]
    ends = [json.loads((run.path / "attempts" / n / "exit.json").read_text()) for n in "12"]
    assert [(end["reason"], end.get("error")) for end in ends] == [("done", None), ("failed", "ZeroDivisionError: nought")]
    record = json.loads((run.path / "attempts" / "1" / "plan.json").read_text())
    assert (record["plan"]["workers"], record["code_hash"], record["pid"]) == (1, code_hash(), os.getpid())


def contend(folder: Path, start: multiprocessing.synchronize.Event, told: Connection, stay: multiprocessing.synchronize.Event) -> None:
    start.wait()
    try:
        told.send(begin_attempt(open_run(folder)).number)
    except RunError as error:
        told.send(str(error))
    stay.wait()


def test_of_many_that_begin_at_once_one_owns_the_folder(run: Run) -> None:
    start, stay = FORK.Event(), FORK.Event()
    pipes = [FORK.Pipe() for _ in range(8)]
    processes = [FORK.Process(target=contend, args=(run.path, start, told, stay)) for _, told in pipes]
    for process in processes:
        process.start()
    start.set()
    said = [heard.recv() for heard, _ in pipes]
    stay.set()
    for process in processes:
        process.join()
    assert [one for one in said if isinstance(one, int)] == [1]
    assert sum("attempt 1 (pid " in one and "is at work on stage 'text'" in one for one in said if isinstance(one, str)) == 7
    assert [path.name for path in (run.path / "attempts").iterdir()] == ["1"]


@pytest.fixture
def owner(run: Run):
    """Another process that owns the folder and stays."""
    start, stay = FORK.Event(), FORK.Event()
    heard, told = FORK.Pipe()
    process = FORK.Process(target=contend, args=(run.path, start, told, stay))
    process.start()
    start.set()
    assert heard.recv() == 1
    yield process
    process.kill()
    process.join()


def test_a_second_owner_is_refused_until_the_first_is_dead(run: Run, owner: multiprocessing.Process) -> None:
    with pytest.raises(RunError, match=rf"attempt 1 \(pid {owner.pid} on .*is at work on stage .text.; wait for it.*--take-over"):
        begin_attempt(run)
    os.kill(owner.pid or 0, signal.SIGSTOP)  # asleep is not dead
    with pytest.raises(RunError, match="is at work"):
        begin_attempt(run)
    os.kill(owner.pid or 0, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while live_attempt(run.path) is not None:  # it stays a zombie until it is joined: that is dead
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert begin_attempt(run).number == 2


def test_an_owner_may_be_put_aside_and_may_then_do_nothing_more(run: Run, owner: multiprocessing.Process, monkeypatch) -> None:
    first = Attempt(1, run.path / "attempts" / "1")
    first.check_owner()
    monkeypatch.setenv(TAKE_OVER, "1")
    second = begin_attempt(run)
    second.check_owner()
    with pytest.raises(RunError, match=rf"attempts/1: this attempt lost the run folder to attempt 2 \(pid {os.getpid()} on "):
        first.check_owner()


def elsewhere(run: Run, **changes: object) -> Attempt:
    """An attempt that says it runs on another host."""
    folder = run.path / "attempts" / "1"
    folder.mkdir(parents=True)
    record = {"started_at": "then", "pid": 1, "process_start": 1, "host": "far", "place": "far/b/n", "job_id": "", "restart_count": 0}
    write_json(folder / "plan.json", {**record, **changes})
    (folder / "heartbeat").touch()
    return Attempt(1, folder)


@contextlib.contextmanager
def beating(attempt: Attempt):
    """Another host's heart."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            (attempt.path / "heartbeat").touch()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(attempts, "WAIT_SECONDS", 0.02)


def test_an_owner_elsewhere_lives_while_it_beats(run: Run, short_waits, capsys) -> None:
    other = elsewhere(run)
    with beating(other), pytest.raises(RunError, match=r"attempt 1 \(pid 1 on far, begun then\) is at work"):
        begin_attempt(run)
    assert "waiting up to 180 s to see whether attempt 1 (pid 1 on far, begun then) still lives" in capsys.readouterr().err


def test_an_owner_elsewhere_that_is_silent_is_dead(run: Run) -> None:
    other = elsewhere(run)
    silent = time.time() - attempts.LOST_SECONDS - 10
    os.utime(other.path / "heartbeat", (silent, silent))
    assert begin_attempt(run).number == 2


def test_the_next_job_waits_for_one_that_was_just_killed(run: Run, short_waits, monkeypatch) -> None:
    elsewhere(run)  # its heart beat a moment ago, and beats no more
    monkeypatch.setattr(attempts, "LOST_SECONDS", 0.5)
    assert begin_attempt(run).number == 2


def test_who_begins_between_a_look_and_a_claim_is_seen(run: Run, monkeypatch) -> None:
    true_look = attempts._refuse_beside_owner

    def look(of: Run) -> None:
        true_look(of)
        monkeypatch.setattr(attempts, "_refuse_beside_owner", true_look)
        assert begin_attempt(of).number == 1  # the other

    monkeypatch.setattr(attempts, "_refuse_beside_owner", look)
    with pytest.raises(RunError, match=r"attempt 1 .*is at work"):
        begin_attempt(run)
    assert attempt_numbers(run.path) == [1]


def test_a_requeued_job_takes_its_folder_back(run: Run, short_waits, monkeypatch) -> None:
    other = elsewhere(run, job_id="77", restart_count=1)
    with beating(other):
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(RunError, match=r"on far, job 77, begun then\) is at work"):  # the same start of the job, on another node
            begin_attempt(run)
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        with pytest.raises(RunError, match="is at work"):
            begin_attempt(run)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert begin_attempt(run).number == 2


def test_another_process_under_the_same_number_is_not_the_owner(run: Run) -> None:
    """Process numbers are used again; the time at which a process began tells them apart."""
    here = begin_attempt(run)
    assert live_attempt(run.path) == here
    record = json.loads((here.path / "plan.json").read_text())
    write_json(here.path / "plan.json", {**record, "process_start": record["process_start"] - 1})
    assert live_attempt(run.path) is None


def test_the_heart_beats_until_the_end(run: Run, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.01)
    attempt = begin_attempt(run)
    os.utime(attempt.path / "heartbeat", (1, 1))
    deadline = time.monotonic() + 60
    with attempt.beating():
        while (attempt.path / "heartbeat").stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.utime(attempt.path / "heartbeat", (1, 1))
    time.sleep(0.05)
    assert (attempt.path / "heartbeat").stat().st_mtime == 1


def test_a_disk_that_refuses_is_named(run: Run) -> None:
    (run.path / "attempts").write_text("a file stands in the way")
    with pytest.raises(RunError, match=r"text: no attempt can begin: \[Errno 17\] File exists: .*attempts'; make room on its disk"):
        begin_attempt(run)
