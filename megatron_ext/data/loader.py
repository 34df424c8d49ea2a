"""What a training step gets: the micro-batches of one data-parallel rank, and held-out batches.

Which sequences a step holds, and their order, depend on nothing but the step.

Shapes: B sequences of a micro-batch, S sequence_length.

    tokens         int64 BS    inputs
    labels         int64 BS    the token after each input
    loss_mask      float32 BS  1 where the prediction counts
    position_ids   int64 BS
    attention_mask bool B1SS   True = hidden; only with documents.attention='within', else the causal mask is the model's
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron_ext.config.stages import Documents
from megatron_ext.data.prepare import Prepared
from megatron_ext.data.streams import SequenceId, SourceStream
from megatron_ext.errors import ConfigError

Batch = dict[str, torch.Tensor]
PREFETCHED_BATCHES = 4  # micro-batches that each worker holds ready


def make_batch(texts: list[np.ndarray], documents: Documents, eod_id: int) -> Batch:
    """One micro-batch from token ids of sequence_length + 1 each, under the recipe's four words.

    An end-of-document token belongs to the document that it ends. `eod_loss=False` takes out the
    predictions whose input is that token, for they guess how an unrelated document begins.
    `attention='within'` hides all later tokens and those of other documents; `positions='restart'`
    counts from 0 in each document (in a sequence that begins inside one, from the sequence's start).
    """
    text = torch.from_numpy(np.stack(texts)).long()
    tokens_BS, labels_BS = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    length = tokens_BS.shape[1]
    ends_BS = tokens_BS == eod_id
    position_ids_BS = torch.arange(length).repeat(len(texts), 1)
    document_BS = ends_BS.cumsum(dim=1) - ends_BS.long()  # documents that ended before each token
    if documents.positions == "restart":
        starts_BS = torch.ones_like(ends_BS)
        starts_BS[:, 1:] = ends_BS[:, :-1]
        position_ids_BS = position_ids_BS - (position_ids_BS * starts_BS).cummax(dim=1).values
    batch = {
        "tokens": tokens_BS,
        "labels": labels_BS,
        "loss_mask": torch.ones_like(tokens_BS, dtype=torch.float32) if documents.eod_loss else (~ends_BS).float(),
        "position_ids": position_ids_BS,
    }
    if documents.attention == "within":
        later_SS = torch.ones(length, length, dtype=torch.bool).triu(1)
        other_BSS = document_BS[:, :, None] != document_BS[:, None, :]
        batch["attention_mask"] = (other_BSS | later_SS)[:, None]
    return batch


class Loader:
    """Iterates the steps of a stage from `start_step` on; each step is a list of micro-batches.

    With B sequences a step, D data-parallel ranks and micro-batches of b, step t holds sequences
    [t B, (t + 1) B) of the stage; rank r takes the r-th of D equal contiguous parts, and its
    micro-batch m the m-th run of b sequences of that part. `workers` > 0 reads in that many
    processes, ahead of the trainer; 0 reads in this one. No global random state is touched.
    """

    def __init__(
        self, prepared: Prepared, *, micro_batch: int, data_parallel: int = 1, data_rank: int = 0, start_step: int = 0, workers: int = 0
    ) -> None:
        budget = prepared.stage.budget
        if budget.sequences_per_batch % (micro_batch * data_parallel):
            raise ConfigError(
                f"loader: a batch of {budget.sequences_per_batch} sequences is no multiple of "
                f"micro_batch {micro_batch} x data-parallel {data_parallel}"
            )
        if not 0 <= start_step <= budget.steps:
            raise ConfigError(f"loader: start_step {start_step} lies outside the stage's {budget.steps} steps")
        self.prepared, self.workers = prepared, workers
        self.micro_batch, self.data_parallel, self.data_rank = micro_batch, data_parallel, data_rank
        self.start_step = start_step
        self.micro_batches = budget.sequences_per_batch // (micro_batch * data_parallel)

    def __iter__(self) -> Iterator[list[Batch]]:
        collate = functools.partial(_collate, documents=self.prepared.stage.documents, eod_id=self.prepared.corpus.eod_id)
        batches = iter(
            DataLoader(
                self.prepared.blend,
                batch_sampler=_Indices(self),
                collate_fn=collate,
                num_workers=self.workers,
                prefetch_factor=PREFETCHED_BATCHES if self.workers else None,
                generator=torch.Generator(),  # or it would draw a seed from the global state
            )
        )
        for _ in range(self.start_step, self.prepared.stage.budget.steps):
            yield [next(batches) for _ in range(self.micro_batches)]

    def micro_batch_indices(self, step: int) -> list[list[int]]:
        """The stage's sequence numbers in each micro-batch of this rank at `step`."""
        share = self.micro_batches * self.micro_batch
        first = step * self.prepared.stage.budget.sequences_per_batch + self.data_rank * share
        return [list(range(start, start + self.micro_batch)) for start in range(first, first + share, self.micro_batch)]

    def sequence_ids(self, step: int) -> list[SequenceId]:
        """The sequences of a step, all ranks', in order."""
        size = self.prepared.stage.budget.sequences_per_batch
        return self.prepared.blend.sequence_ids(step * size, (step + 1) * size)

    def samples_sha256(self, step: int) -> str:
        """SHA-256 over the identities of a step's sequences, in order: equal hashes, equal samples."""
        total = hashlib.sha256()
        for one in self.sequence_ids(step):
            total.update(f"{one.source}\t{one.position}\t{one.epoch}\t{one.document}\t{one.offset}\n".encode())
        return total.hexdigest()


class _Indices:
    """The batch sampler: the sequence numbers of every micro-batch to come."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.loader.start_step, self.loader.prepared.stage.budget.steps):
            yield from self.loader.micro_batch_indices(step)


def _collate(samples: list[dict[str, Any]], documents: Documents, eod_id: int) -> Batch:
    return make_batch([sample["text"] for sample in samples], documents, eod_id)


class HeldOut:
    """The first `sequences` sequences of a source's held-out text (all, where it has fewer), in a fixed order.

    The order is the same for every stage, seed and layout, so losses of different stages compare.
    """

    def __init__(self, stream: SourceStream, sequences: int, documents: Documents, eod_id: int) -> None:
        self.source, self.documents, self.eod_id = stream.source, documents, eod_id
        self.stream = stream
        self.sequences = min(sequences, stream.sequences_per_epoch)

    def batches(self, micro_batch: int, data_parallel: int = 1, data_rank: int = 0) -> Iterator[Batch]:
        """This rank's batches, all of `micro_batch` sequences and equally many on every rank.

        Where the sequences do not fill the last round, its batches are filled up with copies of the
        first sequence whose loss_mask is 0: the sum of losses over the sum of masks is exact.
        """
        each_round = micro_batch * data_parallel
        for first in range(data_rank * micro_batch, -(-self.sequences // each_round) * each_round, each_round):
            numbers = range(first, first + micro_batch)
            texts = [self.stream[number if number < self.sequences else 0]["text"] for number in numbers]
            batch = make_batch(texts, self.documents, self.eod_id)
            batch["loss_mask"][[number >= self.sequences for number in numbers]] = 0.0
            yield batch


def heldouts(prepared: Prepared) -> list[HeldOut]:
    """The held-out sets of a stage, one per source of its mixture that has held-out text."""
    stage = prepared.stage
    count = stage.plan.validation_sequences
    return [HeldOut(stream, count, stage.documents, prepared.corpus.eod_id) for stream in prepared.heldout.values() if count]
