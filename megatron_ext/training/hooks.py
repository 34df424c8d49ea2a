"""Eight events of a training stage, and the hooks that watch them. Hooks never change the training.

| event      | when                                     | what it is given beside the context |
|------------|------------------------------------------|-------------------------------------|
| start      | weights are in place, before any step    |                                     |
| step       | after an optimizer step                  | the step's metrics                  |
| skip       | after a batch was left out               | what was found                      |
| stop       | before a step that cannot be trained on  | what was found                      |
|            | stops the stage                          |                                     |
| roll_back  | after an older checkpoint was loaded     | what was found, at which step       |
| validation | after held-out losses were computed      | one record per source               |
| checkpoint | after a save ended                       | how: what was published, or why not |
| end        | after the last step's checkpoint         |                                     |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.attempts import Attempt
from megatron_ext.distributed import Groups
from megatron_ext.errors import RunError
from megatron_ext.metrics import MetricsWriter
from megatron_ext.runs import Run
from megatron_ext.training.fallback import fall_back_words
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


@dataclass(frozen=True)
class Saved:
    """How a save ended."""

    progress: Progress  # what it holds
    path: Path | None  # published; None: it failed, and training goes on by policy
    seconds: float  # from its begin to its end
    stall_seconds: float  # of them, how long training waited
    problem: str = ""  # why it failed, or what else went wrong


class Hook:
    """Does nothing at every event; override what is wanted. Called on every rank, in the order given."""

    def start(self, context: Context) -> None:
        """Before the first step of this attempt."""

    def step(self, context: Context, metrics: Record) -> None:
        """After a step."""

    def skip(self, context: Context, found: Record) -> None:
        """After a batch was left out; the step counts as finished."""

    def stop(self, context: Context, found: Record) -> None:
        """Before the stage stops at a step that is not finished."""

    def roll_back(self, context: Context, found: Record) -> None:
        """After an older checkpoint was loaded; training goes on from there."""

    def validation(self, context: Context, records: list[Record]) -> None:
        """After a validation."""

    def checkpoint(self, context: Context, saved: Saved) -> None:
        """After a save."""

    def end(self, context: Context) -> None:
        """After the stage's last checkpoint."""


class MetricsHook(Hook):
    """Writes metrics.jsonl on rank 0; `kinds` of a step's record and of a validation's."""

    def __init__(self, kinds: tuple[str, str] = ("train", "validation")) -> None:
        self._kinds = kinds
        self._writer: MetricsWriter | None = None

    def start(self, context: Context) -> None:
        """Open the file and mark where this attempt begins."""
        if context.groups.rank == 0:
            context.attempt.check_owner()
            self._writer = MetricsWriter(context.run.metrics_path, context.attempt.number, context.progress.step)

    def step(self, context: Context, metrics: Record) -> None:
        """One record every `log_every_steps`, and one at each joint: the first step and the last."""
        step, stage = context.progress.step, context.run.stage
        if step in (1, stage.num_steps) or step % stage.plan.log_every_steps == 0:
            self._write(context, self._kinds[0], step, metrics)

    def skip(self, context: Context, found: Record) -> None:
        """One `skip` record."""
        self._write(context, "skip", context.progress.step, found)

    def stop(self, context: Context, found: Record) -> None:
        """One `stop` record, under the number of the step that was not done."""
        self._write(context, "stop", context.progress.step + 1, found)

    def roll_back(self, context: Context, found: Record) -> None:
        """One `roll_back` record; what was recorded after its step is done again."""
        self._write(context, "roll_back", context.progress.step, found)

    def validation(self, context: Context, records: list[Record]) -> None:
        """One record a source."""
        for record in records:
            self._write(context, self._kinds[1], context.progress.step, record)

    def checkpoint(self, context: Context, saved: Saved) -> None:
        """One `checkpoint` record, or `failed_save`."""
        took = {"seconds": saved.seconds, "stall_seconds": saved.stall_seconds}
        if saved.path is None:
            self._write(context, "failed_save", saved.progress.step, {**took, "problem": saved.problem})
        elif self._writer:
            size_bytes = sum(p.stat().st_size for p in saved.path.iterdir())
            self._write(context, "checkpoint", saved.progress.step, {"path": saved.path.name, "bytes": size_bytes, **took})

    def _write(self, context: Context, kind: str, step: int, values: Record) -> None:
        """Append a record on rank 0. A full disk is treated as at a save: it stops the stage, or the record is lost, and said to be."""
        if self._writer is None:
            return
        context.attempt.check_owner()
        try:
            self._writer.write(kind, step, values)
        except OSError as refusal:
            if context.run.stage.plan.on_failed_save == "stop":
                raise RunError(
                    f"{refusal}; make room on its disk and start the stage again: the last published checkpoint stands"
                ) from None
            say(f"step {step}: WARNING: a record '{kind}' is lost: {refusal}")

    def end(self, context: Context) -> None:  # noqa: ARG002
        """Close the file."""
        if self._writer:
            self._writer.close()


class LogHook(Hook):
    """Plain lines on rank 0's log: where the attempt began, held-out losses, what was published. What is amiss also goes to `warn`."""

    def __init__(self, warn: Callable[[str], None] = lambda _: None) -> None:
        self._warn = warn

    def start(self, context: Context) -> None:
        """Say from where."""
        self._say(context, f"attempt {context.attempt.number} of stage '{context.run.name}' begins ({context.how})")
        fallen = fall_back_words(context.attempt) if context.groups.rank == 0 else ""
        if fallen:  # the log has it already
            self._warn(f"{context.run.name}: WARNING: {fallen}")

    def skip(self, context: Context, found: Record) -> None:
        """Say that a batch was left out, and why."""
        self._say(context, f"WARNING: the batch was left out: {_reason(found)}")

    def roll_back(self, context: Context, found: Record) -> None:
        """Say from where training goes on, and why."""
        self._say(context, f"WARNING: went back to here from step {found['at_step']}, whose batch will be left out: {_reason(found)}")

    def validation(self, context: Context, records: list[Record]) -> None:
        """Say the held-out losses."""
        if records:
            self._say(context, "held-out loss: " + ", ".join(f"{r['source']} {r['loss']:.4f}" for r in records))

    def checkpoint(self, context: Context, saved: Saved) -> None:
        """Say what was published, or why nothing was."""
        if saved.path is not None:
            self._say(context, f"published {saved.path.name} after {saved.seconds:.2f} s; training waited {saved.stall_seconds:.2f} s")
        if saved.problem:
            self._say(context, f"WARNING: {saved.problem}")

    def end(self, context: Context) -> None:
        """Say that this was all."""
        self._say(context, "all steps are done")

    def _say(self, context: Context, text: str) -> None:
        if context.groups.rank == 0:
            say(f"step {context.progress.step}, {context.progress.tokens:,} tokens: {text}")
            if text.startswith("WARNING"):
                self._warn(f"{context.run.name}, step {context.progress.step}: {text}")


def say(text: str) -> None:
    """A line of the log; one that the disk refuses stops no training."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _reason(found: Record) -> str:
    """'loss spike: 12.1, where the steps before have 2.31 on average, with a deviation of 0.0412'."""
    if found["mean"] is None:
        return str(found["reason"])
    average = f"where the steps before have {found['mean']:.6g} on average, with a deviation of {found['sigma']:.3g}"
    return f"{found['reason']}: {found['value']:.6g}, {average}"


class Hooks:
    """Several hooks as one."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = tuple(hooks)

    def call(self, event: str, *arguments: Any) -> None:
        """Call one event on every hook, in order."""
        for hook in self._hooks:
            getattr(hook, event)(*arguments)
