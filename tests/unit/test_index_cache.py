"""The cache of index arrays: whole or absent, never stale, safe between two builders."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.index_cache import ABANDONED_SECONDS, IndexCache
from megatron_ext.errors import DataError

WHAT = {"kind": "numbers", "seed": 3}


def make(root: Path, may_build: bool = True) -> IndexCache:
    return IndexCache(root, may_build=may_build, way_out="run: megatron-ext prepare RUN")


def numbers() -> dict[str, np.ndarray]:
    return {"a": np.arange(5), "b": np.ones((2, 2), dtype=np.int32)}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("built again")


def test_arrays_are_built_once_and_then_only_mapped(tmp_path):
    first = make(tmp_path).arrays(WHAT, numbers)
    again = make(tmp_path, may_build=False).arrays(WHAT, never)
    assert isinstance(again["a"], np.memmap)
    assert first["a"].tolist() == again["a"].tolist() == [0, 1, 2, 3, 4]
    assert again["b"].dtype == np.int32


def test_another_description_is_another_index(tmp_path):
    make(tmp_path).arrays(WHAT, numbers)
    other = make(tmp_path).arrays({**WHAT, "seed": 4}, lambda: {"a": np.zeros(1)})
    assert other["a"].tolist() == [0.0]


def test_a_reader_names_the_command_that_builds(tmp_path):
    with pytest.raises(DataError, match=r"no such index \(of numbers\); run: megatron-ext prepare RUN"):
        make(tmp_path, may_build=False).arrays(WHAT, never)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_index_is_no_index(tmp_path):
    cache = make(tmp_path)
    aside = tmp_path / f".{cache.folder(WHAT).name}.1234.tmp"  # what a killed builder leaves
    aside.mkdir()
    np.save(aside / "a.npy", np.zeros(5))
    with pytest.raises(DataError, match="no such index"):
        make(tmp_path, may_build=False).arrays(WHAT, never)
    assert cache.arrays(WHAT, numbers)["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(
            DataError, match=rf"{tmp_path}: cannot write indices here \(No space left on device\); .*run: megatron-ext prepare"
        ):
            make(tmp_path).arrays(WHAT, numbers)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "indices").write_text("")
    with pytest.raises(DataError, match=rf"{tmp_path}/indices: cannot write indices here \("):
        make(tmp_path / "indices").arrays(WHAT, numbers)


def test_what_a_killed_builder_left_is_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".old.1.tmp", tmp_path / ".young.1.tmp"
    for folder in (old, young):
        folder.mkdir()
    past = time.time() - ABANDONED_SECONDS - 60
    os.utime(old, (past, past))
    make(tmp_path).arrays(WHAT, numbers)
    assert not old.exists()
    assert young.exists()


def test_the_slower_of_two_builders_discards_its_work(tmp_path):
    def slower() -> dict[str, np.ndarray]:
        make(tmp_path).arrays(WHAT, numbers)  # another process finishes first
        return {"a": np.zeros(5), "b": np.zeros(1)}

    assert make(tmp_path).arrays(WHAT, slower)["a"].tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [make(tmp_path).folder(WHAT).name]


def build_with_others(root: Path, start: multiprocessing.synchronize.Barrier) -> None:
    def at_once() -> dict[str, np.ndarray]:
        start.wait(20)
        return numbers()

    assert make(root).arrays(WHAT, at_once)["a"].tolist() == [0, 1, 2, 3, 4]


def test_processes_that_build_at_once_all_succeed(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [context.Process(target=build_with_others, args=(tmp_path, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_is_refused_with_the_way_out(tmp_path):
    cache = make(tmp_path)
    cache.arrays(WHAT, numbers)
    array = cache.folder(WHAT) / "a.npy"
    array.write_bytes(array.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"cannot be read.*delete the folder, then run: megatron-ext prepare RUN"):
        cache.arrays(WHAT, never)
    (cache.folder(WHAT) / "description.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        cache.arrays(WHAT, never)


def test_an_index_under_another_name_is_refused(tmp_path):
    cache = make(tmp_path)
    cache.arrays(WHAT, numbers)
    other = {**WHAT, "seed": 4}
    cache.folder(WHAT).rename(cache.folder(other))
    with pytest.raises(DataError, match="describes another index"):
        cache.arrays(other, never)
