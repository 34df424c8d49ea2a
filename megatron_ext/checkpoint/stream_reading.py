"""Reading a checkpoint's weights one tensor at a time, whatever layout it was saved under: no model, no process group.

A tensor of a torch_dist checkpoint lies there in chunks, one for each tensor-parallel rank and layer, in the
files of the ranks that wrote them. `.metadata` says where; each chunk is read for itself and put into its place.
Optimizer state is never read.

Shapes: a stacked tensor has the layers as its first axis; one layer of it has the other axes.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint.load import open_metadata
from megatron_ext.checkpoint.safe_reading import first_line
from megatron_ext.checkpoint.thin import is_weight
from megatron_ext.errors import CheckpointError, DamagedCheckpointError

Shape = tuple[int, ...]
OTHER = "use another checkpoint of the run"
ARCHIVE = b"PK\x03\x04"  # what torch.save writes begins with


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and how large it is along every axis."""

    start: Shape
    size: Shape

    @property
    def end(self) -> Shape:
        """Where it ends."""
        return tuple(start + size for start, size in zip(self.start, self.size, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as an index."""
        return tuple(slice(start, end) for start, end in zip(self.start, self.end, strict=True))


class CheckpointReader:
    """The weights of a published checkpoint, to be read by their Megatron names.

    Opening goes through every guard of a load: `DamagedCheckpointError` names files that are missing or cut,
    `CheckpointError` what was refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = open_metadata(folder)
        self._placed: dict[MetadataIndex, Any] = metadata.storage_data or {}
        named = {name: entry for name, entry in metadata.state_dict_metadata.items() if is_weight(name)}
        self._tensors = {name: entry for name, entry in named.items() if isinstance(entry, TensorStorageMetadata)}
        self.others = tuple(sorted(set(named) - set(self._tensors)))  # what is no tensor: no model of ours has any

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all weights."""
        return tuple(self._tensors)

    def shape(self, key: str) -> Shape:
        """Shape of a whole tensor, the axis of layers included."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Its numbers' type, as stored."""
        dtype: torch.dtype = self._tensors[key].properties.dtype
        return dtype

    def gap(self, key: str) -> str:
        """What of a tensor no chunk holds, or more than one; '' where every place is held once. Reads nothing."""
        boxes, shape = self._boxes(key), self.shape(key)
        return _outside(boxes, shape) or _uneven(boxes, shape)

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A tensor, or one layer of a stacked one, as stored; `DamagedCheckpointError` where a part is missing, cut or of another size.

        Where one chunk holds it all, that chunk is returned; else the memory of one more chunk is needed.
        """
        shape = self.shape(key)
        window = Box((0,) * len(shape), shape) if layer is None else Box((layer, *(0 for _ in shape[1:])), (1, *shape[1:]))
        wrong = _outside(self._boxes(key), shape)
        boxes = [] if wrong else [box for box in self._boxes(key) if all(a < d and c < b for a, b, c, d in _sides(box, window))]
        inside = [_cut(box, window) for box in boxes]
        if wrong := wrong or _uneven(inside, window.size):
            raise DamagedCheckpointError(f"{self.folder / '.metadata'}: {key}: {wrong}; it was damaged or altered, {OTHER}")
        if len(boxes) == 1 and boxes[0] == window:
            whole = self._chunk(key, boxes[0])
        else:
            whole = torch.empty(window.size, dtype=self.dtype(key))
            for box, place in zip(boxes, inside, strict=True):
                whole[place.slices] = self._chunk(key, box)[_cut(window, box).slices]
        return whole if layer is None else whole[0]

    def _boxes(self, key: str) -> list[Box]:
        return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._tensors[key].chunks]

    def _chunk(self, key: str, box: Box) -> torch.Tensor:
        """One chunk as its rank wrote it, over the mapped bytes of its file."""
        info = self._placed.get(MetadataIndex(key, torch.Size(box.start)))
        if info is None:
            raise DamagedCheckpointError(f"{self.folder / '.metadata'}: does not say where {key} at {box.start} lies; {OTHER}")
        path, name = self.folder / info.relative_path, f"{self.folder / info.relative_path}: {key} at {box.start}"
        try:
            tensor = _map_saved(path, info.offset, info.length)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{name}: refused, nothing was run: {first_line(error.__context__ or error)}; it was damaged or altered"
            ) from None
        except Exception as error:  # noqa: BLE001 - a damaged archive raises anything: RuntimeError, KeyError, MemoryError
            raise DamagedCheckpointError(f"{name}: cannot be read: {first_line(error)}; {OTHER}") from None
        wanted, found = (box.size, self.dtype(key)), (tuple(tensor.shape), tensor.dtype)
        if found != wanted:
            raise DamagedCheckpointError(f"{name}: holds {found}, .metadata says {wanted}; it was damaged or altered, {OTHER}")
        return tensor


def _map_saved(path: Path, offset_bytes: int, length_bytes: int) -> torch.Tensor:
    """A tensor that `torch.save` put somewhere into a file. Nothing is copied: it lies over a private mapping of the file.

    What says how the bytes are to be seen passes torch's weights-only loading, of exactly that part of the file.
    """
    with path.open("rb") as file:
        end_bytes = offset_bytes + length_bytes
        if end_bytes > os.fstat(file.fileno()).st_size:
            raise EOFError("the file ends inside of it")
        view: Any = _create_file_view(file, offset_bytes, length_bytes)
        if view.read(len(ARCHIVE)) != ARCHIVE:  # torch would take it for a plain pickle
            raise TypeError("no archive begins there")
        view.seek(0)
        seen = torch.load(view, map_location="meta", weights_only=True)
        if not isinstance(seen, torch.Tensor) or not seen.is_contiguous() or seen.storage_offset():
            raise TypeError(f"a {type(seen).__name__}, not a plain tensor")
        at_bytes = offset_bytes + int(seen.untyped_storage()._checkpoint_offset)  # type: ignore[arg-type]
        if at_bytes + seen.nbytes > end_bytes:
            raise EOFError("it ends inside of its numbers")
        first_page = at_bytes - at_bytes % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(file.fileno(), end_bytes - first_page, access=mmap.ACCESS_COPY, offset=first_page)
    mapped.madvise(mmap.MADV_WILLNEED)  # read ahead: the whole of it is about to be used
    return torch.frombuffer(mapped, dtype=seen.dtype, count=seen.numel(), offset=at_bytes - first_page).view(seen.shape)


def _sides(one: Box, other: Box) -> list[tuple[int, int, int, int]]:
    return list(zip(one.start, one.end, other.start, other.end, strict=True))


def _cut(box: Box, window: Box) -> Box:
    """The part of a box that lies in a window, as seen from the window's corner."""
    start = tuple(max(a, c) for a, _, c, _ in _sides(box, window))
    end = tuple(min(b, d) for _, b, _, d in _sides(box, window))
    return Box(tuple(a - c for a, c in zip(start, window.start, strict=True)), tuple(b - a for a, b in zip(start, end, strict=True)))


def _outside(boxes: list[Box], shape: Shape) -> str:
    """What is wrong with boxes that cannot be blocks of the shape; '' where they all can."""
    for box in boxes:
        fits = len(box.start) == len(box.size) == len(shape) and min((*box.start, *box.size), default=0) >= 0
        if not fits or any(end > size for end, size in zip(box.end, shape, strict=True)):
            return f"a chunk of {box.size} at {box.start} is no block of its shape {shape}"
    return "" if math.prod(shape) else "it is empty"


def _uneven(boxes: list[Box], shape: Shape) -> str:
    """'' where the boxes fill the shape once; else the first block that none of them holds, or several do."""
    return _uneven_from(boxes, shape, 0, ())


def _uneven_from(boxes: list[Box], shape: Shape, axis: int, at: tuple[str, ...]) -> str:
    """The same for the axes from `axis` on; `at` says where on the axes before."""
    if len(boxes) == 0 or axis == len(shape):
        return "" if len(boxes) == 1 else f"[{', '.join(at)}] is {'missing' if not boxes else f'there {len(boxes)} times'}"
    cuts = sorted({0, shape[axis], *(box.start[axis] for box in boxes), *(box.end[axis] for box in boxes)})
    for start, end in itertools.pairwise(cuts):
        held = [box for box in boxes if box.start[axis] <= start and end <= box.end[axis]]
        if found := _uneven_from(held, shape, axis + 1, (*at, f"{start}:{end}")):
            return found
    return ""
