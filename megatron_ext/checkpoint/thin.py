"""Weights without optimizer state: a published checkpoint made several times smaller, in place.

No model is built and no tensor is opened: entries of `.distcp` files stand on their own, so those of the
weights are copied as they are and found again through a new `.metadata`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint.extra_state import EXTRA_STATE
from megatron_ext.checkpoint.hashing import HashingFileSystem
from megatron_ext.checkpoint.load import open_metadata
from megatron_ext.checkpoint.safe_reading import read_common
from megatron_ext.checkpoint.stream_writing import synced, write_bytes, write_metadata
from megatron_ext.checkpoint.swap import finish_swaps, swap_in
from megatron_ext.checkpoint.verify import verify
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, Manifest, file_sha256, read_manifest, write_manifest
from megatron_ext.runs import force_to_disk

COPY_BYTES = 1 << 24
DATA_SUFFIX = ".distcp"
_OPTIMIZER = re.compile(r"(chained_[0-9]+\.)?optimizer(\.|$)")


def thin(folder: Path, who_is_busy: Callable[[], str] = lambda: "") -> Manifest:
    """Remove the optimizer state of a published checkpoint; its new manifest, or the old one where there is none left.

    Every file is read and checked first: what is damaged must not be given digests that fit
    (`DamagedCheckpointError`). Nobody may be writing or reading the checkpoint: `who_is_busy` names
    whoever is, and is asked again when the copy is ready (`CheckpointError`, and the checkpoint stands).
    """
    finish_swaps(folder.parent)
    manifest = verify(folder)
    if manifest.optimizer_layout == "none":
        return manifest
    aside = folder.with_name(f".{folder.name}.thinning-{uuid.uuid4().hex}")  # two at once do not write the same files
    aside.mkdir()
    try:
        _write(folder, aside, manifest)
        if busy := who_is_busy():
            raise CheckpointError(f"{folder}: {busy}: stands as it was; run gc again when that has ended")
        swap_in(aside, folder)
    except OSError as error:
        raise CheckpointError(f"{aside}: could not be written: {error}; make room on its disk, if that is full: {folder} stands") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return read_manifest(folder)


def _write(folder: Path, aside: Path, manifest: Manifest) -> None:
    """Write the thin checkpoint aside, all of it on the disk, its manifest last."""
    metadata, files = open_metadata(folder), HashingFileSystem()
    _write_metadata(files, aside, metadata, _copy_weights(files, folder, aside, metadata))
    common = {key: value for key, value in read_common(folder).items() if not _OPTIMIZER.match(key)}
    with synced(files, aside / COMMON_STATE_FNAME) as stream:
        torch.save(common, stream)
    for name in manifest.files:  # what else lies there: its format, the files of a tokenizer
        if name not in files.digests and not name.endswith(DATA_SUFFIX):
            write_bytes(files, aside / name, (folder / name).read_bytes())
    was = file_sha256(folder / MANIFEST)
    write_manifest(aside, dataclasses.replace(manifest, optimizer_layout="none", files=files.digests, thinned_from=was))
    force_to_disk(aside)


def thinnable_bytes(folder: Path) -> int:
    """How many bytes of a checkpoint are optimizer state."""
    entries = (open_metadata(folder).storage_data or {}).items()
    return sum(info.length for index, info in entries if not is_weight(index.fqn))


def is_weight(name: str) -> bool:
    """Whether a name in a checkpoint is a weight's: not the optimizer's, and no layer's extra state."""
    return not _OPTIMIZER.match(name) and EXTRA_STATE not in name


def _copy_weights(files: HashingFileSystem, folder: Path, aside: Path, metadata: Metadata) -> dict[MetadataIndex, Any]:
    """Copy the bytes of all weights; where each of them lies now."""
    by_file: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, info in (metadata.storage_data or {}).items():
        if is_weight(index.fqn):
            by_file.setdefault(info.relative_path, []).append((index, info))
    if not by_file:
        raise CheckpointError(f"{folder}: holds no weights, only optimizer state; it was not written by a training stage")
    placed = {}
    for name, entries in by_file.items():
        with (folder / name).open("rb") as source, synced(files, aside / name) as target:
            end = 0
            for index, info in sorted(entries, key=lambda entry: int(entry[1].offset)):
                _copy(source, target, info.offset, info.length)
                placed[index] = dataclasses.replace(info, offset=end)
                end += info.length
    return placed


def _copy(source: BinaryIO, target: Any, offset_bytes: int, length_bytes: int) -> None:
    source.seek(offset_bytes)
    while length_bytes:
        data = source.read(min(COPY_BYTES, length_bytes))
        if not data:
            raise CheckpointError(f"{source.name}: ends inside of an entry that .metadata names; it was altered")
        target.wait()
        target.write(data)
        length_bytes -= len(data)


def _write_metadata(files: HashingFileSystem, aside: Path, metadata: Metadata, placed: dict[MetadataIndex, Any]) -> None:
    kept = {name: entry for name, entry in metadata.state_dict_metadata.items() if is_weight(name)}
    write_metadata(files, aside, dataclasses.replace(metadata, state_dict_metadata=kept, storage_data=placed))
