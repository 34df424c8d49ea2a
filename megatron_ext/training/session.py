"""An attempt at a stage that trains weights: its process groups, its log files, its heartbeat, how it ended.

Rank 0 and the last pipeline stage log into the attempt's folder, other ranks into the node's
temporary folder; whichever rank fails writes its traceback into the attempt's folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_ext import device
from megatron_ext.attempts import Attempt, begin_attempt
from megatron_ext.distributed import Groups, broadcast_object, environment_ranks, process_groups
from megatron_ext.errors import MegatronExtError
from megatron_ext.runs import Run


@contextlib.contextmanager
def attempt_session(run: Run) -> Iterator[tuple[Groups, Attempt, TextIO]]:
    """Groups, attempt and terminal of a stage on the ranks of this environment; what is printed meanwhile goes to the logs."""
    rank, _ = environment_ranks()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    device.activate(run.stage.plan.device, run.stage.plan.threads_per_rank)
    with process_groups(run.stage.plan) as groups:
        attempt = broadcast_object(begin_attempt(run) if rank == 0 else None)
        beating = attempt.beating() if rank == 0 else contextlib.nullcontext()
        with _logging_to(_log_path(run, attempt, groups)), beating, _recording_end(attempt, rank):
            yield groups, attempt, terminal


def _log_path(run: Run, attempt: Attempt, groups: Groups) -> Path:
    if groups.rank == 0:
        return attempt.log_path
    if groups.is_last_stage and groups.data_rank == 0 and groups.tensor_rank == 0:
        return attempt.path / f"log.rank{groups.rank}.txt"
    return Path(tempfile.gettempdir()) / f"megatron_ext.{run.graph}.{run.name}.{attempt.number}.rank{groups.rank}.txt"


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send standard output and error of this process, native code's too, to a file."""
    with path.open("ab", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in enumerate(kept, start=1):
                os.dup2(original, number)
                os.close(original)


@contextlib.contextmanager
def _recording_end(attempt: Attempt, rank: int) -> Iterator[None]:
    """Say how the attempt ended: rank 0 for all, a failing rank for itself, with its traceback."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide what stopped the training
            _record_failure(attempt, rank, error)
        raise
    if rank == 0:
        attempt.finish("done")


def _record_failure(attempt: Attempt, rank: int, error: BaseException) -> None:
    text = traceback.format_exc()
    print(text, file=sys.stderr)
    (attempt.path / f"rank_{rank:05d}.error.txt").write_text(text, encoding="utf-8")
    if rank == 0:
        reason = "stopped" if isinstance(error, MegatronExtError) else "failed"
        attempt.finish(reason, error=f"{type(error).__name__}: {error}")
