"""A conversion that was killed, or met a full disk, goes on where it was; what is half done, damaged or another's is never taken for it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import stream_writing
from megatron_ext.checkpoint.verify import verify
from megatron_ext.conversion import publishing, to_megatron
from megatron_ext.conversion.to_megatron import Imported, hf_to_megatron, import_model
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import Manifest, file_sha256, read_manifest
from tests import ranks
from tests.layouts import CPU
from tests.small_models import change_tensor, hugging_face_folder
from tests.training_runs import DEAD

SMALL_FILES, DATA_FILES = 4_000, 10  # bytes, and how many data files that makes of the model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hugging_face_folder(tmp_path_factory.mktemp("models") / "untied", "qwen3", torch.bfloat16, "50KB")


def convert(source: Path, target: Path) -> Manifest:
    """`hf_to_megatron` into many small files."""
    with pytest.MonkeyPatch.context() as patch:
        true = to_megatron.import_model
        patch.setattr(to_megatron, "import_model", lambda *given, **named: true(*given, **named, file_bytes=SMALL_FILES))
        hf_to_megatron(str(source), target)
    return verify(target)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    manifest = convert(source, tmp_path_factory.mktemp("undisturbed") / "checkpoint")
    assert [name for name in sorted(manifest.files) if name.endswith(".distcp")] == [f"__0_{i}.distcp" for i in range(DATA_FILES)]
    return manifest


def killed(groups: Any, source: Path, target: Path, point: str) -> None:
    """Convert, and be killed at a point."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "in the third file":
        true = stream_writing.torch.save
        begun: list[str] = []

        def save(tensor: Any, stream: Any) -> None:
            begun.append(str(stream.name) if hasattr(stream, "name") else "")
            true(tensor, stream)
            if len(set(begun)) == 3:
                stream.flush()
                die()

        stream_writing.torch.save = save
    elif point == "before the metadata":
        stream_writing.write_metadata = die
    elif point == "before the manifest":
        to_megatron.write_manifest = die
    elif point == "before the renames":
        to_megatron.publish = die
    else:
        publishing.force_to_disk = die
    convert(source, target)


POINTS = {"in the third file": 2, "before the metadata": DATA_FILES, "before the manifest": 0, "before the renames": 0,
          "between the renames": 0}  # fmt: skip  # -> data files kept


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_conversion_goes_on_where_it_was(source, undisturbed, tmp_path, point):
    target = tmp_path / "checkpoint"
    with pytest.raises(AssertionError, match=DEAD):
        ranks.run(killed, CPU, source, target, point)
    (work,) = tmp_path.iterdir()
    assert work.name.startswith(".checkpoint.converting.") if point == "between the renames" else work.name == ".checkpoint.converting"
    if not point.endswith("the renames"):
        with pytest.raises(DamagedCheckpointError, match=r"has no manifest\.json"):
            read_manifest(work)
    before = states(work)
    assert convert(source, target).files == undisturbed.files
    kept = {name for name, state in states(target).items() if before.get(name) == state}
    assert kept == {f"__0_{i}.distcp" for i in range(POINTS[point])}
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def interrupt(source: Path, work: Path) -> None:
    """Leave a conversion with four finished files."""
    seen: list[int] = []
    true = stream_writing.atomic_write

    def stop(*given: Any) -> None:
        true(*given)
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_writing, "atomic_write", stop)
        with pytest.raises(KeyboardInterrupt):
            finish(source, work)
    assert sorted(path.name for path in work.glob("*.distcp")) == [f"__0_{i}.distcp" for i in range(4)]


def finish(source: Path, work: Path) -> Imported:
    return import_model(source, work, name="untied", file_bytes=SMALL_FILES)


def test_finished_files_are_believed_only_if_they_hash_to_what_was_recorded(source, undisturbed, tmp_path):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    for wrong in (damage, Path.unlink, lambda path: os.truncate(path, 100)):
        work = tmp_path / "work"
        interrupt(source, work)
        wrong(work / "__0_1.distcp")
        (work / "stray").mkdir()
        (work / ".__0_4.distcp.half").write_bytes(b"half")
        before = states(work)
        assert finish(source, work).files == undisturbed.files
        assert {path.name for path in work.iterdir()} == set(undisturbed.files)
        after = states(work)
        assert {i for i in range(4) if before.get(f"__0_{i}.distcp") == after[f"__0_{i}.distcp"]} == {0, 2, 3}
        shutil.rmtree(work)
    interrupt(source, work)
    damage(work / "__0_1.distcp")
    with pytest.MonkeyPatch.context() as patch:  # the fault: a file is believed by its size
        recorded = json.loads((work / stream_writing.RECORD).read_text())["files"]
        patch.setattr(stream_writing, "file_sha256", lambda path: recorded[path.name][0][1])
        assert finish(source, work).files == undisturbed.files
    assert file_sha256(work / "__0_1.distcp") != undisturbed.files["__0_1.distcp"][1]


def test_what_another_source_left_is_not_mixed_in(source, undisturbed, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    change_tensor(other, "model.layers.0.mlp.gate_proj.weight", lambda tensor: tensor + 1)
    for fault in (False, True):
        work = tmp_path / "work"
        interrupt(other, work)
        before = states(work)
        with pytest.MonkeyPatch.context() as patch:
            if fault:  # the job's identity says nothing
                patch.setattr(to_megatron, "_states", lambda _: [])
                interrupt(other, work)
            assert (finish(source, work).files == undisturbed.files) is not fault
        assert fault or not set(before.values()) & set(states(work).values())
        shutil.rmtree(work)


def test_a_damaged_record_costs_only_time(source, undisturbed, tmp_path):
    for text in ("", "[]", '{"identity": 3}', '{"files": {}}'):
        interrupt(source, tmp_path / "work")
        (tmp_path / "work" / stream_writing.RECORD).write_text(text)
        assert finish(source, tmp_path / "work").files == undisturbed.files


def test_a_full_disk_is_said_and_a_restart_with_room_finishes(tmp_path):
    """A bound on the size of files stands for the disk: the feed-forward's do not fit."""
    wide = hugging_face_folder(tmp_path / "source", dtype=torch.bfloat16, intermediate_size=800, num_hidden_layers=2)
    target, work = tmp_path / "checkpoint", tmp_path / ".checkpoint.converting"
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most))
    try:
        with pytest.raises(CheckpointError) as error:
            convert(wide, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert re.search(rf"{work}/\.__0_2\.distcp\S+: could not be written: File too large; make room on its disk", str(error.value))
    assert f"it goes on from what is finished in {work}" in str(error.value)
    assert not target.exists()
    left = states(work)
    assert left.keys() == {"__0_0.distcp", "__0_1.distcp", stream_writing.RECORD}
    manifest = convert(wide, target)
    assert {name for name, state in states(target).items() if left.get(name) == state} == {"__0_0.distcp", "__0_1.distcp"}
    assert manifest.files == convert(wide, tmp_path / "undisturbed").files
