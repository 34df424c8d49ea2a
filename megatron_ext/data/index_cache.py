"""Folders of index arrays, each named by the hash of what it was built from; a folder that is there is whole.

    <root>/<key>/description.json   what the arrays are a function of
    <root>/<key>/<name>.npy

An index is built aside and renamed into place, so a killed build leaves nothing that could be
taken for whole, and of two builders the slower one discards its work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ext.attempts import pulse
from megatron_ext.config.base import Json, content_hash
from megatron_ext.errors import DataError
from megatron_ext.runs import read_json, write_json

FORMAT = 1
DESCRIPTION = "description.json"
ABANDONED_SECONDS = 86_400  # a build takes minutes; an older unfinished folder belongs to a killed one
Arrays = dict[str, np.ndarray]


class IndexCache:
    """Index arrays on disk; `may_build` separates the prepare step from trainers, which only read.

    `way_out` ends the message about a missing index.
    """

    def __init__(self, root: Path, *, may_build: bool, way_out: str) -> None:
        self.root = root
        self.may_build = may_build
        self.way_out = way_out

    def folder(self, description: Json) -> Path:
        """Where the arrays of a description lie, or would."""
        return self.root / content_hash({"format": FORMAT, **description})[:32]

    def arrays(self, description: Json, build: Callable[[], Arrays]) -> Arrays:
        """The described arrays, memory-mapped read-only; built first where they are missing and may be.

        `DataError` where they are missing and may not be built or cannot be written, or where their folder was damaged.
        """
        folder = self.folder(description)
        if not folder.is_dir():
            if not self.may_build:
                raise DataError(f"{folder}: no such index (of {description.get('kind')}); {self.way_out}")
            pulse()
            self._publish(folder, description, build())
            pulse()
        return self._open(folder, description)

    def _publish(self, folder: Path, description: Json, arrays: Arrays) -> None:
        aside = self.root / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            aside.mkdir()
        except OSError as cause:
            raise self._unwritable(cause) from None
        try:
            for name, array in arrays.items():
                with (aside / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            write_json(aside / DESCRIPTION, {**description, "format": FORMAT, "arrays": sorted(arrays)})
            _rename_or_discard(aside, folder)
        except OSError as cause:
            raise self._unwritable(cause) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # gone already, unless something failed or came second

    def _unwritable(self, cause: OSError) -> DataError:
        return DataError(
            f"{self.root}: cannot write indices here ({cause.strerror or cause}); "
            f"free space or quota, or make the corpus folder writable; {self.way_out}"
        )

    def _remove_abandoned(self) -> None:
        for folder in self.root.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its builder published it just now
                if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too

    def _open(self, folder: Path, description: Json) -> Arrays:
        way_out = f"it was altered; delete the folder, then {self.way_out}"
        found = read_json(folder / DESCRIPTION, f"the description of an index: {way_out}", DataError)
        names = found.pop("arrays", [])
        if found != {**description, "format": FORMAT}:
            raise DataError(f"{folder / DESCRIPTION}: describes another index than its folder's name; {way_out}")
        try:
            return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        except (OSError, ValueError, EOFError) as cause:
            raise DataError(f"{folder}: an index array cannot be read ({cause}); {way_out}") from None


def _rename_or_discard(aside: Path, folder: Path) -> None:
    """Publish `aside` as `folder`; where another process was first, its equal work stands."""
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
