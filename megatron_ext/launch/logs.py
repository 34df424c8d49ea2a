"""The logs of a run: what its newest attempt wrote, what its job wrote around it, and what failed first, by its job's ledger and logs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.attempts import EXIT, INTERRUPTED, RECORD, live_attempt
from megatron_ext.config.base import Json
from megatron_ext.errors import RunError
from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_events import EVENTS, LEFT_OUT, LOST, SLOW_NODE, Event
from megatron_ext.runs import ATTEMPTS, Run, attempt_numbers, open_run, read_json

LOG, JOB_LOGS = "log.txt", "job/slurm-*.log"
LOOK_SECONDS = 0.5
BLOCK_BYTES = 65_536
TAIL_LINES = 40  # of a job's log: a traceback of one rank and what is said around it
# What the job's own process says of an end, and srun of a rank: the reason in the ledger says it too.
_SAID_TWICE = re.compile(r"(stop|requeue): |srun: error: \S+: tasks? [\d,-]+: ")

StartKey = tuple[str, int]  # job and restart count


def logs_command(run: Path, first_failure: bool = False, follow: bool = False) -> None:
    """Print a run's newest log; `first_failure`: its newest fault and the traceback behind it; `follow`: go on printing."""
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
    return next(iter([*logs[:1], *_job_logs(run)[-1:]]), None)


def _job_logs(run: Run) -> list[Path]:
    """Logs of a run's jobs, the newest last."""
    return sorted(run.path.glob(JOB_LOGS), key=lambda path: path.stat().st_mtime_ns)


def first_failure_text(run: Run) -> str:
    """What the ledger says of the newest fault and of a stop, the traceback behind it, and where the rest stands.

    The traceback is that of the rank that failed first in the newest attempt that failed; of a start that began no attempt
    it stands in the job's log.
    """
    events = read_json_lines(run.path / EVENTS)
    number, log = _failed_attempt(run, events), log_without_attempt(run, events)
    lines = [*_ledger_lines(events), *(_tail(log) if log else []), *(_attempt_lines(run, number) if number else [])]
    if not lines:
        lines = [f"{run.path}: no attempt of stage '{run.name}' failed", *_interrupted_lines(run)]
    paths = [run.path / ATTEMPTS / str(number) / LOG] if number else []
    return "\n".join([*lines, *(f"see also {path}" for path in [*paths, *_job_logs(run)] if path.is_file())])


def _ledger_lines(events: Sequence[Event]) -> list[str]:
    fault, end = newest_fault(events), newest_end(events)
    lines = [f"fault at {clock(fault)}, in start {fault_start(fault)[1]} of job {fault['job_id']}: {fault['words']}"] if fault else []
    return [*lines, *([f"stopped at {clock(end)}: {end['reason']}"] if end and end["decision"] == "stop" else [])]


def clock(event: Event) -> str:
    """When something happened, by this machine's clock and zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))


def newest_fault(events: Sequence[Event]) -> Event | None:
    """The newest fault that ended a start: not a node that is slow, nor what was done about one."""
    faults = [e for e in events if e["event"] == "fault" and e["cause"] != SLOW_NODE and not e["words"].startswith(LEFT_OUT)]
    return faults[-1] if faults else None


def newest_end(events: Sequence[Event]) -> Event | None:
    """How the newest start ended; None where it has left no word."""
    found = [e for e in events if e["event"] in ("start", "end")]
    return found[-1] if found and found[-1]["event"] == "end" else None


def fault_start(event: Event) -> StartKey:
    """The start that an event is about: a lost one is told by the next."""
    return str(event["job_id"]), int(event["lost_restart_count"] if event.get("cause") == LOST else event["restart_count"])


def log_without_attempt(run: Run, events: Sequence[Event]) -> Path | None:
    """The newest job's log where that tells more than any attempt: of a run without one, and of a job that ended before it began one.

    A set-up that fails ends a job before its ledger knows of it.
    """
    log = next(reversed(_job_logs(run)), None)
    starts = [fault_start(e) for e in events if log and e["event"] == "start" and log.name == f"slurm-{e['job_id']}.log"]
    if not starts or not attempt_numbers(run.path):
        return log
    begun = {_start_of(run, number) for number in attempt_numbers(run.path)}
    return log if starts[-1] not in begun and starts[-1] in _ended_starts(events) else None


def _ended_starts(events: Sequence[Event]) -> set[StartKey]:
    return {fault_start(e) for e in events if e["event"] == "end" or e.get("cause") == LOST}


def _start_of(run: Run, number: int) -> StartKey:
    """The start that an attempt belongs to; without a job '' and 0, as of one whose record somebody has removed."""
    path = run.path / ATTEMPTS / str(number) / RECORD
    record: Json = read_json(path, "how an attempt began") if path.is_file() else {"job_id": "", "restart_count": 0}
    return str(record["job_id"]), int(record["restart_count"])


def _failed_attempt(run: Run, events: Sequence[Event]) -> int | None:
    """The newest attempt that ended neither well nor because it was asked to, and is not at work."""
    for number in reversed(attempt_numbers(run.path)):
        ended = _recorded_end(run, number)
        if ended["reason"] not in ("done", INTERRUPTED) if ended else not _at_work(run, number, events):
            return number
    return None


def _recorded_end(run: Run, number: int) -> Json:
    """How an attempt says that it ended; empty where it has not."""
    path = run.path / ATTEMPTS / str(number) / EXIT
    values: Json = read_json(path, "how an attempt ended") if path.is_file() else {}
    return values


def _at_work(run: Run, number: int, events: Sequence[Event]) -> bool:
    """Whether an attempt that has recorded no end may still be at work."""
    if number != attempt_numbers(run.path)[-1] or _start_of(run, number) in _ended_starts(events):
        return False
    try:
        return live_attempt(run.path) is not None
    except OSError:  # a heartbeat is timed by a file beside it, which who may only read cannot make
        return True


def _attempt_lines(run: Run, number: int) -> list[str]:
    """How an attempt ended, and the traceback of its rank that failed first."""
    folder, ended = run.path / ATTEMPTS / str(number), _recorded_end(run, number)
    failed = sorted(folder.glob("rank_*.error.txt"), key=lambda path: path.stat().st_mtime_ns)
    why = ended.get("error") or ended.get("words")
    lines = [f"attempt {number}: {ended.get('reason', 'left no word of its end')}" + (f": {why}" if why else "")]
    if failed:
        lines += [f"{failed[0]}, the first of {len(failed)}:", failed[0].read_text(encoding="utf-8", errors="replace").rstrip()]
    return lines


def _interrupted_lines(run: Run) -> list[str]:
    """Of a run whose newest attempt was asked to stop: that it was."""
    newest = attempt_numbers(run.path)[-1:]
    return [line for number in newest if _recorded_end(run, number).get("reason") == INTERRUPTED for line in _attempt_lines(run, number)]


def _tail(path: Path) -> list[str]:
    lines = _last_lines(path)[-TAIL_LINES:]
    return [f"the last {len(lines)} lines of {path}:", *(f"  | {line}" for line in lines)] if lines else []


def last_line(path: Path, besides: str = "") -> str:
    """The last line of a file that says something more than `besides`, the reason that the ledger holds; '' where there is none."""
    known = {line.strip() for line in besides.splitlines()}
    for line in (line.strip() for line in reversed(_last_lines(path))):
        is_known = line in known or (line.startswith("fault: ") and line.removeprefix("fault: ") in besides)
        if line and not is_known and not _SAID_TWICE.match(line):
            return line
    return ""


def _last_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - BLOCK_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


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
