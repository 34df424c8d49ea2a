"""Putting one whole checkpoint in the place of another: killed at any moment, one of the two can be found again.

checkpoints/.iter_0000500.thinned/    whole and on the disk, about to take the place of iter_0000500
checkpoints/.iter_0000500.replaced/   what stood there; deleted when the new one stands

Between two renames iter_0000500 is missing for an instant. A kill there is made good by
`finish_swaps`, which whoever cleans calls first, and by `show_hidden`, which a trainer calls before it looks for checkpoints.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from megatron_ext.checkpoint.verify import READY, check_files, replaced_by
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, file_sha256, read_manifest
from megatron_ext.runs import force_to_disk

REPLACED = ".replaced"


def ready_path(target: Path) -> Path:
    """Where a whole replacement of `target` waits."""
    return target.with_name(f".{target.name}{READY}")


def swap_in(whole: Path, target: Path) -> None:
    """Replace the folder `target` by `whole`, a folder beside it whose files are on the disk.

    `CheckpointError` where `whole` lacks a file, or was not made from what `target` holds: then `target` stands.
    """
    problem = _misfit(whole, target)
    if problem:
        raise CheckpointError(f"{target} stands as it was; its replacement cannot be used: {problem}")
    ready = ready_path(target)
    whole.rename(ready)  # from here on it will stand, whatever happens
    force_to_disk(target.parent)
    _finish(ready)


def unfinished_swaps(folder: Path) -> list[Path]:
    """Replacements that were made and not put into place."""
    return sorted(folder.glob(f".iter_*{READY}"))


def finish_swaps(folder: Path) -> None:
    """Put into place what a killed process had made ready; what does not fit there any more is deleted.

    Only for who owns the folder's cleaning: nobody else may be in the middle of a swap.
    """
    for ready in unfinished_swaps(folder):
        _finish(ready)


def show_hidden(folder: Path) -> None:
    """Put a waiting replacement into place where its checkpoint is missing, and touch nothing else: a gc may be at work."""
    for ready in unfinished_swaps(folder):
        target = replaced_by(ready)
        if not target.exists() and not _misfit(ready, target):
            with contextlib.suppress(FileNotFoundError):  # the gc lives, and did it at the same moment
                ready.rename(target)


def _finish(ready: Path) -> None:
    target = replaced_by(ready)
    replaced = target.with_name(f".{target.name}{REPLACED}")
    misfit = _misfit(ready, target)
    if misfit and replaced.exists() and not target.exists():
        replaced.rename(target)
    if misfit and target.exists():  # published again meanwhile, or damaged: what stands is the better one
        shutil.rmtree(ready)
        return
    if target.exists():
        if replaced.exists():  # of an earlier swap, which was killed while it deleted
            shutil.rmtree(replaced)
        target.rename(replaced)
    try:
        ready.rename(target)
    except FileNotFoundError:
        if not target.exists():
            raise
        # a trainer that began at this moment has put it there: show_hidden
    force_to_disk(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _misfit(whole: Path, target: Path) -> str:
    """Why a folder must not take the place of `target`, which may be missing; '' where it may."""
    try:
        manifest = read_manifest(whole)
        check_files(whole, manifest)
        if target.exists() and manifest.thinned_from != file_sha256(target / MANIFEST):
            return f"{whole}: was made from another checkpoint than {target} holds now"
    except (CheckpointError, OSError) as problem:
        return str(problem)
    return ""
