"""What Transformer Engine would unpickle: the `_extra_state` entries of a checkpoint, looked into before anything loads.

Megatron-Core saves them as sharded objects; what Transformer Engine 2 puts there is a tensor of bytes
that are a pickle, which its layers give to `pickle.loads`. We load none of them, but a checkpoint that
passes our guards is opened by others too. So the inner pickle is followed here with stand-ins for the
few names that a real one needs, and a checkpoint that asks for another is refused by that name.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_ext.checkpoint.safe_reading import first_line, weights_only
from megatron_ext.errors import CheckpointError, DamagedCheckpointError

EXTRA_STATE = "_extra_state"
# What Transformer Engine's own pickles are made of: tensors on the CPU, and a recipe. CustomRecipe is left out: it holds a function.
_NAMES = {
    "collections": {"OrderedDict"},
    "torch": {"float32", "float16", "bfloat16", "int64", "int32", "uint8"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {
        "Format", "_FormatHelper", "MMParams", "QParams", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling",
        "MXFP8BlockScaling", "NVFP4BlockScaling", "MXFP4QATMXFP8BlockScaling", "MXFP4QATFloat8BlockScaling",
    },
}  # fmt: skip
_ENUMERATION, _MEMBER = ("transformer_engine.common.recipe", "Format"), re.compile(r"[A-Z][A-Z0-9_]*")
_STORAGE = ("torch.storage", "_load_from_bytes")  # opens its argument as a pickle of its own, without a guard


def refuse_extra_state(folder: Path, metadata: Metadata) -> None:
    """Look into every extra state of a checkpoint; `CheckpointError` names the class that one must not ask for."""
    for index, info in (metadata.storage_data or {}).items():
        if EXTRA_STATE in index.fqn:
            _check(_entry(folder, info, index.fqn), f"{folder / info.relative_path}: entry '{index.fqn}'")


def _entry(folder: Path, info: _StorageInfo, name: str) -> Any:
    """A stored entry, opened by torch's weights-only allow-list: a tensor, or the list of a sharded object's parts."""
    path = folder / info.relative_path
    if info.transform_descriptors:
        raise CheckpointError(f"{path}: entry '{name}' is packed by {info.transform_descriptors}, which this program does not use")
    with path.open("rb") as file:
        file.seek(info.offset)
        content = file.read(info.length)
    if len(content) != info.length:
        raise DamagedCheckpointError(f"{path}: ends inside of entry '{name}'; it was cut short, use another checkpoint")
    return weights_only(io.BytesIO(content), f"{path}: entry '{name}'")


def _check(entry: Any, where: str) -> None:
    for part in entry if isinstance(entry, list) else [entry]:
        if isinstance(part, torch.Tensor) and part.numel():
            _follow(_bytes_of(part, where), where)
        elif isinstance(part, io.BytesIO):
            weights_only(io.BytesIO(part.getvalue()), where)  # Transformer Engine 1: plain values and tensors by torch.save


def _bytes_of(tensor: torch.Tensor, where: str) -> bytes:
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"{where}: is a tensor of layout {tensor.layout}, not of bytes; nothing was run")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _follow(content: bytes, where: str) -> None:
    """Follow a pickle with stand-ins."""
    try:
        _StandIns(io.BytesIO(content), where).load()
    except CheckpointError:
        raise
    except Exception as cause:  # noqa: BLE001 - a damaged pickle raises anything, MemoryError too
        raise CheckpointError(
            f"{where}: refused, nothing was run: not a pickle that can be followed: {first_line(cause)}; it was damaged or altered"
        ) from None


class _StandIns(pickle.Unpickler):
    """Builds nothing real: every name is one made for this occasion, or refused."""

    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self._where = where
        self._enumerations: list[Any] = []
        self._member = _member_of(self._enumerations, where)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _STORAGE:
            return _Storage(self._where)
        if (module, name) == ("builtins", "getattr"):
            return self._member
        if name in _NAMES.get(module, ()):
            stand_in = type(name, (_Inert,), {})  # a new one each time: a pickle can set attributes on what it is given
            self._enumerations += [stand_in] if (module, name) == _ENUMERATION else []
            return stand_in
        raise CheckpointError(
            f"{self._where}: refused: it asks for {module}.{name}, which no extra state needs; nothing was run. "
            f"Transformer Engine would run it: do not give this checkpoint to another program either"
        )


def _member_of(enumerations: list[Any], where: str) -> Callable[[Any, Any], _Inert]:
    """What stands for getattr: Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) writes a member of an enumeration so.

    A function, because a pickle can set attributes on what it is given, and can reach nothing in one.
    """

    def member(enumeration: Any, name: Any) -> _Inert:
        if any(enumeration is one for one in enumerations) and isinstance(name, str) and _MEMBER.fullmatch(name):
            return _Inert()
        raise CheckpointError(
            f"{where}: refused: it asks for builtins.getattr of {enumeration!r}, {name!r}, which no extra state needs; nothing was run. "
            f"Transformer Engine would run it: do not give this checkpoint to another program either"
        )

    return member


class _Inert(dict[Any, Any]):
    """Stands for a class, a function and what they return; a dict, because a pickle may set items on it."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Inert:
        del arguments, named
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take whatever the real one takes."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _Storage:
    """Stands for the function that opens a tensor's storage; its bytes are opened by the weights-only allow-list."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, content: Any) -> None:
        weights_only(io.BytesIO(content), self._where)

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError(f"{self._where}: refused: it would change how torch opens tensors; nothing was run")
