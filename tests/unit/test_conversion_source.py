"""A Hugging Face folder as a source: read without copies, and refused, with all that is wrong, before anything is made of it."""

from __future__ import annotations

import json
import re
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.conversion.source import Stopped, open_source, survey
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.provenance import file_sha256
from tests.small_models import hugging_face_folder

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model in three files, and the same in one."""
    folder = tmp_path_factory.mktemp("source")
    return {size: hugging_face_folder(folder / size, "qwen2", torch.bfloat16, size) for size in ("50KB", "5GB")}


@pytest.fixture
def sharded(made, tmp_path):
    return Path(shutil.copytree(made["50KB"], tmp_path / "sharded"))


@pytest.fixture
def single(made, tmp_path):
    return Path(shutil.copytree(made["5GB"], tmp_path / "single"))


def test_files_and_names_are_those_of_the_folder(made):
    expected = load_file(made["5GB"] / "model.safetensors")
    for size, files in (("50KB", [INDEX, FIRST, SECOND, THIRD]), ("5GB", ["model.safetensors"])):
        source = open_source(made[size])
        assert [path.name for path in source.files] == ["config.json", *files]
        assert set(source.names) == set(expected)
        assert sorted(name for path in source.files for name in source.names_in(path)) == sorted(expected)
        for name, tensor in expected.items():
            found = source.read(name)
            assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        assert source.config["model_type"] == "qwen2"


def test_reading_takes_no_anonymous_memory(tmp_path):
    size_bytes = 1 << 26
    tensors = {"large": torch.ones(size_bytes // 4), "odd": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin"):
        source = open_source(tmp_path, allow_pickle=True)
        assert source.files[-1].name == name
        before = anonymous_bytes()
        tensor = source.read("large")
        assert float(tensor.sum()) == size_bytes // 4
        assert anonymous_bytes() - before < size_bytes // 4
        kept = tensor.clone()  # the fault: a copy shows
        assert anonymous_bytes() - before > size_bytes * 3 // 4
        (tmp_path / name).unlink()
        del kept


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_survey_gives_digests_and_counts_what_is_not_finite(sharded):
    source = open_source(sharded)
    surveyed = survey(source, threading.Event())
    assert surveyed.files == {path.name: (path.stat().st_size, file_sha256(path)) for path in source.files}
    assert surveyed.nonfinite == {}
    change(sharded / FIRST, EMBEDDING, lambda tensor: tensor.index_fill_(0, torch.tensor([3, 5]), float("nan")))
    (holder,) = (path for path in source.files if NORM in source.names_in(path))
    change(holder, NORM, lambda tensor: tensor.index_fill_(0, torch.tensor([7]), float("-inf")))
    assert survey(open_source(sharded), threading.Event()).nonfinite == {EMBEDDING: 64, NORM: 1}
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        survey(source, stop)


def change(path: Path, name: str, how: Callable[[torch.Tensor], Any]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    how(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def test_what_programs_compute_is_left_out(single):
    path = single / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}, path)
    assert not [name for name in open_source(single).names if "inv_freq" in name]


# ---- refused


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    values = json.loads((folder / INDEX).read_text())
    edit(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def rewrite(path: Path, **more: torch.Tensor) -> None:
    save_file({**{name: tensor.clone() for name, tensor in load_file(path).items()}, **more}, path)


def cut(path: Path, size_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:size_bytes])


def lose_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def cut_shard(folder: Path) -> None:
    cut(folder / SECOND, 20_000)


def cut_header(folder: Path) -> None:
    cut(folder / SECOND, 100)


def empty(folder: Path) -> None:
    cut(folder / SECOND, 0)


def lengthen(folder: Path) -> None:
    with (folder / SECOND).open("ab") as file:
        file.write(b"\0" * 8)


def wrong_place(folder: Path) -> None:
    edit_index(folder, lambda placed: placed.update({NORM: FIRST}))


def unknown_tensor(folder: Path) -> None:
    edit_index(folder, lambda placed: placed.update({"model.extra.weight": FIRST}))


def unnamed_tensor(folder: Path) -> None:
    edit_index(folder, lambda placed: placed.pop(EMBEDDING))


def outside(folder: Path) -> None:
    edit_index(folder, lambda placed: placed.update({EMBEDDING: "../model.safetensors"}))


def twice(folder: Path) -> None:
    rewrite(folder / THIRD, **{EMBEDDING: torch.ones(2, 2)})


def float64(folder: Path) -> None:
    rewrite(folder / THIRD, **{"lm_head.weight": torch.ones(2, dtype=torch.float64)})


def integers(folder: Path) -> None:
    rewrite(folder / THIRD, **{"lm_head.weight": torch.ones(2, dtype=torch.int8)})


def no_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def two_sets(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def huge_header(folder: Path) -> None:
    (folder / SECOND).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


FAULTS = {
    lose_shard: rf"{SECOND}: missing, though {INDEX} names it; download it",
    cut_shard: rf"{SECOND}: not a whole safetensors file: it has 20,000 bytes, its header speaks of \d\d,\d{{3}}; download it again",
    cut_header: rf"{SECOND}: not a whole safetensors file",
    empty: rf"{SECOND}: not a whole safetensors file",
    huge_header: rf"{SECOND}: not a whole safetensors file",
    lengthen: rf"{SECOND}: not a whole safetensors file: it has",
    wrong_place: rf"{INDEX}: says that {FIRST} holds {NORM}, and it does not; .*\n.*{INDEX}: does not say that \S+ holds {NORM}; download",
    unknown_tensor: rf"{INDEX}: says that {FIRST} holds model.extra.weight, and it does not",
    unnamed_tensor: rf"{INDEX}: does not say that \S+ holds {EMBEDDING}",
    outside: rf"{INDEX}: names files outside of its folder: '../model.safetensors'",
    twice: rf"\S+ and {THIRD} hold the same tensors: {EMBEDDING}",
    float64: rf"{THIRD}: numbers as F64, where F32, BF16, F16 are taken: lm_head.weight; save the model in one of these",
    integers: rf"{THIRD}: numbers as I8",
    no_map: rf"{INDEX}: has no weight_map",
    broken_index: rf"{INDEX}: not valid JSON",
    no_index: rf"has {FIRST}, {SECOND}, {THIRD}, but not the index that says what is in them",
    two_sets: rf"holds model.safetensors and {INDEX}, which does not name it",
    no_weights: r"it has no weights; looked for model.safetensors",
    no_config: r"config.json: no such file",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_folder_that_is_not_right_is_refused(sharded, fault):
    open_source(sharded)
    fault(sharded)
    with pytest.raises(DataError, match=FAULTS[fault]) as error:
        open_source(sharded)
    assert str(sharded) in str(error.value)


def test_everything_that_is_wrong_is_said_at_once(sharded):
    for fault in (float64, wrong_place, cut_shard):
        fault(sharded)
    (sharded / FIRST).unlink()
    with pytest.raises(DataError) as error:
        open_source(sharded)
    for part in (f"{FIRST}: missing", f"{SECOND}: not a whole", f"{THIRD}: numbers as F64"):
        assert part in str(error.value)


def test_a_checkpoint_in_its_place_is_said_to_be_one(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(DataError, match="is a Megatron checkpoint, and a Hugging Face folder is wanted here; are the two names swapped"):
        open_source(tmp_path)


def test_a_file_that_git_lfs_has_not_fetched_is_said_to_be_one(single):
    path = next(single.glob("*.safetensors"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"a Git LFS pointer, not the file; run `git lfs pull`"):
        open_source(single)


def test_a_config_that_is_no_object_and_a_folder_that_is_none_are_refused(single):
    (single / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_source(single)
    with pytest.raises(DataError, match="no such folder"):
        open_source(single / "nowhere")


# ---- pickles


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('ran').write_text('x')",)


def as_pickle(folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Turn a folder's weights into a pickle; the tensors."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    torch.save({**tensors, **more}, folder / "pytorch_model.bin")
    path.unlink()
    return tensors


def test_pickles_are_read_if_asked_for(single):
    path = single / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    torch.save({**tensors, "odd": torch.ones(4, 6).t()}, single / "pytorch_model.bin")
    assert open_source(single).files[-1] == path  # safetensors first
    path.unlink()
    with pytest.raises(DataError, match=r"pytorch_model\.bin: weights as pickles.*--allow-pickle"):
        open_source(single)
    source = open_source(single, allow_pickle=True)
    assert set(source.names) == {*tensors, "odd"}
    assert source.read("odd").is_contiguous()
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor)
        assert source.dtype(name) == tensor.dtype


def test_an_index_of_pickles_is_read_too(single):
    tensors = as_pickle(single)
    names = sorted(tensors)
    placed = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: tensors[name] for name in names if placed[name] == file}, single / file)
    (single / "pytorch_model.bin").unlink()
    (single / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    assert set(open_source(single, allow_pickle=True).names) == set(names)
    with pytest.raises(DataError, match="allow-pickle"):
        open_source(single)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"evil": Evil()}, r"nothing of it was run: .*exec"),
        ({"number": 3}, r"what is no plain tensor: number"),
        ({"sparse": torch.eye(3).to_sparse()}, r"what is no plain tensor: sparse"),
        ({"double": torch.ones(2, dtype=torch.float64)}, r"numbers as float64"),
    ],
    ids=["code", "a number", "a sparse tensor", "float64"],
)
def test_pickles_of_anything_else_are_refused_and_nothing_runs(single, monkeypatch, more, said):
    monkeypatch.chdir(single)
    as_pickle(single, **more)
    with pytest.raises(DataError, match=rf"pytorch_model\.bin: .*{said}"):
        open_source(single, allow_pickle=True)
    assert not Path("ran").exists()


def test_a_cut_pickle_is_refused(single):
    as_pickle(single)
    cut(single / "pytorch_model.bin", 20_000)
    with pytest.raises(DataError, match=r"pytorch_model\.bin: not read"):
        open_source(single, allow_pickle=True)
