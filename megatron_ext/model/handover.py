"""The weights of a running Megatron model as Hugging Face tensors, bucket by bucket: what an inference engine takes over.

Any tensor, pipeline and virtual-pipeline layout gives the same buckets, on every rank. A Megatron tensor is
put together over its model-parallel group: each rank lays its pieces into zeroed bytes, and the bytes are
summed. Every place is filled by one rank alone, which is checked, so the sum is that rank's bits: -0.0 and
NaN stay what they are. One bucket and one tensor are held at a time, whatever the model's size.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_ext.config.model import ModelConfig
from megatron_ext.distributed import Groups
from megatron_ext.errors import CheckpointError
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.weights import Row, Shape, table

Place = tuple[str, int | None]  # key and layer: a row of the table


@dataclass(frozen=True)
class _Box:
    """Where a piece lies in its Megatron tensor."""

    offset: Shape
    shape: Shape
    dtype: torch.dtype

    @property
    def window(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def overlaps(self, other: _Box) -> bool:
        return all(a.start < b.stop and b.start < a.stop for a, b in zip(self.window, other.window, strict=True))


@dataclass(frozen=True)
class _Piece:
    """A part of a Megatron tensor that this rank holds; `owned` where it is the one to give it to its model-parallel group."""

    box: _Box
    data: torch.Tensor
    owned: bool


def hugging_face_buckets(chunks: Sequence[GPTModel], model: ModelConfig, groups: Groups, bucket_bytes: int) -> Iterator[Bucket]:
    """Every Hugging Face tensor of the model once, in the table's order, in buckets of at most `bucket_bytes`.

    A tensor larger than `bucket_bytes` has a bucket of its own. Collective over the model-parallel group: all
    its ranks iterate to the end, and every one of them gets every bucket; each data-parallel replica does so
    for itself. The tensors are copies, so training may go on while they are in use. Beside the bucket that
    the caller holds, one bucket and at most two copies of one Megatron tensor are in memory.
    `CheckpointError` on all ranks, naming every tensor, where the chunks are not the model of the table.
    """
    rows = table(model)
    pieces = _pieces(chunks)
    dtypes = _check(rows, pieces, groups)
    held: list[tuple[str, torch.Tensor]] = []
    for name, tensor in _tensors(rows, pieces, dtypes, groups):
        if held and sum(t.nbytes for _, t in held) + tensor.nbytes > bucket_bytes:
            yield _emptied(held)
        held.append((name, tensor))
        del tensor  # else it lives on here while the next one is put together
    yield _emptied(held)


def agreed_checksum(bucket: Bucket, groups: Groups) -> str:
    """The bucket's checksum, which all ranks of the job must have, data-parallel replicas included.

    Collective over all ranks. `CheckpointError` says which ranks differ: their replica has other weights.
    """
    found: list[str] = [""] * groups.plan.num_ranks
    dist.all_gather_object(found, bucket.checksum)
    differing = [rank for rank, checksum in enumerate(found) if checksum != found[0]]
    if differing:
        names = ", ".join(name for name, _ in bucket.tensors)
        raise CheckpointError(
            f"ranks {differing} hold other weights than rank 0 in the bucket of {names}: the data-parallel replicas have come "
            f"apart; start again from the last checkpoint"
        )
    return found[0]


def _emptied(held: list[tuple[str, torch.Tensor]]) -> Bucket:
    bucket = Bucket(tuple(held))
    held.clear()
    return bucket


def _tensors(
    rows: Iterable[Row], pieces: dict[Place, list[_Piece]], dtypes: dict[Place, torch.dtype], groups: Groups
) -> Iterator[tuple[str, torch.Tensor]]:
    for row in rows:
        place = (row.key, row.layer)
        parts = row.to_hugging_face(_whole(row, pieces[place], dtypes[place], groups))
        for name in row.names:
            yield name, parts.pop(0)  # nothing here keeps a tensor that was handed over


@torch.no_grad()
def _whole(row: Row, pieces: Iterable[_Piece], dtype: torch.dtype, groups: Groups) -> torch.Tensor:
    """One Megatron tensor put together over the model-parallel group."""
    whole = torch.zeros(row.shape, dtype=dtype, device=groups.device)
    for piece in pieces:
        if piece.owned:
            whole[piece.box.window] = piece.data
    dist.all_reduce(whole.flatten().view(torch.uint8), group=groups.collection.mp)
    return whole


def _pieces(chunks: Sequence[GPTModel]) -> dict[Place, list[_Piece]]:
    """What this rank holds, by place in the table."""
    found: dict[Place, list[_Piece]] = defaultdict(list)
    for chunk in chunks:
        for entry in nested_values(chunk.sharded_state_dict()):
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            for part in nested_values(built) if isinstance(built, dict | list) else [built]:
                if isinstance(part, ShardedTensor):  # not Transformer Engine's extra state
                    axes = part.prepend_axis_num  # 1 where the checkpoint stacks the layers
                    layer = part.global_offset[0] if axes else None
                    box = _Box(tuple(part.global_offset[axes:]), tuple(part.local_shape), part.dtype)
                    found[part.key, layer].append(_Piece(box, part.data, _is_owner(part)))
    return found


def _is_owner(part: ShardedTensor) -> bool:
    """Whether this rank gives the part to its model-parallel group.

    Megatron's replica_id is (copy on another pipeline stage, copy on another tensor-parallel rank, copy on
    another data- or context-parallel rank); the last one tells replicas apart, not ranks within one.
    """
    return not any(part.replica_id[:-1])


def _check(rows: Sequence[Row], pieces: dict[Place, list[_Piece]], groups: Groups) -> dict[Place, torch.dtype]:
    """That the group's pieces fill each tensor of the table, each place once; each tensor's dtype."""
    own = {place: [piece.box for piece in held if piece.owned] for place, held in pieces.items()}
    gathered: list[dict[Place, list[_Box]]] = [{}] * groups.collection.mp.size()
    dist.all_gather_object(gathered, own, group=groups.collection.mp)
    boxes: dict[Place, list[_Box]] = defaultdict(list)
    for of_rank in gathered:
        for place, held in of_rank.items():
            boxes[place] += held
    shapes = {(row.key, row.layer): row.shape for row in rows}
    faults = [f"{_name(place)} is not in the table" for place in boxes if place not in shapes]
    faults += [f"{_name(place)} {fault}" for place, shape in shapes.items() if (fault := _fault(shape, boxes[place]))]
    if faults:
        raise CheckpointError(
            "the running model is not the one that its config describes, so its weights cannot be handed over: "
            + "; ".join(faults)
            + ". Build model and table from one config"
        )
    return {place: boxes[place][0].dtype for place in shapes}


def _fault(shape: Shape, boxes: Sequence[_Box]) -> str:
    """What keeps the boxes from filling the shape, each place once and in one dtype; nothing: ''."""
    if not boxes:
        return "is held by no rank"
    ends = [tuple(start + size for start, size in zip(box.offset, box.shape, strict=True)) for box in boxes]
    if any(len(end) != len(shape) or any(a > b for a, b in zip(end, shape, strict=True)) for end in ends):
        return f"does not fit into {list(shape)}: a part ends at {[list(end) for end in ends]}"
    if any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)):
        return "is given twice in part"
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        return f"is held only in part of {list(shape)}"
    if len({box.dtype for box in boxes}) > 1:
        return "has parts of different dtypes"
    return ""


def _name(place: Place) -> str:
    key, layer = place
    return key if layer is None else f"{key} (layer {layer})"
