"""What a job's supervisor writes down and reads in a run folder: the ledger RUN/job/events.jsonl, and the marks that its ranks leave.

Standard library alone (Python 3.9): it runs on a batch host that has none of the project's packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.json_lines import read_json_lines

Event = dict[str, Any]
COMMENT = "megatron_ext:"  # of every job, and the run folder: how one is known, whoever submitted it
PART_COMMENT = "megatron_ext-part:"  # of the jobs of an array that works ahead of a stage's own
EVENTS, CHECK = Path("job") / "events.jsonl", Path("job") / "node_check.json"  # in a run folder
LOST, SLOW_NODE = "lost", "slow node"  # causes of faults: a start that left no word of its end; one that ends no start
LEFT_OUT = "left out from now on"  # begins the words of a fault that says what was done about nodes
CANCELLED = "cancelled"  # reason of a stop that a person asked for, and that no cause need be mended for
CHECKED = "checked"  # event: the nodes of this start were found fit
PREEMPTED = "preempted"  # reason of an end that says nothing about the stage: Slurm, or a person, wanted the nodes
_ITERATION, _SLICE = re.compile(r"iter_(\d{7,})"), re.compile(r"slice-\d{5,}\.json")
_TAIL_BYTES = 1 << 20  # of metrics.jsonl: a read of the whole file each second would not end on a long run


@dataclass(frozen=True)
class Start:
    """One start of a job. A requeue keeps the job's id and counts its restarts up."""

    job_id: int
    restart_count: int


class Ledger:
    """events.jsonl of one run, written by one start of its job: whole lines, on disk before anything else happens."""

    def __init__(self, run: Path, start: Start, nodes: list[str]) -> None:
        self.path = run / EVENTS
        self.start, self.nodes = start, nodes

    def append(self, event: str, **values: Any) -> None:
        """Write one event of this start."""
        whose = {"job_id": self.start.job_id, "restart_count": self.start.restart_count, "nodes": self.nodes}
        line = json.dumps({"at": time.time(), "event": event, **whose, **values}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                if file.tell() and not _ends_whole(file):
                    line = "\n" + line  # what a lost host left half written stays a line of its own
                file.write(line.encode())
                os.fsync(file.fileno())
        except OSError as refusal:  # a full disk is no reason to end a job whose ranks may still get by
            say(f"{self.path}: not written ({refusal.strerror}): {line.strip()}")

    def events(self) -> list[Event]:
        """Every event of the run so far, of all its jobs."""
        return read_json_lines(self.path)


def say(text: str) -> None:
    """A line for the job's log; a full disk loses it, and must not end the job."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _ends_whole(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def lost_starts(events: list[Event], now: Start) -> list[Event]:
    """`start` events of the same job's earlier starts that no `end` nor `fault` of cause 'lost' answers."""
    answered = {_of(e) for e in events if e["event"] == "end"}
    answered |= {Start(int(e["job_id"]), int(e["lost_restart_count"])) for e in events if e["event"] == "fault" and e["cause"] == LOST}
    return [e for e in events if e["event"] == "start" and e["job_id"] == now.job_id and _of(e) != now and _of(e) not in answered]


def must_check(events: list[Event], now: Start) -> bool:
    """Whether nodes are to be checked before a start: as long as no check of the job has passed, and after a start that met a fault."""
    own = [e for e in events if e["job_id"] == now.job_id]
    before = now.restart_count - 1
    faulty = any(e["event"] == "fault" and before in (e["restart_count"], e.get("lost_restart_count")) for e in own)
    return faulty or not any(e["event"] == CHECKED for e in own)


def idle_starts(events: list[Event], job_id: int, iteration: int | None) -> int:
    """How many starts in a row, the newest of a job's last, ended without having advanced the stage.

    `iteration`: the `progress_mark` by now. A start that Slurm ended for another job's sake counts neither way. Only this
    job counts: who launches the stage again has looked at it.
    """
    starts = [e for e in events if e["event"] == "start" and e["job_id"] == job_id]
    ends = {_of(e): e for e in events if e["event"] == "end"}
    idle = 0
    for start in reversed(starts):
        if _number(start.get("iteration")) < _number(iteration):
            break
        if ends.get(_of(start), {}).get("reason") != PREEMPTED:
            idle += 1
    return idle


def _number(iteration: int | None) -> int:
    return -1 if iteration is None else iteration


def _of(event: Event) -> Start:
    return Start(int(event["job_id"]), int(event["restart_count"]))


def progress_mark(run: Path) -> int | None:
    """What grows as a stage advances: the newest published checkpoint, of a tokenize stage its finished slices; None before the first."""
    slices = sum(_SLICE.fullmatch(path.name) is not None for source in _entries(run / "shards") for path in _entries(source))
    return slices or newest_iteration(run)


def newest_iteration(run: Path) -> int | None:
    """The newest published checkpoint: one with its name and its manifest."""
    found = [int(match[1]) for path in _entries(run / "checkpoints") if (match := _ITERATION.fullmatch(path.name)) and is_published(path)]
    return max(found, default=None)


def is_published(checkpoint: Path) -> bool:
    """Whether a checkpoint has its manifest, which is written last."""
    return (checkpoint / "manifest.json").is_file()


def newest_attempt(run: Path) -> int:
    """Number of the newest attempt, 0 where there is none."""
    return max((int(path.name) for path in _entries(run / "attempts") if path.name.isdigit()), default=0)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def pulse_mark(run: Path, attempt: int) -> int | None:
    """When an attempt's training thread last touched its pulse, by the file system's clock (nanoseconds); None before the first."""
    try:
        return (run / "attempts" / str(attempt) / "pulse").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def first_failure(run: Path, after_attempt: int) -> tuple[str, str] | None:
    """(rank, traceback) of the rank that failed first in the newest attempt after number `after_attempt`."""
    number = newest_attempt(run)
    found = [path for path in _entries(run / "attempts" / str(number)) if re.fullmatch(r"rank_\d+\.error\.txt", path.name)]
    if number <= after_attempt or not found:
        return None
    first = min(found, key=lambda path: path.stat().st_mtime_ns)
    return str(int(first.name.split(".")[0][5:])), first.read_text(encoding="utf-8", errors="replace")


def longest_seconds(run: Path) -> tuple[float, float]:
    """(longest save, longest step) that the end of metrics.jsonl tells of, in seconds; 0 where it tells of none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0.0, 0.0
    save, step = 0.0, 0.0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        if record.get("kind") == "checkpoint":
            save = max(save, float(record.get("seconds") or 0))
        elif record.get("kind") in ("train", "rl"):
            step = max(step, float(record.get("step_seconds") or 0))
    return save, step
