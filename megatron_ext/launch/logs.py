"""The logs of a run: what its newest attempt wrote, what its job wrote around it, and what failed first."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.attempts import EXIT
from megatron_ext.errors import RunError
from megatron_ext.runs import ATTEMPTS, Run, attempt_numbers, open_run, read_json

LOG, JOB_LOGS = "log.txt", "job/slurm-*.log"
LOOK_SECONDS = 0.5
BLOCK_BYTES = 65_536


def logs_command(run: Path, first_failure: bool = False, follow: bool = False) -> None:
    """Print a run's newest log; `first_failure`: of its newest attempt that failed, the first failing rank; `follow`: go on printing."""
    opened = open_run(run)
    if first_failure:
        print(first_failure_text(opened))
        return
    for part in _following(opened) if follow else [newest_log(opened).read_bytes()]:
        sys.stdout.buffer.write(part)
        sys.stdout.flush()


def newest_log(run: Run) -> Path:
    """The log of the newest attempt, or of the job where there is none; `RunError` where nothing has written any."""
    found = newest_log_or_none(run)
    if found is None:
        raise RunError(f"{run.path}: nothing of stage '{run.name}' has run yet, so there is no log; see megatron-ext status {run.path}")
    return found


def newest_log_or_none(run: Run) -> Path | None:
    """The same, or None."""
    numbers = attempt_numbers(run.path)
    logs = [path for number in reversed(numbers) if (path := run.path / ATTEMPTS / str(number) / LOG).is_file()]
    jobs = sorted(run.path.glob(JOB_LOGS), key=lambda path: path.stat().st_mtime_ns)
    return next(iter([*logs[:1], *jobs[-1:]]), None)


def first_failure_text(run: Run) -> str:
    """The traceback of the rank that failed first in the newest attempt that did not end well, and where the rest stands."""
    for number in reversed(attempt_numbers(run.path)):
        folder = run.path / ATTEMPTS / str(number)
        ended = read_json(folder / EXIT, "how an attempt ended") if (folder / EXIT).is_file() else {"reason": "left no word of its end"}
        if ended["reason"] == "done":
            continue
        failed = sorted(folder.glob("rank_*.error.txt"), key=lambda path: path.stat().st_mtime_ns)
        why = ended.get("error") or ended.get("words")
        lines = [f"attempt {number}: {ended['reason']}" + (f": {why}" if why else "")]
        if failed:
            lines += [f"{failed[0]}, the first of {len(failed)}:", failed[0].read_text(encoding="utf-8", errors="replace").rstrip()]
        return "\n".join([*lines, *_elsewhere(run, folder)])
    return "\n".join([f"{run.path}: no attempt of stage '{run.name}' failed", *_elsewhere(run, None)])


def _elsewhere(run: Run, attempt: Path | None) -> list[str]:
    paths = [attempt / LOG] if attempt and (attempt / LOG).is_file() else []
    paths += sorted(run.path.glob(JOB_LOGS))
    return [f"see also {path}" for path in paths]


def last_line(path: Path) -> str:
    """The last line of a file that says something; '' where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - BLOCK_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _following(run: Run) -> Iterator[bytes]:
    """What is written from now on, and the whole of what stands; goes over to the next attempt's log when there is one."""
    shown: dict[Path, int] = {}
    while True:
        path = newest_log(run)
        with path.open("rb") as file:
            file.seek(shown.get(path, 0))
            part = file.read()
        if path not in shown and shown:
            yield f"==> {path}\n".encode()
        shown[path] = shown.get(path, 0) + len(part)
        if part:
            yield part
        elif run.is_done():
            return
        else:
            time.sleep(LOOK_SECONDS)
