"""Shards: Megatron-Core's `.bin/.idx` pair, our `.ids` file of document ids, and a JSON sidecar written last.

NAME.bin   token ids of all documents, one after another (uint16 or int32)
NAME.idx   Megatron-Core's index, one sequence a document: header, lengths (int32), byte offsets (int64), document bounds (int64)
NAME.ids   document ids: their UTF-8 bytes one after another, then documents + 1 byte offsets (int64, little-endian)
NAME.json  provenance.ShardSidecar; where it stands, the shard is whole
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megatron_ext.config.base import content_hash, nearest
from megatron_ext.errors import DataError
from megatron_ext.provenance import CORPUS, CorpusIndex, ShardSidecar, read_sidecar, write_sidecar

Split = Literal["train", "heldout"]
SUFFIXES = (".bin", ".idx", ".ids")
REDO = "delete the shard's four files and run its tokenize stage again"
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPE_CODES = {"int32": 4, "uint16": 8}
MEGATRON_VERSION = 1
HEADER_BYTES = 34  # magic 9, version 8, dtype code 1, sequences 8, document bounds 8
CHUNK_ITEMS = 1 << 20  # of the arrays assembled at the end: 8 MiB of int64 at a time
MAPPED_SHARDS = 256  # kept mapped per process: two file descriptors each, under the usual limit of 1,024


def token_dtype(vocab_size: int) -> Literal["uint16", "int32"]:
    """The element type of a `.bin` file, as Megatron-Core's GPTDataset expects it for a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


class _HashedFile:
    """A file under construction: written aside, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("xb")
        self.path = path
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, values: bytes | np.ndarray) -> None:
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values).view(np.uint8).data
        self.file.write(data)
        self.digest.update(data)
        self.size_bytes += len(data)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class ShardWriter:
    """Writes one shard as a stream; what it holds in memory does not grow with the documents.

    Lengths go to files aside, and the index is assembled from them in chunks by `finish`, which
    renames the three files into place and writes the sidecar. Leaving the `with` block without
    `finish` removes everything.
    """

    def __init__(
        self, folder: Path, name: str, *, source: str, split: Split, vocab_size: int, eod_id: int, bos: bool, tokenizer_hash: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.documents = self.tokens = 0
        self._facts: dict[str, Any] = {
            "source": source, "split": split, "vocab_size": vocab_size, "eod_id": eod_id, "bos": bos, "tokenizer_hash": tokenizer_hash,
            "dtype": token_dtype(vocab_size),
        }  # fmt: skip
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._largest_id = 0
        aside = f".{name}.{os.getpid()}"
        self._files = {suffix: _HashedFile(folder / f"{aside}{suffix}.tmp") for suffix in SUFFIXES}
        self._lengths_path = folder / f"{aside}.lengths.tmp"
        self._id_lengths_path = folder / f"{aside}.id_lengths.tmp"
        self._lengths = self._lengths_path.open("xb")
        self._id_lengths = self._id_lengths_path.open("xb")

    def add(self, document_id: str, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document: its ids, the last of which is the end-of-document id."""
        flat = np.asarray(tokens, dtype=np.int64)
        self.extend([document_id], np.array([len(flat)]), flat)

    def extend(self, document_ids: Sequence[str], lengths: np.ndarray, flat: np.ndarray) -> None:
        """Append documents: `flat` holds their tokens one after another, `lengths` how many each has.

        `DataError` for an id outside the vocabulary or a document that does not end with the end-of-document id.
        """
        if not len(document_ids):
            return
        if len(document_ids) != len(lengths) or int(lengths.sum()) != len(flat) or int(lengths.min()) < 1:
            raise ValueError(f"{len(document_ids)} ids and {len(lengths)} lengths (sum {lengths.sum()}) for {len(flat)} tokens")
        largest, vocab_size, eod_id = int(flat.max()), self._facts["vocab_size"], self._facts["eod_id"]
        if largest >= vocab_size or int(flat.min()) < 0:
            raise DataError(
                f"{self.folder / self.name}: token ids from {flat.min()} to {largest}, but the vocabulary has {vocab_size} ids; "
                f"the tokenizer's files do not belong together"
            )
        unended = np.flatnonzero(flat[np.cumsum(lengths) - 1] != eod_id)
        if len(unended):
            raise DataError(
                f"{self.folder / self.name}: document {document_ids[unended[0]]!r} does not end with the end-of-document id {eod_id}"
            )
        names = [name.encode("utf-8") for name in document_ids]
        self._files[".bin"].write(flat.astype(self._dtype))
        self._files[".ids"].write(b"".join(names))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._id_lengths.write(np.fromiter(map(len, names), dtype="<i4", count=len(names)).tobytes())
        self._largest_id = max(self._largest_id, largest)
        self.documents += len(names)
        self.tokens += len(flat)

    def finish(self) -> ShardSidecar | None:
        """Publish the shard and return its sidecar; a shard without documents leaves nothing and returns None."""
        self._lengths.close()
        self._id_lengths.close()
        if not self.documents:
            self.discard()
            return None
        self._write_index()
        _write_offsets(self._files[".ids"], self._id_lengths_path, itemsize=1, with_end=True)
        for suffix, file in self._files.items():
            file.sync()
            os.replace(file.path, self.folder / f"{self.name}{suffix}")
        sidecar = ShardSidecar(
            prefix=self.name, documents=self.documents, tokens=self.tokens, largest_id=self._largest_id,
            bytes={suffix: file.size_bytes for suffix, file in self._files.items()},
            sha256={suffix: file.digest.hexdigest() for suffix, file in self._files.items()},
            **self._facts,
        )  # fmt: skip
        write_sidecar(self.folder / f"{self.name}.json", sidecar)
        self.discard()
        return sidecar

    def _write_index(self) -> None:
        index, bounds = self._files[".idx"], self.documents + 1
        index.write(index_header(self._facts["dtype"], self.documents))
        for chunk in _chunks(self._lengths_path):
            index.write(chunk)
        _write_offsets(index, self._lengths_path, itemsize=self._dtype.itemsize, with_end=False)
        for start in range(0, bounds, CHUNK_ITEMS):
            index.write(np.arange(start, min(start + CHUNK_ITEMS, bounds), dtype="<i8"))

    def discard(self) -> None:
        """Remove whatever is unpublished."""
        self._lengths.close()
        self._id_lengths.close()
        for file in self._files.values():
            file.file.close()
        for path in (self._lengths_path, self._id_lengths_path, *(file.path for file in self._files.values())):
            path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


def index_header(dtype: str, documents: int) -> bytes:
    """The first bytes of Megatron-Core's index: magic, version, element type, numbers of sequences and of document bounds."""
    numbers = [n.to_bytes(8, "little") for n in (MEGATRON_VERSION, documents, documents + 1)]
    return MEGATRON_MAGIC + numbers[0] + bytes([MEGATRON_DTYPE_CODES[dtype]]) + numbers[1] + numbers[2]


def _chunks(path: Path) -> Iterator[np.ndarray]:
    """The int32 values of a file, a bounded array at a time."""
    with path.open("rb") as file:
        while len(chunk := np.fromfile(file, dtype="<i4", count=CHUNK_ITEMS)):
            yield chunk


def _write_offsets(file: _HashedFile, lengths_path: Path, *, itemsize: int, with_end: bool) -> None:
    """Append the byte offset at which each item starts (int64), and the end of the last one if asked."""
    end = 0
    for chunk in _chunks(lengths_path):
        ends = end + np.cumsum(chunk, dtype="<i8") * itemsize
        file.write(ends - chunk.astype("<i8") * itemsize)
        end = int(ends[-1])
    if with_end:
        file.write(np.array([end], dtype="<i8"))


class _Mapped:
    """The arrays of one shard, mapped read-only; bytes are loaded as they are read."""

    def __init__(self, shard: Shard) -> None:
        count = shard.sidecar.documents
        index = shard.array(".idx", "u1", 0, shard.sidecar.bytes[".idx"])  # one mapping, one file descriptor
        self.lengths = np.frombuffer(index.data, "<i4", count, HEADER_BYTES)
        self.pointers = np.frombuffer(index.data, "<i8", count, HEADER_BYTES + 4 * count)
        self.bounds = np.frombuffer(index.data, "<i8", count + 1, HEADER_BYTES + 12 * count)
        self.tokens = shard.array(".bin", shard.sidecar.dtype, 0, shard.sidecar.tokens)


class Shard:
    """One opened shard: its sidecar and its files, mapped when first read."""

    def __init__(self, path: Path, sidecar: ShardSidecar) -> None:
        self.path, self.sidecar = path, sidecar

    def file(self, suffix: str) -> Path:
        """Path of the shard's `.bin`, `.idx` or `.ids` file."""
        return self.path.with_name(self.sidecar.prefix + suffix)

    def array(self, suffix: str, dtype: str, offset_bytes: int, count: int) -> np.ndarray:
        """`count` items of a file from `offset_bytes`, mapped read-only."""
        return np.asarray(np.memmap(self.file(suffix), dtype=np.dtype(dtype), mode="r", offset=offset_bytes, shape=(count,)))

    @property
    def mapped(self) -> _Mapped:
        """The arrays of the shard; mapped again where other shards have pushed them out."""
        return _mapped(self)

    def document_id(self, index: int) -> str:
        """The id of document `index`; reads nothing else."""
        table = self.sidecar.bytes[".ids"] - 8 * (self.sidecar.documents + 1)
        with self.file(".ids").open("rb") as file:
            file.seek(table + 8 * index)
            start, end = np.frombuffer(file.read(16), dtype="<i8")
            file.seek(int(start))
            return file.read(int(end - start)).decode("utf-8")


@functools.lru_cache(maxsize=MAPPED_SHARDS)
def _mapped(shard: Shard) -> _Mapped:
    return _Mapped(shard)


def open_shard(path: Path) -> Shard:
    """Open a shard by its sidecar, checking every file's size but reading none; `DataError` where they disagree."""
    shard = Shard(path, read_sidecar(path))
    sidecar = shard.sidecar
    for suffix in SUFFIXES:
        file, expected = shard.file(suffix), sidecar.bytes.get(suffix)
        if not file.is_file():
            raise DataError(f"{file}: missing; its sidecar {path.name} expects {expected} bytes. Copy the shard again, or {REDO}")
        found = file.stat().st_size
        if found != expected:
            what = "cut short" if found < (expected or 0) else "longer than written"
            raise DataError(f"{file}: {what}: expected {expected} bytes, found {found}. Copy the shard again, or {REDO}")
    count = sidecar.documents
    sizes = {".bin": sidecar.tokens * np.dtype(sidecar.dtype).itemsize, ".idx": HEADER_BYTES + 4 * count + 8 * count + 8 * (count + 1)}
    for suffix, size in sizes.items():
        if sidecar.bytes[suffix] != size:
            raise DataError(
                f"{path}: says {count} documents of {sidecar.tokens} tokens, which make a {suffix} file of {size} bytes, "
                f"but also {sidecar.bytes[suffix]} bytes: the sidecar was altered; {REDO}"
            )
    return shard


class Shards:
    """Several shards as one low-level dataset: what Megatron-Core's GPTDataset uses of an IndexedDataset.

    Documents are numbered through the shards in the order given. Pickles as its list of paths.
    """

    def __init__(self, sidecar_paths: Sequence[Path]) -> None:
        if not sidecar_paths:
            raise DataError("no shards given; a dataset needs at least one")
        self.shards = [open_shard(Path(path)) for path in sidecar_paths]
        first = self.shards[0]
        for shard in self.shards[1:]:
            if shard.sidecar.tokenizer_hash != first.sidecar.tokenizer_hash:
                raise DataError(
                    f"{shard.path}: made with tokenizer {shard.sidecar.tokenizer_hash[:12]}, but {first.path} with "
                    f"{first.sidecar.tokenizer_hash[:12]}; tokenize both with one tokenizer"
                )
        self._starts = [0, *np.cumsum([s.sidecar.documents for s in self.shards]).tolist()]
        self.sequence_lengths = first.mapped.lengths if len(self.shards) == 1 else self._all_lengths()
        self.digest = content_hash([shard.sidecar.sha256 for shard in self.shards])
        self.num_tokens = sum(shard.sidecar.tokens for shard in self.shards)
        self.path_prefix = str(first.path.with_name(first.sidecar.prefix))

    def _all_lengths(self) -> np.ndarray:
        """Lengths of all documents, int32; one shard mapped at a time."""
        lengths = np.empty(len(self), dtype=np.int32)
        for shard, start in zip(self.shards, self._starts, strict=False):
            count = shard.sidecar.documents
            lengths[start : start + count] = shard.array(".idx", "<i4", HEADER_BYTES, count)
        return lengths

    @property
    def document_indices(self) -> np.ndarray:
        """Bounds of the documents in sequences, int64; one sequence a document, so 0, 1, 2, ..."""
        return self.shards[0].mapped.bounds if len(self.shards) == 1 else np.arange(len(self) + 1, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return self.shards[number], int(index) - self._starts[number]

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of document `index` from `offset` (to its end, or `length` of them), a read-only view."""
        shard, local = self._locate(index)
        arrays = shard.mapped
        whole = int(arrays.lengths[local])
        length = whole - offset if length is None else length
        if not 0 <= offset <= offset + length <= whole:
            raise IndexError(f"tokens {offset} to {offset + length} of document {index}, which has {whole}")
        start = int(arrays.pointers[local]) // arrays.tokens.itemsize + int(offset)
        tokens: np.ndarray = arrays.tokens[start : start + int(length)]
        return tokens

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    def document_id(self, index: int) -> str:
        """The id that document `index` came with."""
        shard, local = self._locate(index)
        return shard.document_id(local)

    def __reduce__(self) -> tuple[type[Shards], tuple[list[Path]]]:
        return Shards, ([shard.path for shard in self.shards],)


def open_split(corpus_folder: Path, corpus: CorpusIndex, source: str, split: Split) -> Shards:
    """The shards of `source`; `DataError` where it is unknown or empty, or a shard belongs to something else."""
    where = corpus_folder / CORPUS
    if source not in corpus.sources:
        raise DataError(f"{where}: no source '{source}'{nearest(source, list(corpus.sources))}")
    record = corpus.sources[source]
    names = record.train if split == "train" else record.heldout
    if not names:
        way_out = "raise its heldout_fraction" if split == "heldout" else "add text, or lower its heldout_fraction"
        raise DataError(f"{where}: source '{source}' has no {split} documents; {way_out} and tokenize it again")
    shards = Shards([corpus_folder / name for name in names])
    for shard in shards.shards:
        expected = {"source": source, "split": split, "tokenizer_hash": corpus.tokenizer_hash, "eod_id": corpus.eod_id, "bos": corpus.bos}
        for key, value in expected.items():
            found = getattr(shard.sidecar, key)
            if found != value:
                raise DataError(
                    f"{shard.path}: {key} is {found!r}, but {where} says {value!r}: the shard belongs to another corpus. "
                    f"Delete it and run the tokenize stage again"
                )
    return shards
