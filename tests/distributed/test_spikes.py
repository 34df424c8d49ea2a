"""Spikes and bad numbers that are left out or gone back for: nothing moves, nothing is lost from the ledger, a resume decides the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.faults import Faults
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import Branch
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import Manifest
from megatron_ext.runs import Run
from tests import training_runs
from tests.documented_metrics import undocumented
from tests.faulty_runs import trained
from tests.small_corpus import train_run, write_corpus

CPU = TrainPlan(device="cpu")
TWO = replace(CPU, ranks_per_node=2)
STEPS, EVERY, BAD, TOKENS = 8, 3, 7, 128  # tokens of a batch
WATCHING = Faults(spike="skip", window_steps=6, least_steps=4)
CASES = {
    "data 2": (replace(TWO, micro_batch=2, asynchronous_saves=True), "nan", "gradient norm not finite"),
    "tensor 2": (replace(TWO, tensor=2), "gradients", "gradient norm spike"),
    "data 2, plain optimizer": (replace(TWO, distributed_optimizer=False), "one rank's gradients", "gradient norm spike"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("spikes"), {"web": 60, "qa": 30})


def stage(name: str, faults: Faults, plan: TrainPlan = CPU, **changes: Any) -> Any:
    return replace(training_runs.stage(steps=STEPS, save_every_steps=EVERY, plan=plan, **changes), name=name, faults=faults)


def newest(run: Run) -> Manifest:
    return folders.find(run.checkpoints_path, None, run.name)[1]


def records(run: Run, kind: str) -> list[dict[str, Any]]:
    return read_metrics(run.metrics_path, kind)


@pytest.fixture(scope="module")
def skipping(corpus):
    """A run whose step 7, the first after a checkpoint, spikes and is left out; and what was seen."""
    run = train_run(corpus, stage("skipping", WATCHING))
    return run, trained(run, {BAD: "loss"})[0]


def test_a_spike_is_left_out_and_nothing_moves(skipping):
    _, seen = skipping
    assert seen["skips"] == [(BAD, "loss spike")]
    assert [step for step, _, _ in seen["steps"]] == [1, 2, 3, 4, 5, 6, 8]
    assert seen["after"][BAD] == seen["after"][BAD - 1]  # weights, moments and step counts
    assert seen["after"][BAD + 1] != seen["after"][BAD]


def test_what_was_left_out_stands_in_the_ledger_and_the_metrics(skipping):
    run, _ = skipping
    manifest, skips, train = newest(run), records(run, "skip"), records(run, "train")
    assert [(one.stage, one.step, one.reason, one.action) for one in manifest.skipped] == [("skipping", BAD, "loss spike", "skip")]
    batch = manifest.skipped[0].tokens
    assert sum(batch.values()) == TOKENS
    assert manifest.skipped_tokens == batch
    assert sum(line.tokens for line in manifest.ledger) == manifest.tokens == STEPS * TOKENS
    trained_on = {line.source: line.tokens - manifest.skipped_tokens.get(line.source, 0) for line in manifest.ledger}
    assert sum(trained_on.values()) == (STEPS - 1) * TOKENS == train[-1]["tokens"] - train[-1]["skipped_tokens"]
    assert [(one["step"], one["tokens"], one["skipped_tokens"]) for one in skips] == [(BAD, BAD * TOKENS, TOKENS)]
    assert skips[0]["value"] == skips[0]["loss"] > skips[0]["mean"] + 6 * skips[0]["sigma"]
    assert len({one["samples_sha256"] for one in (*skips, *train)}) == STEPS  # no batch came twice


def test_a_resume_right_before_the_spike_decides_the_same(corpus, skipping):
    run = train_run(corpus, stage("killed", WATCHING))
    with pytest.raises(AssertionError, match="exit codes"):
        trained(run, {BAD: "loss"}, kill_after=BAD - 1)
    resumed = trained(run, {BAD: "loss"})[0]
    straight_run, straight = skipping
    assert resumed["skips"] == straight["skips"]
    assert resumed["steps"] == straight["steps"][-1:]
    assert resumed["after"][STEPS] == straight["after"][STEPS]
    assert newest(run).guard == newest(straight_run).guard
    assert [replace(one, stage="") for one in newest(run).skipped] == [replace(one, stage="") for one in newest(straight_run).skipped]


def test_a_window_that_is_not_restored_is_noticed(corpus, skipping):
    run = train_run(corpus, stage("forgetful", WATCHING))
    with pytest.raises(AssertionError, match="exit codes"):
        trained(run, {BAD: "loss"}, kill_after=BAD - 1)
    resumed = trained(run, {BAD: "loss"}, fault="window not restored")[0]
    assert resumed["skips"] == []
    assert resumed["after"][STEPS] != skipping[1]["after"][STEPS]
    assert newest(run).guard != newest(skipping[0]).guard


def test_a_roll_back_ends_where_leaving_out_ends(corpus, skipping):
    run = train_run(corpus, stage("returning", replace(WATCHING, spike="roll_back")))
    seen = trained(run, {BAD + 1: "gradients", 5: "loss"})[0]
    other = train_run(corpus, stage("leaving", WATCHING))
    straight = trained(other, {BAD + 1: "gradients", 5: "loss"})[0]
    assert seen["back"] == [(3, 5), (6, 8)]
    assert seen["skips"] == straight["skips"] == [(5, "loss spike"), (8, "gradient norm spike")]
    assert [step for step, _, _ in seen["steps"]] == [1, 2, 3, 4, 4, 6, 7, 7]  # 4 and 7 were done twice, to the same numbers
    assert sorted(set(seen["steps"])) == straight["steps"]
    assert seen["after"] == straight["after"]
    assert [replace(one, stage="", action="skip") for one in newest(run).skipped] == [
        replace(one, stage="") for one in newest(other).skipped
    ]
    assert [one["step"] for one in records(run, "train")] == [1, 2, 3, 4, 6, 7]
    assert [(one["step"], one["at_step"]) for one in records(run, "roll_back")] == [(3, 5), (6, 8)]
    assert undocumented(records(run, "roll_back")) == []
    assert newest(run).ledger == newest(other).ledger


@pytest.mark.parametrize("name", CASES)
def test_what_one_rank_finds_is_left_out_or_gone_back_for_on_all(corpus, name):
    plan, injected, reason = CASES[name]
    results = {}
    for action in ("skip", "roll_back"):
        run = train_run(corpus, stage(f"{action} {name}", replace(WATCHING, spike=action, non_finite=action), plan))
        seen = trained(run, {BAD: injected})
        assert all(one["steps"] == seen[0]["steps"] for one in seen)
        assert all(one["skips"] == [(BAD, reason)] for one in seen)
        assert all(one["after"][BAD] == one["after"][BAD - 1] for one in seen)
        assert all(one["back"] == ([(6, BAD)] if action == "roll_back" else []) for one in seen)
        results[action] = [one["after"][STEPS] for one in seen]
    assert results["skip"] == results["roll_back"]


GIVING_UP = {
    "too many in a row": (
        Faults(non_finite="skip", most_in_a_row=2), dict.fromkeys((4, 5, 6), "nan"), 3,
        "step 6: the batches of steps 4 to 5 were left out",
    ),
    "too many roll-backs": (
        Faults(non_finite="roll_back", most_roll_backs=1), dict.fromkeys((4, 5), "nan"), 3,
        "step 5: the stage went back to the checkpoint of step 3 1 times",
    ),
    "nothing to go back to": (
        Faults(non_finite="roll_back"), {2: "nan"}, None,
        "step 2: gradient norm is nan; the step was stopped before the weights moved",
    ),
    "a spike stops": (
        replace(WATCHING, spike="stop"), {6: "gradients"}, 3,
        "step 6: gradient norm ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVING_UP)
def test_giving_up_names_the_steps_and_the_way_out(corpus, name):
    faults, injected, last, said = GIVING_UP[name]
    run = train_run(corpus, stage(name, faults))
    error = trained(run, injected)[0]["error"]
    assert error.startswith(f"stage '{name}', {said}"), error
    assert error.endswith(f"(megatron-ext why {run.path} --step {max(injected)})"), error
    assert folders.latest(run.checkpoints_path) == last
    assert [one["step"] for one in records(run, "stop")] == [max(injected)]
    if name == "nothing to go back to":
        assert "published no checkpoint yet: start it again with a smaller plan.save_every_steps" in error
    if name == "a spike stops":
        assert "is a spike: more than" in error


def test_a_branch_carries_the_list_on_and_begins_a_window(corpus, skipping):
    parent, _ = skipping
    child = stage("child", WATCHING, start=Branch(stage="skipping", tokens=STEPS * TOKENS))
    child = replace(child, budget=replace(child.budget, steps=2))
    run = train_run(corpus, child, parent)
    seen = trained(run, {STEPS + 2: "loss"})[0]  # no spike to a window of one step
    assert seen["skips"] == []
    assert [(one.stage, one.step) for one in newest(run).skipped] == [("skipping", BAD)]
    assert newest(run).guard["losses"] == [loss for _, loss, _ in seen["steps"]]
    assert records(run, "train")[-1]["skipped_tokens"] == 0  # of the stage; the manifest has the lineage's
