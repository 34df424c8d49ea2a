"""A torch_dist checkpoint of weights written tensor by tensor: no model is built, no process group runs.

Each part becomes entries of data files of about a gigabyte. A finished file is on the disk, and the job's
record says its digest and where its entries lie; so a job that was killed goes on behind the last finished
file, and what another job left is never mixed in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from megatron_ext.checkpoint.hashing import Digests, HashingFileSystem
from megatron_ext.config.base import Json, content_hash
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import file_sha256
from megatron_ext.runs import atomic_write, force_to_disk

METADATA_FNAME = ".metadata"
RECORD = ".unfinished.json"  # of a job under way: what it writes, and which files are finished
FORMAT = 1  # of the data files and the record: another version of this program does not go on with them
FILE_BYTES = 1 << 30  # of a data file: what a kill may cost
HELD_BYTES = 1 << 27  # of pieces being hashed: to wait for each would cost time, to hold all of a file memory
Shape = tuple[int, ...]
Entry = tuple[str, Shape, Shape, int, int]  # key, offset in the whole tensor, shape, place in the file, bytes there


@dataclass(frozen=True)
class Part:
    """A piece of a checkpoint's tensor, as large as fits into memory: one layer of a stacked tensor, or all of one."""

    key: str
    whole: Shape  # of the tensor that the checkpoint holds
    offset: Shape  # of this part in it
    shape: Shape  # of this part, with as many axes as the whole
    dtype: torch.dtype
    axis: int  # along which it comes in pieces
    pieces: Callable[[], Iterable[torch.Tensor]]  # of any dtype that goes into this one without loss

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    work: Path,
    parts: Sequence[Part],
    beside: Mapping[str, bytes],
    identity: Json,
    wrote: Callable[[int], None] = lambda _: None,
    file_bytes: int = FILE_BYTES,
) -> Digests:
    """Write `parts` and the files `beside` as a checkpoint, but for its manifest; digests of all its files.

    `work` belongs to this job: what in it is not a finished file of a job of the same `identity` is deleted.
    The job's record is left there for `forget_job`. `wrote` hears of bytes that are on their way to the disk,
    those of finished files at once. `CheckpointError` where the disk takes no more: what is finished stays.
    """
    try:
        plan = [[part.key, part.offset, part.shape, str(part.dtype)] for part in parts]
        job = _Job(work, content_hash({"format": FORMAT, **identity, "plan": plan, "file_bytes": file_bytes}), wrote)
        shares = {f"__0_{number}.distcp": share for number, share in enumerate(_shares(parts, file_bytes))}
        for name, share in shares.items():
            job.data_file(name, share)
        files = HashingFileSystem()
        write_metadata(files, work, _metadata(parts, {name: job.entries[name] for name in shares}))
        write_bytes(files, work / COMMON_STATE_FNAME, _saved({}))
        write_bytes(files, work / CONFIG_FNAME, json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1))).encode())
        for name, content in beside.items():
            write_bytes(files, work / name, content)
        force_to_disk(work)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or work}: could not be written: {error.strerror or error}; make room on its disk, if that is full, "
            f"and start this again: it goes on from what is finished in {work}"
        ) from error
    return {**job.digests, **files.digests}


def forget_job(work: Path) -> None:
    """Delete the job's record: the folder is whole, and holds nothing that a manifest would not list."""
    (work / RECORD).unlink(missing_ok=True)


class _Job:
    """What is finished of a job, in memory and in its record."""

    def __init__(self, work: Path, identity: str, wrote: Callable[[int], None]) -> None:
        self._work, self._identity, self._wrote = work, identity, wrote
        self._held: list[torch.Tensor] = []  # being hashed
        self.digests: Digests = {}
        self.entries: dict[str, list[Entry]] = {}
        work.mkdir(parents=True, exist_ok=True)
        self._take_up()
        for path in work.iterdir():
            if path.name not in self.digests and path.name != RECORD:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _take_up(self) -> None:
        """Believe the record of the same job as far as files are to the byte what it says."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no record, or none that can be read
            record = json.loads((self._work / RECORD).read_text(encoding="utf-8"))
            finished = record["files"] if record["identity"] == self._identity else {}
            for name, ((size_bytes, sha256), entries) in finished.items():
                path = self._work / name
                if path.is_file() and path.stat().st_size == size_bytes and file_sha256(path) == sha256:
                    self.entries[name] = [(key, tuple(offset), tuple(shape), at, length) for key, offset, shape, at, length in entries]
                    self.digests[name] = (size_bytes, sha256)

    def data_file(self, name: str, parts: Sequence[Part]) -> None:
        """Write one data file, unless it is finished, and say so in the record."""
        if name in self.digests:
            self._wrote(sum(part.num_bytes for part in parts))
            return
        files, aside = HashingFileSystem(), self._work / f".{name}.{uuid.uuid4().hex}"  # two at once do not write the same file
        try:
            with synced(files, aside) as stream, _without_crc32():
                entries = [entry for part in parts for entry in self._write(stream, part)]
            self._held.clear()
            files.rename(aside, self._work / name)
        finally:
            aside.unlink(missing_ok=True)  # of a full disk, the room is given back
        force_to_disk(self._work)
        self.digests.update(files.digests)
        self.entries[name] = entries
        finished = {one: (digest, self.entries[one]) for one, digest in self.digests.items()}
        atomic_write(self._work / RECORD, json.dumps({"identity": self._identity, "files": finished}))

    def _write(self, stream: Any, part: Part) -> Iterator[Entry]:
        """Write a part piece by piece. A piece stays as it is until it is hashed, and others are made meanwhile, up to `HELD_BYTES`."""
        along = 0
        for piece in part.pieces():
            begin, saved = stream.size_bytes, _alone(piece.detach().to(part.dtype))
            self._held.append(saved)
            torch.save(saved, stream)
            if sum(tensor.nbytes for tensor in self._held) > HELD_BYTES:
                stream.wait()
                self._held.clear()
            offset = tuple(start + (along if i == part.axis else 0) for i, start in enumerate(part.offset))
            along += piece.shape[part.axis]
            self._wrote(saved.nbytes)
            yield part.key, offset, tuple(piece.shape), begin, stream.size_bytes - begin
            del saved, piece
        assert along == part.shape[part.axis], (part.key, part.offset, along)


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Without torch's own checksum of entries, a third of SHA-256's cost: the manifest has digests, and no load looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and alone in its storage: `torch.save` writes all of a storage."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _shares(parts: Sequence[Part], file_bytes: int) -> list[list[Part]]:
    """Which parts go into each data file: a file is closed when it holds `file_bytes`."""
    shares: list[list[Part]] = []
    room = 0
    for part in parts:
        if room <= 0:
            shares.append([])
            room = file_bytes
        shares[-1].append(part)
        room -= part.num_bytes
    return shares


def _metadata(parts: Sequence[Part], entries: Mapping[str, Sequence[Entry]]) -> Metadata:
    """torch's metadata over all entries, in the order of the parts."""
    tensors = {part.key: TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(part.whole), []) for part in parts}
    same = {key: key for key in tensors}  # one string for each key, wherever its entries come from: a pickle shows which are one
    placed: dict[MetadataIndex, Any] = {}
    for name, (key, offset, shape, at, length) in ((name, entry) for name, inside in entries.items() for entry in inside):
        chunks = tensors[key].chunks
        placed[MetadataIndex(same[key], torch.Size(offset), len(chunks))] = _StorageInfo(name, at, length)
        chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
    return Metadata(state_dict_metadata=dict(tensors), storage_data=placed)


def write_metadata(files: HashingFileSystem, folder: Path, metadata: Metadata) -> None:
    """Write a checkpoint's `.metadata`."""
    with synced(files, folder / METADATA_FNAME) as stream:
        pickle.dump(metadata, stream)


def write_bytes(files: HashingFileSystem, path: Path, content: bytes) -> None:
    """Write a small file."""
    with synced(files, path) as stream:
        stream.write(content)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@contextlib.contextmanager
def synced(files: HashingFileSystem, path: Path) -> Iterator[Any]:
    """A new file, hashed as it is written, on the disk when the block ends."""
    with files.create_stream(path, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
