"""Hugging Face folders of chosen checkpoints (plan.export_tokens, plan.export_last), written beside the training.

    RUN/exports/iter_0000500/        a folder that transformers and vLLM load
    RUN/exports/.attempt-2/          what attempt 2 has not finished; never read

An export reads a published checkpoint in a process of its own, so training neither waits nor holds its weights
still. One runs at a time. One that fails stops nothing until the end of the stage, which then is not marked done:
started again, it exports what is missing. An export of a checkpoint that is no longer there, because the step was
trained again, counts as missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.memory import export_steps
from megatron_ext.config.stages import RLStage
from megatron_ext.conversion.beside import start_export
from megatron_ext.conversion.to_hugging_face import CONVERSION
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.provenance import MANIFEST, file_sha256, read_manifest
from megatron_ext.runs import EXPORTS, force_to_disk, read_json
from megatron_ext.tracker import iteration_path, published
from megatron_ext.training.hooks import Context, Hook, Record, Saved, say

LOG = "export-{step}.txt"  # in the attempt's folder
LOG_LINES = 12


@dataclass
class ExportHook(Hook):
    """Exports on rank 0; the other ranks do nothing."""

    warn: Callable[[str], None] = lambda _: None  # what is amiss also goes to the terminal
    _waiting: deque[int] = field(default_factory=deque)
    _running: tuple[int, subprocess.Popen[Any]] | None = None
    _failures: list[str] = field(default_factory=list)
    _own: set[int] = field(default_factory=set)  # steps whose checkpoints this attempt has published

    def start(self, context: Context) -> None:
        """Take up what earlier attempts have saved and not exported."""
        steps = _steps(context)
        if steps:
            folders.revoke(_exports(context), context.attempt.number)
            saved = set(published(context.run.checkpoints_path))
            self._waiting.extend(step for step in steps if step in saved and not _is_exported(context, step))
            self._advance(context)

    def step(self, context: Context, metrics: Record) -> None:  # noqa: ARG002
        """See whether one has ended, and begin the next."""
        self._advance(context)

    def checkpoint(self, context: Context, saved: Saved) -> None:
        """Export what was published, if it is to be."""
        step = saved.progress.step
        if saved.path is not None and step in _steps(context) and not _is_exported(context, step):
            self._own.add(step)
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
                "\n".join([*self._failures, "All steps are trained and saved. Start the stage again, and only what is missing is exported; "
                           "or without what cannot be: plan.export_tokens=[], plan.export_last=false"])
            )  # fmt: skip

    def _advance(self, context: Context) -> None:
        """Take note of an export that has ended, and begin the next; what fails is remembered and stops no training."""
        step = self._running[0] if self._running else None
        try:
            if self._running is not None and self._running[1].poll() is not None:
                (step, process), self._running = self._running, None
                self._finish(context, step, process.returncode)
            if self._running is None and self._waiting:
                step = self._waiting.popleft()
                self._running = step, self._begin(context, step)
        except OSError as error:
            self._fail(context, step, f"{error.filename or _exports(context)}: {error.strerror or error}")

    def _begin(self, context: Context, step: int) -> subprocess.Popen[Any]:
        target = _aside(context, step)
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = iteration_path(context.run.checkpoints_path, step)
        return start_export(checkpoint, target, _log(context, step), is_verified=step in self._own)

    def _finish(self, context: Context, step: int, code: int) -> None:
        """Put a finished export into place, or remember why there is none."""
        if code:
            self._fail(context, step, f"it ended {_ending(code)}: {_reason(_log(context, step))}")
            return
        path = iteration_path(_exports(context), step)
        context.attempt.check_owner()
        if path.exists():  # of a checkpoint that is no longer there
            stale = _aside(context, step).with_name("stale")
            os.replace(path, stale)
            shutil.rmtree(stale)
        os.replace(_aside(context, step), path)
        force_to_disk(path.parent)
        say(f"step {step}: exported to {path}")

    def _fail(self, context: Context, step: int | None, reason: str) -> None:
        self._failures.append(f"the export of step {step} to {_exports(context)} failed: {reason}")
        say(f"WARNING: {self._failures[-1]}")
        self.warn(f"{context.run.name}: WARNING: {self._failures[-1]}")


def _is_exported(context: Context, step: int) -> bool:
    """Whether a step's export is there and is of the checkpoint that is there now, or of that before its optimizer state was removed."""
    record = iteration_path(_exports(context), step) / CONVERSION
    checkpoint = iteration_path(context.run.checkpoints_path, step)
    try:
        source = read_json(record, "what an export was made from")["source"]["manifest_sha256"]
        return source in (file_sha256(checkpoint / MANIFEST), read_manifest(checkpoint).thinned_from)
    except (OSError, RunError, CheckpointError, KeyError, TypeError):
        return False  # not there, or none that can be read: it is made anew


def _ending(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _reason(log: Path) -> str:
    """What an export's log says from its error on, or its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip() if log.is_file() else ""
    found = text.rpartition("error: ")[2] if "error: " in text else "\n".join(text.splitlines()[-LOG_LINES:])
    return f"{found or 'it printed nothing'} (see {log})"


def _steps(context: Context) -> tuple[int, ...]:
    """The steps to export, on the rank that does it."""
    stage = context.run.stage
    if context.groups.rank != 0:
        return ()
    if isinstance(stage, RLStage):
        return (stage.steps,) if stage.plan.export_last else ()
    return export_steps(stage.budget, stage.plan)


def _exports(context: Context) -> Path:
    return context.run.path / EXPORTS


def _aside(context: Context, step: int) -> Path:
    return folders.aside_path(_exports(context), step, context.attempt.number)


def _log(context: Context, step: int) -> Path:
    return context.attempt.path / LOG.format(step=step)
