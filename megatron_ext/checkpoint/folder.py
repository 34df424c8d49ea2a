"""Names inside a run's checkpoint folder, and which checkpoints are published.

checkpoints/iter_0000500/                    a published checkpoint (has a manifest)
checkpoints/latest_checkpointed_iteration.txt  Megatron's tracker, written last
checkpoints/.iter_0000500.attempt-2.tmp/      being written; never read
checkpoints/.iter_0000500.discarded.tmp/      being deleted; never read
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, Manifest, read_manifest
from megatron_ext.runs import atomic_write

TRACKER = "latest_checkpointed_iteration.txt"
_PUBLISHED = re.compile(r"iter_([0-9]{7,})")
_NUMBER = re.compile(r"[0-9]+")


def iteration_path(folder: Path, iteration: int) -> Path:
    """Path of a checkpoint, by Megatron's naming."""
    return folder / f"iter_{iteration:07d}"


def aside_path(folder: Path, iteration: int, attempt: int) -> Path:
    """Where an attempt writes a checkpoint before it is published."""
    return folder / f".iter_{iteration:07d}.attempt-{attempt}.tmp"


def published(folder: Path) -> list[int]:
    """Iterations of the published checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = ((_PUBLISHED.fullmatch(p.name), p) for p in folder.iterdir())
    return sorted(int(m[1]) for m, p in matches if m and (p / MANIFEST).is_file())


def latest(folder: Path) -> int | None:
    """The iteration that the tracker names, or None where nothing was published."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not _NUMBER.fullmatch(text):
        raise CheckpointError(f"{tracker}: holds {text[:40]!r}, not an iteration; write the number of a folder iter_* into it")
    if int(text) not in published(folder):
        raise CheckpointError(
            f"{tracker}: names iteration {text}, but {iteration_path(folder, int(text))} is no published checkpoint; "
            f"published are {published(folder)}: write one of these into the tracker"
        )
    return int(text)


def publish(folder: Path, aside: Path, iteration: int) -> Path:
    """Rename a whole checkpoint into place and move the tracker to it."""
    target = iteration_path(folder, iteration)
    if target.exists():  # an earlier attempt got this far but not to the tracker
        _discard(target)
    aside.rename(target)
    atomic_write(folder / TRACKER, f"{iteration}\n")
    return target


def _discard(path: Path) -> None:
    """Unpublish a checkpoint by one rename, then delete it: half of it is never seen as a checkpoint."""
    doomed = path.with_name(f".{path.name}.discarded.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_unpublished(folder: Path) -> None:
    """Delete what dead writers left behind."""
    for path in folder.glob(".iter_*.tmp") if folder.is_dir() else ():
        shutil.rmtree(path)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the pinned checkpoints, the newest `keep` of the others, and the one that the tracker names."""
    last = latest(folder)
    routine = [i for i in published(folder) if not read_manifest(iteration_path(folder, i)).pinned]
    for iteration in routine[:-keep]:
        if iteration != last:
            _discard(iteration_path(folder, iteration))


def find(folder: Path, tokens: int | None, stage: str) -> tuple[Path, Manifest]:
    """The checkpoint of a stage at exactly `tokens`, or its last; the error names what there is."""
    iterations = published(folder)
    if not iterations:
        raise CheckpointError(f"{folder}: stage '{stage}' has published no checkpoint; run it first")
    if tokens is None:
        last = latest(folder)
        path = iteration_path(folder, iterations[-1] if last is None else last)
        return path, read_manifest(path)
    manifests = {i: read_manifest(iteration_path(folder, i)) for i in iterations}
    for iteration, manifest in manifests.items():
        if manifest.tokens == tokens:
            return iteration_path(folder, iteration), manifest
    there = ", ".join(f"{m.tokens:,}" for m in manifests.values())
    raise CheckpointError(
        f"{folder}: no checkpoint of '{stage}' at {tokens:,} tokens; there are {there}. "
        f"Name one of these, or pin the point (plan.pin_every_tokens) and train the stage again"
    )
