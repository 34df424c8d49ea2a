"""The samples of an update, packed: the same split on every rank, several sequences a row, one shape for all micro-batches.

Every rank holds all samples and works out the same placing, so nothing is sent. Sequences go into rows that hold whole
ones, rows into micro-batches, micro-batches to data-parallel ranks, equally many each: Megatron's pipeline wants one shape,
and its ranks wait for each other. What is left over is padding at weight 0.

A sequence is its prompt and its response without the last token, which nothing is predicted from. On a CPU a row is little longer
than the longest sequence, since the mask that keeps sequences apart costs rows x length^2. On a GPU a micro-batch is one row of up to
the token budget with the sequences' boundaries (`cu_seqlens`), for Transformer Engine.

Shapes: R rows of a micro-batch, S positions of a row, N response tokens of a micro-batch, in the order of its samples.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ext.config.plan import ParallelPlan

MASK_TOKENS = 768  # in a row of so many positions a toy of 128 channels spends as much on the dense mask as on its matrix products
FP8_MULTIPLE = 16  # Transformer Engine's FP8 products want tokens in multiples of 16 on each rank


@dataclass(frozen=True)
class Sample:
    """A prompt and a response to it, with what an update needs to know of them; response arrays are one a token.

    advantage: of the response. weight, share: as `objective.response_weights` gives them; share is a whole number.
    old_logprobs: the trainer's, of the weights that the rollout step's first update begins with; None in that update.
    reference_logprobs: the frozen reference's, where there is a KL penalty.
    """

    prompt: tuple[int, ...]
    response: np.ndarray  # int32
    engine_logprobs: np.ndarray  # FP32
    advantage: float
    weight: float
    share: float
    old_logprobs: np.ndarray | None = None  # FP32
    reference_logprobs: np.ndarray | None = None  # FP32

    @property
    def num_inputs(self) -> int:
        """Positions that the model sees."""
        return len(self.prompt) + len(self.response) - 1


@dataclass(frozen=True)
class Shape:
    """What all micro-batches of an update have in common: how many a data-parallel rank has, and their size."""

    num_micro_batches: int
    num_rows: int
    row_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on this rank's device.

    positions_N are s x R + r, those that predict; targets_N what comes there. samples are the numbers of its samples in
    the given sequence, lengths their response tokens, shares what they add to the update's denominator.
    """

    tokens_RS: torch.Tensor
    position_ids_RS: torch.Tensor
    mask_R1SS: torch.Tensor | None  # True = hidden
    packed: PackedSeqParams | None
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    shares: int


Row = list[int]  # numbers of samples
Placing = list[list[list[Row]]]  # rows by data-parallel rank and micro-batch


def place(lengths: Sequence[int], plan: ParallelPlan, tokens_per_micro_batch: int) -> tuple[Shape, Placing]:
    """Where each of the sequences of `lengths` positions goes; those of length 0 go nowhere.

    The same lengths in the same order give the same placing everywhere. A sequence longer than the budget has rows of its own length.
    """
    capacity, rows = _rows(lengths, plan, tokens_per_micro_batch)
    most_rows = max(1, tokens_per_micro_batch // capacity)
    rounds = plan.pipeline if plan.virtual_pipeline > 1 else 1  # Megatron interleaves multiples of the pipeline's size
    num_micro_batches = -(-max(len(rows), 1) // (plan.data_parallel * most_rows * rounds)) * rounds
    parts = plan.data_parallel * num_micro_batches
    num_rows = -(-max(len(rows), 1) // parts)
    rows = _levelled(lengths, rows, parts * num_rows, capacity)
    row_tokens = _rounded(max((sum(lengths[i] for i in row) for row in rows), default=1), plan)
    dealt = [rows[part::parts] for part in range(parts)]  # rows come longest first: each part gets some of every length
    by_rank = [dealt[rank :: plan.data_parallel] for rank in range(plan.data_parallel)]
    return Shape(num_micro_batches, num_rows, row_tokens), by_rank


def _rows(lengths: Sequence[int], plan: ParallelPlan, tokens_per_micro_batch: int) -> tuple[int, list[Row]]:
    """The length of a row and what goes into each: on a CPU the length among a few at which they cost least."""
    longest = max((*lengths, 1))
    if plan.device == "gpu":
        capacity = _rounded(max(longest, tokens_per_micro_batch), plan)
        return capacity, packed_rows(lengths, capacity)
    tried = []
    for factor in (1.0, 1.25, 1.5, 2.0):  # of the longest sequence: twice that has next to no padding
        capacity = _rounded(max(longest, min(int(factor * longest), tokens_per_micro_batch)), plan)
        tried.append((capacity, packed_rows(lengths, capacity)))
    return min(tried, key=lambda each: len(each[1]) * each[0] * (1.0 + each[0] / MASK_TOKENS))


def packed_rows(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Sequences in rows of `capacity` positions: each, longest first, into the fullest row that has room for it."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (positions left, row), ascending
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


def _levelled(lengths: Sequence[int], rows: list[Row], num_rows: int, capacity: int) -> list[Row]:
    """The sequences spread evenly over `num_rows` rows, if that fits; else the rows as they are and empty ones behind."""
    even: list[Row] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]
    for i in sorted((i for row in rows for i in row), key=lambda i: (-lengths[i], i)):
        tokens, row = filled.pop(0)
        if tokens + lengths[i] > capacity:
            even = [*rows, *([] for _ in range(num_rows - len(rows)))]
            break
        even[row].append(i)
        bisect.insort(filled, (tokens + lengths[i], row))
    return sorted(even, key=lambda row: -sum(lengths[i] for i in row))


def _rounded(tokens: int, plan: ParallelPlan) -> int:
    multiple = (plan.tensor if plan.sequence_parallel else 1) * (FP8_MULTIPLE if plan.device == "gpu" else 1)
    return -(-tokens // multiple) * multiple


def micro_batch(samples: Sequence[Sample], rows: Sequence[Row], shape: Shape, plan: ParallelPlan, device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch; rows beyond those given, and what they leave free, are padding."""
    tokens_RS = np.zeros((shape.num_rows, shape.row_tokens), dtype=np.int64)
    position_ids_RS = np.zeros_like(tokens_RS)
    sequence_RS = np.full_like(tokens_RS, -1)  # -1: padding, a sequence that only padding sees
    placed: list[int] = []
    positions, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    bounds = [0]  # of the first row
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            one = samples[i]
            end = start + one.num_inputs
            tokens_RS[r, start : start + len(one.prompt)] = one.prompt
            tokens_RS[r, start + len(one.prompt) : end] = one.response[:-1]
            position_ids_RS[r, start:end] = np.arange(end - start)
            sequence_RS[r, start:end] = i
            positions.append(np.arange(start + len(one.prompt) - 1, end) * shape.num_rows + r)
            targets.append(one.response.astype(np.int64))
            placed.append(i)
            bounds += [end] * (r == 0)
            start = end
    tensors = [
        torch.from_numpy(each).to(device) for each in (tokens_RS, position_ids_RS, np.concatenate(positions), np.concatenate(targets))
    ]
    mask_R1SS = _mask(torch.from_numpy(sequence_RS)).to(device) if plan.device == "cpu" else None
    packed = None if plan.device == "cpu" else _packed(bounds, shape.row_tokens, device)
    lengths = tuple(len(samples[i].response) for i in placed)
    shares = int(sum(samples[i].share for i in placed))
    return MicroBatch(tensors[0], tensors[1], mask_R1SS, packed, tensors[2], tensors[3], tuple(placed), lengths, shares)


def _mask(sequence_RS: torch.Tensor) -> torch.Tensor:
    """True where a position may not look: later ones, and other sequences. Each sees itself, padding too, so no row of it is empty."""
    length = sequence_RS.shape[1]
    later_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
    return ((sequence_RS[:, :, None] != sequence_RS[:, None, :]) | later_SS)[:, None]


def _packed(bounds: list[int], row_tokens: int, device: torch.device) -> PackedSeqParams:
    """The sequences' boundaries in a row for Transformer Engine, the padding as the last sequence."""
    ends = bounds if bounds[-1] == row_tokens else [*bounds, row_tokens]
    ends_tensor = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = int(np.diff(ends).max())
    boundaries: dict[str, Any] = {
        "cu_seqlens_q": ends_tensor,
        "cu_seqlens_kv": ends_tensor,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
    return PackedSeqParams(qkv_format="thd", **boundaries)
