"""One rank's part of a checkpoint: planned with the other ranks, written alone.

Planning takes part in collectives and so belongs to the training thread. What it returns holds all
that writing needs, so that `Planned.write` may run in another thread while training goes on. The
format is Megatron's torch_dist; torch's file writer writes it, because Megatron's own starts helper
processes for each save, which costs seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_ext.checkpoint.hashing import Digests, HashingFileSystem


@dataclass(frozen=True)
class Written:
    """What a rank wrote: digests of its files, and where in them each entry lies."""

    digests: Digests
    results: list[WriteResult]

    def to_json(self) -> str:
        """As text, for the rank that finishes the checkpoint."""
        rows = [
            [r.index.fqn, None if r.index.offset is None else list(r.index.offset), r.index.index, r.size_in_bytes,
             r.storage_data.relative_path, r.storage_data.offset, r.storage_data.length]
            for r in self.results
        ]  # fmt: skip
        return json.dumps({"digests": self.digests, "results": rows})

    @classmethod
    def from_json(cls, text: str) -> Written:
        """From another rank's text."""
        values = json.loads(text)
        results = [
            WriteResult(
                MetadataIndex(name, None if offset is None else torch.Size(offset), index), size_bytes, _StorageInfo(file, at, length)
            )
            for name, offset, index, size_bytes, file, at, length in values["results"]
        ]
        return cls({name: (size_bytes, sha256) for name, (size_bytes, sha256) in values["digests"].items()}, results)


Buffers = dict[MetadataIndex, torch.Tensor]  # memory of earlier copies, to be used again: fresh memory is several times slower


class _Planner(MCoreSavePlanner):
    """Megatron's planner, which holds on to what it gives out, and can copy it ahead of the writing."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, dedup_save_to_lowest_rank=False)
        self._held: dict[MetadataIndex, Any] = {}

    def copy_data(self, plan: SavePlan, buffers: Buffers) -> None:
        """Copy all that will be written into `buffers`; what trains on may then change."""
        for item in plan.items:
            data = super().resolve_data(item)
            self._held[item.index] = _copied(data, buffers.get(item.index)) if isinstance(data, torch.Tensor) else data
        buffers.clear()
        buffers.update({index: data for index, data in self._held.items() if isinstance(data, torch.Tensor)})

    def resolve_data(self, write_item: WriteItem) -> Any:
        """A write item's data: its copy, or the live tensor; kept as it is until `release`, for the hashing."""
        index = write_item.index
        if index not in self._held:
            data = super().resolve_data(write_item)
            self._held[index] = _compact(data) if isinstance(data, torch.Tensor) else data
        return self._held[index]

    def release(self) -> None:
        """Let go of all that was given out."""
        self._held.clear()


def _copied(data: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
        buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return buffer.copy_(data.detach())


def _compact(data: torch.Tensor) -> torch.Tensor:
    """On the CPU and alone in its storage: torch's writer then takes it as it is, and makes no copy that nobody holds."""
    data = data.detach().cpu()
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


@dataclass
class Planned:
    """This rank's part of a checkpoint that is about to be written into `aside`."""

    aside: Path
    planner: _Planner
    plan: SavePlan
    common: dict[str, Any]
    metadata: Metadata | None  # on rank 0

    def copy(self, buffers: Buffers) -> None:
        """Copy all of this rank's part into `buffers` (and what is not sharded); what trains on may then change."""
        self.planner.copy_data(self.plan, buffers)
        self.common = copy.deepcopy(self.common)

    def write(self) -> Written:
        """Write this rank's files (on rank 0 also what is not sharded) and force them to the disk."""
        writer = _HashingWriter(self.aside)
        if self.metadata is not None:
            _write_synced(writer.fs, self.aside / COMMON_STATE_FNAME, lambda stream: torch.save(self.common, stream))
            config = json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1))).encode()
            _write_synced(writer.fs, self.aside / CONFIG_FNAME, lambda stream: stream.write(config))
        results: list[WriteResult] = writer.write_data(self.plan, self.planner).value()
        self.planner.release()
        return Written(writer.fs.digests, results)

    def finish(self, ranks: list[Written]) -> Digests:
        """On rank 0, when all ranks have written: the metadata over all parts, and all files' digests."""
        assert self.metadata is not None
        writer = _HashingWriter(self.aside)
        writer.finish(self.metadata, [one.results for one in ranks])
        return {name: digest for digests in (*(one.digests for one in ranks), writer.fs.digests) for name, digest in digests.items()}


def plan_write(state_dict: dict[str, Any], aside: Path) -> Planned:
    """Plan a checkpoint with all ranks (collective): who writes what, checked for gaps and overlaps; rank 0 makes `aside`.

    The state must not change before it is written, or copied.
    """
    sharded, common = save_preprocess(state_dict, True)
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    tensors = mcore_to_pyt_state_dict(renamed, False)
    planner = _Planner()
    is_first = dist.get_rank() == 0
    made: list[Metadata] = []

    def local() -> SavePlan:  # what is raised here, torch tells to every rank
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        planner.set_up_planner(tensors, _HashingWriter(aside).storage_meta(), is_first)
        return planner.create_local_plan()

    def whole(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = planner.create_global_plan(plans)
        made.append(metadata)
        return _HashingWriter(aside).prepare_global_plan(plans)

    plan = planner.finish_plan(_DistWrapper(None, True, 0).reduce_scatter("plan", local, whole))
    return Planned(aside, planner, plan, common, made[0] if made else None)


class _HashingWriter(FileSystemWriter):
    """torch's file writer over a file system that hashes."""

    fs: HashingFileSystem

    def __init__(self, folder: Path) -> None:
        # Nothing is read ahead: all tensors are in memory, and torch's way of reading ahead asks the thread's GPU, which is the first.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = HashingFileSystem()


def _write_synced(file_system: HashingFileSystem, path: Path, write: Any) -> None:
    with file_system.create_stream(path, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
