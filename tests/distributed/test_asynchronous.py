"""Saving beside the training: the same bytes as a synchronous save, told only when published, and never two at a time."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.plan import TrainPlan
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import Run
from tests import layouts, ranks, training_runs
from tests.small_corpus import train_run, write_corpus

CPU, TWO = (replace(plan, micro_batch=4) for plan in (layouts.CPU, layouts.TWO))
PLAIN = replace(CPU, distributed_optimizer=False)  # its step counts lie in common.pt
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("asynchronous"), {"web": 60, "qa": 30})


def new_run(corpus: Run, name: str, plan: TrainPlan, beside: bool) -> Run:
    stage = training_runs.stage(steps=STEPS, save_every_steps=EVERY, plan=replace(plan, asynchronous_saves=beside))
    return train_run(corpus, replace(stage, name=name))


def data_digests(run: Run) -> dict[str, Any]:
    """Digests of every data file of every checkpoint, and what stands in its common.pt."""
    from megatron_ext.checkpoint.safe_reading import read_common

    found: dict[str, Any] = {}
    for iteration in folders.published(run.checkpoints_path):
        path = folders.iteration_path(run.checkpoints_path, iteration)
        found.update({f"{iteration}/{name}": digest for name, digest in verify(path).files.items() if name.endswith(".distcp")})
        found[f"{iteration}/common"] = str(read_common(path))
    return found


@pytest.mark.parametrize("plan", [CPU, TWO], ids=["one rank", "two ranks"])
def test_an_asynchronous_save_writes_what_a_synchronous_one_does(corpus, plan):
    runs = [new_run(corpus, f"{beside} {plan.num_ranks}", plan, beside) for beside in (False, True)]
    synchronous, beside = (training_runs.trace(run) for run in runs)
    assert beside["steps"] == synchronous["steps"]
    assert beside["digests"] == synchronous["digests"]
    assert folders.published(runs[1].checkpoints_path) == [2, 4, 6]
    assert data_digests(runs[1]) == data_digests(runs[0])


def late(groups: Any, path: str, copy: bool) -> dict[str, Any]:
    """Train; no save writes before training has taken another step after its begin (or has ended). What was seen at each step's end."""
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.checkpoint import writing
    from megatron_ext.distributed import broadcast_object
    from megatron_ext.runs import open_run
    from megatron_ext.training import trainer
    from megatron_ext.training.hooks import Hook

    run = open_run(Path(path))
    attempt = broadcast_object(begin_attempt(run) if groups.rank == 0 else None)
    may_write, seen = threading.Event(), {"steps": [], "saved": []}
    true_write, true_settle = writing.Planned.write, trainer._Loop.settle

    def write(planned: Any) -> Any:
        assert may_write.wait(60)
        return true_write(planned)

    def settle(loop: Any, progress: Any, wait: bool) -> None:
        if wait:  # before the next save, and at the end
            may_write.set()
        true_settle(loop, progress, wait)
        if wait:
            may_write.clear()

    writing.Planned.write, trainer._Loop.settle = write, settle
    if not copy:
        writing.Planned.copy = lambda *_: None

    class Watch(Hook):
        def step(self, context: Any, metrics: Any) -> None:
            seen["steps"].append((context.progress.step, folders.latest(run.checkpoints_path)))

        def checkpoint(self, context: Any, saved: Any) -> None:
            seen["saved"].append((context.progress.step, saved.progress.step, folders.latest(run.checkpoints_path)))
            assert 0 < saved.stall_seconds < saved.seconds

    trainer.train(run, groups, attempt, [Watch()])
    return seen


@pytest.mark.parametrize("plan", [CPU, PLAIN], ids=["distributed optimizer", "plain optimizer"])
def test_it_says_saved_only_after_the_publish(corpus, plan):
    run = new_run(corpus, f"late {plan.distributed_optimizer}", plan, beside=True)
    seen = ranks.run(late, plan, str(run.path), True)[0]
    # each write was held back until the next save was due: training went on, and neither tracker nor hook spoke of it before
    assert seen["steps"] == [(1, None), (2, None), (3, None), (4, None), (5, 2), (6, 2)]
    assert seen["saved"] == [(4, 2, 2), (6, 4, 4), (6, 6, 6)]
    assert data_digests(run) == data_digests(open_synchronous(corpus, plan))


@pytest.mark.parametrize("plan", [CPU, PLAIN], ids=["distributed optimizer", "plain optimizer"])
def test_a_save_without_its_copy_is_noticed(corpus, plan):
    run = new_run(corpus, f"no copy {plan.distributed_optimizer}", plan, beside=True)
    ranks.run(late, plan, str(run.path), False)
    wrong, right = data_digests(run), data_digests(open_synchronous(corpus, plan))
    assert wrong.keys() == right.keys()
    assert wrong["2/__0_0.distcp"] != right["2/__0_0.distcp"]
    assert (wrong["2/common"] == right["2/common"]) == plan.distributed_optimizer


def open_synchronous(corpus: Run, plan: TrainPlan = CPU) -> Run:
    """The run of one rank that saved synchronously; trained once."""
    run = new_run(corpus, "False 1" if plan == CPU else "False plain", plan, beside=False)
    if not folders.published(run.checkpoints_path):
        training_runs.trace(run)
    return run


def test_the_manifest_is_of_the_step_that_was_saved(corpus):
    run = new_run(corpus, "late again", CPU, beside=True)
    ranks.run(late, CPU, str(run.path), True)
    synchronous = open_synchronous(corpus)
    for iteration in folders.published(run.checkpoints_path):
        one, other = (read_manifest(folders.iteration_path(of.checkpoints_path, iteration)) for of in (run, synchronous))
        assert (one.tokens, one.ledger, one.learning_rate, one.pinned) == (other.tokens, other.ledger, other.learning_rate, other.pinned)
