"""An engine in a process of its own, behind the interface of any engine.

The two talk over a pair of connected sockets that only they hold, so nobody else can put in a word. Every wait ends: a
process that dies is noticed within a second, one that hangs after `silence_seconds` without a forward pass or a byte of
weights taken; both are one error with the exit code and the end of the process's log.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.attempts import pulse
from megatron_ext.errors import LaunchError, MegatronExtError, TrainingError
from megatron_ext.generation.engine import EngineStats, Generation, Request
from megatron_ext.generation.engine_server import SteppedEngine, send_bucket
from megatron_ext.model.bucket import Bucket

START_SECONDS = 1800.0  # imports and, on a GPU, compilation and graphs
SILENCE_SECONDS = 300.0  # of the longest forward pass: 8,192 tokens of prompts on a CPU
LOOK_SECONDS = 1.0  # how often a wait looks whether the process lives
CLOSE_SECONDS = 20.0
LOG_CHARACTERS = 3000  # of the log's end, in an error
OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")  # the trainer's


class EngineProcess:
    """The caller's side. Not for use by two threads at once."""

    def __init__(
        self,
        make: Callable[..., SteppedEngine],
        arguments: Sequence[Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """Start it and wait for `make(*arguments)` there; what it prints is appended to `log`.

        `make` stands at the top of a module. What it refuses is raised here; `LaunchError` where it ends or takes too long.
        """
        self._log, self._silence_seconds = log, silence_seconds
        self._stats = EngineStats()
        self._lost = ""  # why it can no longer be used
        own, theirs = socket.socketpair()
        limit = struct.pack("ll", int(silence_seconds), int(silence_seconds % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # a process that stops in the middle of a message
            own.setsockopt(socket.SOL_SOCKET, option, limit)
        command = [sys.executable, "-P", "-m", "megatron_ext.generation.engine_server", str(theirs.fileno()), str(os.getpid())]
        with theirs, log.open("ab") as output:
            self._log_begin = output.tell()
            self._process = subprocess.Popen(
                command, env=_environment(environment or {}), stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),), start_new_session=True,  # Ctrl-C is the caller's to handle
            )  # fmt: skip
        self._channel = Connection(own.detach())
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # the answer below says why it ended
            stdin.write(pickle.dumps((make, tuple(arguments))))
        try:
            self._answer("starting", start_seconds)
        except TrainingError as error:
            raise LaunchError(str(error)) from error
        except MegatronExtError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def submit(self, requests: Sequence[Request]) -> None:
        """Take on requests; `ConfigError` where the engine refuses one."""
        self._ask("submit", list(requests))

    def poll(self) -> list[Generation]:
        """Those that ended since the last call, as `Engine.poll`; the engine samples on between calls."""
        ended: list[Generation] = self._ask("poll")
        return ended

    def update_weights(self, version: int, tensors: Iterable[Bucket] | None) -> None:
        """Send all weights, one tensor at a time."""
        assert tensors is not None, "another process cannot see the trainer's own tensors"
        doing = f"taking weights version {version}"
        self._send(("update", version), doing)
        try:
            for bucket in tensors:
                try:
                    send_bucket(self._channel, bucket)
                except OSError as error:
                    self._fail(doing, error)
        except BaseException:
            self._end("its weights did not come whole")  # it waits for the rest, and would take the next order for it
            raise
        self._send(None, doing)
        self._answer(doing, self._silence_seconds)

    def held(self, names: Sequence[str]) -> dict[str, int]:
        """See `ReadableEngine.held`."""
        found: dict[str, int] = self._ask("held", list(names))
        return found

    def stats(self) -> EngineStats:
        """Counts as of the last answer."""
        return self._stats

    def close(self) -> None:
        """End the process; requests that run are lost."""
        if not self._lost:
            with contextlib.suppress(OSError):
                self._channel.send(("close", None))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
        self._end("it was closed")

    def _ask(self, order: str, value: Any = None) -> Any:
        self._send((order, value), order)
        return self._answer(order, self._silence_seconds)

    def _send(self, message: Any, doing: str) -> None:
        if self._lost:
            raise TrainingError(f"the generation engine's process is gone: {self._lost}")
        try:
            self._channel.send(message)
        except OSError as error:
            self._fail(doing, error)

    def _answer(self, doing: str, limit_seconds: float) -> Any:
        """Wait for the answer, as long as signs of life keep coming."""
        while True:
            self._await_word(doing, limit_seconds)
            try:
                kind, value, stats = self._channel.recv()
            except (EOFError, OSError) as error:
                self._fail(doing, error)
            self._stats = stats or self._stats
            if kind == "refused":
                raise value
            if kind == "done":
                return value

    def _await_word(self, doing: str, limit_seconds: float) -> None:
        end = time.monotonic() + limit_seconds
        while not self._channel.poll(min(LOOK_SECONDS, limit_seconds)):
            pulse()
            if self._process.poll() is not None and not self._channel.poll(0):
                self._fail(doing)  # a child of its own may hold the channel open
            if time.monotonic() >= end:
                self._fail(doing, TimeoutError(f"gave no sign of life for {limit_seconds:g} seconds, and was ended"))

    def _fail(self, doing: str, cause: Exception | None = None) -> NoReturn:
        """End the process and raise what happened."""
        if isinstance(cause, BlockingIOError):  # the socket's own limit
            cause = TimeoutError(f"stood still in the middle of a message for {self._silence_seconds:g} seconds, and was ended")
        happened = str(cause) if isinstance(cause, TimeoutError) else f"ended with {self._exit()}"
        self._end("it failed before")
        raise TrainingError(
            f"the generation engine's process {self.pid} {happened} ({doing}). The end of its log {self._log}:\n{self._log_end()}\n"
            f"What it was sampling is lost; start the stage again, it goes on from its last checkpoint"
        ) from cause

    def _exit(self) -> str:
        """How it ended by itself, in words."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "a closed channel, but ran on"
        if code >= 0:
            return f"exit code {code}"
        often = " (from outside: often the kernel, out of memory)" if code == -signal.SIGKILL else ""
        return f"signal {signal.Signals(-code).name}{often}"

    def _end(self, why: str) -> None:
        if not self._lost:
            self._lost = why
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # with processes of its own
            self._process.wait()
            self._channel.close()

    def _log_end(self) -> str:
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_begin, size - LOG_CHARACTERS))
            return log.read().decode(errors="replace").strip() or "(empty)"


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The caller's, with its import path, and without its place among the trainer's ranks."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**{name: value for name, value in os.environ.items() if name not in OF_A_GROUP}, "PYTHONPATH": path, **changes}
