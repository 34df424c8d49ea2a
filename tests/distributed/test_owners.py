"""Two trainers and one folder: the second is refused, and one that was cut off and wakes up changes nothing."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import TAKE_OVER
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from megatron_ext.metrics import read_metrics
from megatron_ext.runs import Run
from tests import layouts, ranks, training_runs
from tests.small_corpus import train_run, write_corpus

CPU = replace(layouts.CPU, micro_batch=4)
STEPS, AT = 6, 4  # it stops at the save of step 4
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("owners"), {"web": 60, "qa": 30})


@pytest.fixture(scope="module")
def straight(corpus):
    return training_runs.trace(new_run(corpus, "straight", beside=False))


def new_run(corpus: Run, name: str, beside: bool) -> Run:
    plan = replace(CPU, asynchronous_saves=beside)
    return train_run(corpus, replace(training_runs.stage(steps=STEPS, save_every_steps=2, plan=plan), name=name))


def sleep() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def train_and_sleep(groups: Any, path: str, where: str) -> None:
    """Train, and fall asleep at a point of the save at `AT`, or in the step after it."""
    from megatron_ext.attempts import Attempt
    from megatron_ext.checkpoint import writing

    asleep: list[int] = []

    def once(here: bool) -> None:
        if here and not asleep:
            asleep.append(1)
            sleep()

    true_check, true_rename, true_write = Attempt.check_owner, folders._rename, writing.Planned.write
    at_save = []

    def write(planned: Any) -> Any:
        at_save[:] = [f"iter_{AT:07d}" in planned.aside.name]
        once(where == "while it writes" and at_save[0])
        return true_write(planned)

    def check(attempt: Any) -> None:
        true_check(attempt)
        once(where == "after its look" and at_save == [True])

    def rename(path: Path, target: Path) -> None:
        once(where == "before the tracker" and target.name == folders.TRACKER and at_save == [True])
        true_rename(path, target)
        once(where == "after the publish" and target.name == folders.TRACKER and at_save == [True])

    Attempt.check_owner, folders._rename, writing.Planned.write = check, rename, write  # type: ignore[method-assign]
    training_runs._train(groups, path, None, "")


def take_over(groups: Any, path: str) -> dict[str, Any]:
    """What `train --take-over` does."""
    os.environ[TAKE_OVER] = "1"
    return training_runs._train(groups, path, None, "")


def wait_until_asleep(process: Any) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "Tt":
            return
        assert process.is_alive(), "it ended before it fell asleep"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def contents(run: Run) -> dict[str, str]:
    """Every file of a run that says what was trained: checkpoints, metrics, marks."""
    files = [path for path in run.path.rglob("*") if path.is_file() and "attempts" not in path.relative_to(run.path).parts]
    return {str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("beside", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("where", ["while it writes", "after its look", "before the tracker", "after the publish"])
def test_a_stale_owner_that_wakes_up_changes_nothing(corpus, straight, tmp_path, where, beside):
    run = new_run(corpus, f"{where} {beside}", beside)
    stale = multiprocessing.get_context("forkserver").Process(
        target=ranks._rank, args=(0, run.stage.plan, ranks.free_port(), str(tmp_path), train_and_sleep, (str(run.path), where))
    )
    stale.start()
    try:
        wait_until_asleep(stale)
        with pytest.raises(AssertionError, match=rf"RunError: .*attempt 1 \(pid {stale.pid} on .*is at work on stage.*--take-over"):
            training_runs.trace(run)  # asleep, it still owns the folder
        newer = ranks.run(take_over, run.stage.plan, str(run.path))[0]
        before = contents(run)
        os.kill(stale.pid, signal.SIGCONT)
        stale.join(LIMIT_SECONDS)
    finally:
        stale.kill()
        stale.join()
    assert stale.exitcode == 1
    said = (tmp_path / "0.error").read_text()
    assert re.search(r"RunError: .*attempts/1: this attempt lost the run folder to attempt 2 \(pid \d+ on ", said), said
    assert contents(run) == before
    first = newer["start"]["progress"].step
    assert first in (
        {4 if where == "after the publish" else 2} | ({2, 4} if beside else set())
    )  # a thread may go on a little when all stop
    assert newer["steps"] == straight["steps"][first:]
    assert newer["digests"] == straight["digests"][0]
    for iteration in folders.published(run.checkpoints_path):
        verify(folders.iteration_path(run.checkpoints_path, iteration))
    stands = [(record["step"], record["attempt"]) for record in read_metrics(run.metrics_path, "train")]
    assert stands == [(step, 1 if step <= first else 2) for step in range(1, STEPS + 1)]
