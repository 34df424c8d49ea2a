"""A folder gets its name whole or not at all, also where two make it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.conversion import publishing
from megatron_ext.conversion.publishing import publish, work_folder
from megatron_ext.errors import CheckpointError


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with two files that is to become `made`."""
    folder = work_folder(tmp_path / "made", "making")
    folder.mkdir()
    (folder / "a").write_text("12")
    (folder / "b").write_text("345")
    return folder


SIZES = {"a": 2, "b": 3}


def test_a_whole_folder_gets_its_name(tmp_path: Path, work: Path) -> None:
    publish(work, tmp_path / "made", SIZES)
    assert {path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()} == SIZES
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_empty_target_is_taken_and_one_that_came_to_hold_something_stands(tmp_path: Path, work: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "theirs").write_text("")
    with pytest.raises(OSError, match="not empty"):
        publish(work, tmp_path / "made", SIZES)
    assert {path.name for path in work.iterdir()} == {"a", "b"}  # is kept
    (tmp_path / "made" / "theirs").unlink()
    publish(work, tmp_path / "made", SIZES)


@pytest.mark.parametrize("change", ["one more", "one fewer", "shorter", "all gone"])
def test_what_another_start_changes_is_not_published(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    true = publishing.os.rename

    def rename_after_a_change(old: Path, new: Path) -> None:
        if old == work:  # the other start does this between the last look and the rename
            if change == "one more":
                (work / ".b.tmp").write_text("")
            elif change == "shorter":
                (work / "b").write_text("3")
            else:
                for path in list(work.iterdir())[: 1 if change == "one fewer" else 2]:
                    path.unlink()
        true(old, new)

    monkeypatch.setattr(publishing.os, "rename", rename_after_a_change)
    with pytest.raises(CheckpointError, match="made: another start into the same folder was at work"):
        publish(work, tmp_path / "made", SIZES)
    assert not (tmp_path / "made").exists()


def test_a_folder_that_another_start_has_published_is_not_there(tmp_path: Path, work: Path) -> None:
    publish(work, tmp_path / "made", SIZES)
    with pytest.raises(CheckpointError, match="another start"):
        publish(work, tmp_path / "made", SIZES)


def test_what_was_killed_between_the_renames_is_taken_up(tmp_path: Path, work: Path) -> None:
    work.rename(work.with_name(work.name + ".0123abcd"))
    assert work_folder(tmp_path / "made", "making") == work
    assert {path.name for path in work.iterdir()} == {"a", "b"}


def test_a_link_is_refused(tmp_path: Path, work: Path) -> None:
    precious = work.rename(tmp_path / "precious")
    work.symlink_to(precious)
    with pytest.raises(CheckpointError, match=r"is a link.*remove it"):
        work_folder(tmp_path / "made", "making")
    assert {path.name for path in precious.iterdir()} == {"a", "b"}
