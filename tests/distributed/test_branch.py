"""What crosses a joint, and what does not: weights, moments, learning rate, data order, random state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.optimizer import Optimizer
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, Weights
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import mark_done
from megatron_ext.training.start import parent_checkpoint
from tests.small_corpus import train_run, write_corpus
from tests.training_runs import DEAD, stage, trace

OTHER = Mixture(rows=(Row(source="web", weight=0.25), Row(source="qa", weight=0.75)))
DECAY = Schedule(shape="cosine", peak=1e-2, floor_fraction=0.1)
BATCH_TOKENS = 8 * 16


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("branch"), {"web": 60, "qa": 30})
    run = train_run(corpus, replace(stage(schedule=Schedule(shape="constant", peak=1e-2), save_every_steps=2), name="stable"))
    return corpus, run, _finished(run)


def _finished(run):
    result = trace(run)
    mark_done(run, {})
    return result


def child(parent, name, **changes):
    corpus, run, _ = parent
    return train_run(corpus, replace(stage(steps=4, schedule=DECAY), name=name, start=Branch(stage="stable"), **changes), run)


def moments(digests):
    return {k: v for k, v in digests[0].items() if k.startswith(("exp_avg", "step"))}


def weights(digests):
    return {k: v for k, v in digests[0].items() if k.startswith("0.")}


def test_a_branch_begins_where_its_parent_ended(parent):
    run = child(parent, "decay")
    result = trace(run)
    _, _, stable = parent
    assert result["start"]["digests"] == stable["digests"][0]  # weights, moments and step counts, bit for bit
    assert len(moments([result["start"]["digests"]])) > 0
    rates = [step[2] for step in result["steps"]]
    assert rates[0] == 1e-2  # the first decay step is at the peak
    assert rates[1] < rates[0]
    tokens = [step[3:5] for step in result["steps"]]
    assert tokens == [(n * BATCH_TOKENS, (8 + n) * BATCH_TOKENS) for n in range(1, 5)]
    manifest = read_manifest(folders.iteration_path(run.checkpoints_path, 4))
    assert manifest.parent is not None
    assert (manifest.parent.stage, manifest.parent.start, manifest.parent.iteration) == ("stable", "branch", 8)
    assert manifest.lineage_tokens == 12 * BATCH_TOKENS


def test_a_weights_start_brings_weights_and_nothing_else(parent):
    corpus, run, stable = parent
    result = trace(train_run(corpus, replace(stage(steps=4), name="weights", start=Weights(stage="stable")), run))
    assert weights([result["start"]["digests"]]) == weights(stable["digests"])
    assert moments([result["start"]["digests"]]) == {}
    assert result["steps"][0][3:5] == (BATCH_TOKENS, 9 * BATCH_TOKENS)


def test_a_changed_mixture_changes_the_samples_and_nothing_else(parent):
    one, other = trace(child(parent, "same")), trace(child(parent, "mixed", mixture=OTHER))
    assert one["start"]["digests"] == other["start"]["digests"]
    assert one["rng"] == other["rng"]
    assert [s[2:5] for s in one["steps"]] == [s[2:5] for s in other["steps"]]
    assert all(a[5] != b[5] for a, b in zip(one["steps"], other["steps"], strict=True))


def test_the_random_state_is_the_recipes(parent):
    one, same, other = (trace(child(parent, name, seed=seed)) for name, seed in (("seed a", 1), ("seed b", 1), ("seed c", 2)))
    assert one["rng"] == same["rng"]
    assert all(a != b for a, b in zip(one["rng"], other["rng"], strict=True))
    assert [s[5] for s in one["steps"]] == [s[5] for s in other["steps"]]  # a branch goes on in its lineage's order


def test_the_branchs_own_optimizer_numbers_are_used(parent):
    kept, changed = trace(child(parent, "kept")), trace(child(parent, "changed", optimizer=Optimizer(weight_decay=0.0)))
    assert kept["steps"][0] == changed["steps"][0]
    assert kept["digests"] != changed["digests"]


def test_resume_right_after_the_joint_is_exact(parent):
    straight = trace(child(parent, "straight", plan=stage(save_every_steps=1).plan))
    run = child(parent, "killed", plan=stage(save_every_steps=1).plan)
    with pytest.raises(AssertionError, match=DEAD):
        trace(run, kill_after=1)
    resumed = trace(run)
    assert resumed["steps"] == straight["steps"][1:]
    assert resumed["digests"] == straight["digests"]


def test_the_ledger_goes_on_across_the_joint(parent):
    run = child(parent, "ledger", mixture=OTHER)
    trace(run)
    before = {line.source: line for line in read_manifest(folders.iteration_path(parent[1].checkpoints_path, 8)).ledger}
    after = {line.source: line for line in read_manifest(folders.iteration_path(run.checkpoints_path, 4)).ledger}
    assert sum(line.tokens for line in before.values()) == 8 * BATCH_TOKENS
    assert sum(line.stage_tokens for line in after.values()) == 4 * BATCH_TOKENS
    for source, line in after.items():
        assert line.tokens == before[source].tokens + line.stage_tokens
        assert line.position == before[source].position + line.stage_tokens // 16


def test_a_branch_from_a_point_in_the_middle(parent):
    run = child(parent, "middle")
    run_at = train_run(
        parent[0],
        replace(stage(steps=4, schedule=DECAY), name="middle at 6", start=Branch(stage="stable", tokens=6 * BATCH_TOKENS)),
        parent[1],
    )
    assert trace(run_at)["steps"][0][4] == 7 * BATCH_TOKENS
    assert trace(run)["steps"][0][4] == 9 * BATCH_TOKENS


def test_a_point_that_was_not_saved_names_those_that_were(parent):
    start = Branch(stage="stable", tokens=3 * BATCH_TOKENS)
    run = train_run(parent[0], replace(stage(steps=4), name="nowhere", start=start), parent[1])
    with pytest.raises(CheckpointError, match=r"no checkpoint of 'stable' at 384 tokens; there are .*1,024"):
        parent_checkpoint(run)


def test_the_last_of_an_unfinished_parent_is_refused(parent, tmp_path):
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 30})
    unfinished = train_run(corpus, replace(stage(), name="stable"))
    run = train_run(corpus, replace(stage(steps=4), name="decay", start=Branch(stage="stable")), unfinished)
    with pytest.raises(RunError, match="'stable', which is not finished"):
        parent_checkpoint(run)
