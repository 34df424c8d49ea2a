"""Resuming beside damage: the newest whole checkpoint is used, loudly and to the bit, or training stops; parents are never passed over."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.stages import Branch
from megatron_ext.provenance import read_manifest, write_manifest
from megatron_ext.runs import Run, write_run
from tests import layouts, training_runs
from tests.small_corpus import train_run, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TWO = replace(layouts.TWO, micro_batch=4)
STEPS, TOKENS_PER_STEP = 6, 128


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("fallback"), {"web": 60, "qa": 30})


@pytest.fixture(scope="module")
def interrupted(corpus) -> Any:
    """A run of two ranks killed after the checkpoint at 4 (others at 2, 3), and what it computes without a kill."""
    stage = training_runs.stage(steps=STEPS, save_every_steps=1, plan=TWO)
    run = train_run(corpus, replace(stage, name="killed"))
    with pytest.raises(AssertionError, match=training_runs.DEAD):
        training_runs.trace(run, kill_after=4)
    assert folders.latest(run.checkpoints_path) == 4
    return run, training_runs.trace(train_run(corpus, replace(stage, name="straight")))


def copied(interrupted: Any, name: str, **plan: Any) -> tuple[Run, Any]:
    """A copy of the killed run, to be damaged and resumed."""
    run, straight = interrupted
    path = shutil.copytree(run.path, run.path.parent / name)
    return write_run(path, run.graph, replace(run.stage, plan=replace(run.stage.plan, **plan)), run.inputs), straight


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": lambda path: flip(path / "__1_0.distcp"),
    "cut": lambda path: (path / "common.pt").write_bytes(b""),
    "missing": lambda path: (path / ".metadata").unlink(),
    "manifest": lambda path: flip(path / "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(interrupted, damage):
    run, straight = copied(interrupted, f"damaged {damage}")
    DAMAGE[damage](folders.iteration_path(run.checkpoints_path, 4))
    resumed = training_runs.trace(run)
    assert resumed["start"]["progress"].step == 3
    assert (resumed["steps"], resumed["digests"]) == (straight["steps"][3:], straight["digests"])
    record = json.loads((run.path / "attempts" / "2" / "fallback.json").read_text())
    assert (record["from"], record["to"], record["set_aside"]) == ("iter_0000004", "iter_0000003", [".iter_0000004.damaged"])
    assert "iter_0000004" in record["reason"]
    assert (run.checkpoints_path / ".iter_0000004.damaged").is_dir()  # to be looked at
    verify(folders.iteration_path(run.checkpoints_path, 4))  # written again
    assert folders.latest(run.checkpoints_path) == STEPS


def test_several_are_passed_over(interrupted):
    run, straight = copied(interrupted, "two damaged")
    for iteration in (3, 4):
        flip(folders.iteration_path(run.checkpoints_path, iteration) / "__0_0.distcp")
    resumed = training_runs.trace(run)
    assert resumed["steps"] == straight["steps"][2:]
    assert len(json.loads((run.path / "attempts" / "2" / "fallback.json").read_text())["set_aside"]) == 2


@pytest.mark.parametrize("content", ["9\n", "soon\n"])
def test_a_bad_tracker_is_made_good(interrupted, content):
    run, straight = copied(interrupted, f"tracker {content.strip()}")
    (run.checkpoints_path / folders.TRACKER).write_text(content)
    assert training_runs.trace(run)["steps"] == straight["steps"][4:]
    record = json.loads((run.path / "attempts" / "2" / "fallback.json").read_text())
    assert (record["from"], record["to"]) == (None, "iter_0000004")


def test_a_lost_tracker_does_not_begin_the_run_again(interrupted):
    run, straight = copied(interrupted, "no tracker")
    (run.checkpoints_path / folders.TRACKER).unlink()
    assert training_runs.trace(run)["steps"] == straight["steps"][4:]


def test_training_stops_where_the_plan_says_so(interrupted):
    run, _ = copied(interrupted, "stop", on_damaged_checkpoint="stop")
    flip(folders.iteration_path(run.checkpoints_path, 4) / "__1_0.distcp")
    words = r"the newest checkpoint of stage 'killed' is damaged:\s.*__1_0\.distcp.*\siter_0000003 is whole: set killed\.plan\.on_damaged"
    with pytest.raises(AssertionError, match=words):
        training_runs.trace(run)
    assert folders.published(run.checkpoints_path) == [2, 3, 4]


def test_training_stops_where_none_is_whole(interrupted):
    run, _ = copied(interrupted, "none")
    for iteration in (2, 3, 4):
        (folders.iteration_path(run.checkpoints_path, iteration) / "common.pt").unlink()
    with pytest.raises(AssertionError, match=r"no checkpoint of stage 'killed' is whole:(\s.*common\.pt.*){3}\sBring one back from a copy"):
        training_runs.trace(run)
    assert len(folders.published(run.checkpoints_path)) == 3  # nothing was removed, and nothing begun from scratch


def test_weights_alone_are_not_written_over(interrupted):
    run, _ = copied(interrupted, "weights alone")
    for iteration in (2, 3, 4):
        path = folders.iteration_path(run.checkpoints_path, iteration)
        write_manifest(path, replace(read_manifest(path), optimizer_layout="none"))
    with pytest.raises(AssertionError, match=r"no checkpoint of stage 'killed' is whole:\s.*hold weights without optimizer state"):
        training_runs.trace(run)
    assert folders.published(run.checkpoints_path) == [2, 3, 4]


# ---- parents


def child(corpus: Run, parent: Run, name: str) -> Run:
    stage = training_runs.stage(steps=2, plan=TWO, start=Branch(stage=parent.name, tokens=4 * TOKENS_PER_STEP), name=name)
    return write_run(parent.path.parent / name, "test", stage, {"start": parent.path, "corpus": corpus.path})


def test_a_damaged_parent_is_refused(corpus, interrupted):
    parent, _ = copied(interrupted, "parent damaged")
    flip(folders.iteration_path(parent.checkpoints_path, 4) / "__1_0.distcp")
    with pytest.raises(AssertionError, match=r"iter_0000004: is damaged:\s.*__1_0\.distcp.*hash.*\s.*Bring it back from a copy"):
        training_runs.trace(child(corpus, parent, "child of damaged"))


def test_a_parent_of_another_run_is_refused(corpus, interrupted):
    """The checkpoint of a run with another seed, put in the place of the right one."""
    parent, _ = copied(interrupted, "parent replaced")
    other = train_run(corpus, replace(parent.stage, name="other seed", seed=4321, budget=replace(parent.stage.budget, steps=4)))
    training_runs.trace(other)
    place = folders.iteration_path(parent.checkpoints_path, 4)
    shutil.rmtree(place)
    shutil.copytree(folders.iteration_path(other.checkpoints_path, 4), place)
    words = rf"iter_0000004: belongs to science {other.science_hash[:12]}, its run 'killed' is {parent.science_hash[:12]}; .* copied from"
    with pytest.raises(AssertionError, match=words):
        training_runs.trace(child(corpus, parent, "child of another"))


def test_a_parent_begun_again_with_another_recipe_is_refused(corpus, interrupted):
    parent, _ = copied(interrupted, "parent begun again")
    run = child(corpus, parent, "child of begun again")
    shutil.rmtree(parent.path)
    write_run(parent.path, parent.graph, replace(parent.stage, seed=99), parent.inputs)
    with pytest.raises(AssertionError, match=re.escape("the parent was begun again with another recipe; delete")):
        training_runs.trace(run)


def test_the_terminal_hears_of_it(interrupted):
    """The whole command: what is amiss stands above the progress, not in the log alone."""
    run, _ = copied(interrupted, "terminal")
    flip(folders.iteration_path(run.checkpoints_path, 4) / "__1_0.distcp")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", "train", str(run.path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = r"killed: WARNING: fell back to iter_0000003: .*__1_0\.distcp.* \(kept as \.iter_0000004\.damaged\)"
    assert re.search(words, done.stdout), done.stdout
    assert re.search(words.removeprefix("killed: "), (run.path / "attempts" / "2" / "log.txt").read_text())
