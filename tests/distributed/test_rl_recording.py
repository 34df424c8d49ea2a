"""A step's record is written beside its updates; neither metrics nor a checkpoint name it before it stands there, kill -9 included."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.rl import Objective
from megatron_ext.errors import TrainingError
from megatron_ext.metrics import read_metrics
from megatron_ext.rl.record_paths import record_path, recorded_steps
from megatron_ext.tracker import published
from tests import ranks, rl_runs
from tests.rl_runs import CPU, rl_run, stage, trace
from tests.training_runs import DEAD

SECONDS = 100.0  # before a thread that waits for what never comes goes on
UPDATES = 2  # of a step


@dataclass(frozen=True)
class Held:
    """What the writing of a step's record waits for, and what then happens."""

    step: int
    until_update: int | None  # how many are done when it begins; None: the loop itself waits for the record
    dies: bool = False  # before the file gets its name
    update_fails: bool = False
    unwaited: bool = False  # a fault: the loop is told a digest at once


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("recording"))


def short(start: Any, steps: int, staleness: int = 0) -> Any:
    """Saved every second step; nothing is validated."""
    made = stage(start.path.parent, steps=steps, plan=replace(CPU, save_every_steps=2), objective=Objective(importance_cap=2.0))
    rollouts = replace(made.rollouts, max_staleness=staleness)
    return replace(made, validation=replace(made.validation, sets=()), rollouts=rollouts)


def learnt(run: Any, held: Held) -> dict[str, Any]:
    return ranks.run(_learn, run.stage.plan, str(run.path), held)[0]


def _learn(groups: Any, path: str, held: Held) -> dict[str, Any]:
    from megatron_ext.rl import source
    from megatron_ext.rl.actor import Actor
    from megatron_ext.rl.recording import Recorder

    write, update, digest, goes_on = source.write_record, Actor.update, Recorder.digest, threading.Event()
    found: dict[str, Any] = {}

    def writing(run_path: Any, batch: Any, may_write: Any) -> str:
        if batch.step == held.step:
            found["in_time"] = goes_on.wait(SECONDS)
            may_write = _die if held.dies else may_write
        return write(run_path, batch, may_write)

    def updating(self: Any, part: Any, rate: float, updates_before: int) -> Any:
        if updates_before == held.until_update:
            found["stood"] = record_path(Path(path), held.step).exists()
            goes_on.set()
            if held.update_fails:
                raise TrainingError("the loss is not finite")
        return update(self, part, rate, updates_before)

    def waiting(self: Any, step: int) -> str:
        if step == held.step and held.until_update is None:
            goes_on.set()
        return "0" * 64 if step == held.step and held.unwaited else digest(self, step)

    source.write_record, Actor.update, Recorder.digest = writing, updating, waiting  # type: ignore[method-assign]
    try:
        rl_runs._learn(groups, path, None, "")
    except TrainingError as error:
        found["error"] = str(error)
    return {**found, "recorded": recorded_steps(Path(path))}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def named(run: Any) -> tuple[list[int], list[int]]:
    """Steps of metrics.jsonl, and of checkpoints."""
    return [one["step"] for one in read_metrics(run.metrics_path, "rl")], published(run.checkpoints_path)


def test_updates_go_on_while_a_record_is_written(start):
    """The writing waits for the step's first update: a loop that waited for the writing before it would never come there."""
    found = learnt(rl_run(start, short(start, 2), "beside"), Held(2, until_update=UPDATES))
    assert found == {"in_time": True, "stood": False, "recorded": [1, 2]}


def test_a_failing_update_leaves_the_record_of_its_step(start):
    run = rl_run(start, short(start, 2), "failing")
    found = learnt(run, Held(2, until_update=UPDATES, update_fails=True))
    assert found == {"in_time": True, "stood": False, "error": "the loss is not finite", "recorded": [1, 2]}
    assert named(run) == ([1], [])


AHEAD = {"its own step's metrics": 0, "the checkpoint that it was sampled ahead of": 1}


@pytest.mark.parametrize("staleness", AHEAD.values(), ids=AHEAD)
def test_nothing_names_a_record_before_it_stands(start, staleness):
    """Killed while the loop waits for a record, before its file has a name; then resumed."""
    made = short(start, 4, staleness)
    straight, run = trace(rl_run(start, made, f"straight {staleness}")), rl_run(start, made, f"killed {staleness}")
    with pytest.raises(AssertionError, match=DEAD):
        learnt(run, Held(3, until_update=None, dies=True))
    assert recorded_steps(run.path) == [1, 2]
    assert named(run) == ([1, 2], [] if staleness else [2])
    resumed = trace(run)
    assert (resumed["digests"], resumed["progress"]) == (straight["digests"], straight["progress"])
    assert resumed["steps"] == straight["steps"][0 if staleness else 2 :]
    assert [path.name for path in (run.path / "rollouts").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("staleness", AHEAD.values(), ids=AHEAD)
def test_a_loop_that_does_not_wait_is_noticed(start, staleness):
    run = rl_run(start, short(start, 4, staleness), f"unwaited {staleness}")
    with pytest.raises(AssertionError, match=DEAD):
        learnt(run, Held(3, until_update=(3 - staleness) * UPDATES, dies=True, unwaited=True))
    assert recorded_steps(run.path) == [1, 2]
    metrics, checkpoints = named(run)
    assert 2 in checkpoints if staleness else 3 in metrics
