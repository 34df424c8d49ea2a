"""What a safetensors file's header says of it, without reading a weight. No torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from megatron_ext.config.base import Json
from megatron_ext.errors import DataError

MOST_HEADER_BYTES = 100_000_000  # what the safetensors library takes
LFS_POINTER = b"version "  # a repository cloned without Git LFS has texts of three lines in place of its large files
COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # old Llama files hold RoPE's frequencies, which every program computes itself
AGAIN = "download it again"


def read_header(file: Path) -> Json:
    """Tensor -> dtype, shape and place, of a safetensors file whose size is what they add up to; else `DataError`."""
    size_bytes = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == LFS_POINTER:
            raise DataError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull` in its repository")
        length_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or length_bytes > min(MOST_HEADER_BYTES, size_bytes - 8):
            raise DataError(f"{file}: not a whole safetensors file: it has {size_bytes:,} bytes, and ends within its header; {AGAIN}")
        text = opened.read(length_bytes)
    try:
        header: Json = json.loads(text)
        header.pop("__metadata__", None)
        end_bytes = max((_end_bytes(entry) for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as cause:
        raise DataError(f"{file}: not a whole safetensors file: its header is none ({type(cause).__name__}: {cause}); {AGAIN}") from None
    need_bytes = 8 + length_bytes + end_bytes
    if size_bytes != need_bytes:
        raise DataError(f"{file}: not a whole safetensors file: it has {size_bytes:,} bytes, its header speaks of {need_bytes:,}; {AGAIN}")
    return header


def _end_bytes(entry: Json) -> int:
    """Where a tensor ends, behind the header; `ValueError` where its place is not as large as its shape."""
    start, end = entry["data_offsets"]
    number, bits = math.prod(entry["shape"]), re.search(r"[0-9]+", entry["dtype"])
    if bits and (end - start) * 8 != number * int(bits[0]):
        raise ValueError(f"a tensor of {number:,} numbers in {entry['dtype']} has {end - start:,} bytes")
    return int(end)
