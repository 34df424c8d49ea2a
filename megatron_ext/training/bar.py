"""A stage's progress bar on rank 0's terminal, while its output goes to the log."""

from __future__ import annotations

import contextlib
from typing import TextIO

from megatron_ext.progress import Meter, progress
from megatron_ext.training.hooks import Context, Hook


class TerminalBar(Hook):
    """Opened by `start` of each kind of stage, which knows what it counts; None on the other ranks."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._stack = contextlib.ExitStack()
        self._bar: Meter | None = None

    def open(self, context: Context, title: str, *, total: int, unit: str, done: int) -> None:
        """Show it, on rank 0."""
        if context.groups.rank == 0:
            self._bar = self._stack.enter_context(progress(title, total=total, unit=unit, done=done, stream=self._terminal))

    def warn(self, text: str) -> None:
        """A line above the bar."""
        if self._bar:
            self._bar.say(text)
        else:
            print(text, file=self._terminal, flush=True)

    def end(self, context: Context) -> None:  # noqa: ARG002
        """Close it."""
        self._stack.close()
