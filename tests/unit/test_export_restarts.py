"""Exports that are killed or refused by the disk: never taken for whole, and finished by the next start."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.conversion import to_hugging_face
from megatron_ext.conversion.to_hugging_face import CONVERSION, FINISHED, megatron_to_hf
from megatron_ext.errors import CheckpointError
from tests import ranks
from tests.small_models import hugging_face_folder
from tests.unit.test_to_hugging_face import SHARD_BYTES, contents, megatron_tensors, quiet, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Hugging Face model."""
    return hugging_face_folder(tmp_path_factory.mktemp("restarts") / "hf")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write(folder.parent / "checkpoint", folder, megatron_tensors(folder))


def at_point(point: str, act: Callable[[], None]) -> None:
    """Make this process' export call `act` at a point."""

    def before(holder: Any, name: str, here: Callable[..., bool]) -> None:
        true = getattr(holder, name)

        def wrapped(*arguments: Any) -> Any:
            if here(*arguments):
                act()
            return true(*arguments)

        setattr(holder, name, wrapped)

    match point:
        case "in the third file":
            before(to_hugging_face, "_write_row", lambda _, row, __: row.key.endswith("linear_fc1.weight") and row.layer == 1)
        case "before a record":
            before(to_hugging_face, "write_json", lambda path, values: path.name == FINISHED and len(values["shards"]) == 3)
        case "before the config":
            before(to_hugging_face, "_write_beside", lambda *_: True)
        case "before the last file":
            before(to_hugging_face, "write_json", lambda path, _: path.name == CONVERSION)
        case "before the name":
            before(to_hugging_face.os, "rename", lambda *_: True)


POINTS = ("in the third file", "before a record", "before the config", "before the last file", "before the name")


def export_until(point: str, act: Callable[[], None], checkpoint: Path, target: Path) -> None:
    at_point(point, act)
    megatron_to_hf(checkpoint, target, say=quiet, shard_bytes=SHARD_BYTES)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bound_files() -> None:
    """From here on files of this process may have 100 bytes; it needs no privilege."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def in_process(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(checkpoint):
    """Name -> bytes of an export that nothing disturbed."""
    return contents(megatron_to_hf(checkpoint, checkpoint.parent / "undisturbed", say=quiet, shard_bytes=SHARD_BYTES))


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_export_is_never_taken_for_whole_and_the_next_start_finishes_it(tmp_path, checkpoint, undisturbed, point):
    target, aside = tmp_path / "out", tmp_path / ".out.exporting"
    assert in_process(export_until, point, die, checkpoint, target) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.exporting"]
    finished = json.loads((aside / FINISHED).read_text())["shards"] if point != "before the name" else {}
    assert len(finished) >= (0 if point == "before the name" else 2)
    was = {name: (aside / name).stat().st_mtime_ns for name in finished}
    (aside / "left over").write_bytes(b"x")
    megatron_to_hf(checkpoint, target, say=quiet, shard_bytes=SHARD_BYTES)
    assert contents(target) == undisturbed
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == was  # not written again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refused(point: str, checkpoint: Path, target: Path) -> None:
    with pytest.raises(CheckpointError, match=r"out: could not be written: File too large: .*/\.out\.exporting.*; make room") as error:
        export_until(point, bound_files, checkpoint, target)
    assert "run the same command again: it goes on with what is finished" in str(error.value)


@pytest.mark.parametrize("point", ["in the third file", "before a record", "before the config", "before the last file"])
def test_a_full_disk_is_named_and_the_next_start_finishes(tmp_path, checkpoint, undisturbed, point):
    target, aside = tmp_path / "out", tmp_path / ".out.exporting"
    assert in_process(refused, point, checkpoint, target) == 0
    assert not target.exists()
    assert not [path.name for path in aside.iterdir() if path.name.startswith(".model")]  # no half of a file holds room
    finished = json.loads((aside / FINISHED).read_text())["shards"]
    was = {name: (aside / name).stat().st_mtime_ns for name in finished}
    assert was
    megatron_to_hf(checkpoint, target, say=quiet, shard_bytes=SHARD_BYTES)
    assert contents(target) == undisturbed
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == was


@pytest.fixture
def half(tmp_path, checkpoint):
    """An export that was stopped with all of its weights written."""
    assert in_process(export_until, "before the config", die, checkpoint, tmp_path / "out") == -signal.SIGKILL
    return tmp_path / ".out.exporting"


def test_a_finished_file_that_was_changed_is_written_again(tmp_path, checkpoint, undisturbed, half):
    names = sorted(path.name for path in half.glob("*.safetensors"))
    was = {name: (half / name).stat().st_mtime_ns for name in names}
    data = bytearray((half / names[1]).read_bytes())
    data[-1] ^= 1
    (half / names[1]).write_bytes(data)
    (half / names[2]).write_bytes(b"short")
    (half / names[3]).unlink()
    megatron_to_hf(checkpoint, tmp_path / "out", say=quiet, shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == undisturbed
    assert [name for name in names if (tmp_path / "out" / name).stat().st_mtime_ns == was[name]] == [names[0], *names[4:]]


@pytest.mark.parametrize("what", ["dtype", "shard size", "checkpoint", "record"])
def test_nothing_of_another_export_is_kept(tmp_path, folder, checkpoint, half, what):
    names = {path.name: path.stat().st_mtime_ns for path in half.glob("*.safetensors")}
    options: dict[str, Any] = {"shard_bytes": SHARD_BYTES}
    if what == "dtype":
        options["dtype"] = "bf16"
    elif what == "shard size":
        options["shard_bytes"] = SHARD_BYTES + 1
    elif what == "checkpoint":
        checkpoint = write(tmp_path / "other", folder, {key: 2 * one for key, one in megatron_tensors(folder).items()})
    else:
        (half / FINISHED).write_text('{"how": {}}')
    out = megatron_to_hf(checkpoint, tmp_path / "out", say=quiet, **options)
    alone = megatron_to_hf(checkpoint, tmp_path / "alone", say=quiet, **options)
    assert contents(out) == contents(alone)
    assert all((out / name).stat().st_mtime_ns != was for name, was in names.items() if (out / name).exists())
