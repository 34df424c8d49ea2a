"""Five events of a training stage, and the hooks that watch them. Hooks never change the training.

| event      | when                                     | what it is given beside the context |
|------------|------------------------------------------|-------------------------------------|
| start      | weights are in place, before any step    |                                     |
| step       | after an optimizer step                  | the step's metrics                  |
| validation | after held-out losses were computed      | one record per source               |
| checkpoint | after a checkpoint was published         | its path, seconds it took           |
| end        | after the last step's checkpoint         |                                     |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.distributed import Groups
from megatron_ext.metrics import MetricsWriter
from megatron_ext.runs import Attempt, Run
from megatron_ext.training.state import Progress, TrainState

Record = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a hook may look at; `progress` is as of the event."""

    run: Run
    attempt: Attempt
    groups: Groups
    state: TrainState
    progress: Progress
    how: str  # scratch, weights, branch or resume


class Hook:
    """Does nothing at every event; override what is wanted. Called on every rank, in the order given."""

    def start(self, context: Context) -> None:
        """Before the first step of this attempt."""

    def step(self, context: Context, metrics: Record) -> None:
        """After a step."""

    def validation(self, context: Context, records: list[Record]) -> None:
        """After a validation."""

    def checkpoint(self, context: Context, path: Path, seconds: float) -> None:
        """After a publish."""

    def end(self, context: Context) -> None:
        """After the stage's last checkpoint."""


class MetricsHook(Hook):
    """Writes metrics.jsonl on rank 0."""

    def __init__(self) -> None:
        self._writer: MetricsWriter | None = None

    def start(self, context: Context) -> None:
        """Open the file and mark where this attempt begins."""
        if context.groups.rank == 0:
            self._writer = MetricsWriter(context.run.metrics_path, context.attempt.number, context.progress.step)

    def step(self, context: Context, metrics: Record) -> None:
        """One `train` record every `log_every_steps`, and one at each joint: the first step and the last."""
        step, stage = context.progress.step, context.run.stage
        if self._writer and (step in (1, stage.budget.steps) or step % stage.plan.log_every_steps == 0):
            self._writer.write("train", context.progress.step, metrics)

    def validation(self, context: Context, records: list[Record]) -> None:
        """One `validation` record a source."""
        for record in records if self._writer else ():
            assert self._writer is not None
            self._writer.write("validation", context.progress.step, record)

    def checkpoint(self, context: Context, path: Path, seconds: float) -> None:
        """One `checkpoint` record."""
        if self._writer:
            size_bytes = sum(p.stat().st_size for p in path.iterdir())
            self._writer.write("checkpoint", context.progress.step, {"path": path.name, "seconds": seconds, "bytes": size_bytes})

    def end(self, context: Context) -> None:  # noqa: ARG002
        """Close the file."""
        if self._writer:
            self._writer.close()


class LogHook(Hook):
    """Plain lines on rank 0's log: where the attempt began, held-out losses, what was published."""

    def start(self, context: Context) -> None:
        """Say from where."""
        self._say(context, f"attempt {context.attempt.number} of stage '{context.run.name}' begins ({context.how})")

    def validation(self, context: Context, records: list[Record]) -> None:
        """Say the held-out losses."""
        self._say(context, "held-out loss: " + ", ".join(f"{r['source']} {r['loss']:.4f}" for r in records))

    def checkpoint(self, context: Context, path: Path, seconds: float) -> None:
        """Say what was published."""
        self._say(context, f"published {path.name} in {seconds:.2f} s")

    def end(self, context: Context) -> None:
        """Say that this was all."""
        self._say(context, "all steps are done")

    def _say(self, context: Context, text: str) -> None:
        if context.groups.rank == 0:
            print(f"step {context.progress.step}, {context.progress.tokens:,} tokens: {text}", flush=True)


class Hooks:
    """Several hooks as one."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = tuple(hooks)

    def call(self, event: str, *arguments: Any) -> None:
        """Call one event on every hook, in order."""
        for hook in self._hooks:
            getattr(hook, event)(*arguments)
