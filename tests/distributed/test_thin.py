"""Checkpoints made into weights alone: the same weights to the bit under any layout, and never lost while it is done."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.gc import acts, do, size_bytes
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.stages import Branch, Weights
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import MANIFEST, file_sha256, read_manifest
from megatron_ext.runs import Run, open_run
from tests import ranks, training_runs
from tests.layouts import CPU, LAYOUTS, TWO, parts, toy_stage, whole
from tests.small_checkpoints import TOKENS_PER_STEP, save_small
from tests.small_corpus import train_run, write_corpus

ONE = replace(CPU, micro_batch=4)
ROUTINE, PINNED, LAST = 1, 2, 3


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A corpus, and a run of two data-parallel ranks with a routine checkpoint, a pinned one and the last."""
    folder = tmp_path_factory.mktemp("thin")
    plan = replace(TWO, pin_every_tokens=PINNED * TOKENS_PER_STEP)
    corpus = write_corpus(folder, {"web": 60, "qa": 30})
    training_runs.trace(train_run(corpus, replace(training_runs.stage(steps=LAST, save_every_steps=1, plan=plan), name="stable")))
    return folder


def thin_two(groups: Any, checkpoints: Path) -> None:
    from megatron_ext.checkpoint.thin import thin, thinnable_bytes

    for iteration in (ROUTINE, PINNED):
        path = folders.iteration_path(checkpoints, iteration)
        before, expected = size_bytes(path), thinnable_bytes(path)
        assert thin(path) == read_manifest(path)
        assert before / 5 < expected <= before - size_bytes(path)  # two moments and the FP32 copy of each weight
        again = (path / MANIFEST).read_bytes()
        thin(path)  # nothing is left to do
        assert (path / MANIFEST).read_bytes() == again


@pytest.fixture(scope="module")
def thinned(graph):
    """The same graph, the first two checkpoints of its run thinned."""
    copy = Path(shutil.copytree(graph, graph.with_name(f"{graph.name} thinned")))
    ranks.run(thin_two, CPU, copy / "stable" / "checkpoints")
    return copy


def checkpoint(graph: Path, iteration: int) -> Path:
    return folders.iteration_path(graph / "stable" / "checkpoints", iteration)


def test_what_is_left_is_whole_and_says_what_it_was(graph, thinned):
    for iteration in (ROUTINE, PINNED):
        old, path = checkpoint(graph, iteration), checkpoint(thinned, iteration)
        manifest, before = verify(path), read_manifest(old)
        assert manifest == replace(before, optimizer_layout="none", files=manifest.files, thinned_from=file_sha256(old / MANIFEST))
        assert size_bytes(path) < size_bytes(old) / 2
    names = sorted(p.name for p in checkpoint(thinned, PINNED).parent.iterdir())
    assert names == [f"iter_{i:07d}" for i in (ROUTINE, PINNED, LAST)] + [folders.TRACKER]
    assert verify(checkpoint(thinned, LAST)) == read_manifest(checkpoint(graph, LAST))


def weights(groups: Any, stage: Any, paths: list[Path]) -> list[Any]:
    """A rank's weights after loading each checkpoint."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import build_state, load_model, sharded_model

    found = []
    for path in paths:
        state = build_state(stage, groups, 1)
        load_model(state, load_state(sharded_model(state), path))
        found.append(parts(sharded_model(state)))
    return found


def loaded(plan: Any, paths: list[Path]) -> list[dict[str, np.ndarray]]:
    return [whole(list(pieces)) for pieces in zip(*ranks.run(weights, plan, toy_stage(plan), paths), strict=True)]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_the_weights_are_the_same_to_the_bit_under_every_layout(graph, thinned):
    after = [checkpoint(thinned, i) for i in (ROUTINE, PINNED)]
    *expected, routine, pinned = loaded(ONE, [checkpoint(graph, i) for i in (ROUTINE, PINNED)] + after)
    for found in ([routine, pinned], loaded(LAYOUTS["tensor 2 x pipeline 2"], after)):
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert not same(expected[0], expected[1])  # the fault: another checkpoint's weights are not


def child(graph: Path, start: Any) -> Run:
    stable = open_run(graph / "stable")
    stage = replace(training_runs.stage(steps=1, plan=ONE), name=start.kind, start=start)
    return train_run(open_run(graph / "corpus"), stage, stable)


def test_a_weights_start_works_and_a_branch_is_refused(thinned):
    tokens = PINNED * TOKENS_PER_STEP
    found = training_runs.trace(child(thinned, Weights(stage="stable", tokens=tokens)))
    assert found["steps"][0][3:5] == (TOKENS_PER_STEP, (PINNED + 1) * TOKENS_PER_STEP)
    with pytest.raises(AssertionError, match=r"iter_0000002: holds weights without optimizer state; start from it with Weights\(\.\.\.\)"):
        training_runs.trace(child(thinned, Branch(stage="stable", tokens=tokens)))


# ---- which ones a gc thins


def clean(groups: Any, runs: list[Path]) -> list[str]:
    """What `gc` prints of each folder of runs: first dry, then done."""
    from megatron_ext.checkpoint.gc import gc_command

    said = []
    for folder in runs:
        for dry_run in (True, False):
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                gc_command(folder, dry_run, thin=True)
            said.append(text.getvalue())
    return said


def test_gc_thins_the_pinned_ones_that_nothing_branches_from(graph, tmp_path):
    copies = [Path(shutil.copytree(graph, tmp_path / name)) for name in ("alone", "weights", "branch")]
    tokens = PINNED * TOKENS_PER_STEP
    child(copies[1], Weights(stage="stable", tokens=tokens))
    child(copies[2], Branch(stage="stable", tokens=tokens))
    said = ranks.run(clean, CPU, copies)[0]
    for copy, dry, done in zip(copies, said[::2], said[1::2], strict=True):
        assert dry.splitlines()[:-1] == done.splitlines()[:-1]
        assert re.search(r"^keep .*iter_0000003  \(the last of its run\)$", done, re.M)
        branches = copy.name == "branch"
        why = "keep .*a stage branches from it" if branches else r"thin .*pinned; no stage branches from it"
        assert re.search(rf"^{why}\)$", done, re.M), done
        layouts = {i: read_manifest(checkpoint(copy, i)).optimizer_layout for i in (ROUTINE, PINNED, LAST)}
        assert layouts == {
            ROUTINE: "dp_reshardable", PINNED: "fully_reshardable" if branches else "none", LAST: "fully_reshardable",
        }  # fmt: skip


# ---- killed while thinning


class Killed(BaseException):
    """Stands for the end of the process: no `except` of the code under test catches it."""


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")  # of the module os: all that changes names, and what waits for the disk


def killed_at(number: int, work: Any) -> bool:
    """Do `work`, killed before its call number `number` of `CALLS`; whether it came to that."""
    true = {name: getattr(os, name) for name in CALLS}
    count = [0]

    def counted(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] >= number:
                raise Killed
            return true[name](*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    try:
        work()
    except Killed:
        return True
    finally:
        for name in CALLS:
            setattr(os, name, true[name])
    return False


def left_by_each_kill(folder: Path, good: Path, faulty: bool) -> list[str]:
    """Thin a copy of a checkpoint, killed at every point in turn; what is left after a gc: 'old', 'new' or 'lost'."""
    from megatron_ext.checkpoint import swap
    from megatron_ext.checkpoint.thin import thin

    def delete_first(whole: Path, target: Path) -> None:  # the fault
        shutil.rmtree(target)
        whole.rename(target)

    found, number = [], 0
    while True:
        number += 1
        run = open_run(Path(shutil.copytree(good, folder / f"{number}{' faulty' * faulty}")))
        path = folders.iteration_path(run.checkpoints_path, 1)
        with pytest.MonkeyPatch.context() as patch:
            if faulty:
                patch.setattr("megatron_ext.checkpoint.thin.swap_in", delete_first)
            was_killed = killed_at(number, lambda path=path: thin(path))
        waits = [*swap.unfinished_swaps(run.checkpoints_path), *run.checkpoints_path.glob(".*.replaced")]
        assert faulty or path.is_dir() or len(waits) == 2  # either stands, or both can be found
        try:
            for act in acts(run, set()):
                do(act)
            found.append("new" if verify(path).thinned_from else "old")
            assert sorted(p.name for p in run.checkpoints_path.iterdir() if p != path) == [folders.TRACKER]
        except DamagedCheckpointError:
            found.append("lost")
        if not was_killed:
            return found


def kill_everywhere(groups: Any, folder: Path, good: Path) -> tuple[list[str], list[str]]:
    """A small checkpoint with an optimizer's entry; what each kill leaves, done rightly and with the fault."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.weight", torch.ones(8))
    save_small(good / "checkpoints", entry={"a": 1}, moment=moment)
    return left_by_each_kill(folder, good, faulty=False), left_by_each_kill(folder, good, faulty=True)


def test_a_kill_at_any_moment_loses_nothing(graph, tmp_path):
    good = train_run(open_run(graph / "corpus"), replace(training_runs.stage(), name="killed")).path
    (done, faulty), *_ = ranks.run(kill_everywhere, CPU, tmp_path, good)
    assert "lost" not in done
    assert done == sorted(done, reverse=True)  # first the old one, from some point on the new one
    assert done.count("old") > 5
    assert done.count("new") > 5
    assert "lost" in faulty


# ---- refused


def thin_refused(groups: Any, full: Path, damaged: Path) -> list[str]:
    """What is said on a disk that takes no more (a bound on the size of files stands for it), and of a flipped byte."""
    from megatron_ext.checkpoint.thin import thin

    said = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    data = next(damaged.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    for path in (full, damaged):
        with pytest.raises(CheckpointError) as error:
            thin(path)
        said.append(str(error.value))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        data.write_bytes(content)
    for who_is_busy in (lambda: "attempt 7 is at work", lambda: gut(full.parent)):
        with pytest.raises(CheckpointError) as error:
            thin(full, who_is_busy)
        said.append(str(error.value))
    return said


def gut(folder: Path) -> str:
    """Take a file of the copy away, as a second gc did that began while the first wrote it."""
    (copy,) = folder.glob(".iter_*.thinning-*")
    (copy / ".metadata").unlink()
    return ""


def test_a_full_disk_damage_a_trainer_and_another_gc_change_nothing(graph, tmp_path):
    full, damaged = (Path(shutil.copytree(checkpoint(graph, ROUTINE), tmp_path / name / "iter_0000001")) for name in ("full", "damaged"))
    before = read_manifest(full)
    on_full, on_damaged, beside_trainer, beside_gc = ranks.run(thin_refused, CPU, full, damaged)[0]
    assert re.search(r"\.iter_0000001\.thinning-\w+: could not be written: .*File too large.*: .*full/iter_0000001 stands$", on_full), (
        on_full
    )
    assert [p.name for p in full.parent.iterdir()] == [full.name]
    assert verify(full) == before
    assert "its bytes do not hash to what the manifest says" in on_damaged
    assert read_manifest(damaged) == before
    assert re.search(r"full/iter_0000001: attempt 7 is at work: stands as it was; run gc again", beside_trainer)
    assert re.search(r"iter_0000001 stands as it was; .*thinning-\w+/\.metadata: missing, though the manifest lists it", beside_gc)
