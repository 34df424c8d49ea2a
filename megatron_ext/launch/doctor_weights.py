"""The files that hold a Hugging Face model's weights: what their headers say of them, without reading a weight. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.config.base import Json
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_source import CONFIG
from megatron_ext.errors import DataError

MOST_HEADER_BYTES = 100_000_000  # what the safetensors library takes
TAKEN = ("BF16", "F16", "F32")
LFS_POINTER = b"version "  # a repository cloned without Git LFS has texts of three lines in place of its large files
SUFFIX = ".safetensors"
HEAD = "lm_head.weight"  # some files hold a tied one all the same
COMPUTED = "rotary_emb.inv_freq"  # old files hold RoPE's frequencies


def weight_problems(folder: Path, files: Mapping[str, tuple[str, ...]], model: ModelConfig) -> list[str]:
    """What is wrong with these files, which must be there, as headers tell it; `files` names the tensors that an index places in each.

    Pickles have no header, and are not looked at.
    """
    problems = []
    holder: dict[str, str] = {}
    found_numbers = 0
    for name in (name for name in files if name.endswith(SUFFIX)):
        try:
            header = {tensor: entry for tensor, entry in read_header(folder / name).items() if not tensor.endswith(COMPUTED)}
        except (DataError, OSError) as problem:
            problems.append(str(problem))
            continue
        problems += [f"{tensor} stands in {holder[tensor]} and in {name} of {folder}" for tensor in sorted(set(header) & set(holder))]
        problems += _contents(folder / name, header, tuple(tensor for tensor in files[name] if not tensor.endswith(COMPUTED)))
        holder |= dict.fromkeys(header, name)
        found_numbers += sum(
            math.prod(entry["shape"]) for tensor, entry in header.items() if not (tensor == HEAD and model.tied_embeddings)
        )
    if holder and not problems and found_numbers != (expected := _numbers(model)):
        problems.append(f"{folder}: its weights are {found_numbers:,} numbers, those of {CONFIG}'s model {expected:,}")
    return problems


def _numbers(model: ModelConfig) -> int:
    """Parameters without the padding of the vocabulary, which only our checkpoints have."""
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    return model.num_parameters - padding * (1 if model.tied_embeddings else 2)


def _contents(file: Path, header: Json, placed: tuple[str, ...]) -> list[str]:
    refused = sorted({str(entry["dtype"]) for entry in header.values()} - set(TAKEN))
    absent, unnamed = sorted(set(placed) - set(header)), sorted(set(header) - set(placed)) if placed else []
    return [
        *([f"{file}: holds {', '.join(refused)}, and only {', '.join(TAKEN)} are taken"] if refused else []),
        *([f"{file}: lacks {_some(absent)}, which its index places there"] if absent else []),
        *([f"{file}: holds {_some(unnamed)}, which its index does not place there"] if unnamed else []),
    ]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def read_header(file: Path) -> Json:
    """Tensor -> dtype, shape and place, of a safetensors file whose size is what they add up to; else `DataError`."""
    size_bytes = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == LFS_POINTER:
            raise DataError(f"{file}: a Git LFS pointer, not the file; run `git lfs pull` in its repository")
        length_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or length_bytes > min(MOST_HEADER_BYTES, size_bytes - 8):
            raise DataError(f"{file}: {size_bytes:,} bytes, cut short within its header, or no safetensors file")
        text = opened.read(length_bytes)
    try:
        header: Json = json.loads(text)
        header.pop("__metadata__", None)
        end_bytes = max((_end_bytes(entry) for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as cause:
        raise DataError(f"{file}: its header is not that of a safetensors file ({type(cause).__name__}: {cause})") from None
    need_bytes = 8 + length_bytes + end_bytes
    if size_bytes != need_bytes:
        raise DataError(f"{file}: {size_bytes:,} bytes, but its header speaks of {need_bytes:,}")
    return header


def _end_bytes(entry: Json) -> int:
    """Where a tensor ends, behind the header; `ValueError` where its place is not as large as its shape."""
    start, end = entry["data_offsets"]
    number, bits = math.prod(entry["shape"]), re.search(r"[0-9]+", entry["dtype"])
    if bits and (end - start) * 8 != number * int(bits[0]):
        raise ValueError(f"a tensor of {number:,} numbers in {entry['dtype']} has {end - start:,} bytes")
    return int(end)
