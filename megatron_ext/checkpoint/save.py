"""Writing a checkpoint: every rank writes and hashes its own bytes, rank 0 writes the manifest last.

torch's synchronous file writer does the writing, in this process: Megatron's own writer starts
helper processes for each save, which costs seconds and gains nothing for a synchronous one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.failures import first_failure
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.provenance import Manifest, file_sha256, write_manifest

Digests = dict[str, tuple[int, str]]


class _HashingStream:
    """Passes writes on and hashes them; everything else is the file's."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size_bytes += memoryview(data).nbytes
        try:
            return int(self._file.write(data))
        except OSError as refusal:
            self.refusal = refusal
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _HashingFileSystem(FileSystem):
    """A file system that remembers the digest of every file it wrote."""

    def __init__(self) -> None:
        self.digests: Digests = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if "w" not in mode:
                yield file
                return
            stream = _HashingStream(file)
            try:
                yield stream
            except RuntimeError as error:  # what torch.save makes of it: "unexpected pos 704 vs 598"
                raise stream.refusal or error from None
            self.digests[Path(path).name] = (stream.size_bytes, stream.sha256.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class HashingStrategy(SaveShardedStrategy):
    """Megatron's torch_dist format by torch's synchronous writer, with digests."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.digests: Digests = {}

    def can_handle_sharded_objects(self) -> bool:
        """Sharded objects become byte entries of the same files."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's part and, on rank 0, `.metadata`."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        writer = FileSystemWriter(checkpoint_dir, sync_files=True)
        writer.fs = _HashingFileSystem()
        planner = MCoreSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=False)
        torch_checkpoint.save(mcore_to_pyt_state_dict(renamed, False), storage_writer=writer, planner=planner)
        self.digests = writer.fs.digests


def save_checkpoint(
    state_dict: dict[str, Any],
    checkpoints: Path,
    iteration: int,
    attempt: int,
    manifest: Callable[[Digests], Manifest],
    may_publish: Callable[[], None] = lambda: None,
) -> Path:
    """Write `state_dict` aside on all ranks, then publish it from rank 0.

    `manifest` makes the manifest from the digests of all files; `may_publish` raises where this
    writer has lost the right to the run folder. Raises `CheckpointError` where the disk refuses.
    """
    aside = folders.aside_path(checkpoints, iteration, attempt)
    try:
        digests = _write(state_dict, aside)
        if dist.get_rank() == 0:
            write_manifest(aside, manifest(digests))
            _sync(aside)
            may_publish()
            folders.publish(checkpoints, aside, iteration)
            _sync(checkpoints)
        dist.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:  # torch's own writers turn an OSError into a RuntimeError
        cause = first_failure(error)
        if isinstance(cause, MegatronExtError):
            raise cause from None
        raise CheckpointError(
            f"{aside}: could not be written: {cause}; make room on its disk, if that is full, and start the stage again: "
            f"the last published checkpoint stands"
        ) from cause
    return folders.iteration_path(checkpoints, iteration)


def _write(state_dict: dict[str, Any], aside: Path) -> Digests:
    """Write all ranks' files aside, force them to the disk, and gather their digests."""
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    strategy = HashingStrategy()
    dist_checkpointing.save(state_dict, str(aside), sharded_strategy=strategy)
    gathered: list[Digests | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, strategy.digests)
    digests = {name: digest for part in gathered if part for name, digest in part.items()}
    if dist.get_rank() == 0:
        for path in sorted(aside.iterdir()):
            if path.name not in digests:  # Megatron's own small files: common.pt, metadata.json
                digests[path.name] = (path.stat().st_size, file_sha256(path))
                _sync(path)
    return digests


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
