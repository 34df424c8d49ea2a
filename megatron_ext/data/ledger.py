"""What a lineage has consumed of each source, exact at any step, and the documents behind any sequence.

Both are functions of the index arrays alone: nothing is counted while training, so nothing is lost
by a stop, and a branch that changes the mixture goes on from its parent's positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_ext.data.streams import Blend, SourceStream
from megatron_ext.provenance import Consumed

Ledger = tuple[Consumed, ...]


def inherit(parent: Ledger, start: Literal["weights", "branch"]) -> Ledger:
    """The ledger with which a child begins.

    Lineage tokens carry on, for the weights have seen them. Positions carry on across a `branch`;
    across `weights` a fresh order begins, at position 0.
    """
    return tuple(dataclasses.replace(line, position=line.position if start == "branch" else 0, stage_tokens=0) for line in parent)


def start_positions(inherited: Ledger) -> dict[str, int]:
    """Source -> the position at which its stream goes on; a source that is not named begins at 0."""
    return {line.source: line.position for line in inherited}


def ledger_at(blend: Blend, sequences_done: int, inherited: Ledger = ()) -> Ledger:
    """The ledger after the first `sequences_done` sequences of a stage, one line per source of its lineage.

    `inherited` is what the stage began with (`inherit`); its sources that the stage does not draw
    keep their lines. Epochs are tokens over the source's training tokens. Sorted by source.
    """
    lines = {line.source: line for line in inherited}
    for stream, count in zip(blend.streams, blend.counts(sequences_done), strict=True):
        stage_tokens = int(count) * stream.sequence_length
        before = lines[stream.source].tokens if stream.source in lines else 0
        lines[stream.source] = Consumed(
            source=stream.source,
            position=stream.start_position + int(count),
            tokens=before + stage_tokens,
            stage_tokens=stage_tokens,
            epochs=(before + stage_tokens) / stream.tokens.num_tokens,
        )
    return tuple(lines[source] for source in sorted(lines))


@dataclass(frozen=True)
class Span:
    """Tokens [first_token, end_token) of a document, as they stand in the sequence at `position` of its source."""

    position: int
    epoch: int
    document: int  # number in the source's shards
    document_id: str
    first_token: int
    end_token: int


def documents(stream: SourceStream, from_position: int, to_position: int) -> Iterator[Span]:
    """The document spans behind positions [from_position, to_position), in the order of their tokens.

    The spans of one position are its `sequence_length` input tokens. The one token more that its last
    prediction aims at begins the sequence after it in the same epoch, and is counted there.
    """
    for position in range(from_position, to_position):
        number, within = stream.locate(position)
        epoch = stream.epoch(number)
        sequence = int(epoch.shuffle_index[within])
        (first_slot, first_offset), (last_slot, last_offset) = epoch.sample_index[sequence : sequence + 2].tolist()
        for slot in range(first_slot, last_slot + 1):
            document = int(epoch.document_index[slot])
            first = first_offset if slot == first_slot else 0
            end = last_offset if slot == last_slot else int(stream.tokens.sequence_lengths[document])
            if end > first:
                yield Span(position, number, document, stream.tokens.document_id(document), first, end)
