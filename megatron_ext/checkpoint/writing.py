"""One rank's part of a checkpoint: planned with the other ranks, written alone.

Planning takes part in collectives and so belongs to the training thread. What it returns holds all
that writing needs, so that `Planned.write` may run in another thread while training goes on. The
format is Megatron's torch_dist; torch's file writer writes it, because Megatron's own starts helper
processes for each save, which costs seconds.
"""

from __future__ import annotations

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


def _index(name: str, offset: list[int] | None, index: int | None) -> MetadataIndex:
    return MetadataIndex(name, None if offset is None else torch.Size(offset), index)


class _Planner(MCoreSavePlanner):
    """Megatron's planner, whose tensors can be copied ahead of the writing."""

    copies: dict[MetadataIndex, Any] | None = None

    def copy_data(self, plan: SavePlan) -> None:
        """Copy all that will be written into this process's memory; what trains on may then change."""
        self.copies = {item.index: _copied(super(_Planner, self).resolve_data(item)) for item in plan.items}

    def resolve_data(self, write_item: WriteItem) -> Any:
        """A write item's data: its copy, or the live tensor."""
        return super().resolve_data(write_item) if self.copies is None else self.copies[write_item.index]


def _copied(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data


@dataclass
class Planned:
    """This rank's part of a checkpoint that is about to be written into `aside`."""

    aside: Path
    planner: _Planner
    plan: SavePlan
    common: dict[str, Any]
    metadata: Metadata | None  # on rank 0

    def write(self) -> Written:
        """Write this rank's files (on rank 0 also what is not sharded) and force them to the disk."""
        writer = _file_writer(self.aside)
        if self.metadata is not None:
            _write_synced(writer.fs, self.aside / COMMON_STATE_FNAME, lambda stream: torch.save(self.common, stream))
            config = json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1))).encode()
            _write_synced(writer.fs, self.aside / CONFIG_FNAME, lambda stream: stream.write(config))
        results: list[WriteResult] = writer.write_data(self.plan, self.planner).value()
        return Written(writer.fs.digests, results)

    def finish(self, ranks: list[Written]) -> Digests:
        """On rank 0, when all ranks have written: the metadata over all parts, and all files' digests."""
        assert self.metadata is not None
        writer = _file_writer(self.aside)
        writer.finish(self.metadata, [one.results for one in ranks])
        return {name: digest for digests in (*(one.digests for one in ranks), writer.fs.digests) for name, digest in digests.items()}


def plan_write(state_dict: dict[str, Any], aside: Path, copy: bool) -> Planned:
    """Plan a checkpoint with all ranks (collective): who writes what, checked for gaps and overlaps; rank 0 makes `aside`.

    With `copy`, all of this rank's part is copied to memory first; else it must not change before it is written.
    """
    sharded, common = save_preprocess(state_dict, True)
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    tensors = mcore_to_pyt_state_dict(renamed, False)
    planner = _Planner(flatten_state_dict=False, dedup_save_to_lowest_rank=False)
    is_first = dist.get_rank() == 0
    made: list[Metadata] = []

    def local() -> SavePlan:  # what is raised here, torch tells to every rank
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        planner.set_up_planner(tensors, _file_writer(aside).storage_meta(), is_first)
        return planner.create_local_plan()

    def whole(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = planner.create_global_plan(plans)
        made.append(metadata)
        return _file_writer(aside).prepare_global_plan(plans)

    plan = planner.finish_plan(_DistWrapper(None, True, 0).reduce_scatter("plan", local, whole))
    if copy:
        planner.copy_data(plan)
    return Planned(aside, planner, plan, common, made[0] if made else None)


def _file_writer(aside: Path) -> FileSystemWriter:
    writer = FileSystemWriter(aside, sync_files=True)
    writer.fs = HashingFileSystem()
    return writer


def _write_synced(file_system: HashingFileSystem, path: Path, write: Any) -> None:
    with file_system.create_stream(path, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
