"""JSONL text as documents: which files a source names, which byte ranges they are cut into, what each line holds.

A file is cut every `slice_bytes`; a slice owns the lines that begin inside it, so the cut depends on the file alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.stages import Source
from megatron_ext.errors import DataError

READ_BYTES = 1 << 20
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadLine(Exception):
    """Why a line is no document."""


@dataclass(frozen=True)
class TextFile:
    """One file of a source; `name` is its path below what all the source's files share."""

    path: Path
    name: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Slice:
    """A range of a file's bytes, and its number among the source's slices."""

    file: TextFile
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A line's text and id, and the byte at which the line begins."""

    id: str
    text: str
    offset_bytes: int


def find_files(source: Source, base: Path) -> list[TextFile]:
    """The files that a source's paths name, in order, each once; relative paths are read from `base`.

    `DataError` where a pattern matches no file, or a file is compressed.
    """
    paths: dict[Path, None] = {}
    for pattern in source.paths:
        whole = os.path.join(base, pattern)
        matches = sorted(path for path in map(Path, glob.glob(whole, recursive=True)) if path.is_file())
        if not matches:
            is_folder = f"; that is a folder: write {pattern.rstrip('/')}/*.jsonl" if os.path.isdir(whole) else ""
            raise DataError(f"source '{source.name}': no file matches '{pattern}' (looked for {whole}){is_folder or '; correct its paths'}")
        paths.update(dict.fromkeys(path.resolve() for path in matches))
    shared = os.path.commonpath([path.parent for path in paths])
    files = []
    for path in paths:
        if path.suffix in COMPRESSED:
            raise DataError(f"{path}: source '{source.name}' reads plain JSONL; decompress or convert this file first")
        facts = path.stat()
        files.append(TextFile(path, os.path.relpath(path, shared), facts.st_size, facts.st_mtime_ns))
    return files


def cut(files: list[TextFile], slice_bytes: int) -> list[Slice]:
    """All slices of a source's files, numbered in order."""
    ranges = [(file, start) for file in files for start in range(0, file.size_bytes, slice_bytes)]
    return [Slice(file, i, start, min(start + slice_bytes, file.size_bytes)) for i, (file, start) in enumerate(ranges)]


def lines(part: Slice) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of the lines that begin inside a slice."""
    with part.file.path.open("rb", buffering=READ_BYTES) as file:
        offset = part.start
        if offset:  # the line that reaches into the slice belongs to the one before
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < part.end and (line := file.readline()):
            yield offset, line
            offset += len(line)


def read_document(line: bytes, offset_bytes: int, source: Source, file_name: str) -> Document:
    """The document of one line; `BadLine` says why it is none. Without an id it is named by its file and byte."""
    if offset_bytes == 0:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as cause:
        raise BadLine(f"not UTF-8 ({cause.reason} at byte {offset_bytes + cause.start} of the file)") from None
    except json.JSONDecodeError as cause:
        raise BadLine(f"not JSON ({cause.msg} at character {cause.pos + 1} of the line)") from None
    except RecursionError:
        raise BadLine("not a document: JSON nested too deep") from None
    if not isinstance(values, dict):
        raise BadLine(f"a JSON {type(values).__name__}, not an object")
    if source.text_key not in values:
        keys = ", ".join(list(values)[:8]) or "none"
        raise BadLine(f"no key '{source.text_key}' (keys: {keys}); text_key of source '{source.name}' names the key that holds the text")
    text, given = values[source.text_key], values.get(source.id_key)
    if not isinstance(text, str):
        raise BadLine(f"'{source.text_key}' holds a {type(text).__name__}, not text")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise BadLine(f"'{source.id_key}' holds a {type(given).__name__}, not text or a whole number")
    name = f"{file_name}:{offset_bytes}" if given is None else str(given)
    if b"\\u" in line and not (_is_unicode(text) and _is_unicode(name)):  # only an escape can spell one
        raise BadLine("holds half of a surrogate pair (such as \\ud800), which no encoding can write")
    return Document(name, text, offset_bytes)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def line_number(path: Path, offset_bytes: int) -> int:
    """The number of the line that begins at a byte, counted from 1."""
    count, left = 1, offset_bytes
    with path.open("rb") as file:
        while left and (block := file.read(min(left, READ_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def is_heldout(source: str, document_id: str, fraction: float) -> bool:
    """Whether a document is kept from training: its hash, read as a number in [0, 1), lies below `fraction`."""
    digest = hashlib.sha256(f"{source}/{document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
