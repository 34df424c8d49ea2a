"""Writing safetensors files tensor by tensor: what will stand where is known before the first number is.

    8 bytes          length of the header, little-endian
    header           JSON: name -> dtype, shape, where its bytes begin and end; spaces up to a multiple of 8
    the tensors      plain little-endian bytes, one behind the other

A file and each tensor in it are hashed while they are written, in threads of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.checkpoint.hashing import HashingFileSystem

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE_BYTES = 1 << 22  # converted, looked through, hashed and written at a time: a processor's cache holds it meanwhile
PIECES_AHEAD = 8  # of the hashing: bounds the memory of what was converted
WHOLE_NUMBERS = {2: (torch.int16, np.uint16, 1 << 15), 4: (torch.int32, np.uint32, 1 << 31)}  # bytes: signed, unsigned, sign's bit
METADATA = {"format": "pt"}  # without it transformers does not open a file


@dataclass(frozen=True)
class Entry:
    """A tensor of a file before its numbers are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its numbers."""
        return self.num_numbers * self.dtype.itemsize


@dataclass
class Written:
    """What a finished file holds: its digest, its tensors' digests, and how many numbers of which are NaN or infinite."""

    size_bytes: int = 0
    sha256: str = ""
    tensors: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)


def header(entries: Sequence[Entry]) -> bytes:
    """Length and header of a file that holds `entries` in this order."""
    values: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.size_bytes
        values[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_names(count: int) -> list[str]:
    """The names that transformers looks for."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_text(shards: dict[str, Sequence[Entry]]) -> str:
    """The index of several files as transformers writes it."""
    entries = [entry for shard in shards.values() for entry in shard]
    sizes = {"total_parameters": sum(e.num_numbers for e in entries), "total_size": sum(e.size_bytes for e in entries)}
    placed = {entry.name: name for name, shard in shards.items() for entry in shard}
    return json.dumps({"metadata": sizes, "weight_map": placed}, indent=2, sort_keys=True) + "\n"


class Stream:
    """Puts one tensor after another behind a header."""

    def __init__(self, file: Any, entries: Sequence[Entry], hasher: ThreadPoolExecutor) -> None:
        self._file, self._hasher, self.written = file, hasher, Written()
        self._left = iter(entries)
        file.write(header(entries))

    def add(self, tensor: torch.Tensor) -> int:
        """Write the next tensor in its entry's dtype; the bytes written. Nothing of the tensor is held afterwards."""
        entry = next(self._left)
        assert tuple(tensor.shape) == entry.shape, (entry, tuple(tensor.shape))
        sha256, nonfinite = hashlib.sha256(), 0
        for number, piece in enumerate(tensor.reshape(-1).split(PIECE_BYTES // tensor.element_size())):
            if number % PIECES_AHEAD == 0:
                self._wait()
            kept = piece.to(entry.dtype)
            nonfinite += count_nonfinite(kept)
            data = memoryview(kept.view(torch.uint8).numpy())
            self._hasher.submit(sha256.update, data)
            self._file.write(data)
        self._wait()
        self.written.tensors[entry.name] = sha256.hexdigest()
        if nonfinite:
            self.written.nonfinite[entry.name] = nonfinite
        return entry.size_bytes

    def _wait(self) -> None:
        """Until all that was written is hashed, by tensor and by file."""
        self._hasher.submit(lambda: None).result()
        self._file.wait()

    def end(self) -> None:
        """Force all of it to the disk."""
        assert next(self._left, None) is None, "a tensor of the file was not written"
        self._file.flush()
        os.fsync(self._file.fileno())


def count_nonfinite(piece: torch.Tensor) -> int:
    """How many numbers of a contiguous tensor are NaN or infinite.

    Almost always none, which one look at the largest bits tells: read as whole numbers, positive floats keep their order, with
    NaN above infinity; negative ones do so as unsigned. (torch's own test takes ten times as long, and its threads wait for each other.)
    """
    signed, unsigned, sign = WHOLE_NUMBERS[piece.element_size()]
    bits = piece.view(signed).numpy()
    infinity = int(torch.tensor(torch.inf, dtype=piece.dtype).view(signed))
    if bits.max(initial=0) < infinity and bits.view(unsigned).max(initial=0) < infinity + sign:
        return 0
    return int(piece.numel() - torch.isfinite(piece).sum())


@contextlib.contextmanager
def writing(path: Path, entries: Sequence[Entry]) -> Iterator[Stream]:
    """A new file for `entries`; tensors are added in their order, and the file is on the disk when the block ends.

    The stream's `written` is complete after the block. `OSError` names the file.
    """
    assert sys.byteorder == "little"
    files = HashingFileSystem()
    with ThreadPoolExecutor(1) as hasher, files.create_stream(path, "wb") as file:
        stream = Stream(file, entries, hasher)
        yield stream
        stream.end()
    stream.written.size_bytes, stream.written.sha256 = files.digests[path.name]
