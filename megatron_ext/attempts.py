"""Attempts at a stage: who owns a run folder, whether an owner still lives, how an attempt ended.

The owner is the newest attempt. Its folder appears by one rename, with its record inside, so of two
that begin at once exactly one wins. Nobody begins beside an owner that still lives:

- an attempt that recorded its end does not live;
- one of the same job with a smaller restart count does not (the scheduler requeued it);
- one in this place (host, boot, process namespace) lives as long as its process does;
- one elsewhere lives as long as it touches its `heartbeat`.

An owner that was cut off and wakes up finds a newer attempt and may neither publish nor append
(`Attempt.check_owner`); what it has staged is taken from it (checkpoint.folder.revoke).
There are no file locks: shared file systems do not keep them.

The heart beats in a thread of its own, and goes on when the work hangs. The `pulse` is touched by the work itself
(`pulse`), so whoever watches a stage that shows one can tell that it hangs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from megatron_ext import interruption
from megatron_ext.config.base import Json, to_json
from megatron_ext.errors import Interrupted, RunError
from megatron_ext.redaction import own_secrets, without_secrets
from megatron_ext.runs import ATTEMPTS, Run, attempt_numbers, now, read_json, write_json
from megatron_ext.snapshot import code_hash

RECORD, EXIT, HEARTBEAT, PULSE = "plan.json", "exit.json", "heartbeat", "pulse"
INTERRUPTED = "interrupted"  # the reason of an attempt that was asked to stop, and did
FALLBACK = "fallback.json"  # where it went back to an older checkpoint than the newest: from which, to which, and why
TAKE_OVER = "MEGATRON_EXT_TAKE_OVER"  # set to 1: begin although the owner seems to live
BEAT_SECONDS = 15.0
PULSE_SECONDS = 1.0
WAIT_SECONDS = 1.0
LOST_SECONDS = 180.0  # an owner elsewhere that is silent for so long is taken for dead


@dataclass(frozen=True)
class Attempt:
    """One try at a stage."""

    number: int
    path: Path

    @property
    def log_path(self) -> Path:
        """The log of rank 0."""
        return self.path / "log.txt"

    @cached_property
    def record(self) -> Json:
        """Who began it, when and where, under which plan and code."""
        values: Json = read_json(self.path / RECORD, "how an attempt began")
        return values

    def finish(self, reason: str, **values: Any) -> None:
        """Record why the attempt ended."""
        secrets = own_secrets()
        words = {key: without_secrets(value, secrets) if isinstance(value, str) else value for key, value in values.items()}
        write_json(self.path / EXIT, {"reason": reason, "at": now(), **words})

    def interrupted(self, words: str, terminal: TextIO) -> None:
        """Record and say that it was asked to stop, and did."""
        self.finish(INTERRUPTED, words=words)
        print(f"stopped: {words}", file=terminal, flush=True)

    def is_interrupted(self) -> bool:
        """Whether it has recorded that it was asked to stop, and did."""
        path = self.path / EXIT
        return path.is_file() and read_json(path, "how an attempt ended")["reason"] == INTERRUPTED

    def pulse(self) -> None:
        """Touch the pulse."""
        with contextlib.suppress(OSError):  # as for the heartbeat
            (self.path / PULSE).touch()

    def check_owner(self) -> None:
        """`RunError` where a newer attempt has taken the run folder over."""
        newest = attempt_numbers(self.path.parent.parent)[-1]
        if newest != self.number:
            owner = Attempt(newest, self.path.parent / str(newest))
            raise RunError(
                f"{self.path}: this attempt lost the run folder to {owner.describe()}; it publishes and appends nothing more, "
                f"and the newer attempt goes on from the last published checkpoint. End this process"
            )

    def describe(self) -> str:
        """Number, process and host, for messages."""
        job = f", job {self.record['job_id']}" if self.record.get("job_id") else ""
        return f"attempt {self.number} (pid {self.record['pid']} on {self.record['host']}{job}, begun {self.record['started_at']})"

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Touch the heartbeat until the end of the block, in which `pulse` is this attempt's."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError):  # a full or absent file system is the work's to report
                    (self.path / HEARTBEAT).touch()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        _at_work.append(self)
        try:
            yield
        finally:
            _at_work.remove(self)
            ended.set()
            thread.join()


_at_work: list[Attempt] = []  # those that this process speaks for, the newest last
_pulsed_at = [-PULSE_SECONDS]


def pulse() -> None:
    """Show that the work goes on, where this process speaks for an attempt: at most once a second, and in the main thread alone.

    For whatever gets on, and for a wait that ends by a time limit of its own.
    """
    seconds = time.monotonic()
    if _at_work and seconds - _pulsed_at[0] >= PULSE_SECONDS and threading.current_thread() is threading.main_thread():
        _pulsed_at[0] = seconds
        _at_work[-1].pulse()


def begin_attempt(run: Run) -> Attempt:
    """Become the owner of a run folder; `RunError` where another attempt still runs the stage, or the disk refuses.

    The environment variable MEGATRON_EXT_TAKE_OVER=1 (`--take-over`) begins all the same, and fences the other off.
    """
    try:
        return _claim(run)
    except OSError as cause:
        raise RunError(f"{run.path}: no attempt can begin: {cause}; make room on its disk, or see who may write there") from cause


def _claim(run: Run) -> Attempt:
    folder = run.path / ATTEMPTS
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{uuid.uuid4().hex}.tmp"
    aside.mkdir()
    try:
        write_json(aside / RECORD, {**_here(), "code_hash": code_hash(), "plan": to_json(run.stage.plan)})
        (aside / HEARTBEAT).touch()
        while True:
            number = max(attempt_numbers(run.path), default=0) + 1  # before the look: who begins between the two takes this number
            _refuse_beside_owner(run)
            try:
                aside.rename(folder / str(number))
                return Attempt(number, folder / str(number))
            except OSError:
                if not (folder / str(number)).exists():
                    raise
                # another began at the same moment: look at it, and give way if it lives
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def live_attempt(run_path: Path) -> Attempt | None:
    """The newest attempt where it may still be at work, or None."""
    numbers = attempt_numbers(run_path)
    if not numbers:
        return None
    newest = Attempt(numbers[-1], run_path / ATTEMPTS / str(numbers[-1]))
    return newest if _lives(newest) else None


def _refuse_beside_owner(run: Run) -> None:
    owner = live_attempt(run.path)
    if owner is None or os.environ.get(TAKE_OVER) == "1":
        return
    if _falls_silent(owner):
        if (owner.path / EXIT).is_file() and run.is_done():
            raise RunError(f"{run.path}: {owner.describe()} has finished stage '{run.name}' meanwhile; there is nothing left to do")
        return
    raise RunError(
        f"{run.path}: {owner.describe()} is at work on stage '{run.name}'; wait for it or stop it. "
        f"Where it is known to be dead or cut off, add --take-over: it can then publish nothing more"
    )


def _falls_silent(owner: Attempt) -> bool:
    """Wait for an owner elsewhere until its heart beats again (False), or has not for so long that it is dead (True).

    The next job of a chain comes when the last one was killed a moment ago, and must not end because of it.
    """
    if owner.record["place"] == _here()["place"]:
        return False
    print(f"waiting up to {LOST_SECONDS:.0f} s to see whether {owner.describe()} still lives", file=sys.stderr, flush=True)
    heard = _last_beat(owner)
    while _lives(owner):
        if _last_beat(owner) != heard:
            return False
        interruption.check()
        time.sleep(WAIT_SECONDS)
    return True


def _last_beat(attempt: Attempt) -> float:
    return (attempt.path / HEARTBEAT).stat().st_mtime


def _lives(attempt: Attempt) -> bool:
    if (attempt.path / EXIT).is_file():
        return False
    owner, here = attempt.record, _here()
    if here["job_id"] and owner["job_id"] == here["job_id"] and owner["restart_count"] < here["restart_count"]:
        return False
    if owner["place"] == here["place"]:
        return owner["process_start"] == _process_start(owner["pid"])
    return _silent_seconds(attempt) < LOST_SECONDS


def _silent_seconds(attempt: Attempt) -> float:
    """Seconds since the last heartbeat by the file system's own clock: hosts' clocks differ."""
    probe = attempt.path.parent / f".{uuid.uuid4().hex}.clock"
    probe.touch()
    try:
        return probe.stat().st_mtime - _last_beat(attempt)
    finally:
        probe.unlink()


def _here() -> Json:
    """This process, so that another can tell whether it still lives."""
    host = os.uname().nodename
    return {
        "started_at": now(),
        "pid": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "host": host,
        "place": f"{host}/{_boot_id()}/{os.readlink('/proc/self/ns/pid')}",
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def _process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else int(start)


@contextlib.contextmanager
def attempting(run: Run) -> Iterator[Attempt]:
    """An attempt whose end, good or bad, is recorded; single-process stages use it.

    `Interrupted` where it was asked to stop, whatever came of that: a pool whose processes got the signal too, say.
    """
    with interruption.held() as let_go:  # a request between the attempt's record and the watch over it would leave its end unsaid
        attempt = begin_attempt(run)
        with attempt.beating():
            try:
                let_go()
                yield attempt
                attempt.check_owner()
            except BaseException as error:
                _record_end(attempt, error)
                raise
    attempt.finish("done")


def _record_end(attempt: Attempt, error: BaseException) -> None:
    """What ended an attempt that did not finish; `Interrupted` from `error` where a request to stop is behind it."""
    if isinstance(error, Interrupted):
        attempt.interrupted(str(error), sys.stderr)
    elif interruption.request():
        words = f"asked to stop ({interruption.request()}), and it ended with {type(error).__name__}: {error}"
        attempt.interrupted(words, sys.stderr)
        raise Interrupted(words) from error
    else:
        attempt.finish("failed", error=f"{type(error).__name__}: {error}")
