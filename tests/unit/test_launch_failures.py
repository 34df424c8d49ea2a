"""What `launch --local` refuses before it starts, and what it and `logs --first-failure` say of a stage that failed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_ext.attempts import Attempt, begin_attempt
from megatron_ext.config.stages import Source, TokenizeStage
from megatron_ext.errors import LaunchError
from megatron_ext.launch import doctor_machine, job_queue, supervisor
from megatron_ext.launch.commands import parse
from megatron_ext.launch.failures import failure_text
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.job_events import Ledger, Start
from megatron_ext.launch.local import launch_local
from megatron_ext.launch.logs import first_failure_text, newest_fault
from megatron_ext.runs import Run, open_run, write_run
from tests.unit.test_launch import SMOKE, TEXT
from tests.unit.test_supervisor_rules import batch_of
from tests.unit.test_tree import trained, write_all


def with_absent_files(folder: Path) -> Graph:
    """The text stage, and one that reads files that are not there."""
    missing = Source(name="web", paths=(str(folder / "absent.jsonl"),), max_epochs=1.0)
    corpus = TokenizeStage(name="corpus", sources=(missing,), tokenizer=str(folder / "no" / "tokenizer"))
    return Graph(name="g", stages=(*TEXT.stages, corpus))


def test_what_a_later_stage_would_lack_is_refused_before_the_first_one_runs(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        launch_local(with_absent_files(tmp_path), tmp_path / "runs", None)
    first, *lines = str(caught.value).splitlines()
    assert first == "graph g: nothing was started, because it would fail:"
    assert [line.split(": ")[0] for line in lines if line.startswith("error ")] == [
        "error    text of corpus",
        "error    tokenizer of corpus",
    ]
    assert lines[-1].endswith("add --no-doctor to start all the same")
    assert list(tmp_path.iterdir()) == []
    assert [parse(["launch", "demo:smoke", "--local", *word]).doctor for word in ([], ["--no-doctor"])] == [True, False]


def test_what_may_fail_is_said_and_started_and_what_is_done_asks_for_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (1025, 1 << 20))  # files that this shell may open
    launch_local(TEXT, tmp_path, None)
    assert capfd.readouterr().out.startswith(
        "warning  open files: this shell allows 1,025 a process; rank 0 of 1 may need 1,026; way out: "
    )
    launch_local(TEXT, tmp_path, None)
    assert "warning" not in capfd.readouterr().out


def test_a_failed_stage_tells_its_cause_once_and_the_way_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second stage reads a file that is not there."""
    with pytest.raises(LaunchError) as caught:
        launch_local(with_absent_files(tmp_path), tmp_path / "runs", None, doctor=False)
    assert str(caught.value).splitlines() == [
        "stage 'corpus' ended with exit code 2, for the reason above",
        f"attempt 1 is {tmp_path}/runs/g/corpus/attempts/1",
        "To go on, run the same command again: finished stages are skipped",
    ]
    printed = capfd.readouterr()
    assert "[2/2] corpus: tokenize" in printed.out
    assert printed.err.count("error: ") == 1
    assert "no" in printed.err
    assert open_run(tmp_path / "runs" / "g" / "text").is_done()
    assert not open_run(tmp_path / "runs" / "g" / "corpus").is_done()


def test_a_failed_attempts_log_and_rank_errors_are_shown(tmp_path: Path) -> None:
    """A verb that dies at once (its recipe is gone) after an attempt that we wrote, as a rank would."""
    attempt = begin_attempt(write_run(tmp_path / "text", "g", TEXT.stages[0], {}))
    attempt.log_path.write_text("".join(f"line {i}\n" for i in range(50)))
    (attempt.path / "rank_00002.error.txt").write_text("Traceback\nValueError: two\n")
    os.utime(attempt.path / "rank_00002.error.txt", (1, 1))
    (attempt.path / "rank_00001.error.txt").write_text("Traceback\nConnectionError: one\n")
    message = failure_text(open_run(tmp_path / "text"), -9, attempt=1)
    assert f"the last 20 lines of {attempt.log_path}:\n  | line 30\n" in message
    assert "  | ValueError: two\n" in message  # the rank that failed first
    assert "ConnectionError" not in message
    assert f"see also {attempt.path / 'rank_00001.error.txt'}" in message
    cause, way_on = message.splitlines()[-2:]  # the cause last, where a terminal shows it
    assert cause.startswith("stage 'text' ended by signal SIGKILL, and attempt 1 left no word of its end. Where nobody killed it, memory")
    assert way_on == "To go on, run the same command again: finished stages are skipped"


def test_what_stands_after_a_failure_is_named(tmp_path: Path) -> None:
    base = write_all(tmp_path)["base"]
    begin_attempt(base)
    trained(base, 4, 5.0)
    assert failure_text(base, -9, 1).endswith("finished stages are skipped, and this one goes on from its checkpoint 4")
    assert "memory may have run out" not in failure_text(base, -signal.SIGSEGV, 1)


@pytest.mark.parametrize(("ranks", "said"), [(1, False), (2, True)])
def test_an_error_that_stopped_a_stage_is_told_where_its_ranks_buried_it(tmp_path: Path, ranks: int, said: bool) -> None:
    """One process prints it last of all; of several each prints it, and torchrun a page behind them."""
    graph = with_overrides(SMOKE, [f"base.plan.ranks_per_node={ranks}", "base.plan.micro_batch=1"])
    base = write_all(tmp_path, graph)["base"]
    attempt = begin_attempt(base)
    attempt.log_path.write_text("Traceback\n")
    attempt.finish("stopped", error="DataError: no such source\nand more")
    cause, *others = failure_text(base, 2, 1).splitlines()
    assert cause == f"stage 'base' ended with exit code 2{': DataError: no such source' if said else ', for the reason above'}"
    assert others[:-1] == [*(["and more"] if said else []), f"the log of attempt 1 is {attempt.log_path}"]


STACKLESS = "no step was finished for 9 s; no stack came from rank 1 (n2): stopped, dead, or cut off"


def attempt_of(run: Run, patch: pytest.MonkeyPatch, start: int, job_id: int = 7) -> Attempt:
    """An attempt of one start of a job, by this process: it seems to be at work."""
    patch.setenv("SLURM_JOB_ID", str(job_id))
    patch.setenv("SLURM_RESTART_COUNT", str(start))
    return begin_attempt(run)


def write_start(run: Run, start: int, fault: dict[str, str], end: dict[str, str], job_id: int = 7) -> None:
    """What one start of a job leaves in its ledger."""
    ledger = Ledger(run.path, Start(job_id, start), ["n1", "n2"])
    ledger.append("start")
    for name, values in (("fault", fault), ("end", end)):
        if values:
            ledger.append(name, **values)


def job_log(run: Run, text: str, job_id: int = 7) -> Path:
    path = run.path / "job" / f"slurm-{job_id}.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_the_first_failure_is_what_the_ledger_says_and_the_traceback_of_the_attempt_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank was killed, and another lost its peer; the next start runs, its nodes slow or left out."""
    base = write_all(tmp_path)["base"]
    first = attempt_of(base, monkeypatch, 0)
    (first.path / "rank_00000.error.txt").write_text("Connection closed by peer\n")
    write_start(base, 0, {"cause": "rank", "words": "rank 1 on n2: Killed"}, {"decision": "requeue", "reason": "rank 1 on n2: Killed"})
    Ledger(base.path, Start(7, 0), []).append("fault", cause="node", words="left out from now on: n2")
    attempt_of(base, monkeypatch, 1)
    write_start(base, 1, {"cause": "slow node", "words": "n1: half as fast"}, {})
    fault, attempt, path, trace = first_failure_text(base).splitlines()
    assert fault.startswith("fault at 2")
    assert fault.endswith(", in start 0 of job 7: rank 1 on n2: Killed")
    assert (attempt, trace) == ("attempt 1: left no word of its end", "Connection closed by peer")
    assert path.endswith("attempts/1/rank_00000.error.txt, the first of 1:")

    write_start(base, 1, {"cause": "hang", "words": STACKLESS}, {"decision": "stop", "reason": "started 3 times in a row"})
    fault, stop, attempt = first_failure_text(base).splitlines()
    assert fault.endswith(f"in start 1 of job 7: {STACKLESS}")
    assert stop.startswith("stopped at 2")
    assert stop.endswith(": started 3 times in a row")
    assert attempt == "attempt 2: left no word of its end", "its process lives, but its start is over"


def test_what_a_supervisor_notes_of_slow_and_broken_nodes_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(tmp_path)
    (tmp_path / "check.json").write_text('{"slow": {"n1": "half as fast"}, "broken": {}, "words": "n1 is slow"}')
    supervisor.judge_nodes(batch, 0, tmp_path / "check.json", "")
    monkeypatch.setattr(job_queue, "exclude", lambda *_: None)  # Slurm takes it
    supervisor.leave_out(batch, ["n2"])
    assert [event["event"] for event in batch.ledger.events()] == ["fault", "checked", "fault"]
    assert newest_fault(batch.ledger.events()) is None


def test_a_failure_before_any_attempt_is_in_the_jobs_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_all(tmp_path)["base"]
    module = "ModuleNotFoundError: No module named 'torch'"
    log = job_log(base, "".join(f"line {i}\n" for i in range(50)) + f"0: {module}\n")
    words = {"cause": "rank", "words": "rank 0 on n1: Exited with exit code 1"}
    write_start(base, 0, words, {"decision": "stop", "reason": "started 3 times in a row"})
    text = first_failure_text(base)
    assert [line[:9] for line in text.splitlines()[:4]] == ["fault at ", "stopped a", "the last ", "  | line "]
    assert f"the last 40 lines of {log}:" in text
    assert f"  | 0: {module}\n" in text

    attempt_of(base, monkeypatch, 0, job_id=8).finish("failed", error="ValueError: two")  # the launch after it came further
    write_start(base, 0, {"cause": "rank", "words": "rank 0 on n1: Killed"}, {"decision": "requeue", "reason": "Killed"}, job_id=8)
    log = job_log(base, "the newer job\n", job_id=8)
    os.utime(log, (2e9, 2e9))
    assert "attempt 1: failed: ValueError: two" in first_failure_text(base)
    assert "  | " not in first_failure_text(base)
    write_start(base, 1, {}, {}, job_id=8)  # begins, and has no attempt yet
    assert "  | " not in first_failure_text(base)
    write_start(base, 1, words, {"decision": "requeue", "reason": words["words"]}, job_id=8)  # of no attempt again
    assert "  | the newer job\nattempt 1: failed" in first_failure_text(base)
    os.utime(job_log(base, "n1: module: command not found\n", job_id=9), (2.1e9, 2.1e9))  # its set-up fails: no ledger hears of it
    assert "  | n1: module: command not found\nattempt 1: failed" in first_failure_text(base)


def test_without_a_job_an_attempt_that_runs_hides_none_that_failed(tmp_path: Path) -> None:
    base = write_all(tmp_path)["base"]
    assert first_failure_text(base) == f"{base.path}: no attempt of stage 'base' failed"
    begin_attempt(base).finish("failed", error="ValueError: one")
    begin_attempt(base)
    assert first_failure_text(base) == "attempt 1: failed: ValueError: one"
    (base.path / "attempts" / "2" / "plan.json").write_text('{"job_id": "", "restart_count": 0, "place": "", "process_start": 0}')
    os.utime(base.path / "attempts" / "2" / "heartbeat", (1, 1))
    assert first_failure_text(base) == "attempt 2: left no word of its end"


def test_a_request_to_stop_is_no_failure(tmp_path: Path) -> None:
    base = write_all(tmp_path)["base"]
    begin_attempt(base).finish("interrupted", words="asked to stop (SIGINT)")
    assert first_failure_text(base).splitlines() == [
        f"{base.path}: no attempt of stage 'base' failed",
        "attempt 1: interrupted: asked to stop (SIGINT)",
    ]
