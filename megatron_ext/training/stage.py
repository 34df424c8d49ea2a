"""A training stage as a command: progress bar, provenance and marks around `train`."""

from __future__ import annotations

import time

from megatron_ext import device
from megatron_ext.distributed import Groups
from megatron_ext.provenance import environment, read_corpus
from megatron_ext.runs import PROVENANCE, Run, mark_done, write_json
from megatron_ext.training.bar import TerminalBar
from megatron_ext.training.exports import ExportHook
from megatron_ext.training.hooks import Context, Hook, LogHook, MetricsHook, Record
from megatron_ext.training.session import attempt_session
from megatron_ext.training.stragglers import StragglerHook
from megatron_ext.training.trainer import train


def run_train(run: Run) -> None:
    """Train the stage of a run folder on the ranks of this environment, and mark it done."""
    started = time.perf_counter()
    with attempt_session(run) as (groups, attempt, terminal):
        if groups.rank == 0:
            _write_provenance(run, groups)
        summary = _Summary()
        shown = _ProgressHook(terminal)
        train(run, groups, attempt, [MetricsHook(), LogHook(shown.warn), ExportHook(shown.warn), StragglerHook(shown.warn), shown, summary])
        if groups.rank == 0:
            attempt.check_owner()
            seconds = round(time.perf_counter() - started, 2)
            mark_done(run, {**summary.values, "seconds": seconds, "peak_memory_bytes": device.peak_memory_bytes(run.stage.plan.device)})


class _ProgressHook(TerminalBar):
    """Tokens, loss, learning rate and time left, on rank 0's terminal."""

    def start(self, context: Context) -> None:
        """Open the bar at the tokens that are done."""
        budget = context.run.stage.budget
        self.open(context, f"Train {context.run.name}", total=budget.tokens, unit="tokens", done=context.progress.tokens)

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
