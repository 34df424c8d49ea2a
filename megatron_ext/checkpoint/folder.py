"""Names inside a run's checkpoint folder, and which checkpoints are published.

checkpoints/iter_0000500/                    a published checkpoint (has a manifest)
checkpoints/latest_checkpointed_iteration.txt  Megatron's tracker, written last
checkpoints/.attempt-2/                        what attempt 2 has not published: checkpoints being written or deleted; never read
checkpoints/.iter_0000500.damaged/             set aside by a resume that fell back to an older one

Everything that an attempt publishes it renames out of its own `.attempt-N`. A newer attempt takes that
folder away, so an owner that was cut off between its last look and its rename has nothing to rename.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import MANIFEST, Manifest, read_manifest
from megatron_ext.runs import CHECKPOINTS, atomic_write
from megatron_ext.tracker import TRACKER, iteration_path, published
from megatron_ext.tracker import read_tracker as latest


def staging_path(folder: Path, attempt: int) -> Path:
    """Where an attempt keeps what it has not published."""
    return folder / f".attempt-{attempt}"


def aside_path(folder: Path, iteration: int, attempt: int) -> Path:
    """Where an attempt writes a checkpoint before it is published."""
    return iteration_path(staging_path(folder, attempt), iteration)


def publish(folder: Path, iteration: int, attempt: int, may_publish: Callable[[], None] = lambda: None) -> Path:
    """Rename a whole checkpoint out of an attempt's staging folder into place, then move the tracker to it.

    `may_publish` raises where the attempt has lost the run folder. Losing it after that look makes a
    rename fail: `FileNotFoundError`, and nothing is published.
    """
    target, staging = iteration_path(folder, iteration), staging_path(folder, attempt)
    tracker = staging / TRACKER
    atomic_write(tracker, f"{iteration}\n")
    may_publish()
    if target.exists():  # an earlier attempt got this far but not to the tracker
        _rename(target, staging / f"replaced-{target.name}")
    _rename(aside_path(folder, iteration, attempt), target)
    _rename(tracker, folder / TRACKER)
    shutil.rmtree(staging)
    return target


def _rename(path: Path, target: Path) -> None:
    os.replace(path, target)


def revoke(folder: Path, attempt: int) -> None:
    """Take away what older attempts have staged: a stale owner can then publish nothing, and dead writers leave nothing."""
    for path in folder.glob(".attempt-*") if folder.is_dir() else ():
        if int(path.name.rpartition("-")[2]) < attempt:
            with contextlib.suppress(FileNotFoundError):  # another newer attempt took it at the same moment
                _rename(path, folder / f".revoked-{uuid.uuid4().hex}")
    for path in folder.glob(".revoked-*"):
        shutil.rmtree(path, ignore_errors=True)  # a stale owner may still be writing into it


def set_aside_damaged(path: Path) -> Path:
    """Unpublish a damaged checkpoint by one rename; it is kept to be looked at."""
    damaged = path.with_name(f".{path.name}.damaged")
    if damaged.exists():
        shutil.rmtree(damaged)
    _rename(path, damaged)
    return damaged


def routine_beyond(folder: Path, keep: int) -> list[int]:
    """Iterations that may go: all but the pinned, the newest `keep` of the others, the one that the tracker names, and damaged ones."""
    last = latest(folder)
    routine = [i for i, manifest in manifests(folder, published(folder))[0].items() if not manifest.pinned]
    return [iteration for iteration in routine[:-keep] if iteration != last]


def prune(folder: Path, keep: int, attempt: int) -> str:
    """Delete the routine checkpoints beyond the newest `keep`: each unpublished by one rename, so half of it is never seen.

    One whose manifest cannot be read is kept; a warning names it.
    """
    staging = staging_path(folder, attempt)
    for iteration in routine_beyond(folder, keep):
        staging.mkdir(exist_ok=True)
        _rename(iteration_path(folder, iteration), staging / f"discarded-{iteration}")
        shutil.rmtree(staging)
    damaged = manifests(folder, published(folder))[1]
    return f"kept, because damaged: {'; '.join(damaged)}" if damaged else ""


def named_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run folder or of a folder of checkpoints."""
    if (path / MANIFEST).is_file() or (path / ".metadata").is_file():  # the second without the first is damaged, as its reader says
        return path
    for folder in (path / CHECKPOINTS, path):
        iteration = latest(folder) if folder.is_dir() else None
        if iteration is not None:
            return iteration_path(folder, iteration)
    what = "has no manifest.json, and no checkpoints below it" if path.exists() else "no such folder"
    raise CheckpointError(f"{path}: {what}; name a published checkpoint (.../checkpoints/iter_0000100), or a run folder that has some")


def adopt(folder: Path, attempt: int) -> None:
    """Take over what the newest dead attempt has staged, so that work which goes on where it was is not lost; take away all else."""
    staged = sorted((int(path.name.rpartition("-")[2]), path) for path in folder.glob(".attempt-*"))
    if staged and staged[-1][0] < attempt:
        _rename(staged[-1][1], staging_path(folder, attempt))
    revoke(folder, attempt)


def find(folder: Path, tokens: int | None, stage: str) -> tuple[Path, Manifest]:
    """The checkpoint of a stage at exactly `tokens`, or its last; the error names what there is."""
    iterations = published(folder)
    if not iterations:
        raise CheckpointError(f"{folder}: stage '{stage}' has published no checkpoint; run it first")
    if tokens is None:
        last = latest(folder)
        path = iteration_path(folder, iterations[-1] if last is None else last)
        return path, read_manifest(path)
    readable, damaged = manifests(folder, iterations)
    for iteration, manifest in readable.items():
        if manifest.tokens == tokens:
            return iteration_path(folder, iteration), manifest
    if damaged:
        raise DamagedCheckpointError(f"{folder}: no whole checkpoint of '{stage}' at {tokens:,} tokens; damaged are: {'; '.join(damaged)}")
    there = ", ".join(f"{m.tokens:,}" for m in readable.values())
    raise CheckpointError(
        f"{folder}: no checkpoint of '{stage}' at {tokens:,} tokens; there are {there}. "
        f"Name one of these, or pin the point (plan.pin_every_tokens) and train the stage again"
    )


def manifests(folder: Path, iterations: list[int]) -> tuple[dict[int, Manifest], list[str]]:
    """The manifests that can be read, and what is wrong with the others."""
    found, damaged = {}, []
    for iteration in iterations:
        try:
            found[iteration] = read_manifest(iteration_path(folder, iteration))
        except DamagedCheckpointError as problem:
            damaged.append(str(problem))
    return found, damaged
