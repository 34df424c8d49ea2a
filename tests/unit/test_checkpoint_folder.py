"""The checkpoint folder: what counts as published, which is the latest, what a crash leaves, what is kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.errors import CheckpointError, DamagedCheckpointError, RunError
from megatron_ext.provenance import MANIFEST, read_manifest, write_manifest
from tests.small_checkpoints import TOKENS_PER_STEP, manifest


def written(folder: Path, iteration: int, attempt: int = 1, pinned: bool = False) -> Path:
    """A whole checkpoint, still aside."""
    aside = folders.aside_path(folder, iteration, attempt)
    aside.mkdir(parents=True)
    (aside / "weights").write_bytes(b"bytes")
    write_manifest(aside, manifest(iteration, pinned=pinned, attempt=attempt))
    return aside


def publish(folder: Path, *iterations: int, pinned: tuple[int, ...] = ()) -> None:
    for iteration in iterations:
        written(folder, iteration, pinned=iteration in pinned)
        folders.publish(folder, iteration, 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_are_megatrons_own(tmp_path):
    assert folders.iteration_path(tmp_path, 500).name == "iter_0000500"
    assert folders.iteration_path(tmp_path, 12_345_678).name == "iter_12345678"
    assert folders.aside_path(tmp_path, 500, 2) == tmp_path / ".attempt-2" / "iter_0000500"
    assert folders.TRACKER == "latest_checkpointed_iteration.txt"


def test_an_absent_and_an_empty_folder_have_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert folders.published(folder) == []
        assert folders.latest(folder) is None
        folders.revoke(folder, 1)


def test_publishing_renames_and_moves_the_tracker(tmp_path):
    written(tmp_path, 2)
    target = folders.publish(tmp_path, 2, 1)
    assert target == folders.iteration_path(tmp_path, 2)
    assert (target / "weights").read_bytes() == b"bytes"
    assert names(tmp_path) == ["iter_0000002", folders.TRACKER]
    assert (tmp_path / folders.TRACKER).read_text() == "2\n"
    publish(tmp_path, 10, 4)
    assert folders.published(tmp_path) == [2, 4, 10]  # by number
    assert folders.latest(tmp_path) == 4  # what was published last


def test_what_is_aside_or_has_no_manifest_is_no_checkpoint(tmp_path):
    publish(tmp_path, 2)
    written(tmp_path, 4)
    (tmp_path / "iter_0000006").mkdir()
    (tmp_path / "iter_0000008").write_text("a file")
    (tmp_path / "iter_10").mkdir()
    write_manifest(tmp_path / "iter_10", manifest(10))
    assert folders.published(tmp_path) == [2]
    with pytest.raises(CheckpointError, match=r"no checkpoint of 'stable' at 512 tokens; there are 256\."):
        folders.find(tmp_path, 4 * TOKENS_PER_STEP, "stable")


@pytest.mark.parametrize("content", [b"soon", b"", b"-4", b"4.0", b"\xff\xfe4", "²".encode(), "٤".encode(), b"4\n4\n"])
def test_a_garbage_tracker_is_refused(tmp_path, content):
    publish(tmp_path, 4)
    (tmp_path / folders.TRACKER).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt: holds .*, not an iteration; write the number"):
        folders.latest(tmp_path)


def test_a_tracker_that_names_a_missing_checkpoint_is_refused(tmp_path):
    publish(tmp_path, 2, 4)
    (tmp_path / folders.TRACKER).write_text("6\n")
    with pytest.raises(CheckpointError, match=r"names iteration 6, but .*iter_0000006 is no published checkpoint; published are \[2, 4\]"):
        folders.latest(tmp_path)
    (tmp_path / folders.TRACKER).write_text("4\n")
    (folders.iteration_path(tmp_path, 4) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"published are \[2\]"):
        folders.latest(tmp_path)


class Crash(Exception):
    """Stands for the end of the process."""


def crash(*arguments, **options):
    raise Crash


def test_a_crash_between_rename_and_tracker_leaves_the_old_one_and_is_made_good(tmp_path, monkeypatch):
    publish(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_rename", lambda path, target: crash() if target.name == folders.TRACKER else path.rename(target))
        with pytest.raises(Crash):
            publish(tmp_path, 4)
    assert folders.latest(tmp_path) == 2
    assert folders.published(tmp_path) == [2, 4]
    again = written(tmp_path, 4, attempt=2)
    (again / "weights").write_bytes(b"newer")
    folders.revoke(tmp_path, 2)
    target = folders.publish(tmp_path, 4, 2)
    assert (target / "weights").read_bytes() == b"newer"
    assert folders.latest(tmp_path) == 4
    assert names(tmp_path) == ["iter_0000002", "iter_0000004", folders.TRACKER]


def halfway(path, *arguments, **options):
    """Delete a part, as a process does that dies in a removal: everything but the manifests."""
    for child in Path(path).rglob("*"):
        if child.is_file() and child.name != MANIFEST:
            child.unlink()
    raise Crash


def test_a_crash_while_replacing_never_shows_half_a_checkpoint(tmp_path, monkeypatch):
    publish(tmp_path, 2, 4)
    (tmp_path / folders.TRACKER).write_text("2\n")
    written(tmp_path, 4, attempt=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", halfway)
        with pytest.raises(Crash):
            folders.publish(tmp_path, 4, 2)
    assert folders.published(tmp_path) == [2, 4]
    assert (folders.latest(tmp_path), read_manifest(folders.iteration_path(tmp_path, 4)).attempt) == (4, 2)
    folders.revoke(tmp_path, 3)
    assert names(tmp_path) == ["iter_0000002", "iter_0000004", folders.TRACKER]


def test_a_crash_while_pruning_leaves_nothing_that_stays(tmp_path, monkeypatch):
    publish(tmp_path, 2, 4, 6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", halfway)
        with pytest.raises(Crash):
            folders.prune(tmp_path, 1, 1)
    assert folders.published(tmp_path) == [4, 6]
    folders.revoke(tmp_path, 2)
    folders.prune(tmp_path, 1, 2)
    assert names(tmp_path) == ["iter_0000006", folders.TRACKER]


def test_pruning_keeps_the_pinned_and_the_newest_others(tmp_path):
    publish(tmp_path, *range(1, 9), pinned=(2, 7))
    folders.prune(tmp_path, 2, 1)
    assert folders.published(tmp_path) == [2, 6, 7, 8]
    folders.prune(tmp_path, 2, 1)
    assert folders.published(tmp_path) == [2, 6, 7, 8]
    folders.prune(tmp_path, 1, 1)
    assert folders.published(tmp_path) == [2, 7, 8]


def test_pinned_checkpoints_take_no_place_of_the_others(tmp_path):
    publish(tmp_path, 1, 2, 3, 4, pinned=(3, 4))
    folders.prune(tmp_path, 2, 1)
    assert folders.published(tmp_path) == [1, 2, 3, 4]


def test_a_damaged_manifest_does_not_end_pruning(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    (folders.iteration_path(tmp_path, 1) / MANIFEST).write_text("{}")
    warning = folders.prune(tmp_path, 1, 1)
    assert folders.published(tmp_path) == [1, 4]
    assert re.search(r"kept, because damaged: .*iter_0000001/manifest\.json", warning)
    assert folders.prune(tmp_path / "none", 1, 1) == ""


def test_pruning_keeps_what_the_tracker_names(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    (tmp_path / folders.TRACKER).write_text("1\n")  # set back by hand
    folders.prune(tmp_path, 2, 1)
    assert folders.published(tmp_path) == [1, 3, 4]
    assert folders.latest(tmp_path) == 1


def test_a_newer_attempt_takes_away_what_others_staged_and_nothing_else(tmp_path):
    publish(tmp_path, 2)
    for attempt in (1, 2, 3, 10):
        written(tmp_path, 4, attempt)
    (tmp_path / "notes.tmp").write_text("mine")
    folders.revoke(tmp_path, 3)  # the tenth is newer: whoever calls this lost the folder to it
    assert names(tmp_path) == [".attempt-10", ".attempt-3", "iter_0000002", folders.TRACKER, "notes.tmp"]


@pytest.mark.parametrize("cut_off", ["before its look", "after its look", "after its rename"])
def test_a_stale_owner_publishes_nothing(tmp_path, monkeypatch, cut_off):
    """A newer attempt takes over while the older is about to publish; what the newer finds is what stays."""
    publish(tmp_path, 2)
    written(tmp_path, 4)
    seen = []

    def look():
        if cut_off == "before its look":
            raise RunError("lost")
        if cut_off == "after its look":
            take_over()

    def take_over():
        folders.revoke(tmp_path, 2)
        seen.append((folders.latest(tmp_path), folders.published(tmp_path)))

    def rename(path, target):
        if cut_off == "after its rename" and target.name == folders.TRACKER:
            take_over()
        os.replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_rename", rename)
        with pytest.raises((RunError, FileNotFoundError)):
            folders.publish(tmp_path, 4, 1, look)
    if cut_off == "before its look":
        take_over()
    assert seen == [(2, [2, 4] if cut_off == "after its rename" else [2])]
    assert (folders.latest(tmp_path), folders.published(tmp_path)) == seen[0]
    written(tmp_path, 4, 2)
    folders.publish(tmp_path, 4, 2)
    assert read_manifest(folders.iteration_path(tmp_path, 4)).attempt == 2


def test_a_damaged_checkpoint_is_set_aside_and_kept(tmp_path):
    publish(tmp_path, 2, 4)
    for _ in range(2):
        kept = folders.set_aside_damaged(folders.iteration_path(tmp_path, 4))
        assert (kept.name, (kept / "weights").read_bytes()) == (".iter_0000004.damaged", b"bytes")
        assert folders.published(tmp_path) == [2]
        publish(tmp_path, 4)


def test_finding_by_tokens_and_the_last(tmp_path):
    publish(tmp_path, 2, 4, 6)
    path, found = folders.find(tmp_path, 4 * TOKENS_PER_STEP, "stable")
    assert (path.name, found.iteration) == ("iter_0000004", 4)
    assert folders.find(tmp_path, None, "stable")[1].iteration == 6
    (tmp_path / folders.TRACKER).write_text("4\n")
    assert folders.find(tmp_path, None, "stable")[1].iteration == 4  # the tracker says which is last
    (tmp_path / folders.TRACKER).unlink()
    assert folders.find(tmp_path, None, "stable")[1].iteration == 6


def test_what_is_not_found_is_named_with_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match="stage 'stable' has published no checkpoint; run it first"):
        folders.find(tmp_path, None, "stable")
    publish(tmp_path, 2, 40)
    with pytest.raises(CheckpointError, match=r"no checkpoint of 'stable' at 500 tokens; there are 256, 5,120\. .*plan\.pin_every_tokens"):
        folders.find(tmp_path, 500, "stable")


def test_a_damaged_manifest_is_named(tmp_path):
    publish(tmp_path, 2)
    path = folders.iteration_path(tmp_path, 2) / MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"iter_0000002/manifest\.json: not valid JSON"):
        folders.find(tmp_path, None, "stable")
    publish(tmp_path, 4)
    assert folders.find(tmp_path, 4 * TOKENS_PER_STEP, "stable")[1].iteration == 4  # another one is no hindrance
    with pytest.raises(DamagedCheckpointError, match=r"no whole checkpoint of 'stable' at 256 tokens; damaged are: .*manifest"):
        folders.find(tmp_path, 256, "stable")
