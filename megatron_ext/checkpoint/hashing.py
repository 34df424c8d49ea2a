"""Files that hash themselves while they are written.

A large write is handed to the disk and to SHA-256 at the same time, in two threads: both release
the interpreter, so the digest costs what it takes longer than the write, which is little or nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

Digests = dict[str, tuple[int, str]]  # file name -> (bytes, sha256)
SIDE_BY_SIDE_BYTES = 1 << 18  # below this a second thread costs more than it saves


class HashingStream:
    """Passes writes on and hashes them; everything else is the file's."""

    def __init__(self, file: Any, hasher: ThreadPoolExecutor) -> None:
        self._file, self._hasher = file, hasher
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash; the caller may reuse `data` as soon as this returns."""
        size_bytes = memoryview(data).nbytes
        self.size_bytes += size_bytes
        beside = self._hasher.submit(self.sha256.update, data) if size_bytes >= SIDE_BY_SIDE_BYTES else None
        try:
            if beside is None:
                self.sha256.update(data)
            return int(self._file.write(data))
        except OSError as refusal:
            self.refusal = refusal
            raise
        finally:
            if beside is not None:
                beside.result()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class HashingFileSystem(FileSystem):
    """A file system that remembers the digest of every file it wrote, by name."""

    def __init__(self) -> None:
        self.digests: Digests = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; the digest of a written one is kept when it is closed."""
        if "w" not in mode:
            with super().create_stream(path, mode) as file:
                yield file
            return
        try:
            with super().create_stream(path, mode) as file, ThreadPoolExecutor(1) as hasher:
                stream = HashingStream(file, hasher)
                try:
                    yield stream
                except RuntimeError as error:  # what torch.save makes of it: "unexpected pos 704 vs 598"
                    raise stream.refusal or error from None
        except OSError as refusal:
            refusal.filename = str(path)  # a buffered file does not name itself
            raise
        self.digests[Path(path).name] = (stream.size_bytes, stream.sha256.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, its digest too."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)
