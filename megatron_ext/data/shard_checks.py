"""The full check of a shard: everything that its sidecar and its format promise, read back from its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megatron_ext.data.shards import CHUNK_ITEMS, HEADER_BYTES, REDO, SUFFIXES, Shard, index_header, open_shard
from megatron_ext.errors import DataError
from megatron_ext.provenance import ShardSidecar


def verify_shard(path: Path) -> ShardSidecar:
    """Read a whole shard and hold it against its sidecar; `DataError` names the file and what is wrong with it.

    Digests of the three files; the index's header, lengths, offsets and bounds; ids inside the vocabulary; the
    end-of-document id at the end of each document and nowhere else.
    """
    shard = open_shard(path)
    for suffix in SUFFIXES:
        with shard.file(suffix).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        expected = shard.sidecar.sha256[suffix]
        if found != expected:
            raise DataError(f"{shard.file(suffix)}: hashes to {found[:12]}, its sidecar says {expected[:12]}: the file was altered; {REDO}")
    _verify_index(shard)
    _verify_tokens(shard)
    return shard.sidecar


def _verify_index(shard: Shard) -> None:
    arrays, count, itemsize = shard.mapped, shard.sidecar.documents, np.dtype(shard.sidecar.dtype).itemsize
    header = bytes(shard.array(".idx", "u1", 0, HEADER_BYTES))
    problem = "" if header == index_header(shard.sidecar.dtype, count) else "its header names another element type or number of documents"
    end = 0
    for start in range(0, count, CHUNK_ITEMS):
        part = slice(start, start + CHUNK_ITEMS)
        lengths = arrays.lengths[part].astype("<i8")
        ends = end + np.cumsum(lengths) * itemsize
        if lengths.min() < 1 or not np.array_equal(arrays.pointers[part], ends - lengths * itemsize):
            problem = f"lengths and offsets disagree in documents {start} to {start + len(lengths) - 1}"
        if not np.array_equal(arrays.bounds[start : start + len(lengths)], np.arange(start, start + len(lengths))):
            problem = f"bounds are not one sequence a document in documents {start} to {start + len(lengths) - 1}"
        end = int(ends[-1])
    if end != shard.sidecar.bytes[".bin"] or arrays.bounds[-1] != count:
        problem = problem or f"its lengths make {end} bytes of tokens, the .bin file holds {shard.sidecar.bytes['.bin']}"
    table = shard.array(".ids", "<i8", shard.sidecar.bytes[".ids"] - 8 * (count + 1), count + 1)
    if table[0] != 0 or table[-1] != shard.sidecar.bytes[".ids"] - 8 * (count + 1) or (np.diff(table) < 0).any():
        raise DataError(f"{shard.file('.ids')}: its table of offsets does not fit its text; {REDO}")
    if problem:
        raise DataError(f"{shard.file('.idx')}: {problem}; {REDO}")


def _verify_tokens(shard: Shard) -> None:
    arrays, sidecar, largest = shard.mapped, shard.sidecar, 0
    for start in range(0, sidecar.tokens, CHUNK_ITEMS):
        chunk = arrays.tokens[start : start + CHUNK_ITEMS]
        end = start + len(chunk)
        largest = max(largest, int(chunk.max()))
        if largest >= sidecar.vocab_size or int(chunk.min()) < 0:
            raise DataError(
                f"{shard.file('.bin')}: ids from {chunk.min()} to {chunk.max()} in tokens {start} to {end - 1}, but the vocabulary "
                f"has {sidecar.vocab_size} ids; tokenize with the tokenizer whose vocabulary the sidecar names"
            )
        # a document ends where the next one starts
        first, last = np.searchsorted(arrays.pointers, [start * chunk.itemsize, end * chunk.itemsize], side="right")
        ends = arrays.pointers[first:last] // chunk.itemsize
        ends = np.append(ends, end) if end == sidecar.tokens else ends
        found = np.flatnonzero(chunk == sidecar.eod_id) + start + 1
        if not np.array_equal(found, ends):
            odd = int(np.setxor1d(found, ends)[0]) - 1
            index = int(np.searchsorted(arrays.pointers, odd * chunk.itemsize, side="right")) - 1
            raise DataError(
                f"{shard.file('.bin')}: document {index} ({shard.document_id(index)!r}) must hold the end-of-document id "
                f"{sidecar.eod_id} at its end and nowhere else, but token {odd} breaks this; {REDO}"
            )
    if largest != sidecar.largest_id:
        raise DataError(f"{shard.path}: says its largest id is {sidecar.largest_id}, found {largest}: the sidecar was altered; {REDO}")
