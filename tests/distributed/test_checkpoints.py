"""Checkpoints of a real tiny model: files and digests, loading under other layouts, and what a plan may not change."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from megatron_ext.provenance import MANIFEST, read_manifest
from megatron_ext.runs import write_run
from tests import ranks, training_runs
from tests.layouts import CPU, INTERLEAVED, LAYOUTS, SEED, TWO, parts, toy_stage, train_steps, whole
from tests.small_checkpoints import TOKENS_PER_STEP, manifest, save_small
from tests.small_corpus import train_run, write_corpus

KINDS = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "__1_0.distcp")  # of two data-parallel ranks


# ---- files


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("checkpoints"), {"web": 60, "qa": 30})


@pytest.fixture(scope="module")
def written(corpus):
    """The checkpoints of two ranks after 2 steps (routine) and 4 (pinned)."""
    run = train_run(corpus, replace(training_runs.stage(steps=4, save_every_steps=2, plan=TWO), name="two ranks"))
    training_runs.trace(run)
    return run.checkpoints_path


@pytest.mark.parametrize("iteration", [2, 4])
def test_the_digests_made_while_writing_are_the_files(written, iteration):
    path = folders.iteration_path(written, iteration)
    files = read_manifest(path).files
    assert sorted(files) == sorted(KINDS) == sorted(p.name for p in path.iterdir() if p.name != MANIFEST)
    for name, (size_bytes, sha256) in files.items():
        content = (path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size_bytes, sha256)
    assert verify(path) == read_manifest(path)


def test_the_manifest_says_how_the_optimizer_was_written(written):
    layouts = {i: read_manifest(folders.iteration_path(written, i)) for i in folders.published(written)}
    assert {i: (m.optimizer_layout, m.pinned) for i, m in layouts.items()} == {2: ("dp_reshardable", False), 4: ("fully_reshardable", True)}


def save_large(groups: Any, folder: str, beside: bool) -> str:
    """Save parts of a tensor, large enough to be hashed beside the writing, some alone in their memory and some not."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_ext.checkpoint import hashing
    from megatron_ext.checkpoint.save import Target, begin_save

    whole = torch.arange(4_000_000, dtype=torch.float32)
    parts = {f"part{i}": whole[500_000 * i : 500_000 * i + 400_000] for i in range(6)} | {"alone": whole[:300_000].clone()}
    assert min(part.nbytes for part in parts.values()) > 4 * hashing.BESIDE_BYTES
    state = {name: ShardedTensor.from_rank_offsets(name, part) for name, part in parts.items()}
    save = begin_save(state, Target(Path(folder), 1, 1, lambda files: manifest(1, files=files)), {} if beside else None)
    if beside:
        whole.zero_()
    return str(save.finish())


@pytest.mark.parametrize("beside", [False, True], ids=["synchronous", "asynchronous"])
def test_the_digests_of_large_writes_are_the_files(tmp_path, beside):
    path = Path(ranks.run(save_large, CPU, str(tmp_path), beside)[0])
    verify(path)
    assert sum(size_bytes for size_bytes, _ in read_manifest(path).files.values()) > 10_000_000


def synced(groups: Any, folder: str) -> list[str]:
    """Names of a checkpoint's files that were not forced to the disk before they were published."""
    true_sync, true_publish = os.fsync, folders.publish
    inodes: set[int] = set()
    before_publishing: set[int] = set()

    def sync(descriptor: int) -> None:
        inodes.add(os.fstat(descriptor).st_ino)
        true_sync(descriptor)

    def publish(*arguments: Any) -> Path:
        before_publishing.update(inodes)
        return true_publish(*arguments)

    os.fsync, folders.publish = sync, publish
    path = save_small(Path(folder), entry={"a": 1})
    return [p.name for p in path.iterdir() if p.stat().st_ino not in before_publishing]


def test_every_file_is_on_the_disk_before_it_is_published(tmp_path):
    assert ranks.run(synced, CPU, str(tmp_path))[0] == []


# ---- other layouts


def state_of(state: Any, layout: str) -> Any:
    """Weights, moments and FP32 weights of a rank, by name; and the optimizer's step counts."""
    from megatron_ext.training.state import sharded_state

    counts = {float(s["step"]) for o in state.optimizer.chained_optimizers for s in o.optimizer.state.values() if "step" in s}
    return parts(sharded_state(state, layout)), counts


def layout_of(plan: Any) -> str:
    return "fully_reshardable" if plan.distributed_optimizer else "replicated"


NEXT = range(2, 12)  # ten steps after the two that were saved


def save_after_two(groups: Any, stage: Any, folder: str) -> Any:
    """Train two steps and save; the state then, and the next step."""
    from megatron_ext.checkpoint.save import Target, save_checkpoint
    from megatron_ext.training.state import build_state, sharded_state

    state, layout = build_state(stage, groups, SEED), layout_of(stage.plan)
    train_steps(state, stage, [0, 1])
    save_checkpoint(
        sharded_state(state, layout), Target(Path(folder), 2, 1, lambda files: manifest(2, optimizer_layout=layout, files=files))
    )
    return *state_of(state, layout), train_steps(state, stage, NEXT)


def load_and_go_on(groups: Any, stage: Any, folder: str, fault: str = "") -> Any:
    """Load under this layout; the state then, and the next ten steps. A fault leaves out the moments, or swaps them."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import build_state, load_model, load_optimizer, sharded_state

    state, layout = build_state(stage, groups, None), layout_of(stage.plan)
    loaded = load_state(sharded_state(state, layout, is_loading=True), folders.iteration_path(Path(folder), 2))
    load_model(state, loaded)
    if fault == "left out":
        state.optimizer.reload_model_params()
    else:
        load_optimizer(state, loaded)
    if fault == "swapped":
        for moments in (m for one in state.optimizer.chained_optimizers for m in one.optimizer.state.values()):
            moments["exp_avg"], moments["exp_avg_sq"] = moments["exp_avg_sq"], moments["exp_avg"].abs()
    return *state_of(state, layout), train_steps(state, stage, NEXT)


def together(found: list[Any]) -> Any:
    pieces, counts, steps = zip(*found, strict=True)
    assert all(one == steps[0] for one in steps)
    return whole(list(pieces)), set().union(*counts), np.array(steps[0])


FOUR = LAYOUTS["tensor 2 x pipeline 2"]
ONE = replace(CPU, micro_batch=4)
PLAIN = replace(FOUR, distributed_optimizer=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Kind of optimizer -> where two steps were saved at tensor 2 x pipeline 2, and what the state was."""

    @functools.cache
    def save(distributed_optimizer: bool) -> Any:
        folder = str(tmp_path_factory.mktemp("saved"))
        plan = FOUR if distributed_optimizer else PLAIN
        return folder, together(ranks.run(save_after_two, plan, toy_stage(plan), folder))

    return save


TARGETS = {
    "one rank": ONE,
    "data 2": LAYOUTS["data 2"],
    "tensor 2": LAYOUTS["tensor 2"],
    "tensor 2, sequence parallel": LAYOUTS["tensor 2, sequence parallel"],
    "data 2 x tensor 2": LAYOUTS["data 2 x tensor 2"],
    "pipeline 2": LAYOUTS["pipeline 2"],
    "pipeline 2, interleaved": INTERLEAVED,
    "the same": FOUR,
    "plain optimizer, one rank": replace(ONE, distributed_optimizer=False),
    "plain optimizer, pipeline 2": replace(LAYOUTS["pipeline 2"], distributed_optimizer=False),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_pinned_checkpoint_is_the_same_under_every_layout(saved, name):
    plan = TARGETS[name]
    folder, (tensors, counts, steps) = saved(plan.distributed_optimizer)
    found, found_counts, found_steps = together(ranks.run(load_and_go_on, plan, toy_stage(plan), folder))
    assert found.keys() == tensors.keys()
    kinds = {key.split(".")[2] for key in tensors if key.startswith("optimizer.state.")}
    assert {"exp_avg", "exp_avg_sq"} <= kinds
    for key, tensor in tensors.items():
        assert np.array_equal(found[key], tensor), key
        assert key.startswith("optimizer.state.") is False or np.abs(tensor).max() > 0, key
    assert found_counts == counts == {2.0}
    assert found_steps.shape == steps.shape == (len(NEXT), 2)  # losses and gradient norms
    assert np.abs(found_steps / steps - 1).max() < 1e-5


@pytest.mark.parametrize("fault", ["left out", "swapped"])
def test_wrong_moments_are_noticed(saved, fault):
    folder, (tensors, counts, steps) = saved(True)
    found, found_counts, found_steps = together(ranks.run(load_and_go_on, ONE, toy_stage(ONE), folder, fault))
    weights = [key for key in tensors if not key.startswith("optimizer.state.")]
    assert all(np.array_equal(found[key], tensors[key]) for key in weights)
    assert not all(np.array_equal(found[key], tensors[key]) for key in tensors)
    assert (found_counts != counts) == (fault == "left out")
    assert not np.all(np.abs(found_steps / steps - 1)[:2] < 1e-4)  # the step after the next shows it


# ---- plans that change between attempts

STEPS = 5


@pytest.fixture(scope="module")
def interrupted(corpus):
    """A run of one rank, killed after step 3; step 2 is pinned, 3 is the last. And the steps of a run that was not killed."""
    plan = replace(CPU, micro_batch=4, pin_every_tokens=2 * TOKENS_PER_STEP)
    stage = replace(training_runs.stage(steps=STEPS, save_every_steps=1, plan=plan), name="changed plan")
    run = train_run(corpus, stage)
    with pytest.raises(AssertionError, match=training_runs.DEAD):
        training_runs.trace(run, kill_after=3)
    straight = training_runs.trace(train_run(corpus, replace(stage, name="unchanged plan")))
    assert folders.published(run.checkpoints_path) == [1, 2, 3]
    return run, straight["steps"]


def under(run: Any, name: str, **changes: Any) -> Any:
    """A copy of a run, to be resumed under a changed plan."""
    path = shutil.copytree(run.path, run.path.parent / name)
    return write_run(path, run.graph, replace(run.stage, plan=replace(run.stage.plan, micro_batch=4, **changes)), run.inputs)


def same_steps(found: Any, expected: Any) -> bool:
    assert [step[2:] for step in found] == [step[2:] for step in expected]  # rates, tokens, samples
    return bool(np.allclose([s[:2] for s in found], [s[:2] for s in expected], rtol=1e-5, atol=0))


def test_a_routine_checkpoint_goes_on_under_another_data_parallel_size(interrupted):
    run, straight = interrupted
    resumed = training_runs.trace(under(run, "to two", ranks_per_node=2))
    assert same_steps(resumed["steps"], straight[3:])


@pytest.mark.parametrize("changes", [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2, "overlap_p2p": True}], ids=str)
def test_a_routine_checkpoint_under_another_layout_names_the_pinned_ones(interrupted, changes):
    run, straight = interrupted
    other = under(run, f"to {changes}", ranks_per_node=2, **changes)
    words = rf"a routine checkpoint loads under other data-parallel sizes only, but the plan changed .*{next(iter(changes))} 1 -> 2"
    with pytest.raises(AssertionError, match=words + r".*; go back to the old plan, or to a pinned checkpoint: \['iter_0000002'\]"):
        training_runs.trace(other)
    (other.checkpoints_path / folders.TRACKER).write_text("2\n")  # the way out that the message names
    assert same_steps(training_runs.trace(other)["steps"], straight[2:])
    assert folders.latest(other.checkpoints_path) == STEPS


def test_another_optimizer_is_refused(interrupted):
    run, _ = interrupted
    with pytest.raises(AssertionError, match=r"was saved with plan\.distributed_optimizer=true; use the same value to load"):
        training_runs.trace(under(run, "to plain", distributed_optimizer=False))
