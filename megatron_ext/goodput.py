"""Where the time of a run went: its job's ledger, its attempts and its metrics, read into six parts that add up.

productive   in the loop, for steps that stand: loading, training, held-out losses, batches left out on purpose
recomputed   in the loop, for steps that a later attempt or a roll-back did again, and going back itself
queued       a job waited for its nodes, from when it could have started or was requeued
starting     from a start to its loop; all of a start that never came to it
saving       training waited for a save, published or failed
idle         the rest of what a job held: hangs, saves and steps that were cut short, ending

Time between records in a row is shared out by how many of its steps stand, so it may be many steps long. Time between
two jobs is in no part: nothing was submitted, or a parent was not done. docs/cluster.md explains how to read the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from megatron_ext.attempts import INTERRUPTED
from megatron_ext.metrics import STARTS, Record
from megatron_ext.run_times import Period, TimedAttempt, run_periods, ticks
from megatron_ext.runs import Run

LEAST_FAILURES = 2  # one failure says nothing of how far apart they are
SHOWN_SHARE = 0.0005  # smaller parts are left out of the words
ENDED_WELL = ("done", INTERRUPTED)
CLOCK_SECONDS = 1.0  # times in words are whole seconds; a pulse later than that is of a folder that was copied


@dataclass(frozen=True)
class Seconds:
    """Seconds, or node-seconds, of each part, in whole ticks: their sum is exact."""

    productive: float = 0.0
    recomputed: float = 0.0
    queued: float = 0.0
    starting: float = 0.0
    saving: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def held(self) -> float:
        """All but the queue: while nodes were held."""
        return self.total - self.queued

    @property
    def goodput(self) -> float | None:
        """The productive share of what was held; None where nothing was."""
        return self.productive / self.held if self.held else None

    @property
    def goodput_with_queue(self) -> float | None:
        """The productive share of all; None where there is nothing."""
        return self.productive / self.total if self.total else None

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def of_nodes(self, nodes: int) -> Seconds:
        """The same as node-seconds."""
        return Seconds(*(getattr(self, part.name) * nodes for part in fields(self)))


@dataclass(frozen=True)
class Goodput:
    """What a run, or several, made of their time."""

    seconds: Seconds = Seconds()  # of a run, on the clock; of several their sum, though they may have run side by side
    node_seconds: Seconds = Seconds()  # nodes of a job that is queued are those that it will get
    starts: int = 0  # of jobs, and attempts without a job
    job_starts: int = 0
    failures: int = 0  # attempts that came to the loop, and ended neither done nor asked to stop
    steps: int = 0  # recorded, those that were done again included
    step_seconds: float = 0.0  # that they took, held-out losses included
    saves: int = 0  # published or failed
    stall_seconds: float = 0.0  # that training waited for them in passing; not at its end, where nothing else was left to do

    def __add__(self, other: Goodput) -> Goodput:
        return Goodput(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Interval:
    """How often a run saves, and how often its measured failures suggest."""

    planned_steps: int
    failures: int
    step_seconds: float | None  # mean, held-out losses included; None before the first step
    save_seconds: float | None  # mean that training waited for one; None before the first
    between_failures_seconds: float | None  # mean, in the loop; None before there are LEAST_FAILURES

    @property
    def planned_seconds(self) -> float | None:
        """The plan's interval; None before the first step."""
        return None if self.step_seconds is None else self.planned_steps * self.step_seconds

    @property
    def suggested_seconds(self) -> float | None:
        """Young's sqrt(2 x save x time between failures) (1974); None where one of the two is not measured, or a save costs nothing."""
        if not self.save_seconds or self.between_failures_seconds is None:
            return None
        return math.sqrt(2 * self.save_seconds * self.between_failures_seconds)

    @property
    def suggested_steps(self) -> int | None:
        """The same in steps, at least 1."""
        if self.suggested_seconds is None or not self.step_seconds:
            return None
        return max(1, round(self.suggested_seconds / self.step_seconds))


def goodput(run: Run) -> Goodput:
    """What a run folder tells; all zero before anything began."""
    periods = run_periods(run.path)
    newest = max((a.number for period in periods for a in period.start.attempts), default=0)
    return total(_of_period(period, newest, has_steps=run.stage.kind in ("train", "rl")) for period in periods)


def total(parts: Iterable[Goodput]) -> Goodput:
    """The sum over the runs of a graph."""
    return sum(parts, Goodput())


def interval(run: Run, found: Goodput) -> Interval | None:
    """The save interval of a run's plan beside the one that its failures suggest; None of a stage that has no such interval."""
    if run.stage.kind not in ("train", "rl"):
        return None
    seconds = found.seconds
    looped = seconds.productive + seconds.recomputed
    return Interval(
        planned_steps=run.stage.plan.save_every_steps,
        failures=found.failures,
        step_seconds=found.step_seconds / found.steps if found.steps else None,
        save_seconds=found.stall_seconds / found.saves if found.saves else None,
        between_failures_seconds=(looped + seconds.saving) / found.failures if found.failures >= LEAST_FAILURES else None,
    )


def goodput_words(found: Goodput) -> str:
    """'goodput 93.1 %: 2.1 % recomputed, 3.0 % starting, 1.2 % saving; queued 12 min'; '' before anything began."""
    seconds = found.seconds
    if seconds.goodput is None:
        return ""
    shares = {part: getattr(seconds, part) / seconds.held for part in ("recomputed", "starting", "saving", "idle")}
    rest = ", ".join(f"{100 * share:.1f} % {part}" for part, share in shares.items() if share >= SHOWN_SHARE)
    queued = f"; queued {_span(seconds.queued)}" if seconds.queued >= 1 else ""
    return f"goodput {100 * seconds.goodput:.1f} %{': ' if rest else ''}{rest}{queued}"


def interval_words(found: Interval | None) -> str:
    """'saves every 500 steps (42 min); 5 failures, one in 5.1 h, suggest every 312 (26 min)'; '' of a stage that has no such interval."""
    if found is None:
        return ""
    planned = f" ({_span(found.planned_seconds)})" if found.planned_seconds else ""
    return f"saves every {_steps(found.planned_steps)}{planned}; {suggestion_words(found)}"


def suggestion_words(found: Interval) -> str:
    """What the failures suggest, or why they suggest nothing."""
    if not found.failures:
        return "no failure yet to suggest another interval"
    if found.between_failures_seconds is None:
        return f"{found.failures} failure, too few to suggest another interval"
    measured = f"{found.failures} failures, one in {_span(found.between_failures_seconds)}"
    if found.suggested_seconds is None or found.suggested_steps is None:
        return f"{measured}, but no save that training waited for"
    return f"{measured}, suggest every {found.suggested_steps:,} ({_span(found.suggested_seconds)})"


def _steps(number: int) -> str:
    return "step" if number == 1 else f"{number:,} steps"


def _span(seconds: float) -> str:
    """45 s, 12 min, 5.1 h."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"


@dataclass(frozen=True)
class _Mark:
    """A moment in the loop at which it is known how far the training was."""

    at: float
    reached: int  # steps finished or tried by then
    goes_on_from: int  # fewer, where it went back here
    began_at: int  # where the training had started, or gone on after going back
    limit: float  # of the time before it: steps beyond were done again
    waited: float = 0.0  # for the save that begins here


@dataclass(frozen=True)
class _Window:
    """Time in the loop between two marks in a row, or after an attempt's last one: nobody counted the steps there (`last` is None)."""

    seconds: float
    first: int
    last: int | None
    began_at: int
    limit: float

    @property
    def steps(self) -> int:
        """Done in it."""
        return 0 if self.last is None else max(0, self.last - self.first)

    def productive(self) -> float:
        """Seconds of it that stand."""
        if self.steps:
            return ticks(self.seconds * min(max(self.limit - self.first, 0), self.steps) / self.steps)
        # What follows the last mark belongs to a next step. A held-out loss stands with the step that it was measured after,
        # but for one that was measured as training began, and is measured again as it begins there again.
        stands = self.first < self.limit or (self.last is not None and self.first == self.limit and self.first > self.began_at)
        return self.seconds if stands else 0.0


def _of_period(period: Period, newest: int, has_steps: bool) -> Goodput:
    """A start's parts; its attempts share its time at their begins."""
    attempts = period.start.attempts
    begins = [period.began, *(min(max(a.began, period.began), period.ended) for a in attempts[1:]), period.ended]
    found = Goodput(Seconds(queued=period.began - period.queued_from, starting=0.0 if attempts else period.ended - period.began))
    for attempt, (begin, end) in zip(attempts, pairwise(begins), strict=False):  # without attempts there is a pair all the same
        is_over = bool(attempt.reason) or period.is_over or attempt.number != newest
        found += _of_steps(attempt, begin, end, is_over) if has_steps else Goodput(_of_whole(attempt, begin, end, is_over))
    node_seconds = found.seconds.of_nodes(period.start.nodes)
    return replace(found, node_seconds=node_seconds, starts=1, job_starts=int(period.start.is_job))


def _of_steps(attempt: TimedAttempt, begin: float, end: float, is_over: bool) -> Goodput:
    """An attempt at a stage with steps."""
    seconds, windows = _of_loop(attempt, begin, end)
    stalls = [ticks(record["stall_seconds"]) for record in attempt.records if "stall_seconds" in record]
    return Goodput(
        seconds=seconds,
        failures=int(bool(windows) and is_over and attempt.reason not in ENDED_WELL),
        steps=sum(window.steps for window in windows),
        step_seconds=sum(window.seconds for window in windows if window.last is not None),
        saves=len(stalls),
        stall_seconds=sum(stalls),
    )


def _of_whole(attempt: TimedAttempt, begin: float, end: float, is_over: bool) -> Seconds:
    """An attempt at a stage without steps: its time stands where it ended well, or may still."""
    works_from = min(max(attempt.began, begin), end)
    works_to = end if attempt.ended is None else min(max(attempt.ended, works_from), end)
    stands = attempt.reason == "done" or not is_over
    worked = works_to - works_from
    return Seconds(
        productive=worked if stands else 0.0, recomputed=0.0 if stands else worked, starting=works_from - begin, idle=end - works_to
    )


def _of_loop(attempt: TimedAttempt, begin: float, end: float) -> tuple[Seconds, list[_Window]]:
    """An attempt at a stage with steps, and its windows; none of one that did not come to the loop."""
    if not attempt.records:
        return Seconds(starting=end - begin), []
    pulse = None if attempt.pulse is None or attempt.pulse > end + CLOCK_SECONDS else min(attempt.pulse, end)
    times = _dated(attempt.records, begin, end, end if pulse is None else pulse)
    works_to = times[-1] if pulse is None else max(times[-1], pulse)
    windows = _windows(_marks(attempt, times), works_to, attempt.limits[-1])
    looped, productive = sum(window.seconds for window in windows), sum(window.productive() for window in windows)
    parts = Seconds(
        productive=productive,
        recomputed=looped - productive,
        starting=times[0] - begin,
        saving=works_to - times[0] - looped,
        idle=end - works_to,
    )
    return parts, windows


def _marks(attempt: TimedAttempt, times: list[float]) -> list[_Mark]:
    """The moments that records tell of, ascending: a save tells of its begin, which may be many steps before its record."""
    marks: list[_Mark] = []
    began_at, went_on = int(attempt.records[0]["step"]), times[0]
    for record, at, limit in zip(attempt.records, times, attempt.limits[:-1], strict=True):
        step = int(record["step"])
        if record["kind"] in STARTS:
            began_at, went_on = step, at
        if "stall_seconds" in record:
            is_last = record is attempt.records[-1] and attempt.reason in ENDED_WELL  # nothing else was left to do
            waited = record["seconds" if is_last else "stall_seconds"]
            marks.append(_Mark(max(at - ticks(record["seconds"]), went_on), step, step, began_at, limit, ticks(waited)))
        else:
            reached = int(record["at_step"]) if record["kind"] == "roll_back" else step
            marks.append(_Mark(at, reached, step, began_at, limit))
    return sorted(marks, key=lambda mark: mark.at)


def _windows(marks: list[_Mark], works_to: float, limit: float) -> list[_Window]:
    """Time between marks, and up to `works_to`, without that in which training waited for saves."""
    windows: list[_Window] = []
    waits = 0.0
    ends: list[_Mark | None] = [*marks[1:], None]
    for mark, after in zip(marks, ends, strict=True):
        seconds = (works_to if after is None else after.at) - mark.at
        waits += mark.waited
        waited = min(waits, seconds)
        waits -= waited
        reached, beyond = (None, limit) if after is None else (after.reached, after.limit)
        windows.append(_Window(seconds - waited, mark.goes_on_from, reached, mark.began_at, beyond))
    return windows


def _dated(records: list[Record], begin: float, end: float, works_to: float) -> list[float]:
    """When each record was written, ascending from `begin` to `end`; those without `at` by what the later ones say that they took."""
    told, at = [], works_to
    for record, following in zip(reversed(records), [None, *reversed(records[1:])], strict=True):
        at = ticks(record["at"]) if "at" in record else at - _lasted(record, following)
        told.append(at)
    times: list[float] = []
    for at in reversed(told):
        times.append(min(max(at, times[-1] if times else begin), end))
    return times


def _lasted(record: Record, following: Record | None) -> float:
    """Seconds between two records, by what the second one says of itself."""
    if following is None:
        return 0.0
    steps = max(0, following["step"] - record["step"])
    return ticks(following.get("stall_seconds", 0.0) + steps * following.get("step_seconds", 0.0))
