"""Which checkpoints stand in a run's folder `checkpoints`, by Megatron's names, and which of them is the newest. Needs no torch.

A checkpoint is published once it has its name and a manifest; the tracker, written after it, names the newest.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_ext.errors import DamagedCheckpointError
from megatron_ext.provenance import MANIFEST

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,})")
_NUMBER = re.compile(r"[0-9]{1,18}")


def iteration_path(folder: Path, iteration: int) -> Path:
    """Path of a checkpoint, by Megatron's naming."""
    return folder / f"iter_{iteration:07d}"


def published(folder: Path) -> list[int]:
    """Iterations of the published checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = ((ITERATION.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(int(match[1]) for match, path in matches if match and (path / MANIFEST).is_file())


def read_tracker(folder: Path) -> int | None:
    """The iteration that the tracker names, None where there is no tracker; `DamagedCheckpointError` where that is no published one."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not _NUMBER.fullmatch(text):
        raise DamagedCheckpointError(f"{tracker}: holds {text[:40]!r}, not an iteration; write the number of a folder iter_* into it")
    if int(text) not in published(folder):
        raise DamagedCheckpointError(
            f"{tracker}: names iteration {text}, but {iteration_path(folder, int(text))} is no published checkpoint; "
            f"published are {published(folder)}: write one of these into the tracker"
        )
    return int(text)


def newest(folder: Path) -> tuple[int | None, str]:
    """The checkpoint that a run would go on from if it is whole, and what is wrong with the tracker ('': nothing).

    Without a good tracker it is the newest published one. Who only looks asks this: one run's tracker must not hide the others.
    """
    damage = ""
    try:
        named = read_tracker(folder)
    except DamagedCheckpointError as problem:
        named, damage = None, str(problem)
    return (named if named is not None else max(published(folder), default=None)), damage
