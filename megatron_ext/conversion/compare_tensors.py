"""Every tensor that a checkpoint would export against what a Hugging Face folder holds, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_ext.checkpoint.stream_reading import CheckpointReader
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.source import Source
from megatron_ext.model.weights import Row, table
from megatron_ext.progress import progress

PIECE_NUMBERS = 1 << 22  # subtracted at a time: bounds the memory that a comparison adds
SHORT = 12  # characters of a digest
HOLDS_ALL = torch.float32  # every number of every dtype that is taken
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides."""

    name: str
    largest: float  # difference of two numbers; infinite where the shapes differ, or NaN stands on one side alone
    text: str
    same_shape: bool = True


@dataclass
class Compared:
    """What a comparison of all tensors found."""

    equal: int = 0  # bit for bit
    converted: int = 0  # the same numbers in another dtype
    rounded: int = 0  # the same numbers once the checkpoint's are rounded to the folder's lower dtype
    dtypes: set[torch.dtype] = field(default_factory=set)  # of the folder's tensors
    different: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the folder
    unknown: list[str] = field(default_factory=list)  # in the folder, and in no such model
    sha256: str = ""  # of the names and the folder's bytes, in the order in which the model computes

    @property
    def complete(self) -> bool:
        """Whether both sides hold the same names in the same shapes, so that both can be run."""
        return not self.missing and not self.unknown and all(one.same_shape for one in self.different)


def compare_tensors(reader: CheckpointReader, model: ModelConfig, source: Source) -> Compared:
    """Compare all tensors of a checkpoint, which is of `model`, with a folder's.

    Dtypes may differ, as those of an FP32 training and its BF16 export do: the numbers must be equal in the lower one.
    """
    rows, found, whole = table(model), Compared(), hashlib.sha256()
    known = {name for row in rows for name in row.names}
    with progress("Compare", total=len(known), unit="tensors") as bar:
        for name, tensor in exported(reader, rows):
            for held in [name, *_copies(name, model, source)]:
                if held in source.names:
                    other = source.read(held)
                    digest = sha256(other)
                    whole.update(f"{held}\t{digest}\n".encode())
                    _compare(found, held, tensor, other, digest)
                else:
                    found.missing.append(held)
                known.add(held)
            bar.update(1)
    found.unknown = sorted(set(source.names) - known)
    found.sha256 = whole.hexdigest()
    return found


def _copies(name: str, model: ModelConfig, source: Source) -> list[str]:
    """Some folders with tied embeddings hold them a second time."""
    return [HEAD] if name == EMBEDDING and model.tied_embeddings and HEAD in source.names else []


def exported(reader: CheckpointReader, rows: tuple[Row, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint would export, as stored, under their Hugging Face names."""
    for row in rows:
        tensor = reader.read(row.key, row.layer)
        yield from zip(row.names, row.to_hugging_face(tensor), strict=True)


def _compare(found: Compared, name: str, ours: torch.Tensor, theirs: torch.Tensor, digest: str) -> None:
    if ours.shape != theirs.shape:
        text = f"shape {tuple(ours.shape)} in the checkpoint, {tuple(theirs.shape)} in the folder"
        found.different.append(Difference(name, math.inf, text, same_shape=False))
        return
    found.dtypes.add(theirs.dtype)
    own_digest = sha256(ours)
    if ours.dtype == theirs.dtype and own_digest == digest:
        found.equal += 1
        return
    if ours.dtype != theirs.dtype:
        if sha256(ours.to(HOLDS_ALL)) == sha256(theirs.to(HOLDS_ALL)):
            found.converted += 1
            return
        if ours.dtype == HOLDS_ALL and sha256(ours.to(theirs.dtype)) == digest:
            found.rounded += 1
            return
    largest, index = largest_difference(ours, theirs)
    place = ", ".join(str(i) for i in index)
    text = f"{_number(ours, index)} and {_number(theirs, index)} at [{place}], sha256 {own_digest[:SHORT]} and {digest[:SHORT]}"
    found.different.append(Difference(name, largest, text))


def sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference of two tensors of one shape, and where; NaN on one side alone is infinitely far."""
    largest, place = -1.0, 0
    flat, flat_other = one.reshape(-1), other.reshape(-1)
    for start in range(0, flat.numel(), PIECE_NUMBERS):
        a, b = (side[start : start + PIECE_NUMBERS].to(torch.float64) for side in (flat, flat_other))
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
        at = int(apart.argmax())
        if float(apart[at]) > largest:
            largest, place = float(apart[at]), start + at
    index = []
    for size in reversed(one.shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return largest, tuple(reversed(index))


def _number(tensor: torch.Tensor, index: tuple[int, ...]) -> str:
    return f"{float(tensor[index]):.6g}"
