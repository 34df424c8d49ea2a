"""What `launch --local` refuses before it starts, and what it says of a stage that failed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.stages import Source, TokenizeStage
from megatron_ext.errors import LaunchError
from megatron_ext.launch import doctor_machine
from megatron_ext.launch.commands import parse
from megatron_ext.launch.failures import failure_text
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.local import launch_local
from megatron_ext.runs import open_run, write_run
from tests.unit.test_launch import SMOKE, TEXT
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
