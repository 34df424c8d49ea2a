"""When a run was at work: the starts of its jobs with their attempts, in order on the clock, from its folder alone.

A start began by Slurm's word. It ended by its own word, when Slurm requeued it, or with its last sign of life.
Times are unix seconds in whole ticks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_ext.attempts import EXIT, HEARTBEAT, PULSE, RECORD
from megatron_ext.config.base import Json
from megatron_ext.json_lines import read_json_lines
from megatron_ext.metrics import STARTS, Record
from megatron_ext.runs import ATTEMPTS, METRICS, attempt_numbers, read_json

EVENTS = Path("job") / "events.jsonl"  # in a run folder; the ledger of its job's supervisor
TICKS = 2**16  # a second: sums of whole ticks are exact in floating point up to 2**37 s, some 4,000 node-years

Key = tuple[str, int]  # job id ('' without a job) and restart count, or the attempt's number


@dataclass(frozen=True)
class TimedAttempt:
    """An attempt: when it began, how it ended, its records in order, those that do not stand included."""

    number: int
    key: Key
    nodes: int
    began: float
    reason: str  # '' where it recorded no end
    ended: float | None
    pulse: float | None  # when its work last got on
    beat: float | None  # when its process last lived
    records: list[Record]
    limits: list[float]  # of each record, and of what follows the last: a later attempt or roll-back did the steps beyond again

    @property
    def last_word(self) -> float:
        """The newest time that it wrote down."""
        return max([self.began, *([] if self.ended is None else [self.ended]), *(ticks(r["at"]) for r in self.records if "at" in r)])


@dataclass(frozen=True)
class Start:
    """One start of a job, or one attempt without a job, as its files tell of it."""

    key: Key
    nodes: int
    began: float
    submitted: float | None
    eligible: float | None
    end: float | None  # by its own word
    last_word: float
    attempts: tuple[TimedAttempt, ...]

    @property
    def is_job(self) -> bool:
        """Whether Slurm started it."""
        return bool(self.key[0])


@dataclass(frozen=True)
class Period:
    """A start in its place: queued_from <= began <= ended, and none is queued before the last one ended."""

    start: Start
    queued_from: float
    began: float
    ended: float
    is_over: bool  # False: it may still run


def ticks(seconds: float) -> float:
    """The nearest whole tick."""
    return round(seconds * TICKS) / TICKS


def run_periods(run_path: Path) -> list[Period]:
    """Every start of a run, in order; of two that overlap, as after a network cut, the newer one has the time."""
    starts = _starts(read_json_lines(run_path / EVENTS), _attempts(run_path, read_json_lines(run_path / METRICS)))
    return in_order(starts)


def in_order(starts: Sequence[Start]) -> list[Period]:
    """Starts, ascending by their begin, one after the other on the clock."""
    periods: list[Period] = []
    for i, start in enumerate(starts):
        before = periods[-1] if periods else None
        after = starts[i + 1] if i + 1 < len(starts) else None
        free_from = before.ended if before else -math.inf
        began = max(start.began, free_from)
        ready = start.eligible or start.submitted or began
        requeued = before is not None and _same_job(before.start, start)
        queued_from = free_from if requeued else max(free_from, min(ready, began))
        over = after is not None or start.end is not None
        periods.append(Period(start, queued_from, began, max(began, _ended(start, after)), over))
    return periods


def _ended(start: Start, after: Start | None) -> float:
    """When a start gave its nodes back. One that a lost node ended holds them until Slurm notices and requeues it."""
    ended = start.last_word
    if after is not None and after.submitted is not None and _same_job(start, after):
        ended = max(ended, after.submitted)
    elif start.end is None:
        silent = [a for a in start.attempts if not a.reason]
        ended = max([ended, *(sign for a in silent for sign in (a.pulse, a.beat) if sign is not None)])
    return ended if after is None else min(ended, after.began)


def _same_job(one: Start, other: Start) -> bool:
    return one.is_job and one.key[0] == other.key[0]


def _attempts(run_path: Path, records: list[Record]) -> list[TimedAttempt]:
    """Every attempt that recorded its begin, ascending."""
    limits = [math.inf] * (len(records) + 1)
    for i in reversed(range(len(records))):
        limits[i] = min(limits[i + 1], records[i]["step"] if records[i]["kind"] in STARTS else math.inf)
    of_attempt: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        of_attempt.setdefault(record["attempt"], []).append(i)
    found = []
    for number in attempt_numbers(run_path):
        folder, own = run_path / ATTEMPTS / str(number), of_attempt.get(number, [])
        if (folder / RECORD).is_file():
            found.append(_attempt(folder, number, [records[i] for i in own], [limits[i] for i in [*own, *(i + 1 for i in own[-1:])]]))
    return found


def _attempt(folder: Path, number: int, records: list[Record], limits: list[float]) -> TimedAttempt:
    begin = read_json(folder / RECORD, "how an attempt began")
    end = read_json(folder / EXIT, "how an attempt ended") if (folder / EXIT).is_file() else {}
    job_id = str(begin.get("job_id", ""))
    return TimedAttempt(
        number=number,
        key=(job_id, int(begin["restart_count"]) if job_id else number),
        nodes=int(begin["plan"].get("nodes", 1)),  # a stage that is one process plans none
        began=_clock(begin["started_at"]),
        reason=str(end.get("reason", "")),
        ended=_clock(end["at"]) if end else None,
        pulse=_touched(folder / PULSE),
        beat=_touched(folder / HEARTBEAT),
        records=records,
        limits=limits,
    )


def _clock(text: str) -> float:
    return ticks(datetime.fromisoformat(text).timestamp())


def _touched(path: Path) -> float | None:
    return ticks(path.stat().st_mtime) if path.is_file() else None


def _starts(events: list[Json], attempts: list[TimedAttempt]) -> list[Start]:
    """Starts of jobs with their attempts, and attempts whose start nobody wrote down, ascending by their begin."""
    of_key: dict[Key, list[Json]] = {}
    for event in events:
        of_key.setdefault((str(event["job_id"]), int(event["restart_count"])), []).append(event)
    found = {}
    for key, told in of_key.items():
        start = next((event for event in told if event["event"] == "start"), None)
        if start is not None:
            found[key] = _start(key, start, told, tuple(a for a in attempts if a.key == key))
    alone = [Start(("", a.number), a.nodes, a.began, None, None, None, a.last_word, (a,)) for a in attempts if a.key not in found]
    return sorted([*found.values(), *alone], key=lambda start: start.began)


def _start(key: Key, start: Json, told: list[Json], attempts: tuple[TimedAttempt, ...]) -> Start:
    times = {name: None if start.get(name) is None else ticks(start[name]) for name in ("started_at", "submitted_at", "eligible_at")}
    began = times["started_at"]
    return Start(
        key=key,
        nodes=max(1, len(start["nodes"])),
        began=ticks(start["at"]) if began is None else began,  # no controller answered
        submitted=times["submitted_at"],
        eligible=times["eligible_at"],
        end=max((ticks(event["at"]) for event in told if event["event"] == "end"), default=None),
        last_word=max([*(ticks(event["at"]) for event in told), *(a.last_word for a in attempts)]),
        attempts=attempts,
    )
