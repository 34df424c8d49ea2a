"""What `launch --local` says of a stage that failed: what the stage has not printed itself, the cause, and the way on."""

from __future__ import annotations

import signal
from pathlib import Path

from megatron_ext.attempts import EXIT
from megatron_ext.launch.ranks import ranks_of
from megatron_ext.runs import ATTEMPTS, Run, read_json
from megatron_ext.tracker import newest

LOG_LINES = 20


def failure_text(run: Run, code: int, attempt: int | None) -> str:
    """The message of a stage whose process ended with this code (negative: a signal) in this attempt (None: before it began one)."""
    ended = f"stage '{run.name}' ended " + (f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}")
    if attempt is None:
        lines = [f"{ended} before it began an attempt; what it printed above says why"]
    else:
        lines = _attempt_lines(run, code, attempt, ended)
    iteration, _ = newest(run.checkpoints_path)
    goes_on = "" if iteration is None else f", and this one goes on from its checkpoint {iteration:,}"
    return "\n".join([*lines, f"To go on, run the same command again: finished stages are skipped{goes_on}"])


def _attempt_lines(run: Run, code: int, number: int, ended: str) -> list[str]:
    folder = run.path / ATTEMPTS / str(number)
    log, end = folder / "log.txt", folder / EXIT
    values = read_json(end, "how an attempt ended") if end.is_file() else {}
    where = f"the log of attempt {number} is {log}" if log.is_file() else f"attempt {number} is {folder}"
    if values and code > 0 and ranks_of(run.stage) == 1:  # its error was the last thing that it printed
        return [f"{ended}, for the reason above", where]
    if values.get("reason") == "stopped":  # by an error whose message says it all; torchrun has printed a page behind it
        return [f"{ended}: {values['error']}", where]
    if values.get("reason") == "interrupted":
        return [f"{ended}: it was asked to stop: {values['words']}", where]
    failed = sorted(folder.glob("rank_*.error.txt"), key=lambda path: path.stat().st_mtime_ns)
    lines, first = [f"stage '{run.name}' did not finish", *_tail(log)], _tail(failed[0]) if failed else []
    lines += first if first and first[-1] not in lines else []  # rank 0's error stands in its log too
    lines += [f"see also {path}" for path in failed[1:]]
    if values:
        return [*lines, f"{ended}: attempt {number} {values['reason']}"]
    out_of_memory = ". Where nobody killed it, memory may have run out: the kernel's log (dmesg) would say so"
    why = out_of_memory if code > 0 or code == -signal.SIGKILL else ""
    return [*lines, f"{ended}, and attempt {number} left no word of its end{why}"]


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    last = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-LOG_LINES:]
    return [f"the last {len(last)} lines of {path}:", *(f"  | {line}" for line in last)]
