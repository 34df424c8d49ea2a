"""What one process does with one slice of a source's text: a train shard, a held-out shard, and a record of every line.

The record is written last. A slice whose record stands and fits its text and recipe is not done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.base import Json
from megatron_ext.config.stages import Source, TokenizeStage
from megatron_ext.data.shards import ShardWriter, Split, open_shard
from megatron_ext.data.text_lines import BadLine, Document, Slice, is_heldout, line_number, lines, read_document
from megatron_ext.errors import DataError
from megatron_ext.runs import read_json, write_json
from megatron_ext.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1024
MOST_EXAMPLES = 5  # bad lines that a record locates


@dataclass
class SliceRecord:
    """What became of a slice's lines; `lines` = blank + empty + bad + documents."""

    identity: Json
    lines: int = 0
    blank: int = 0
    empty: int = 0  # no text, or text that has no tokens
    bad: int = 0
    bytes: int = 0
    sha256: str = ""  # of the slice's lines
    examples: list[str] = field(default_factory=list)
    documents: dict[Split, int] = field(default_factory=lambda: {"train": 0, "heldout": 0})
    tokens: dict[Split, int] = field(default_factory=lambda: {"train": 0, "heldout": 0})
    shards: dict[Split, list[str]] = field(default_factory=lambda: {"train": [], "heldout": []})


@dataclass(frozen=True)
class SliceTask:
    """A slice, the source it is of, where its shards go, and all that they depend on."""

    part: Slice
    source: Source
    folder: Path
    identity: Json

    @property
    def record_path(self) -> Path:
        """Where the slice's record stands once it is done."""
        return self.folder / f"slice-{self.part.number:05}.json"

    def finished(self) -> SliceRecord | None:
        """The record of an earlier attempt, where it fits this task and its shards are whole."""
        if not self.record_path.is_file():
            return None
        values = read_json(self.record_path, "the record of a tokenized slice: delete it to do the slice again", DataError)
        if values.get("identity") != self.identity:
            return None
        record = SliceRecord(**values)
        try:
            for name in (*record.shards["train"], *record.shards["heldout"]):
                open_shard(self.folder / f"{name}.json")
        except DataError as cause:
            print(f"slice {self.part.number} of source '{self.source.name}' is done again: {cause}", flush=True)
            return None
        return record


class _Lines:
    """The lines of a slice that are no documents: refused, or counted by reason."""

    def __init__(self, task: SliceTask, stage: TokenizeStage, record: SliceRecord) -> None:
        self.task, self.stage, self.record = task, stage, record

    def bad(self, offset_bytes: int, cause: str) -> None:
        """A line that cannot be used, for the reason given; `DataError` where the stage refuses such lines."""
        path = self.task.part.file.path
        if self.stage.on_bad_line == "refuse":
            raise DataError(
                f"{path}, line {line_number(path, offset_bytes)} (byte {offset_bytes}): {cause}. Mend or remove the line, "
                f"or set {self.stage.name}.on_bad_line=skip, which leaves such lines out and counts them"
            )
        self.record.bad += 1
        if len(self.record.examples) < MOST_EXAMPLES:
            self.record.examples.append(f"{path}, byte {offset_bytes}: {cause}")

    def documents(self, digest: Any) -> Iterator[Document]:
        """The documents of the slice; every other line is counted by its reason. `digest` is fed all lines."""
        part, record = self.task.part, self.record
        for offset, line in lines(part):
            digest.update(line)
            record.lines += 1
            record.bytes += len(line)
            if line.isspace():
                record.blank += 1
                continue
            try:
                document = read_document(line, offset, self.task.source, part.file.name)
            except BadLine as cause:
                self.bad(offset, str(cause))
                continue
            if not document.text or document.text.isspace():
                record.empty += 1
            else:
                yield document


class _Sink:
    """Documents of one split on their way into shards, encoded a batch at a time."""

    def __init__(self, split: Split, rest: _Lines, tokenizer: Tokenizer) -> None:
        self.split, self.rest, self.tokenizer = split, rest, tokenizer
        self.waiting: list[Document] = []
        self.characters = 0
        self.writer: ShardWriter | None = None

    def add(self, document: Document) -> None:
        """Take a document; encode and write what waits where that is enough for a batch, or for the shard."""
        self.waiting.append(document)
        self.characters += len(document.text)
        most = self.rest.stage.documents_per_shard or BATCH_DOCUMENTS
        room = most - (self.writer.documents if self.writer and self.rest.stage.documents_per_shard else 0)
        if self.characters >= BATCH_CHARACTERS or len(self.waiting) >= min(room, BATCH_DOCUMENTS):
            self.flush()

    def flush(self) -> None:
        """Encode and write what waits."""
        if not self.waiting:
            return
        documents, self.waiting, self.characters = self.waiting, [], 0
        ids = self.tokenizer.encode_batch([document.text for document in documents])
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        kept = self._kept(documents, lengths, flat)
        if not kept.all():
            flat = flat[np.repeat(kept, lengths)]
            documents, lengths = [d for d, keep in zip(documents, kept, strict=True) if keep], lengths[kept]
        if not documents:
            return
        bos_id = self.tokenizer.bos_id if self.rest.stage.bos else None
        lengths, flat = framed(lengths, flat, bos_id, self.tokenizer.eod_id)
        self._open_writer().extend([document.id for document in documents], lengths, flat)
        self.rest.record.documents[self.split] += len(documents)
        self.rest.record.tokens[self.split] += len(flat)
        if self.writer and self.writer.documents == self.rest.stage.documents_per_shard:
            self.finish()

    def _kept(self, documents: list[Document], lengths: np.ndarray, flat: np.ndarray) -> np.ndarray:
        """Which documents have tokens, and none that begins or ends a document; the others are counted."""
        kept = lengths > 0
        self.rest.record.empty += int((~kept).sum())
        for special in {self.tokenizer.eod_id, self.tokenizer.bos_id} - {None}:
            for index in np.unique(np.searchsorted(np.cumsum(lengths), np.flatnonzero(flat == special), side="right")):
                if kept[index]:
                    kept[index] = False
                    self.rest.bad(
                        documents[index].offset_bytes,
                        f"its text encodes to the id {special}, which begins or ends documents",
                    )
        return kept

    def _open_writer(self) -> ShardWriter:
        if self.writer is None:
            task, stage, names = self.rest.task, self.rest.stage, self.rest.record.shards[self.split]
            piece = f"-{len(names):03}" if stage.documents_per_shard else ""
            names.append(f"{self.split}-{task.part.number:05}{piece}")
            self.writer = ShardWriter(
                task.folder, names[-1], source=task.source.name, split=self.split, vocab_size=self.tokenizer.vocab_size,
                eod_id=self.tokenizer.eod_id, bos=stage.bos, tokenizer_hash=self.tokenizer.identity_hash,
            )  # fmt: skip
        return self.writer

    def finish(self) -> None:
        """Publish the shard that is open."""
        if self.writer is not None:
            self.writer.finish()
            self.writer = None

    def discard(self) -> None:
        """Remove the shard that is open."""
        if self.writer is not None:
            self.writer.discard()


def framed(lengths: np.ndarray, flat: np.ndarray, bos_id: int | None, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents with the end-of-document id at each end, and `bos_id` at each beginning unless it is None: (lengths, tokens)."""
    lengths = lengths + (1 if bos_id is None else 2)
    ends = np.cumsum(lengths)
    result = np.empty(int(ends[-1]), dtype=flat.dtype)
    is_text = np.ones(len(result), dtype=bool)
    is_text[ends - 1] = False
    if bos_id is not None:
        result[ends - lengths] = bos_id
        is_text[ends - lengths] = False
    result[is_text] = flat
    result[ends - 1] = eod_id
    return lengths, result


def tokenize_slice(task: SliceTask, stage: TokenizeStage, tokenizer: Tokenizer, report: Callable[[SliceRecord], None]) -> SliceRecord:
    """Write the shards of one slice, then its record; `DataError` for a bad line that the stage refuses.

    `report` is called with the growing record after every document.
    """
    record, digest = SliceRecord(task.identity), hashlib.sha256()
    rest = _Lines(task, stage, record)
    sinks: dict[Split, _Sink] = {"train": _Sink("train", rest, tokenizer), "heldout": _Sink("heldout", rest, tokenizer)}
    task.folder.mkdir(parents=True, exist_ok=True)
    try:
        for document in rest.documents(digest):
            kept_back = is_heldout(task.source.name, document.id, task.source.heldout_fraction)
            sinks["heldout" if kept_back else "train"].add(document)
            report(record)
        for sink in sinks.values():
            sink.flush()
            sink.finish()
    finally:
        for sink in sinks.values():
            sink.discard()
    record.sha256 = digest.hexdigest()
    write_json(task.record_path, dataclasses.asdict(record))
    return record
