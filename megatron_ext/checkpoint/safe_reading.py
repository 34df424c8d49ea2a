"""Opening a torch_dist checkpoint without running code from it.

Two places of the format are pickles that torch opens without a guard: `.metadata` and the byte
entries inside `.distcp` files (Megatron's sharded objects); a third, `common.pt`, has one that an
environment variable switches off. Here all go through allow-lists. A fourth, Transformer Engine's
extra state, is a pickle inside an entry: extra_state.py looks into it.
`install` puts our reader, planner and loader where Megatron-Core looks for its own, so nothing in
the process can load around them.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import FunctionType
from typing import Any

import megatron.core.dist_checkpointing.strategies.torch as megatron_torch
import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import is_plain_name

# Every class that torch's checkpoint metadata is made of, and no other.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "strided"},
    "pathlib": {"PosixPath", "Path"},
    "collections": {"OrderedDict"},
}


# What a pickle may give state to: things that this same pickle made. Given to a class, to a function or to an enumeration's
# member, state would stay in the process when the file has long been refused.
_WITH_STATE = (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    StorageMeta,
    _StorageInfo,
)


def _build(unpickler: Any) -> None:
    """The opcode BUILD: gives the object below the top of the stack the state on top of it."""
    given = unpickler.stack[-2]
    if type(given) not in _WITH_STATE:
        what = given.__qualname__ if isinstance(given, type | FunctionType) else f"a {type(given).__name__}"
        raise CheckpointError(
            f"{unpickler.path}: refused: it would change {what}, which no checkpoint metadata does; nothing was run. "
            f"The file was altered: do not open it with torch either"
        )
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


def _member(enumeration: Any, name: Any) -> Any:
    """What stands for getattr in a pickle: Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) writes a member of an enumeration so."""
    if enumeration is not _MEM_FORMAT_ENCODING or not isinstance(name, str) or name not in _MEM_FORMAT_ENCODING.__members__:
        raise CheckpointError(
            f"refused: it asks for builtins.getattr of {enumeration!r}, which no checkpoint metadata does; nothing was run. "
            f"The file was altered: do not open it with torch either"
        )
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle._Unpickler):
    """In Python, because the one in C lets nobody see what is given state; it takes about three times as long."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _METADATA_CLASSES.get(module, ()):
            raise CheckpointError(
                f"{self.path}: refused: it asks for {module}.{name}, which no checkpoint metadata needs; nothing was run. "
                f"The file was altered, or comes from a program that this one does not know: do not open it with torch either"
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """A checkpoint's `.metadata`, through the allow-list; `CheckpointError` names a refused class."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, not checkpoint metadata; the file was altered")
        for index, info in (metadata.storage_data or {}).items():
            if not is_plain_name(info.relative_path):
                raise CheckpointError(f"{path}: points to a file outside the checkpoint: {info.relative_path!r}; it was altered")
            if not isinstance(index.fqn, str) or min(info.offset, info.length) < 0:
                raise CheckpointError(f"{path}: entry {index.fqn!r} lies at {info.offset}, {info.length} bytes long; it was altered")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path}: no such file; the checkpoint is not whole, use another one") from None
    except CheckpointError:
        raise
    except Exception as cause:  # noqa: BLE001 - a damaged pickle raises anything, MemoryError too
        raise DamagedCheckpointError(f"{path}: not readable: {first_line(cause)}; the file is damaged, use another checkpoint") from None
    return metadata


def read_common(folder: Path) -> dict[str, Any]:
    """A checkpoint's `common.pt`, what of it is not sharded; `CheckpointError` names a refused class."""
    path = folder / COMMON_STATE_FNAME
    if not path.is_file():
        raise DamagedCheckpointError(f"{path}: no such file; the checkpoint is not whole, use another one")
    common: dict[str, Any] = weights_only(path, str(path))
    return common


def weights_only(source: Any, name: str) -> Any:
    """A file or stream of `torch.save`, by torch's allow-list of plain values and tensors; `CheckpointError` names what it refused."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as cause:  # noqa: BLE001 - a damaged file raises anything: IndexError, TypeError, AssertionError, MemoryError
        # torch's inner error says what it refused, the outer one how to run it all the same.
        raise CheckpointError(
            f"{name}: refused, nothing was run: {first_line(cause.__context__ or cause)}; it was damaged or altered"
        ) from None


def first_line(cause: BaseException) -> str:
    """The first line of an error's text; its name where it has none."""
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__


class SafeReader(FileSystemReader):
    """torch's file reader with a guarded `.metadata`, read once."""

    def __init__(self, path: str | Path, cache_metadata: bool = False) -> None:
        super().__init__(path)
        del cache_metadata
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The guarded metadata; torch's own method is never called."""
        del args, kwargs
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            if self._metadata.storage_meta is None:
                self._metadata.storage_meta = StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class SafeLoadPlanner(MCoreLoadPlanner):
    """Megatron's load planner with guarded byte entries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a byte entry by torch's weights-only allow-list."""
        name = read_item.dest_index.fqn
        entry = weights_only(value, f"checkpoint entry '{name}'")
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], entry)
        else:
            self.state_dict[name] = entry


def install() -> None:
    """Make every load of this process go through the guards."""
    megatron_torch._get_filesystem_reader = SafeReader
    megatron_torch.MCoreLoadPlanner = SafeLoadPlanner
    TorchCommonLoadStrategy.load_common = lambda self, checkpoint_dir: read_common(Path(checkpoint_dir))  # noqa: ARG005
