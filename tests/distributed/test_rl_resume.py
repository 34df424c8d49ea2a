"""Six rollout steps straight equal some, kill -9, resume, the others, changes of the cap inside: bit for bit, and the test can fail."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import replace

import pytest

from megatron_ext.config.rl import Objective
from megatron_ext.errors import EXIT_AGAIN
from megatron_ext.metrics import read_metrics
from megatron_ext.rl.record_paths import recorded_steps
from megatron_ext.runs import open_run
from megatron_ext.tracker import iteration_path, published
from tests import interrupted_runs, rl_runs
from tests.interrupted_runs import Ask
from tests.rl_runs import CPU, FAULTS, rl_run, stage, trace
from tests.training_runs import DEAD

TWO = replace(CPU, ranks_per_node=2)
PLANS = {
    "two data-parallel ranks": TWO,
    "tensor 2": replace(TWO, tensor=2, sequence_parallel=True),
    "pipeline 2": replace(TWO, pipeline=2),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def straight(start):
    """On one rank."""
    return trace(rl_run(start, stage(start.path.parent), "straight"))


@pytest.fixture(scope="module")
def killed(start):
    """On one rank, killed after the checkpoint of step 3."""
    run = rl_run(start, stage(start.path.parent), "killed")
    kill(run, kill_after=3)
    return run


def kill(run, **when):
    with pytest.raises(AssertionError, match=DEAD):
        trace(run, **when)


def two_and_two(start, made, name):
    """Four steps straight, and two, killed, two more: the same?"""
    made = replace(made, steps=4, plan=replace(made.plan, save_every_steps=2))
    straight, run = trace(rl_run(start, made, f"straight {name}")), rl_run(start, made, f"resumed {name}")
    kill(run, kill_after=2)
    same(trace(run), straight, first=2)
    return straight


def again(killed, name, fault=""):
    """The killed run's copy goes on."""
    shutil.copytree(killed.path, killed.path.with_name(name))
    return trace(open_run(killed.path.with_name(name)), fault=fault)


def same(resumed, straight, first=3):
    assert resumed["steps"]
    assert resumed["steps"] == straight["steps"][first:]
    assert resumed["scores"] == [one for one in straight["scores"] if one[0] > first]
    assert resumed["progress"] == straight["progress"]
    assert resumed["digests"] == straight["digests"]


def values(found, name):
    return [step[rl_runs.EXACT.index(name)] for step in found["steps"]]


def test_resume_is_bit_exact(straight, killed):
    same(again(killed, "resumed"), straight)
    assert values(straight, "cap_tokens") == [12, 12, 16, 16, 20, 20]
    assert max(values(straight, "informative_share")) > 0, "no step moved a weight: the test shows nothing"


@pytest.mark.parametrize("name", PLANS)
def test_resume_is_bit_exact_under_a_layout(start, name):
    two_and_two(start, stage(start.path.parent, plan=PLANS[name]), name)


def test_wherever_a_step_is_cut_off(start, straight):
    """Before the first checkpoint while it samples, then while it grades, with a record newer than the checkpoint."""
    run = rl_run(start, stage(start.path.parent), "cut off")
    kill(run, kill_in=("sampling", 2))
    assert (published(run.checkpoints_path), recorded_steps(run.path)) == ([], [1])
    kill(run, kill_in=("grading", 5))
    assert (published(run.checkpoints_path), recorded_steps(run.path)) == ([3], [1, 2, 3, 4])
    same(trace(run), straight)


@pytest.fixture(scope="module")
def ahead(start):
    """Sampled ahead on two data-parallel ranks, with a reference; no more records are kept than must be."""
    plan = replace(TWO, save_every_steps=2, keep_rollouts_bytes=1, on_damaged_checkpoint="fall_back")
    made = stage(start.path.parent, objective=Objective(kl_coefficient=0.1, importance_cap=2.0), plan=plan)
    made = replace(made, rollouts=replace(made.rollouts, max_staleness=1))
    return made, trace(rl_run(start, made, "straight ahead"))


def test_rollouts_sampled_ahead_between_two_updates_and_from_an_older_checkpoint(start, ahead):
    made, straight = ahead
    run = rl_run(start, made, "resumed ahead")
    kill(run, kill_in=("updates", 5))
    assert published(run.checkpoints_path) == [2, 4]
    assert {1, 3, 5} <= set(recorded_steps(run.path)), "behind the start and the checkpoints; that of step 6 was being written"
    assert recorded_steps(run.path.with_name("straight ahead")) == [1, 3, 5, 6], "no others but the newest two"
    damaged = max(iteration_path(run.checkpoints_path, 4).glob("*.distcp"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    same(trace(run), straight, first=2)
    assert values(straight, "weight_version") == [0, 0, 2, 4, 6, 8], "each but the first by weights one step (two updates) old"


def test_an_engine_of_its_own_samples_during_the_updates(start, ahead):
    made, straight = ahead
    found = trace(rl_run(start, made, "elsewhere"), fault="an engine of its own")
    assert (found["steps"], found["digests"]) == (straight["steps"], straight["digests"])
    validation = ["ask", "answers"]
    opening = [*validation, "ask", "answers"]
    assert found["order"][: len(opening) + 4] == [*opening, "ask", "update", "update", "answers"]
    assert straight["order"][: len(opening) + 4] == [*opening, "ask", "answers", "update", "update"]


def test_resume_is_bit_exact_with_resampling_and_easy_prompts_leaving(start):
    made = stage(start.path.parent)
    made = replace(made, rollouts=replace(made.rollouts, prompts_per_step=16, resample_uninformative=2, drop_easy_share=0.5))
    found = two_and_two(start, made, "resampled")
    assert found["progress"].order.removed, "no problem left: the test shows nothing"
    assert values(found, "updates") == [4, 8, 12, 16]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_noticed(straight, killed, fault):
    resumed = again(killed, fault, fault)
    assert resumed["digests"] != straight["digests"]
    assert resumed["steps"] != straight["steps"][3:]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("the disk refuses", "RunError: .*step_0000001.jsonl.gz: the rollouts of step 1 cannot be recorded: .*make room"),
        ("a defect in grading", "LaunchError: grading failed on rank 0: IndexError: "),
        ("a defect in sampling", "LaunchError: sampling failed on rank 1: IndexError: "),
    ],
)
def test_a_failure_of_one_rank_ends_all_with_its_cause(start, failure, said):
    made = stage(start.path.parent, plan=TWO)
    made = replace(made, validation=replace(made.validation, sets=()))
    run = rl_run(start, made, failure)
    found = rl_runs.failures(run, failure)
    assert found[0] == found[1]
    assert re.match(said, found[0]), found[0]
    assert read_metrics(run.metrics_path, "rl") == [], "a step without its record does not count"


def test_learning_stops_on_request_after_a_rollout_step(start, tmp_path):
    """One rank is asked in the updates of a step that is no save step, with rollouts sampled ahead; the next attempt goes on from it."""
    plan = replace(TWO, save_every_steps=4, validate_every_steps=2)
    made = stage(start.path.parent, steps=4, plan=plan, objective=Objective(importance_cap=2.0))
    made = replace(made, rollouts=replace(made.rollouts, max_staleness=1))
    whole, run = rl_run(start, made, "whole"), rl_run(start, made, "asked to stop")
    assert interrupted_runs.command(whole, tmp_path / "0") == [0, 0]
    assert interrupted_runs.command(run, tmp_path / "1", [Ask(1, 3, (signal.SIGUSR1,))]) == [EXIT_AGAIN, EXIT_AGAIN]
    assert interrupted_runs.ended(run)["reason"] == "interrupted"
    assert published(run.checkpoints_path) == [3]
    assert interrupted_runs.command(run, tmp_path / "2") == [0, 0]
    assert interrupted_runs.weights(run, 4) == interrupted_runs.weights(whole, 4)
    names = ("step", *rl_runs.EXACT)
    told = [[tuple(one[name] for name in names) for one in read_metrics(each.metrics_path, "rl")] for each in (whole, run)]
    assert told[0] == told[1]
