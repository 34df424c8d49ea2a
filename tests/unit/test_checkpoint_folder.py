"""The checkpoint folder: what counts as published, which is the latest, what a crash leaves, what is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, write_manifest
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
        folders.publish(folder, written(folder, iteration, pinned=iteration in pinned), iteration)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_names_are_megatrons_own(tmp_path):
    assert folders.iteration_path(tmp_path, 500).name == "iter_0000500"
    assert folders.iteration_path(tmp_path, 12_345_678).name == "iter_12345678"
    assert folders.aside_path(tmp_path, 500, 2).name == ".iter_0000500.attempt-2.tmp"
    assert folders.TRACKER == "latest_checkpointed_iteration.txt"


def test_an_absent_and_an_empty_folder_have_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        assert folders.published(folder) == []
        assert folders.latest(folder) is None
        folders.remove_unpublished(folder)


def test_publishing_renames_and_moves_the_tracker(tmp_path):
    target = folders.publish(tmp_path, written(tmp_path, 2), 2)
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
        patch.setattr(folders, "atomic_write", crash)
        with pytest.raises(Crash):
            publish(tmp_path, 4)
    assert folders.latest(tmp_path) == 2
    assert folders.published(tmp_path) == [2, 4]
    again = written(tmp_path, 4, attempt=2)
    (again / "weights").write_bytes(b"newer")
    target = folders.publish(tmp_path, again, 4)
    assert (target / "weights").read_bytes() == b"newer"
    assert folders.latest(tmp_path) == 4
    assert names(tmp_path) == ["iter_0000002", "iter_0000004", folders.TRACKER]


def halfway(path, *arguments, **options):
    """Delete a part, as a process does that dies in a removal: everything but the manifest."""
    for child in Path(path).iterdir():
        if child.name != MANIFEST:
            child.unlink()
    raise Crash


def test_a_crash_while_replacing_never_shows_half_a_checkpoint(tmp_path, monkeypatch):
    publish(tmp_path, 2, 4)
    (tmp_path / folders.TRACKER).write_text("2\n")
    again = written(tmp_path, 4, attempt=2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", halfway)
        with pytest.raises(Crash):
            folders.publish(tmp_path, again, 4)
    assert folders.published(tmp_path) == [2]
    folders.remove_unpublished(tmp_path)
    assert names(tmp_path) == ["iter_0000002", folders.TRACKER]


def test_a_crash_while_pruning_leaves_nothing_that_stays(tmp_path, monkeypatch):
    publish(tmp_path, 2, 4, 6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", halfway)
        with pytest.raises(Crash):
            folders.prune(tmp_path, keep=1)
    assert folders.published(tmp_path) == [4, 6]
    folders.remove_unpublished(tmp_path)
    folders.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["iter_0000006", folders.TRACKER]


def test_pruning_keeps_the_pinned_and_the_newest_others(tmp_path):
    publish(tmp_path, *range(1, 9), pinned=(2, 7))
    folders.prune(tmp_path, keep=2)
    assert folders.published(tmp_path) == [2, 6, 7, 8]
    folders.prune(tmp_path, keep=2)
    assert folders.published(tmp_path) == [2, 6, 7, 8]
    folders.prune(tmp_path, keep=1)
    assert folders.published(tmp_path) == [2, 7, 8]


def test_pinned_checkpoints_take_no_place_of_the_others(tmp_path):
    publish(tmp_path, 1, 2, 3, 4, pinned=(3, 4))
    folders.prune(tmp_path, keep=2)
    assert folders.published(tmp_path) == [1, 2, 3, 4]


def test_pruning_keeps_what_the_tracker_names(tmp_path):
    publish(tmp_path, 1, 2, 3, 4)
    (tmp_path / folders.TRACKER).write_text("1\n")  # set back by hand
    folders.prune(tmp_path, keep=2)
    assert folders.published(tmp_path) == [1, 3, 4]
    assert folders.latest(tmp_path) == 1


def test_removing_what_is_unpublished_touches_nothing_else(tmp_path):
    publish(tmp_path, 2)
    written(tmp_path, 4)
    written(tmp_path, 4, attempt=2)
    (tmp_path / "notes.tmp").write_text("mine")
    folders.remove_unpublished(tmp_path)
    assert names(tmp_path) == ["iter_0000002", folders.TRACKER, "notes.tmp"]


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
        folders.find(tmp_path, 256, "stable")
