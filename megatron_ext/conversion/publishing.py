"""A folder that is made aside, file by file and over several starts, and gets its name whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import CheckpointError
from megatron_ext.runs import force_to_disk


def work_folder(target: Path, word: str) -> Path:
    """Where `target` is made: `.NAME.word` beside it. `CheckpointError` where that name is a link, which would lead elsewhere.

    What a start left that was killed between the two renames of `publish` is taken up again.
    """
    work = target.with_name(f".{target.name}.{word}")
    if work.is_symlink():
        raise CheckpointError(f"{work}: is a link; this is where {target} would be made, and what it leads to would be emptied: remove it")
    for left in () if work.exists() else sorted(target.parent.glob(f"{work.name}.*")):
        with contextlib.suppress(OSError):  # another start took it
            os.rename(left, work)
    return work


def publish(work: Path, target: Path, sizes: Mapping[str, int]) -> None:
    """Give `work` the name `target`, if it holds exactly the files of `sizes` (name -> bytes).

    It first gets a name that nobody else knows, and is looked at under that: another start of the same work may be
    emptying it. `CheckpointError` where there is one, `OSError` where the system refuses; what is finished stays in `work`.
    """
    private = work.with_name(f"{work.name}.{uuid.uuid4().hex}")
    another = f"{target}: another start into the same folder was at work at the same time; run the command once more, alone"
    try:
        os.rename(work, private)
    except FileNotFoundError:
        raise CheckpointError(another) from None
    try:
        if {path.name: path.stat().st_size for path in private.iterdir()} != dict(sizes):
            raise CheckpointError(another)
        force_to_disk(private)
        os.rename(private, target)  # refused by the system where `target` has come to hold anything meanwhile
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(private, work)
        raise
    force_to_disk(target.parent)
