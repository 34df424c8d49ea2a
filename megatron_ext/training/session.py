"""An attempt at a stage that trains weights: its process groups, its log files, its heartbeat, how it ended.

Rank 0 and the last pipeline stage log into the attempt's folder, other ranks into the node's
temporary folder; whichever rank fails writes its traceback into the attempt's folder. One that is asked
to stop before its loop begins leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron_ext import device, interruption
from megatron_ext.attempts import Attempt, begin_attempt, pulse
from megatron_ext.config.base import content_hash
from megatron_ext.distributed import Groups, broadcast_object, environment_ranks, process_groups
from megatron_ext.errors import Interrupted, MegatronExtError
from megatron_ext.redaction import own_secrets, without_secrets
from megatron_ext.runs import Run
from megatron_ext.training.stopping import has_begun


@contextlib.contextmanager
def attempt_session(run: Run) -> Iterator[tuple[Groups, Attempt, TextIO]]:
    """Groups, attempt and terminal of a stage on the ranks of this environment; what is printed meanwhile goes to the logs."""
    rank, _ = environment_ranks()
    interruption.listen()
    interruption.leave_at_once()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    device.activate(run.stage.plan.device, run.stage.plan.threads_per_rank)
    with process_groups(run.stage.plan) as groups:
        attempt = broadcast_object(begin_attempt(run) if rank == 0 else None)
        interruption.leave_at_once(partial(_last_words, attempt, terminal))
        beating = attempt.beating() if rank == 0 else contextlib.nullcontext()
        with _logging_to(_log_path(run, attempt, groups)), beating, _recording_end(attempt, rank, terminal):
            pulse()
            yield groups, attempt, terminal


def _last_words(attempt: Attempt, terminal: TextIO, signal_name: str) -> None:
    """Say why the attempt ends before its loop: whichever rank is asked, for all, which cannot go on without it."""
    words = f"asked to stop ({signal_name}) before its first step; the same command begins again"
    attempt.interrupted(words, terminal)


def _log_path(run: Run, attempt: Attempt, groups: Groups) -> Path:
    if groups.rank == 0:
        return attempt.log_path
    if groups.is_last_stage and groups.data_rank == 0 and groups.tensor_rank == 0:
        return attempt.path / f"log.rank{groups.rank}.txt"
    whose = f"{os.getuid()}.{content_hash(str(run.path))[:8]}"  # a node's folder for all: others may run the same recipe
    return Path(tempfile.gettempdir()) / f"megatron_ext.{whose}.{run.graph}.{run.name}.{attempt.number}.rank{groups.rank}.txt"


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
def _recording_end(attempt: Attempt, rank: int, terminal: TextIO) -> Iterator[None]:
    """Say how the attempt ended: rank 0 for all, a failing rank for itself, with its traceback.

    What fails while the stage begins, because a rank that was asked to stop has left, ends as that rank does.
    """
    try:
        yield
    except Interrupted as request:
        if rank == 0:
            attempt.interrupted(str(request), terminal)
        with contextlib.suppress(RuntimeError):  # one has left already
            dist.barrier()  # else a launcher may end the others as soon as one has ended
        raise
    except BaseException as error:
        if not has_begun() and (interruption.request() or attempt.is_interrupted()):
            words = "asked to stop, by way of another rank, before its first step; the same command begins again"
            if rank == 0:
                attempt.interrupted(words, terminal)
            raise Interrupted(words) from error
        with contextlib.suppress(OSError):  # a full disk must not hide what stopped the training
            _record_failure(attempt, rank, error)
        raise
    finally:
        interruption.ignore()
    if rank == 0:
        attempt.finish("done")


def _record_failure(attempt: Attempt, rank: int, error: BaseException) -> None:
    text = without_secrets(traceback.format_exc(), own_secrets())
    print(text, file=sys.stderr)
    (attempt.path / f"rank_{rank:05d}.error.txt").write_text(text, encoding="utf-8")
    if rank == 0:
        reason = "stopped" if isinstance(error, MegatronExtError) else "failed"
        attempt.finish(reason, error=f"{type(error).__name__}: {error}")
