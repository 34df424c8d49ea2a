"""A real checkpoint of two ranks, damaged in every kind of file: all of it is found and named, by the start and by `verify`."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.__main__ import main
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import check_files, verify, verify_shared
from megatron_ext.errors import DamagedCheckpointError
from megatron_ext.provenance import MANIFEST, read_manifest, write_manifest
from tests import ranks, training_runs
from tests.layouts import TWO
from tests.small_corpus import train_run, write_corpus

KINDS = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "__1_0.distcp", MANIFEST)
CHANGES = ("flipped", "missing", "cut short", "empty", "longer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A routine checkpoint of two data-parallel ranks: each holds a part of the optimizer."""
    corpus = write_corpus(tmp_path_factory.mktemp("damage"), {"web": 60, "qa": 30})
    run = train_run(corpus, replace(training_runs.stage(steps=2, save_every_steps=1, plan=TWO), name="two ranks"))
    training_runs.trace(run)
    return folders.iteration_path(run.checkpoints_path, 1)


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def damage(file: Path, how: str) -> None:
    size_bytes = file.stat().st_size
    match how:
        case "flipped":
            content = bytearray(file.read_bytes())
            content[size_bytes // 2] ^= 1
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "cut short":
            os.truncate(file, size_bytes - 1)
        case "empty":
            os.truncate(file, 0)
        case "longer":
            os.truncate(file, size_bytes + 1)


def by_two_ranks(path: Path) -> list[str]:
    """What two ranks find together, as a start does it."""
    try:
        return [line for rank in (0, 1) for line in verify_shared(path, read_manifest(path), rank, 2)]
    except DamagedCheckpointError as error:
        return [str(error)]


def test_the_checkpoint_is_whole(whole):
    assert {*read_manifest(whole).files, MANIFEST} == set(KINDS) == {path.name for path in whole.iterdir()}
    verify(whole)
    assert by_two_ranks(whole) == []


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_damage_to_each_kind_of_file_is_found_and_named(copy, capsys, name, how):
    damage(copy / name, how)
    with pytest.raises(DamagedCheckpointError) as found:
        verify(copy)
    for said in (str(found.value), *by_two_ranks(copy)):
        assert name in said
    assert len(by_two_ranks(copy)) == 1
    if how != "flipped" and name != MANIFEST:
        with pytest.raises(DamagedCheckpointError, match=name):
            check_files(copy, read_manifest(copy))
    assert main(["verify", str(copy)]) == 2
    assert f"{copy.name}{'' if (name, how) == (MANIFEST, 'missing') else '/' + name}" in capsys.readouterr().err


def test_metadata_of_another_size_than_the_manifest_says(copy):
    old = read_manifest(copy)
    size_bytes, sha256 = old.files[".metadata"]
    write_manifest(copy, replace(old, files={**old.files, ".metadata": (size_bytes + 7, sha256)}))
    with pytest.raises(DamagedCheckpointError, match=rf"\.metadata: {size_bytes:,} bytes, the manifest says {size_bytes + 7:,}"):
        check_files(copy, read_manifest(copy))
    assert len(by_two_ranks(copy)) == 1


def load_each(groups: Any, folder: Path) -> dict[str, str]:
    """What a load says of each damaged copy: the kind of its error, '' for none."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import build_state, sharded_model
    from tests.layouts import toy_stage

    state = build_state(toy_stage(), groups, None)
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            load_state(sharded_model(state), path / "iter_0000001")
            found[path.name] = ""
        except Exception as error:  # noqa: BLE001 - the test shows what it was
            found[path.name] = type(error).__name__
    return found


def test_no_load_ends_in_an_error_of_another_family(whole, tmp_path):
    """Sizes are looked at before anything is opened; what only a digest shows is an error of ours, or loads."""
    for name in KINDS:
        for how in CHANGES:
            damage(Path(shutil.copytree(whole, tmp_path / f"{name} {how}" / whole.name)) / name, how)
    found = ranks.run(load_each, replace(TWO, ranks_per_node=1), tmp_path)[0]
    assert len(found) == len(KINDS) * len(CHANGES)
    flipped = {case: kind for case, kind in found.items() if case.endswith("flipped")}
    assert {kind for case, kind in found.items() if case not in flipped} == {"DamagedCheckpointError"}
    assert set(flipped.values()) <= {"", "CheckpointError", "DamagedCheckpointError"}
    assert flipped[f"{MANIFEST} flipped"] == "DamagedCheckpointError"
