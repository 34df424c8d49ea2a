"""metrics.jsonl: one JSON object a line, each with its attempt, its kind and its step.

Kinds (docs/metrics.md lists every name): `attempt` opens an attempt and says after which step it
starts; `train` is one optimizer step; `validation` is one source's held-out loss. `step` counts
finished steps, `tokens` the stage's tokens after it. Readers drop what a later attempt did again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from megatron_ext.errors import RunError

Record = dict[str, Any]


class MetricsWriter:
    """Appends whole lines; a torn last line of a killed attempt is closed off first."""

    def __init__(self, path: Path, attempt: int, from_step: int) -> None:
        _end_torn_line(path)
        self._attempt = attempt
        self._file: TextIO = path.open("a", encoding="utf-8")
        self.write("attempt", from_step, {})

    def write(self, kind: str, step: int, values: Record) -> None:
        """Append one record and hand it to the operating system."""
        record = {"attempt": self._attempt, "kind": kind, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_torn_line(path: Path) -> None:
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_metrics(path: Path, kind: str | None = None) -> list[Record]:
    """Records that stand: of each step, what the latest attempt that did it says. No file: none.

    A line that is not JSON is tolerated only as the last line of an attempt (a torn write).
    """
    if not path.is_file():
        return []
    records = [r for r in _records(path) if r is not None]
    starts = {r["attempt"]: r["step"] for r in records if r["kind"] == "attempt"}
    kept = []
    for record in records:
        later = [step for attempt, step in starts.items() if attempt > record["attempt"]]
        superseded = later and record["step"] > min(later)
        if not superseded and kind in (None, record["kind"]):
            kept.append(record)
    if kind != "validation" and kind is not None:
        return kept
    last = {(r["kind"], r["step"], r.get("source"), r["attempt"] if r["kind"] == "attempt" else None): r for r in kept}
    return list(last.values())


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
