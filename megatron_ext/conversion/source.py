"""A Hugging Face folder's weights, opened and checked before anything is made of them.

Tensors come over the mapped files: nothing is copied, and the system can take back what was looked at.
Pickles (`.bin`) are refused unless asked for; torch's weights-only reader then maps them too. A survey reads
every byte once: digests of the files, and the numbers that are not finite.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.checkpoint.hashing import Digests
from megatron_ext.config import model_source
from megatron_ext.config.base import Json
from megatron_ext.config.hugging_face import parse_config
from megatron_ext.config.model_source import CONFIG
from megatron_ext.config.safetensors_header import AGAIN, COMPUTED, read_header
from megatron_ext.conversion.safetensors_writing import count_nonfinite
from megatron_ext.errors import DataError
from megatron_ext.provenance import is_plain_name
from megatron_ext.runs import read_json

SAFETENSORS, SAFETENSORS_INDEX = model_source.SAFETENSORS
PICKLE, PICKLE_INDEX = model_source.PICKLES
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
READ_BYTES, LOOK_NUMBERS = 1 << 20, 1 << 24  # at a time


@dataclass(frozen=True)
class _Tensor:
    """One tensor before it is read, and how to read it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names them
    read: Callable[[], torch.Tensor]


Files = dict[str, dict[str, _Tensor]]  # file name -> tensor name -> tensor


class Source:
    """The weights of a Hugging Face folder, by name."""

    def __init__(self, folder: Path, config: Json, index: Path | None, files: Files) -> None:
        self.folder, self.config = folder, config
        self.files = (folder / CONFIG, *([index] if index else []), *(folder / name for name in files))  # all that it consists of
        self._files = files
        self._tensors = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._tensors)

    def names_in(self, file: Path) -> tuple[str, ...]:
        """Names of the tensors of one of `files`, in its order."""
        return tuple(self._files.get(file.name, ()))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; reads nothing."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype; reads nothing."""
        return DTYPES[self._tensors[name].dtype]

    def read(self, name: str) -> torch.Tensor:
        """A tensor over the mapped file, contiguous; not to be written to."""
        return self._tensors[name].read()


def open_source(folder: Path, allow_pickle: bool = False) -> Source:
    """Open a folder's config and weights; `DataError` lists everything that is wrong with its files."""
    try:
        return _open(folder, allow_pickle)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read: {error.strerror}; mend its permissions, or its disk") from None


def _open(folder: Path, allow_pickle: bool) -> Source:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one with {CONFIG} and {SAFETENSORS}, or its parts and their index")
    if (folder / ".metadata").is_file():
        raise DataError(f"{folder}: is a Megatron checkpoint, and a Hugging Face folder is wanted here; are the two names swapped?")
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise DataError(f"{config_path}: no such file, and without it a folder's weights mean nothing; {AGAIN}")
    config = parse_config(config_path.read_bytes(), str(config_path))
    single, index = _found(folder, allow_pickle)
    placed = _read_index(index) if index else {}
    files, problems = _open_files(folder, sorted(set(placed.values())) if index else [single], index)
    if index:
        problems += _against_index(index, placed, files)
    problems += _held_twice(folder, files)
    if problems:
        raise DataError(f"{folder}: cannot be converted:\n  " + "\n  ".join(problems))
    return Source(folder, config, index, files)


def _found(folder: Path, allow_pickle: bool) -> tuple[str, Path | None]:
    """The name of a single file of weights, or the index of several; safetensors before pickles."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        is_single, is_index = (folder / single).is_file(), (folder / index).is_file()
        if not (is_single or is_index):
            continue
        if single == PICKLE and not allow_pickle:
            raise DataError(
                f"{folder / (single if is_single else index)}: weights as pickles, which can run code when they are opened; "
                f"use a safetensors version of the model, or let a conversion read them, as plain tensors alone: --allow-pickle, or "
                f"allow_pickle=true in a recipe's stage"
            )
        if is_single and is_index and single not in _read_index(folder / index).values():
            raise DataError(f"{folder}: holds {single} and {index}, which does not name it: two sets of weights; delete one of them")
        return single, folder / index if is_index else None
    parts = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    there = f"it has {', '.join(parts[:4])}, but not the index that says what is in them" if parts else "it has no weights"
    raise DataError(f"{folder}: {there}; looked for {SAFETENSORS}, {SAFETENSORS_INDEX}, {PICKLE}, {PICKLE_INDEX}; {AGAIN}")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, without what is computed; `DataError` where it is none, or leads out of the folder."""
    values = read_json(index, "the index of several files of weights", DataError)
    placed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise DataError(f"{index}: has no weight_map of tensor names to file names; {AGAIN}")
    outside = sorted({file for file in placed.values() if not is_plain_name(file)})
    if outside:
        raise DataError(f"{index}: names files outside of its folder: {', '.join(map(repr, outside))}; it was altered, {AGAIN}")
    return {name: file for name, file in placed.items() if not COMPUTED.search(name)}


def _open_files(folder: Path, names: list[str], index: Path | None) -> tuple[Files, list[str]]:
    """The tensors of each file, and what is wrong with files."""
    files: Files = {}
    problems = []
    for name in names:
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing, though {index.name if index else folder} names it; download it")
            continue
        try:
            tensors = _pickle(path) if path.suffix == ".bin" else _safetensors(path)
        except DataError as problem:
            problems.append(str(problem))
            continue
        files[name] = {key: tensor for key, tensor in tensors.items() if not COMPUTED.search(key)}
        problems += _other_dtypes(path, files[name])
    return files, problems


def _safetensors(path: Path) -> dict[str, _Tensor]:
    read_header(path)
    try:
        handle = safe_open(path, framework="pt")  # stays open, and the file mapped, as long as the source is used
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as cause:
        raise DataError(f"{path}: not a whole safetensors file ({cause}); {AGAIN}") from None

    def reader(name: str) -> Callable[[], torch.Tensor]:
        return lambda: handle.get_tensor(name)

    return {name: _Tensor(tuple(part.get_shape()), part.get_dtype(), reader(name)) for name, part in slices.items()}


def _pickle(path: Path) -> dict[str, _Tensor]:
    try:
        values: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as cause:  # noqa: BLE001 - a damaged file raises anything
        reason = next(iter(str(cause.__context__ or cause).splitlines()), type(cause).__name__)
        raise DataError(f"{path}: not read, and nothing of it was run: {reason}; use a safetensors version of the model") from None
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path}: holds a {type(values).__name__}, not tensors by name; use a safetensors version of the model")
    other = [str(name) for name, value in values.items() if not _is_plain(name, value)]
    if other:
        raise DataError(f"{path}: holds what is no plain tensor: {', '.join(other)}; use a safetensors version of the model")
    names = {dtype: name for name, dtype in DTYPES.items()}

    def tensor(value: torch.Tensor) -> _Tensor:
        return _Tensor(tuple(value.shape), names.get(value.dtype, str(value.dtype).removeprefix("torch.")), value.detach().contiguous)

    return {name: tensor(value) for name, value in values.items()}


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


def _other_dtypes(path: Path, tensors: Mapping[str, _Tensor]) -> Iterator[str]:
    other: dict[str, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            other[tensor.dtype].append(name)
    for dtype, names in other.items():
        yield (
            f"{path}: numbers as {dtype}, where {', '.join(DTYPES)} are taken: {', '.join(names)}; "
            f"save the model in one of these with the program that reads it"
        )


def _against_index(index: Path, placed: Mapping[str, str], files: Files) -> Iterator[str]:
    """What the index says of the files that could be opened and is not so."""
    for file, tensors in files.items():
        absent = [name for name, where in placed.items() if where == file and name not in tensors]
        unnamed = [name for name in tensors if placed.get(name) != file]
        if absent:
            yield f"{index}: says that {file} holds {', '.join(absent)}, and it does not; {AGAIN}"
        if unnamed:
            yield f"{index}: does not say that {file} holds {', '.join(unnamed)}; {AGAIN}"


def _held_twice(folder: Path, files: Files) -> Iterator[str]:
    holders: dict[str, list[str]] = defaultdict(list)
    for file, tensors in files.items():
        for name in tensors:
            holders[name].append(file)
    several: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, held_by in holders.items():
        if len(held_by) > 1:
            several[tuple(held_by)].append(name)
    for holding, names in several.items():
        yield f"{folder}: {' and '.join(holding)} hold the same tensors: {', '.join(names)}; {AGAIN}, one of them is of another model"


@dataclass(frozen=True)
class Survey:
    """What reading all of a source found."""

    files: Digests
    nonfinite: dict[str, int]  # tensor name -> how many of its numbers are NaN or infinite


class Stopped(Exception):
    """A survey that nobody waits for any more."""


def survey(source: Source, stop: threading.Event) -> Survey:
    """Read all of a source, file by file: a file's tensors right behind its bytes, while these are in memory.

    Raises `Stopped` soon after `stop` is set, `DataError` where a disk does not give a file's bytes.
    """
    files: Digests = {}
    nonfinite: dict[str, int] = {}
    for path in source.files:
        try:
            files[path.name] = _digest(path, stop)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; {AGAIN}, or mend its disk") from None
        for name in source.names_in(path):
            _check(stop)
            if count := sum(count_nonfinite(piece) for piece in source.read(name).reshape(-1).split(LOOK_NUMBERS)):
                nonfinite[name] = count
    return Survey(files, nonfinite)


def _digest(path: Path, stop: threading.Event) -> tuple[int, str]:
    sha256, size_bytes, buffer = hashlib.sha256(), 0, memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            _check(stop)
            sha256.update(buffer[:count])
            size_bytes += count
    return size_bytes, sha256.hexdigest()


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped
