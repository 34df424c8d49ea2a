"""Files that hash themselves while they are written.

Large writes are hashed in a second thread, which need not keep up: it works on while the disk takes
the bytes (`fsync`), when a processor has nothing else to do. So the digest costs next to nothing.
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
BESIDE_BYTES = 1 << 18  # below this a copy is cheaper than keeping the bytes alive


class HashingStream:
    """Passes writes on and hashes them in the order they came; everything else is the file's."""

    def __init__(self, file: Any, hasher: ThreadPoolExecutor) -> None:
        self._file, self._hasher = file, hasher
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.refusal: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash. Whoever writes `BESIDE_BYTES` or more at once keeps them as they are until the file is closed."""
        view = memoryview(data)
        self.size_bytes += view.nbytes
        self._hasher.submit(self._sha256.update, view if view.nbytes >= BESIDE_BYTES else bytes(view))
        try:
            return int(self._file.write(data))
        except OSError as refusal:
            self.refusal = refusal
            raise

    def wait(self) -> None:
        """Until all that was written is hashed: for a writer whose bytes would else pile up in memory."""
        self._hasher.submit(lambda: None).result()

    def digest(self) -> tuple[int, str]:
        """Bytes and SHA-256 of all that was written; waits for the hashing."""
        return self.size_bytes, self._hasher.submit(self._sha256.hexdigest).result()

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
            with ThreadPoolExecutor(1) as hasher, super().create_stream(path, mode) as file:
                stream = HashingStream(file, hasher)
                try:
                    yield stream
                except RuntimeError as error:  # what torch.save makes of it: "unexpected pos 704 vs 598"
                    if isinstance(error.__context__, KeyboardInterrupt):
                        raise error.__context__ from None
                    raise stream.refusal or error from None
                self.digests[Path(path).name] = stream.digest()
        except OSError as refusal:
            refusal.filename = str(path)  # a buffered file does not name itself
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, its digest too."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)
