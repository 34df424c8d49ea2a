"""A loss or gradient that is not finite on one rank stops every rank before the update, and nothing has moved."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.errors import TrainingError
from tests import ranks, training_runs
from tests.layouts import LAYOUTS, RATE, SEED, TWO, batches, observed, toy_stage, train_steps
from tests.small_corpus import train_run, write_corpus

Stopped = tuple[str, bool, tuple[float, float] | None]  # what was said, whether all was as before, the step done again


def into_gradients(state: Any, value: float) -> None:
    """One element of every gradient, so that it lies in every optimizer's share."""
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.view(-1)[0] = value


def into_weights(state: Any, value: float) -> None:
    for chunk in state.chunks:
        next(chunk.parameters()).data.view(-1)[:] = value


CASES: list[tuple[str, float, int]] = [  # where, what, on which rank
    ("gradients", math.nan, 1),
    ("gradients", math.inf, 0),
    ("nowhere", math.nan, 0),
    ("weights", math.nan, 0),
    ("weights", math.nan, 1),
]


def try_all(groups: Any, stage: Any) -> list[Stopped]:
    """Train a step, put a bad number in on one rank, train another; then, where the weights are good, that step again."""
    return [try_one(groups, stage, *case) for case in CASES]


def try_one(groups: Any, stage: Any, where: str, value: float, on_rank: int) -> Stopped:
    from megatron_ext.training.state import build_state
    from megatron_ext.training.step import train_step

    state = build_state(stage, groups, SEED)
    train_steps(state, stage, [0])
    if where == "weights" and groups.rank == on_rank:
        into_weights(state, value)
    bad_gradients = where == "gradients" and groups.rank == on_rank
    tamper = partial(into_gradients, state, value) if bad_gradients else nothing
    before = training_runs.digests(state)
    try:
        train_step(state, batches(stage, 1, groups.data_rank), RATE, stage.seed, 1, tamper)
        said = ""
    except TrainingError as error:
        said = str(error)
    same = training_runs.digests(state) == before
    return said, same, train_steps(state, stage, [1])[0] if where == "gradients" and said else None


def nothing() -> None:
    """Tamper with nothing."""


@functools.cache
def tried(name: str) -> dict[tuple[str, float, int], list[Stopped]]:
    """Case -> what each rank of a layout found."""
    found = ranks.run(try_all, LAYOUTS[name], toy_stage(LAYOUTS[name]))
    return dict(zip(CASES, zip(*found, strict=True), strict=True))


NAMES = ["data 2", "data 2, plain optimizer", "tensor 2", "pipeline 2"]


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "gradients"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient_on_one_rank_stops_all(name, case):
    for said, same, again in tried(name)[case]:
        what = r"gradient norm is (nan|inf|not finite on another rank \([\d.]+ here\))"
        assert re.match(what + "; the step was stopped before the weights moved, so the last checkpoint is good", said), said
        assert same
        assert again == observed(name).steps[1]  # and the state is as good as new


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "weights"], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_weight_on_one_rank_stops_all(name, case):
    for said, same, _ in tried(name)[case]:
        assert said.startswith("loss is nan; the step was stopped before the weights moved"), said
        assert same


@pytest.mark.parametrize("name", NAMES)
def test_a_good_step_is_not_stopped(name):
    """The check can say no: without a bad number the same function trains on."""
    for said, same, _ in tried(name)["nowhere", math.nan, 0]:
        assert said == ""
        assert not same


def train_with_nan(groups: Any, path: str, at_step: int) -> str:
    """Train a run with a NaN in a gradient of the last rank at one step; what was said."""
    from megatron_ext.training import trainer

    true_step = trainer.train_step
    done = []

    def tampered(state: Any, *arguments: Any, **options: Any) -> Any:
        done.append(1)
        bad = len(done) == at_step and groups.rank == groups.plan.num_ranks - 1
        return true_step(state, *arguments, tamper=partial(into_gradients, state, math.nan) if bad else nothing, **options)

    trainer.train_step = tampered
    with pytest.raises(TrainingError) as error:
        training_runs._train(groups, path, None, "")
    return str(error.value)


def test_the_message_names_stage_and_step_and_the_last_checkpoint_is_good(tmp_path):
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 30})
    run = train_run(corpus, replace(training_runs.stage(steps=4, save_every_steps=2, plan=TWO), name="stable"))
    for said in ranks.run(train_with_nan, TWO, str(run.path), 3):
        assert said.startswith("stage 'stable', step 3: gradient norm is nan; the step was stopped before the weights moved"), said
    assert folders.latest(run.checkpoints_path) == 2
    assert Path(run.metrics_path).read_text().count('"train"') == 2
    resumed = training_runs.trace(run)
    assert len(resumed["steps"]) == 2
    assert folders.latest(run.checkpoints_path) == 4
