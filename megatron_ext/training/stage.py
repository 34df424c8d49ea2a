"""A training stage as a command: processes, logs, progress bar, provenance and marks around `train`.

Rank 0 and the last pipeline stage log into the attempt's folder, other ranks into the node's
temporary folder; whichever rank fails writes its traceback into the attempt's folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_ext import device
from megatron_ext.attempts import Attempt, begin_attempt
from megatron_ext.distributed import Groups, broadcast_object, environment_ranks, process_groups
from megatron_ext.errors import MegatronExtError
from megatron_ext.progress import Meter, progress
from megatron_ext.provenance import environment, read_corpus
from megatron_ext.runs import PROVENANCE, Run, mark_done, write_json
from megatron_ext.training.exports import ExportHook
from megatron_ext.training.hooks import Context, Hook, LogHook, MetricsHook, Record
from megatron_ext.training.trainer import train


def run_train(run: Run) -> None:
    """Train the stage of a run folder on the ranks of this environment, and mark it done."""
    rank, _ = environment_ranks()
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8")
    device.activate(run.stage.plan.device, run.stage.plan.threads_per_rank)
    started = time.perf_counter()
    with process_groups(run.stage.plan) as groups:
        attempt = broadcast_object(begin_attempt(run) if rank == 0 else None)
        beating = attempt.beating() if rank == 0 else contextlib.nullcontext()
        with _logging_to(_log_path(run, attempt, groups)), beating, _recording_end(attempt, rank):
            if rank == 0:
                _write_provenance(run, groups)
            summary = _Summary()
            shown = _ProgressHook(terminal)
            train(run, groups, attempt, [MetricsHook(), LogHook(shown.warn), ExportHook(shown.warn), shown, summary])
            if rank == 0:
                attempt.check_owner()
                seconds = round(time.perf_counter() - started, 2)
                mark_done(run, {**summary.values, "seconds": seconds, "peak_memory_bytes": device.peak_memory_bytes(run.stage.plan.device)})


class _ProgressHook(Hook):
    """Tokens, loss, learning rate and time left, on rank 0's terminal."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._stack = contextlib.ExitStack()
        self._bar: Meter | None = None

    def warn(self, text: str) -> None:
        """A line above the bar."""
        if self._bar:
            self._bar.say(text)
        else:
            print(text, file=self._terminal, flush=True)

    def start(self, context: Context) -> None:
        """Open the bar at the tokens that are done."""
        if context.groups.rank == 0:
            budget = context.run.stage.budget
            shown = progress(
                f"Train {context.run.name}", total=budget.tokens, unit="tokens", done=context.progress.tokens, stream=self._terminal
            )
            self._bar = self._stack.enter_context(shown)

    def step(self, context: Context, metrics: Record) -> None:
        """Move it by one batch."""
        if self._bar:
            self._bar.update(
                context.run.stage.budget.tokens_per_batch,
                loss=metrics["loss"],
                learning_rate=metrics["learning_rate"],
            )

    def skip(self, context: Context, found: Record) -> None:  # noqa: ARG002
        """Move it by a batch that was left out."""
        if self._bar:
            self._bar.update(context.run.stage.budget.tokens_per_batch)

    def roll_back(self, context: Context, found: Record) -> None:
        """Move it back to the checkpoint."""
        if self._bar:
            lost_steps = found["at_step"] - 1 - context.progress.step
            self._bar.update(-lost_steps * context.run.stage.budget.tokens_per_batch)

    def end(self, context: Context) -> None:  # noqa: ARG002
        """Close it."""
        self._stack.close()


class _Summary(Hook):
    """What the completion mark says of the training."""

    def __init__(self) -> None:
        self.values: Record = {}

    def start(self, context: Context) -> None:
        """Where the attempt begins: all there is to say where only the mark was missing."""
        progress = context.progress
        self.values = {"steps": progress.step, "tokens": progress.tokens, "lineage_tokens": progress.lineage_tokens}

    def step(self, context: Context, metrics: Record) -> None:
        """Remember the last step."""
        names = ("loss", "learning_rate", "tokens", "lineage_tokens", "skipped_tokens")
        self.values = {"steps": context.progress.step, **{name: metrics[name] for name in names}}

    def skip(self, context: Context, found: Record) -> None:
        """Count a batch that was left out; loss and learning rate stay those of the last step that was trained on."""
        names = ("tokens", "lineage_tokens", "skipped_tokens")
        self.values = {**self.values, "steps": context.progress.step, **{name: found[name] for name in names}}


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


def _write_provenance(run: Run, groups: Groups) -> None:
    corpus = read_corpus(run.inputs["corpus"])
    write_json(
        run.path / PROVENANCE,
        {
            **environment(),
            "tokenizer_hash": corpus.tokenizer_hash,
            "corpus": {name: {"tokens": source.tokens, "documents": source.documents} for name, source in corpus.sources.items()},
            "ranks": groups.plan.num_ranks,
            "peak": vars(device.peak(run.stage.plan.device, run.stage.precision)),
        },
    )
