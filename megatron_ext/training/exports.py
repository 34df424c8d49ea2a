"""Hugging Face folders of chosen checkpoints (plan.export_tokens, plan.export_last), written beside the training.

    RUN/exports/iter_0000500/        a folder that transformers and vLLM load
    RUN/exports/.attempt-2/          what attempt 2 has not finished; never read

An export reads a published checkpoint in a process of its own, so training neither waits nor holds its weights
still. One runs at a time. One that fails stops nothing until the end of the stage, which then is not marked done:
started again, it exports what is missing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.memory import export_steps
from megatron_ext.conversion.beside import start_export
from megatron_ext.errors import CheckpointError
from megatron_ext.runs import EXPORTS
from megatron_ext.tracker import iteration_path, published
from megatron_ext.training.hooks import Context, Hook, Record, Saved, say

LOG = "export.txt"  # in the attempt's folder
LOG_LINES = 5


@dataclass
class ExportHook(Hook):
    """Exports on rank 0; the other ranks do nothing."""

    _waiting: deque[int] = field(default_factory=deque)
    _running: tuple[int, subprocess.Popen[Any]] | None = None
    _failures: list[str] = field(default_factory=list)

    def start(self, context: Context) -> None:
        """Take up what earlier attempts have saved and not exported."""
        steps = _steps(context)
        if not steps:
            return
        folders.revoke(_exports(context), context.attempt.number)
        saved = set(published(context.run.checkpoints_path))
        self._waiting.extend(step for step in steps if step in saved and not iteration_path(_exports(context), step).exists())
        self._advance(context)

    def step(self, context: Context, metrics: Record) -> None:  # noqa: ARG002
        """See whether one has ended, and begin the next."""
        self._advance(context)

    def checkpoint(self, context: Context, saved: Saved) -> None:
        """Export what was published, if it is to be."""
        step = saved.progress.step
        if saved.path is not None and step in _steps(context) and not iteration_path(_exports(context), step).exists():
            self._waiting.append(step)
            self._advance(context)

    def end(self, context: Context) -> None:
        """Wait for the last; `CheckpointError` lists what could not be exported."""
        while self._waiting or self._running:
            if self._running:
                self._running[1].wait()
            self._advance(context)
        with contextlib.suppress(OSError):  # not there, or not empty
            folders.staging_path(_exports(context), context.attempt.number).rmdir()
        if self._failures:
            raise CheckpointError(
                "\n".join([*self._failures, "all steps are trained and saved: start the stage again, and only what is missing is exported"])
            )

    def _advance(self, context: Context) -> None:
        if self._running is not None and self._running[1].poll() is not None:
            (step, process), self._running = self._running, None
            self._finish(context, step, process.returncode)
        if self._running is None and self._waiting:
            step = self._waiting.popleft()
            target = _aside(context, step)
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = iteration_path(context.run.checkpoints_path, step)
            self._running = step, start_export(checkpoint, target, context.attempt.path / LOG)

    def _finish(self, context: Context, step: int, code: int) -> None:
        """Put a finished export into place, or remember why there is none."""
        path = iteration_path(_exports(context), step)
        if code == 0:
            context.attempt.check_owner()
            os.replace(_aside(context, step), path)
            say(f"step {step}: exported to {path}")
            return
        log = context.attempt.path / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-LOG_LINES:]
        reason = lines[-1].removeprefix("error: ") if lines else "it printed nothing"
        self._failures.append(f"{path}: the export of step {step} ended with code {code}: {reason} (see {log})")
        say(f"WARNING: {self._failures[-1]}")


def _steps(context: Context) -> tuple[int, ...]:
    """The steps to export, on the rank that does it."""
    stage = context.run.stage
    return export_steps(stage.budget, stage.plan) if context.groups.rank == 0 else ()


def _exports(context: Context) -> Path:
    return context.run.path / EXPORTS


def _aside(context: Context, step: int) -> Path:
    return folders.aside_path(_exports(context), step, context.attempt.number)
