"""Weights read one at a time from checkpoints cut in any way; what is missing, doubled or cut is named."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.checkpoint.stream_reading import CheckpointReader
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import file_sha256, write_manifest
from tests.small_checkpoints import manifest

Shape = tuple[int, ...]


@dataclass
class Chunked:
    """A tensor and the blocks that it is saved in; `files` says which of the rank files each goes into, in turn."""

    tensor: torch.Tensor
    blocks: Sequence[tuple[Shape, Shape]]  # start, size
    shape: Shape | None = None  # what the metadata says; None: the truth
    saved: Mapping[int, Any] = field(default_factory=dict)  # block number -> what is saved instead


def whole(tensor: torch.Tensor) -> Chunked:
    """One block."""
    return Chunked(tensor, [((0,) * tensor.dim(), tuple(tensor.shape))])


def cut(tensor: torch.Tensor, *counts: int) -> Chunked:
    """Equal blocks, so many along each axis."""
    blocks: list[tuple[Shape, Shape]] = [((), ())]
    for size, count in zip(tensor.shape, counts, strict=True):
        assert size % count == 0
        blocks = [((*a, i * size // count), (*b, size // count)) for a, b in blocks for i in range(count)]
    return Chunked(tensor, blocks)


def write_checkpoint(path: Path, tensors: Mapping[str, Chunked | bytes], num_files: int = 2, **facts: Any) -> Path:
    """A torch_dist checkpoint written by hand: tensors in blocks, or bytes; `facts` go into its manifest."""
    path.mkdir(parents=True)
    names = [f"__{i}_0.distcp" for i in range(num_files)]
    streams, placed, entries = [io.BytesIO() for _ in names], {}, {}
    for key, one in tensors.items():
        if isinstance(one, bytes):
            _place(streams, names, placed, MetadataIndex(key), one)
            entries[key] = BytesStorageMetadata()
            continue
        chunks = []
        for number, (start, size) in enumerate(one.blocks):
            window = tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))
            data = _saved(one.saved.get(number, one.tensor[window].clone()))
            _place(streams, names, placed, MetadataIndex(key, torch.Size(start), number), data)
            chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
        shape = torch.Size(one.shape or one.tensor.shape)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=one.tensor.dtype), shape, chunks)
    for name, stream in zip(names, streams, strict=True):
        (path / name).write_bytes(stream.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=placed)))
    torch.save({}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    sign(path, **facts)
    return path


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _place(streams: list[io.BytesIO], names: list[str], placed: dict[Any, Any], index: MetadataIndex, data: bytes) -> None:
    which = len(placed) % len(streams)
    placed[index] = _StorageInfo(names[which], streams[which].tell(), len(data))
    streams[which].write(data)


def sign(path: Path, **facts: Any) -> None:
    """A manifest that is true of the files as they are."""
    files = {one.name: (one.stat().st_size, file_sha256(one)) for one in sorted(path.iterdir()) if one.name != "manifest.json"}
    write_manifest(path, replace(manifest(1, **facts), files=files))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape).to(dtype)


CUTS = {
    "whole": whole(numbers(8, 6)),
    "rows": cut(numbers(8, 6), 4, 1),
    "columns": cut(numbers(8, 6), 1, 3),
    "grid": cut(numbers(8, 6), 2, 3),
    "uneven": Chunked(numbers(8, 6), [((0, 0), (3, 6)), ((3, 0), (5, 2)), ((3, 2), (5, 4))]),
    "vector": cut(numbers(8), 2),
    "bf16": cut(numbers(8, 6, dtype=torch.bfloat16), 2, 1),
    "fp16": whole(numbers(3, dtype=torch.float16)),
    "scalar": whole(torch.tensor(3.0)),
}
STACKED = {
    "layers": cut(numbers(4, 6, 2), 4, 1, 1),
    "layers and ranks": cut(numbers(4, 6, 2), 4, 2, 1),
    "several layers at once": cut(numbers(4, 6, 2), 2, 1, 2),
    "all layers": whole(numbers(4, 6, 2)),
    "norms": cut(numbers(4, 6), 4, 1),
}


def test_every_cut_gives_the_same_tensor(tmp_path):
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", {**CUTS, **STACKED}))
    assert reader.keys == (*CUTS, *STACKED)
    for key, one in (CUTS | STACKED).items():
        assert reader.shape(key) == tuple(one.tensor.shape)
        assert reader.dtype(key) == one.tensor.dtype
        assert reader.gap(key) == ""
        assert torch.equal(reader.read(key), one.tensor), key
    for key, one in STACKED.items():
        for layer in range(4):
            assert torch.equal(reader.read(key, layer), one.tensor[layer]), (key, layer)


def test_optimizer_state_is_no_weight_and_never_read(tmp_path):
    hidden = {
        f"{prefix}optimizer.state.exp_avg.w": Chunked(numbers(4), [((0,), (4,))], saved={0: "poison"}) for prefix in ("", "chained_0.")
    }
    path = write_checkpoint(tmp_path / "c", {"w": whole(numbers(4)), **hidden, "w._extra_state/shard_0_1": _saved(None), "other": b"x"})
    reader = CheckpointReader(path)
    assert reader.keys == ("w",)
    assert reader.others == ("other",)
    assert torch.equal(reader.read("w"), numbers(4))


def test_a_chunk_that_covers_a_tensor_is_not_copied(tmp_path):
    size_bytes = 64 << 20
    path = write_checkpoint(tmp_path / "c", {"w": whole(torch.ones(size_bytes // 4)), "cut": cut(torch.ones(size_bytes // 4), 2)})
    reader = CheckpointReader(path)
    assert _anonymous_bytes(lambda: reader.read("w")) < size_bytes / 4
    assert _anonymous_bytes(lambda: reader.read("cut")) > size_bytes / 2  # the measure would see a copy


def _anonymous_bytes(make: Callable[[], torch.Tensor]) -> int:
    """How much anonymous memory a tensor brings with it once it is used."""

    def now() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    before = now()
    held = make()
    held.sum()
    after = now()
    del held
    return after - before


def test_what_is_read_may_be_changed_and_the_file_stays(tmp_path):
    path = write_checkpoint(tmp_path / "c", {"w": whole(numbers(4))})
    before = file_sha256(path / "__0_0.distcp")
    CheckpointReader(path).read("w").zero_()
    assert file_sha256(path / "__0_0.distcp") == before
    assert torch.equal(CheckpointReader(path).read("w"), numbers(4))


# ---- damage


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


ROWS = [((0, 0), (4, 6)), ((4, 0), (4, 6))]


@pytest.mark.parametrize(("blocks", "said"), [
    (ROWS[:1], r"\[4:8\] is missing"),
    ([ROWS[0], ((4, 0), (4, 5))], r"\[4:8, 5:6\] is missing"),
    ([ROWS[0], ((3, 0), (5, 6))], r"\[3:4, 0:6\] is there 2 times"),
    ([*ROWS, ((4, 0), (4, 3))], r"\[4:8, 0:3\] is there 2 times"),
    ([], r"\[\] is missing"),
])  # fmt: skip
def test_gaps_and_overlaps_are_named(tmp_path, blocks, said):
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", {"w": Chunked(numbers(8, 6), blocks)}))
    with pytest.raises(DamagedCheckpointError, match=rf"/\.metadata: w: {said}"):
        reader.read("w")
    assert reader.gap("w")


def test_a_chunk_outside_of_its_tensor_is_named(tmp_path):
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", {"w": Chunked(numbers(8, 6), ROWS, shape=(7, 6))}))
    with pytest.raises(DamagedCheckpointError, match=r"w: a chunk of \(4, 6\) at \(4, 0\) is no block of its shape \(7, 6\)"):
        reader.read("w")


def test_a_missing_layer_is_named_and_the_others_are_read(tmp_path):
    one = cut(numbers(4, 6), 4, 1)
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", {"w": replace(one, blocks=[one.blocks[i] for i in (0, 1, 3)])}))
    assert reader.gap("w") == "[2:3] is missing"
    assert torch.equal(reader.read("w", 3), one.tensor[3])
    with pytest.raises(DamagedCheckpointError, match="w: "):
        reader.read("w", 2)


@pytest.mark.parametrize(("saved", "kind", "said"), [
    (numbers(4, 5), DamagedCheckpointError, r"holds \(\(4, 5\), torch\.float32\), \.metadata says \(\(4, 6\), torch\.float32\)"),
    (numbers(4, 6).half(), DamagedCheckpointError, r"holds \(\(4, 6\), torch\.float16\)"),
    (numbers(6, 4).t(), DamagedCheckpointError, "not a plain tensor"),
    (numbers(5, 6)[1:], DamagedCheckpointError, "not a plain tensor"),
    ([1, 2], DamagedCheckpointError, "a list, not a plain tensor"),
    (Evil(), CheckpointError, "refused, nothing was run: .*GLOBAL print"),
])  # fmt: skip
def test_a_chunk_that_holds_something_else_is_named(tmp_path, saved, kind, said):
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", {"w": Chunked(numbers(8, 6), ROWS, saved={1: saved})}))
    with pytest.raises(CheckpointError, match=rf"__1_0\.distcp: w at \(4, 0\): .*{said}") as error:
        reader.read("w")
    assert type(error.value) is kind


def _move(path: Path, by: int = 0, longer: int = 0, key: str = "w") -> None:
    """Make the metadata say that an entry begins, or ends, elsewhere."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            metadata.storage_data[index] = replace(info, offset=info.offset + by, length=info.length + longer)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


@pytest.mark.parametrize(("by", "longer", "said"), [
    (0, 1, "the file ends inside of it"),
    (0, -700, "cannot be read"),
    (-3, 0, "no archive begins there"),
    (0, -1200, "cannot be read"),
])  # fmt: skip
def test_an_entry_that_lies_elsewhere_or_is_cut_is_named(tmp_path, by, longer, said):
    path = write_checkpoint(tmp_path / "c", {"before": whole(numbers(2)), "w": whole(numbers(8, 6))}, num_files=1)
    _move(path, by, longer)
    with pytest.raises(DamagedCheckpointError, match=rf"__0_0\.distcp: w at \(0, 0\): .*{said}"):
        CheckpointReader(path).read("w")


def test_an_entry_without_a_place_is_named(tmp_path):
    path = write_checkpoint(tmp_path / "c", {"w": whole(numbers(4))})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_data.clear()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata: does not say where w at \(0,\) lies"):
        CheckpointReader(path).read("w")


def test_every_guard_of_a_load_is_passed(tmp_path):
    path = write_checkpoint(tmp_path / "c", {"w": whole(numbers(4))})
    reader = CheckpointReader(path)
    (path / "__0_0.distcp").rename(path / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp: missing"):
        CheckpointReader(path)
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp: w at .*No such file"):
        reader.read("w")  # taken away after it was opened
    (path / "elsewhere").rename(path / "__0_0.distcp")
    (path / "manifest.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        CheckpointReader(path)
