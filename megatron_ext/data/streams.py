"""The order in which sequences are drawn: one endless stream per source, and the blend of them.

Underneath are Megatron-Core's GPTDataset (one epoch of one source: documents shuffled, cut into
sequences, sequences shuffled) and BlendedDataset (which source comes next). Around them: an order
that depends on a seed and never on how much is drawn, and index files that are whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_ext.data.index_cache import Arrays, IndexCache
from megatron_ext.errors import DataError

NO_DOCUMENTS = np.empty(0, dtype=np.int32)
COUNT_CHUNK = 1 << 20  # samples counted at once: bincount widens 2-byte entries to 8


class Tokens(Protocol):
    """What a stream reads; `megatron_ext.data.shards.Shards` is one."""

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each document, int32."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, known without reading them."""

    @property
    def digest(self) -> str:
        """Hash of the content: equal digests, equal tokens."""

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of document `index`."""

    def document_id(self, index: int) -> str:
        """The id that the document had as text."""


class TokenizerIdentity:
    """All that GPTDataset is told of a tokenizer: its hash, which goes into the index's name."""

    vocab_size = None

    def __init__(self, tokenizer_hash: str) -> None:
        self.unique_identifiers = OrderedDict(hash=tokenizer_hash)


def epoch_seed(order_seed: int, source: str, epoch: int) -> int:
    """The 32-bit seed of one pass over one source."""
    digest = hashlib.sha256(f"{order_seed}/{source}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class Epoch(GPTDataset):  # type: ignore[misc]  # Megatron-Core is untyped
    """One pass over a source: Megatron's GPTDataset, its three index arrays kept in an `IndexCache`."""

    def __init__(self, tokens: Tokens, config: GPTDatasetConfig, cache: IndexCache) -> None:
        self._cache = cache
        # The digest takes the place of a path, so the index is named by content. The list of documents is made only for a build.
        super().__init__(tokens, tokens.digest, NO_DOCUMENTS, None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arrays = self._cache.arrays({"kind": "epoch", **json.loads(self.unique_description)}, self._build)
        return arrays["document"], arrays["sample"], arrays["shuffle"]

    def _build(self) -> Arrays:
        self.indices = np.arange(len(self.dataset.sequence_lengths), dtype=np.int32)
        with _quiet("megatron.core.datasets.gpt_dataset"):
            document, sample, shuffle = super()._build_document_sample_shuffle_indices()
        self.indices = NO_DOCUMENTS
        return {"document": document, "sample": sample, "shuffle": shuffle}

    def text(self, index: int) -> np.ndarray:
        """The `sequence_length + 1` token ids (int64) of a sequence: its inputs, and the last one's label."""
        text: np.ndarray = self._query_document_sample_shuffle_indices(index)[0]
        return text


@dataclass(frozen=True, order=True)
class SequenceId:
    """Which sequence of a source: its place in the order, and where in which document its text begins."""

    source: str
    position: int
    epoch: int
    document: int
    offset: int


class SourceStream(Dataset[dict[str, Any]]):
    """The endless order of one source's sequences, from a starting position on.

    Position p is sequence p % sequences_per_epoch of epoch p // sequences_per_epoch; each epoch is
    shuffled by a seed made of (order_seed, source, epoch). So the order is the same however much is
    drawn, and a branch that starts at its parent's position goes on in the parent's permutation.
    Each epoch leaves out the up to `sequence_length` tokens that fill no sequence at its end.
    """

    index_split = Split.train  # BlendedDataset wants one; held-out text is a stream of its own here

    def __init__(
        self,
        *,
        source: str,
        tokens: Tokens,
        cache: IndexCache,
        order_seed: int,
        sequence_length: int,
        tokenizer_hash: str,
        start_position: int = 0,
    ) -> None:
        self.source, self.tokens, self.order_seed = source, tokens, order_seed
        self.sequence_length, self.start_position = sequence_length, start_position
        self.sequences_per_epoch = (tokens.num_tokens - 1) // sequence_length
        if self.sequences_per_epoch < 1:
            raise DataError(
                f"source '{source}': its {tokens.num_tokens:,} tokens are fewer than one sequence of {sequence_length:,} + 1; "
                f"add text, or take shorter sequences"
            )
        self._cache = cache
        self._tokenizer = TokenizerIdentity(tokenizer_hash)
        self._epochs: dict[int, Epoch] = {}

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What the order is a function of (BlendedDataset asks for it)."""
        return OrderedDict(
            source=self.source, digest=self.tokens.digest, order_seed=self.order_seed, sequence_length=self.sequence_length,
            tokenizer=self._tokenizer.unique_identifiers, start_position=self.start_position,
        )  # fmt: skip

    def __len__(self) -> int:
        """Endless: how often a source may be repeated is the prepare step's matter."""
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sequence `index` after the start: its `position`, and `text`, int64 of sequence_length + 1."""
        position = self.start_position + int(index)
        epoch, within = self.locate(position)
        return {"position": position, "text": self.epoch(epoch).text(within)}

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, sequence number in it) of a position."""
        return divmod(position, self.sequences_per_epoch)

    def epoch(self, number: int) -> Epoch:
        """One epoch's dataset, opened at its first use; `DataError` where its index is missing."""
        if number not in self._epochs:
            config = GPTDatasetConfig(
                random_seed=epoch_seed(self.order_seed, self.source, number),
                sequence_length=self.sequence_length,
                tokenizer=self._tokenizer,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            made = Epoch(self.tokens, config, self._cache)
            if len(made) != self.sequences_per_epoch:
                raise DataError(
                    f"source '{self.source}': its documents make {len(made):,} sequences, but its sidecars' {self.tokens.num_tokens:,} "
                    f"tokens make {self.sequences_per_epoch:,}: shards and sidecars differ; tokenize the source again"
                )
            self._epochs[number] = made
        return self._epochs[number]

    def cover(self, num_sequences: int) -> None:
        """Open (or build, where the cache may) every epoch that the next `num_sequences` from the start touch."""
        if num_sequences:
            first, last = self.start_position, self.start_position + num_sequences - 1
            for number in range(self.locate(first)[0], self.locate(last)[0] + 1):
                self.epoch(number)

    def sequence_id(self, index: int) -> SequenceId:
        """Identity of sequence `index` after the start, from the index arrays alone."""
        position = self.start_position + int(index)
        number, within = self.locate(position)
        epoch = self.epoch(number)
        slot, offset = epoch.sample_index[epoch.shuffle_index[within]]
        return SequenceId(self.source, position, number, int(epoch.document_index[slot]), int(offset))


class Blend(BlendedDataset):  # type: ignore[misc]  # Megatron-Core is untyped
    """The sequences of a stage: number i -> (stream, sequence of it), after Megatron's largest-error rule.

    Which stream comes when depends on weights and size alone, so a position in a stream is its start
    plus how often it was drawn. `draws[k]` is how often the whole stage draws stream k.
    """

    datasets: list[SourceStream]

    def __init__(self, streams: list[SourceStream], weights: list[float], size: int, cache: IndexCache) -> None:
        self._cache = cache
        self.draws = np.zeros(len(streams), dtype=np.int64)
        self._counted = (0, self.draws)
        config = BlendedMegatronDatasetConfig(random_seed=0, sequence_length=streams[0].sequence_length)  # draws no random number
        with _quiet("megatron.core.datasets.blended_dataset"):
            super().__init__(streams, weights, size, config)

    def cover(self) -> None:
        """Open (or build, where the cache may) every epoch that the stage draws from."""
        for stream, sequences in zip(self.streams, self.draws, strict=True):
            stream.cover(int(sequences))

    @property
    def streams(self) -> list[SourceStream]:
        """The sources' streams, in the mixture's order."""
        return self.datasets

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        arrays = self._cache.arrays({"kind": "blend", "weights": self.weights, "size": self.size}, self._build)
        self.draws = np.array(arrays["draws"])
        return arrays["dataset"], arrays["dataset_sample"]

    def _build(self) -> Arrays:
        dataset, dataset_sample = super()._build_indices()
        return {"dataset": dataset, "dataset_sample": dataset_sample, "draws": _count(dataset, len(self.datasets))}

    def counts(self, sequences_done: int) -> np.ndarray:
        """How often each stream was drawn in the first `sequences_done` sequences (int64).

        Counted from the index itself; asked again further on, only the new part is counted.
        """
        if not 0 <= sequences_done <= len(self):
            raise DataError(f"blend: sequence {sequences_done:,} lies outside the stage's {len(self):,}")
        done, counts = self._counted
        if sequences_done < done:
            done, counts = 0, np.zeros_like(counts)
        total: np.ndarray = counts + _count(self.dataset_index[done:sequences_done], len(self.datasets))
        self._counted = (sequences_done, total)
        return total.copy()

    def sequence_ids(self, first: int, last: int) -> list[SequenceId]:
        """Identities of sequences [first, last) of the stage, in order."""
        pairs = zip(self.dataset_index[first:last], self.dataset_sample_index[first:last], strict=True)
        return [self.datasets[which].sequence_id(index) for which, index in pairs]


def _count(dataset_index: np.ndarray, num_datasets: int) -> np.ndarray:
    counts = np.zeros(num_datasets, dtype=np.int64)
    for start in range(0, len(dataset_index), COUNT_CHUNK):
        counts += np.bincount(dataset_index[start : start + COUNT_CHUNK], minlength=num_datasets)
    return counts


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Without Megatron's warnings that it does not save its indices (the cache does) or blends one dataset."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
