"""Putting one whole checkpoint in the place of another: killed at any moment, one of the two can be found again.

checkpoints/.iter_0000500.thinned/    whole and on the disk, about to take the place of iter_0000500
checkpoints/.iter_0000500.replaced/   what stood there; deleted when the new one stands

Between two renames iter_0000500 is missing for an instant. `finish_swaps` makes that good; whoever cleans calls it first.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

READY, REPLACED = ".thinned", ".replaced"


def ready_path(target: Path) -> Path:
    """Where a whole replacement of `target` waits."""
    return target.with_name(f".{target.name}{READY}")


def swap_in(whole: Path, target: Path) -> None:
    """Replace the folder `target` by `whole`, a folder beside it whose files are on the disk."""
    ready = ready_path(target)
    whole.rename(ready)  # from here on it will stand, whatever happens
    sync(target.parent)
    _finish(ready)


def unfinished_swaps(folder: Path) -> list[Path]:
    """Replacements that were made and not put into place."""
    return sorted(folder.glob(f".iter_*{READY}"))


def finish_swaps(folder: Path) -> None:
    """Put into place what a killed process had made ready."""
    for ready in unfinished_swaps(folder):
        _finish(ready)


def _finish(ready: Path) -> None:
    target = ready.with_name(ready.name.removeprefix(".").removesuffix(READY))
    replaced = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        if replaced.exists():  # of an earlier swap, which was killed while it deleted
            shutil.rmtree(replaced)
        target.rename(replaced)
    ready.rename(target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
