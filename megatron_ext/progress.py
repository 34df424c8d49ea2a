"""How far a long piece of work is: a bar on a terminal, plain lines every few seconds elsewhere.

with progress("Tokenize corpus", total=3_000, unit="documents") as bar:
    bar.update(100, tokens=52_310)
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn

LINE_EVERY_SECONDS = 5.0
BAR_COLUMNS = 10
SHORT_NAMES = {"learning_rate": "lr"}


class Meter:
    """Counts work done and shows it; `update` is cheap enough to call for every step."""

    def __init__(self, title: str, total: int | None, unit: str, done: int, stream: TextIO, every_seconds: float) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.fields: dict[str, Any] = {}
        self._stream, self._every_seconds = stream, every_seconds
        self._began, self._from, self._shown = time.monotonic(), done, time.monotonic()
        self._bar: Progress | None = None

    def update(self, amount: int = 0, **fields: Any) -> None:
        """Add `amount` units done; `fields` (tokens=..., loss=...) stand beside the count until they are given again."""
        self.done += amount
        self.fields.update(fields)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, facts=self._short_facts())
        elif time.monotonic() - self._shown >= self._every_seconds and self.done != self.total:  # the last line is the block's end
            self._print_line()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _print_line(self) -> None:
        self._shown = time.monotonic()
        print(f"{self.title}: {self._facts()}", file=self._stream, flush=True)

    def _facts(self) -> str:
        """'1,200 / 3,000 documents (40%), tokens 61,200, 0:00:12 left'."""
        share = f" / {self.total:,} {self.unit} ({100 * self.done / self.total:.0f}%)" if self.total else f" {self.unit}"
        named = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.fields.items()]
        return ", ".join([f"{self.done:,}{share}", *named, *self._time()])

    def _short_facts(self) -> str:
        """'40% 1.20k documents  tokens 61.2k  0:00:12 left': what fits beside a bar in 80 columns."""
        share = f"{100 * self.done // self.total}% " if self.total else ""
        named = [f"{SHORT_NAMES.get(name, name.replace('_', ' '))} {_compact(value)}" for name, value in self.fields.items()]
        return "  ".join([f"{share}{_compact(self.done)} {self.unit}", *named, *self._time()])

    def _time(self) -> list[str]:
        seconds, units = time.monotonic() - self._began, self.done - self._from
        if self.total is None or self.done >= self.total:
            return [f"{_clock(seconds)} taken"]
        return [f"{_clock(seconds / units * (self.total - self.done))} left"] if units else []

    @contextlib.contextmanager
    def showing(self) -> Iterator[Meter]:
        """Show while the work runs; the last line stands even if the work fails."""
        if self._stream.isatty():
            columns: tuple[ProgressColumn, ...] = (
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=BAR_COLUMNS), TextColumn("{task.fields[facts]}"),
            )  # fmt: skip
            # Standard output may be the attempt's log by now: what is printed there must not be drawn over the bar.
            drawn = Progress(*columns, console=Console(file=self._stream), redirect_stdout=False, redirect_stderr=False)
            with drawn as self._bar:
                self._bar.add_task(self.title, total=self.total, completed=self.done, facts="")
                yield self
            return
        try:
            yield self
        finally:
            self._print_line()


def progress(
    title: str, *, total: int | None, unit: str, done: int = 0, stream: TextIO | None = None, every_seconds: float = LINE_EVERY_SECONDS
) -> contextlib.AbstractContextManager[Meter]:
    """Show work of `total` units (None: unknown), `done` of them before it began; on `stream` (None: standard output)."""
    return Meter(title, total, unit, done, stream or sys.stdout, every_seconds).showing()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _compact(value: Any) -> str:
    """Three digits: 491,520 -> 492k, 0.0004028 -> 0.000403."""
    if not isinstance(value, int) or value < 1000:
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
