"""metrics.jsonl: one JSON object a line, each with its attempt, its kind, its step and its time.

Kinds (docs/metrics.md lists every name): `attempt` opens an attempt and says after which step it
starts; `train` is one optimizer step; `validation` is one source's held-out loss; `skip` is a batch that
was left out; `roll_back` says after which step the attempt goes on. `step` counts finished steps,
`tokens` the stage's tokens after it. Readers drop what was done again, after a roll-back or in a later attempt.
"""

from __future__ import annotations

import errno
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_ext.errors import RunError

Record = dict[str, Any]
STARTS = ("attempt", "roll_back")  # kinds whose `step` is where the training goes on from


class MetricsWriter:
    """Appends whole lines; a torn last line of a killed attempt is closed off first."""

    def __init__(self, path: Path, attempt: int, from_step: int) -> None:
        _take(path)
        self._attempt = attempt
        self._file = path.open("ab", buffering=0)
        self.write("attempt", from_step, {})

    def write(self, kind: str, step: int, values: Record) -> None:
        """Append one record and hand it to the operating system; `OSError` where it is refused, and then nothing of it is left."""
        record = {"attempt": self._attempt, "kind": kind, "step": step, "at": round(time.time(), 3), **values}
        line = (json.dumps(record) + "\n").encode()
        before_bytes = os.fstat(self._file.fileno()).st_size
        try:
            written_bytes = self._file.write(line)
            if written_bytes != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as refusal:
            os.ftruncate(self._file.fileno(), before_bytes)
            refusal.filename = self._file.name
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _take(path: Path) -> None:
    """Go on in a copy, its torn last line ended: an older attempt that wakes up appends to the file that nobody reads any more."""
    if path.is_file():
        text = path.read_bytes()
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with aside.open("wb") as file:
            file.write(text if not text or text.endswith(b"\n") else text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def read_metrics(path: Path, kind: str | None = None) -> list[Record]:
    """Records that stand: of each step, what was said by the last who did it. No file: none.

    A line that is not JSON is tolerated only as the last line of an attempt (a torn write).
    """
    if not path.is_file():
        return []
    records = [r for r in _records(path) if r is not None]
    eras = _eras(records)
    starts = {era: r["step"] for era, r in zip(eras, records, strict=True) if r["kind"] in STARTS}
    kept = []
    for era, record in zip(eras, records, strict=True):
        later = [step for other, step in starts.items() if other > era]
        superseded = later and record["step"] > min(later)
        if not superseded and kind in (None, record["kind"]):
            kept.append((era, record))
    if kind is not None and not kind.endswith("validation"):
        return [record for _, record in kept]
    last = {(r["kind"], r["step"], r.get("source", r.get("set")), era if r["kind"] in STARTS else None): r for era, r in kept}
    return list(last.values())


def attempt_steps(records: list[Record], start_step: int, end_step: int) -> list[tuple[int, int, int]]:
    """Attempt, first and last of its steps that no later one of `records` did again, within (start_step, end_step]."""
    begins: dict[int, int] = {}
    for one in records:
        if one["kind"] in STARTS:
            begins[one["attempt"]] = min(one["step"], begins.get(one["attempt"], one["step"]))
    marks = [*sorted(begins.items()), (0, end_step)]
    clipped = [(attempt, max(begin, start_step) + 1, min(last, end_step)) for (attempt, begin), (_, last) in pairwise(marks)]
    return [(attempt, first, last) for attempt, first, last in clipped if first <= last]


def _eras(records: list[Record]) -> list[tuple[int, int]]:
    """Of each record: its attempt, and how often that attempt had rolled back when it was written."""
    roll_backs: dict[int, int] = {}
    eras = []
    for record in records:
        attempt = record["attempt"]
        roll_backs[attempt] = roll_backs.get(attempt, 0) + (record["kind"] == "roll_back")
        eras.append((attempt, roll_backs[attempt]))
    return eras


def _records(path: Path) -> list[Record | None]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records: list[Record | None] = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            following = lines[i + 1] if i + 1 < len(lines) else ""
            if following and '"kind": "attempt"' not in following:
                raise RunError(f"{path}:{i + 1}: not JSON: {line[:80]!r}; the file was altered") from None
            records.append(None)
    return records
