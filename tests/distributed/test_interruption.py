"""A stage that is asked to stop: all ranks end after the same step, saved, with exit code 75, and the next attempt loses no bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.errors import EXIT_AGAIN
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import Run
from tests import interrupted_runs, layouts, training_runs
from tests.interrupted_runs import Ask, command, ended, exit_codes, start, weights
from tests.small_corpus import train_run, write_corpus

ONE = replace(layouts.CPU, micro_batch=4)
TWO = replace(ONE, ranks_per_node=2)
STEPS, EVERY = 8, 4
USR1, TERM = signal.SIGUSR1, signal.SIGTERM
AGAIN = [EXIT_AGAIN, EXIT_AGAIN]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("interruption"), {"web": 60, "qa": 30})


def new_run(corpus: Run, name: str, plan: Any = TWO, **changes: Any) -> Run:
    stage = training_runs.stage(**{"steps": STEPS, "save_every_steps": EVERY, "plan": plan, **changes})
    return train_run(corpus, replace(stage, name=name))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """Weights of a run that nobody disturbed, and its steps."""
    run = new_run(corpus, "straight")
    assert command(run, tmp_path_factory.mktemp("straight")) == [0, 0]
    return weights(run, STEPS), steps(run)


def steps(run: Run) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "samples_sha256")
    return [tuple(record[name] for name in names) for record in read_metrics(run.metrics_path, "train")]


CASES = {  # what is asked of each attempt
    "one rank": (TWO, [[Ask(1, 3, (USR1,))]]),
    "the first rank, more than once": (TWO, [[Ask(0, 3, (TERM, TERM, USR1))], [Ask(0, 6, (USR1,))]]),
    "all ranks, asynchronous saves": (replace(TWO, asynchronous_saves=True), [[Ask(0, 3, (TERM,)), Ask(1, 3, (TERM,))]]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_stop_after_one_step_and_no_bit_is_lost(corpus, straight, tmp_path, case):
    plan, attempts = CASES[case]
    run = new_run(corpus, case, replace(plan, keep_checkpoints=1))
    for number, asks in enumerate(attempts, start=1):
        out, step = tmp_path / str(number), asks[0].step
        assert command(run, out, asks) == AGAIN
        assert ended(run, number)["reason"] == "interrupted"
        assert f"ended after step {step}, which is saved" in ended(run, number)["words"]
        assert folders.latest(run.checkpoints_path) == step
        assert not read_manifest(folders.iteration_path(run.checkpoints_path, step)).pinned
        assert not run.is_done()
        assert not list((run.path / "attempts" / str(number)).glob("rank_*.error.txt"))
        assert "stopped: asked to stop (" in (out / "0").read_text()
        assert (out / "1").read_text() == ""
    assert command(run, tmp_path / "last") == [0, 0]
    assert run.is_done()
    assert weights(run, STEPS) == straight[0]
    assert steps(run) == straight[1]
    assert folders.published(run.checkpoints_path) == [max(EVERY, step), STEPS]  # routine ones go as newer ones come


def test_a_deliberate_fault_is_noticed(corpus, straight, tmp_path):
    run = new_run(corpus, "fault")
    assert command(run, tmp_path / "1", [Ask(1, 3, (USR1,))]) == AGAIN
    assert command(run, tmp_path / "2", fault="shifted learning rate") == [0, 0]
    assert weights(run, STEPS) != straight[0]
    assert steps(run) != straight[1]


def test_a_step_that_was_to_be_saved_is_saved_once(corpus, tmp_path):
    run = new_run(corpus, "at a save")
    assert command(run, tmp_path / "1", [Ask(0, EVERY, (USR1,))]) == AGAIN
    assert [record["step"] for record in read_metrics(run.metrics_path, "checkpoint")] == [EVERY]


def test_a_request_in_the_last_step_changes_nothing(corpus, tmp_path):
    run = new_run(corpus, "in the last step", ONE)
    assert command(run, tmp_path / "1", [Ask(0, STEPS, (USR1, TERM))]) == [0]
    assert ended(run)["reason"] == "done"
    assert run.is_done()


@pytest.mark.parametrize("rank", [0, 1])
def test_before_its_first_step_a_stage_leaves_at_once(corpus, tmp_path, rank):
    """The other rank loses its neighbour, and is not taken for one that failed."""
    run = new_run(corpus, f"start {rank}")
    assert command(run, tmp_path / "1", [Ask(rank, 0, (TERM,))]) == AGAIN
    assert ended(run)["reason"] == "interrupted"
    assert folders.published(run.checkpoints_path) == []
    assert not list((run.path / "attempts" / "1").glob("rank_*.error.txt"))


def test_a_rank_leaves_out_of_a_wait_in_native_code(corpus, tmp_path):
    """Rank 0 waits for its neighbour in a collective, where no Python runs."""
    run = new_run(corpus, "native")
    first, second = start(run, tmp_path / "1", [Ask(1, 0, (signal.SIGSTOP,))])
    wait_for(lambda: Path(f"/proc/{second.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", second)
    os.kill(first.pid, TERM)
    first.join(interrupted_runs.LIMIT_SECONDS / 4)
    assert first.exitcode == EXIT_AGAIN
    os.kill(second.pid, TERM)
    os.kill(second.pid, signal.SIGCONT)
    assert exit_codes([first, second]) == AGAIN
    assert ended(run)["reason"] == "interrupted"


def test_stacks_are_shown_and_training_goes_on(corpus, tmp_path):
    run = new_run(corpus, "stacks", ONE)
    assert command(run, tmp_path / "1", [Ask(0, 2, (signal.SIGUSR2,))]) == [0]
    shown = (tmp_path / "1" / "0").read_text()
    assert "most recent call first" in shown
    assert "in _train\n" in shown
    assert "heartbeat" not in (run.path / "attempts" / "1" / "log.txt").read_text()
    assert (run.path / "attempts" / "1" / "pulse").is_file()


@pytest.mark.parametrize("number", [USR1, TERM])
def test_torchrun_ends_as_its_ranks_do(tmp_path, number):
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 30}, max_epochs=1e4)
    run = new_run(corpus, "torchrun", steps=3_000, save_every_steps=3_000)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "megatron_ext", "train", str(run.path)], stdout=out, stderr=out, env=environment)
    try:
        wait_for(lambda: run.metrics_path.is_file() and bool(steps(run)), process)
        process.send_signal(number)
        code = process.wait(interrupted_runs.LIMIT_SECONDS)
    finally:
        process.kill()
    text = (tmp_path / "out").read_text()
    assert code == EXIT_AGAIN, text
    assert "Traceback" not in text
    assert f"stopped: asked to stop ({signal.Signals(number).name}), and ended after step" in text
    assert ended(run)["reason"] == "interrupted"
    (saved,) = folders.published(run.checkpoints_path)
    assert saved == steps(run)[-1][0]


def wait_for(happened: Any, process: Any) -> None:
    deadline = time.monotonic() + interrupted_runs.LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        assert (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None
        time.sleep(0.02)
