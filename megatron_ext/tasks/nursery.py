"""A nursery of processes: a fresh interpreter that imports a function once, and forks workers that call it.

The caller may have threads, torch and a GPU, so it is never forked: the nursery is a program of its own
(`python -m megatron_ext.tasks.nursery`) with one thread. Its forks start warm, in milliseconds. It does two
things on order, start a worker and end one, and it alone is the workers' parent, so an order to end never meets
another process under a used-again number. The nursery ends when its caller does, the workers when the nursery does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.interruption import leave_to_parent

Request = tuple[Any, ...]
Reply = tuple[bool, Any, bool]  # (the function returned, its value or its error as text, the worker leaves)

ANSWER_SECONDS = 120  # for the slowest order, the start: an import of sympy on a machine that swaps
CLOSE_SECONDS = 5  # to end its workers before it is killed
LOOK_SECONDS = 1.0  # how often the nursery looks whether its caller still lives
PACKET_BYTES = 65536  # one order or answer
ERROR_CHARACTERS = 500  # of an error's text: it may hold the whole answer
TRACEBACK_CHARACTERS = 8000  # of a failed start, the end; far below a packet
PR_SET_PDEATHSIG = 1


class Nursery:
    """The caller's side. Not for use by two threads at once; a `ConnectionError` from it says that its process has ended."""

    def __init__(self, function: Callable[..., Any], warm_up: Sequence[Request], memory_bytes: int) -> None:
        """Start it and wait until the function is imported and has seen the `warm_up` arguments.

        Raises ConfigError for a function that cannot be pickled, LaunchError where the start fails.
        """
        try:
            setup = pickle.dumps((function, tuple(warm_up), memory_bytes))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(f"{function!r} cannot be sent to a process ({error}): take a function at the top of a module") from error
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(ANSWER_SECONDS)
        command = [sys.executable, "-P", "-m", "megatron_ext.tasks.nursery", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),), start_new_session=True,  # Ctrl-C is the caller's to handle
            )  # fmt: skip
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # the answer below says why it ended
            stdin.write(setup)
        try:
            self._ask(None)
        except ConnectionError as error:
            raise LaunchError("grading processes cannot start: the first one ended; standard error holds what it said") from error
        except LaunchError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it can take orders, as far as is known."""
        return self._control.fileno() >= 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int:
        """How its process ended, negative for a signal; to be asked once it is no longer open."""
        code = self._process.returncode
        assert code is not None, "the nursery still runs"
        return code

    def start(self) -> tuple[int, Connection]:
        """Fork a worker; its process id and the connection to it."""
        pid, channel = self._ask(("start", 0))
        return pid, Connection(channel)

    def end(self, pid: int) -> int:
        """Kill a worker, or bury a dead one: its exit code, negative for a signal."""
        return self._ask(("end", pid))[0]

    def close(self) -> None:
        """End the nursery and its workers."""
        self._control.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, order: tuple[str, int] | None) -> tuple[int, int]:
        """Send an order (none: wait for the start) and return (number, file descriptor or -1)."""
        try:
            if order is not None:
                self._control.send(pickle.dumps(order))
            data, descriptors, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            if not data:
                raise ConnectionResetError("the nursery ended")
        except BaseException as error:
            self.close()  # an answer still on its way must not be taken for the next order's
            if isinstance(error, TimeoutError):
                raise LaunchError(f"the grading processes did not answer in {ANSWER_SECONDS} seconds (machine out of memory?)") from error
            raise
        number, problem = pickle.loads(data)
        if problem:
            raise LaunchError(f"grading processes cannot start: {problem}")
        return number, descriptors[0] if descriptors else -1


def _environment() -> dict[str, str]:
    """The caller's, with its import path; no GPU, one thread, and one hash seed so that all workers iterate over sets alike."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """The nursery: set up from standard input, then orders from the socket of argument 1 until the caller, argument 2, is gone."""
    leave_to_parent()
    control, caller = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    try:
        function, warm_up, memory_bytes = pickle.load(sys.stdin.buffer)
        for request in warm_up:
            function(*request)
    except BaseException as error:
        control.send(pickle.dumps((0, traceback.format_exc()[-TRACEBACK_CHARACTERS:])))
        raise SystemExit(1) from error  # the caller shows it
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared with the workers
    control.send(pickle.dumps((0, "")))
    children: set[int] = set()
    try:
        while _next_order(control, caller, children, function, memory_bytes):
            pass
    finally:
        for pid in children:
            _end(pid)


def _next_order(control: socket.socket, caller: int, children: set[int], function: Callable[..., Any], memory_bytes: int) -> bool:
    """Carry out one order, if one comes soon; False when the caller is gone."""
    # An unrelated fork of the caller may hold the socket's other end open, so its end alone does not tell.
    if not select.select([control], [], [], LOOK_SECONDS)[0]:
        return os.getppid() == caller
    data = control.recv(PACKET_BYTES)
    if not data:
        return False
    order, pid = pickle.loads(data)
    if order == "end":
        children.discard(pid)
        control.send(pickle.dumps((_end(pid), "")))
        return True
    ours, theirs = socket.socketpair()
    with ours, theirs:
        nursery = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            control.send(pickle.dumps((0, f"{error} (too many processes, or no memory)")))
            return True
        if pid == 0:
            _worker(function, theirs.detach(), (control.detach(), ours.detach()), nursery, memory_bytes)
        children.add(pid)
        socket.send_fds(control, [pickle.dumps((pid, ""))], [ours.fileno()])
    return True


def _end(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _worker(function: Callable[..., Any], channel: int, not_its_own: Sequence[int], nursery: int, memory_bytes: int) -> NoReturn:
    """What the forked process is: it never returns into the nursery's code."""
    try:
        for descriptor in not_its_own:
            os.close(descriptor)
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:
            _limit(memory_bytes)
            _serve(function, Connection(channel), memory_bytes)
    finally:
        os._exit(1)


def _limit(memory_bytes: int) -> None:
    """At most `memory_bytes` of address space beyond the present; silence; no core files; the kernel's first choice when memory ends."""
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # /proc may be read-only
        file.write("1000")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _serve(function: Callable[..., Any], channel: Connection, memory_bytes: int) -> None:
    """Take batches of pickled arguments and reply to each as it is done, until the caller hangs up.

    After an error the worker leaves, for what it holds may be half made; so it does when its peak passes half of its
    memory, so that no request meets a worker that is nearly full.
    """
    most_bytes = _peak_bytes() + memory_bytes // 2
    try:
        while True:
            for request in channel.recv():
                value = function(*pickle.loads(request))
                leaves = _peak_bytes() > most_bytes
                channel.send((True, value, leaves))
                if leaves:
                    return
    except BaseException as error:
        channel.send((False, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS], True))
        raise


if __name__ == "__main__":
    main()
