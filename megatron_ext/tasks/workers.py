"""Grading in processes that can be killed: an answer that hangs, crashes or fills memory costs bounded time and its own grade only.

    with GradingPool(grade, workers=2, deadline_seconds=2.0, memory_bytes=2**30, recycle_after=1000) as pool:
        outcomes = pool.grade_all([(problem, text), ...])

A worker gets a batch and reports each answer as it is done. When one passes its deadline the worker is killed and the
rest of its batch goes to another. Deadlines are of processor time, so that neither a busy machine nor the number of
workers changes a grade; a worker that only waits is killed at `PATIENCE` times that on the clock, and its answer tried once more.
A process that ends unasked is replaced, counted as lost, and told of: grades hardly show that something kills graders.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Generic, Literal, Protocol, TypeVar

from megatron_ext.attempts import pulse
from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.tasks.nursery import Nursery, Reply, Request

V = TypeVar("V", covariant=True)

BATCH = 32  # requests in one message: far more work than the message, little enough to hand to another worker
BATCH_BYTES = 2**20  # of one message, but for a request that is larger by itself: a worker holds its batch in limited memory
SHARES = 4  # batches per worker that the remaining requests are cut into, so that all workers end together
PATIENCE = 10  # deadlines of wall time that a worker may wait for a processor
LOOK_SECONDS = 0.01  # at least, between two looks at a worker's processor time


class Ending(Enum):
    """How the grading of one answer ended."""

    GRADED = "graded"
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Outcome(Generic[V]):
    """What `grade` returned; where there is nothing, why."""

    ending: Ending
    verdict: V | None = None
    cause: str = ""


@dataclass(slots=True)
class WorkerCounts:
    """Worker processes of a pool since it was made."""

    started: int = 0
    timed_out: int = 0  # killed at a deadline
    died: int = 0  # ended by themselves or by something else, in the middle of an answer
    lost: int = 0  # the same at any time, and nurseries, whose workers end with them and are not counted here
    left: int = 0  # replaced after an error in `grade`, or nearly full
    recycled: int = 0  # replaced after `recycle_after` answers


class Judged(Protocol):
    """A verdict that says in a word what it is: right, wrong, unparseable ..."""

    @property
    def outcome(self) -> str: ...


def count_outcomes(outcomes: Iterable[Outcome[Judged]]) -> Counter[str]:
    """How many timed out, how many crashed, and how many were graded as what."""
    return Counter(one.verdict.outcome if one.verdict is not None else one.ending.value for one in outcomes)


@dataclass(slots=True, eq=False)
class _Worker:
    """A process, and the positions of the requests that it has been given, the one in work first."""

    nursery: Nursery
    pid: int
    channel: Connection
    given: deque[int] = field(default_factory=deque)
    num_graded: int = 0
    began_seconds: float = 0.0  # when the request in work began, by the clock ...
    began_cpu_seconds: float = 0.0  # ... and in the worker's processor time
    look_at_seconds: float = 0.0  # when it may be overdue at the earliest

    def cpu_seconds(self) -> float:
        """Processor time that the process has used."""
        return time.clock_gettime((~self.pid << 3) | 2)  # Linux's clock number of another process: clock_getcpuclockid(3)

    def mark(self, deadline_seconds: float) -> None:
        """A request's time begins now."""
        self.began_seconds = time.monotonic()
        with contextlib.suppress(OSError):  # no such process: its channel will say so
            self.began_cpu_seconds = self.cpu_seconds()
        self.look_at_seconds = self.began_seconds + deadline_seconds

    def overdue(self, deadline_seconds: float) -> Literal["", "worked", "waited"]:
        """How the request in work has had its time; if it has not, sets when to look again."""
        now = time.monotonic()
        if now < self.look_at_seconds or self.channel.poll():
            return ""
        used_seconds = 0.0
        with contextlib.suppress(OSError):
            used_seconds = self.cpu_seconds() - self.began_cpu_seconds
        if used_seconds >= deadline_seconds:
            return "worked"
        self.look_at_seconds = now + max(deadline_seconds - used_seconds, LOOK_SECONDS)
        return "waited" if now - self.began_seconds >= PATIENCE * deadline_seconds else ""


class GradingPool(Generic[V]):
    """Workers that call `grade(*request)`, a function at the top of a module, on requests and return its verdicts, both picklable.

    Any thread may use it; calls from several take turns. Results are in the order of the requests and do not depend on
    the number of workers. `deadline_seconds` is for one answer, `memory_bytes` what a worker may take on top of what
    it starts with; after `recycle_after` answers a worker is replaced. `warm_up` holds requests of ours that are
    graded once before any worker is forked, so that what they import and cache is shared by all. `tell` gets a line about
    each process that was lost.
    """

    def __init__(
        self, grade: Callable[..., V], *, workers: int, deadline_seconds: float, memory_bytes: int, recycle_after: int,
        warm_up: Sequence[Request] = (), tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        settings = {"workers": workers, "deadline_seconds": deadline_seconds, "memory_bytes": memory_bytes, "recycle_after": recycle_after}
        for name, value in settings.items():
            if not value > 0:
                raise ConfigError(f"grading: {name} is {value}; it must be above zero")
        self.workers, self.deadline_seconds, self.recycle_after = workers, deadline_seconds, recycle_after
        self.counts = WorkerCounts()
        self._tell = tell
        self._nursery_arguments = (grade, tuple(warm_up), memory_bytes)
        self._nursery = Nursery(*self._nursery_arguments)
        self._idle: list[_Worker] = []
        self._turn = threading.Lock()
        self._closed = False

    def grade_all(self, requests: Sequence[Request]) -> list[Outcome[V]]:
        """One outcome for each request, in their order. Raises LaunchError where processes cannot be started."""
        with self._turn:
            assert not self._closed, "the pool is closed"
            return _Round(self, requests).run()

    def close(self) -> None:
        """End all processes."""
        with self._turn:
            for worker in self._idle:
                worker.channel.close()
            self._idle.clear()
            self._nursery.close()
            self._closed = True

    def __enter__(self) -> GradingPool[V]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def take_worker(self) -> _Worker:
        """An idle worker, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.nursery.is_open and not worker.channel.poll():  # an idle worker has nothing to say: it could only be its end
                return worker
            self.lose(worker)
        try:
            started = self._nursery.start()
        except OSError:  # something ended the nursery, and with it all workers: once more from the beginning
            self._lost(f"the nursery (pid {self._nursery.pid}), and with it every worker: {_ended(self._nursery.exit_code)}")
            self._nursery = Nursery(*self._nursery_arguments)
            try:
                started = self._nursery.start()
            except OSError as error:
                raise LaunchError("grading processes end as soon as they start: something kills them, or memory is short") from error
        self.counts.started += 1
        return _Worker(self._nursery, *started)

    def give_back(self, worker: _Worker) -> None:
        """Keep a worker that has nothing to do."""
        self._idle.append(worker)

    def dismiss(self, worker: _Worker) -> str:
        """End a worker, whatever it does; how it ended."""
        worker.channel.close()
        try:
            code = worker.nursery.end(worker.pid)
        except OSError:
            return "all grading processes ended, from outside or for want of memory"
        return _ended(code)

    def lose(self, worker: _Worker) -> str:
        """Bury a worker that ended unasked; how it ended."""
        how = self.dismiss(worker)
        if worker.nursery.is_open:  # else its nursery is what was lost, and is said to be when another is made
            self._lost(f"a worker (pid {worker.pid}): {how}")
        return how

    def _lost(self, what: str) -> None:
        self.counts.lost += 1
        self._tell(f"grading lost {what}; another takes its place")


def _ended(code: int) -> str:
    """In words, from an exit code that is negative for a signal."""
    names = {-one.value: one.name for one in signal.Signals}
    return f"its process was ended by {names.get(code, f'signal {-code}')}" if code < 0 else f"its process ended with exit code {code}"


class _Round(Generic[V]):
    """One call of `grade_all`."""

    def __init__(self, pool: GradingPool[V], requests: Sequence[Request]) -> None:
        self.pool, self.requests = pool, requests
        self.outcomes: dict[int, Outcome[V]] = {}
        self.waiting = deque(range(len(requests)))
        self.busy: dict[Connection, _Worker] = {}
        self.suspects: set[int] = set()  # requests that have cost a worker

    def run(self) -> list[Outcome[V]]:
        try:
            while len(self.outcomes) < len(self.requests):
                while self.waiting and len(self.busy) < self.pool.workers:
                    self._hand_out(self.pool.take_worker())
                self._collect()
        finally:  # on an error: a late reply must not meet the next call's requests
            for worker in self.busy.values():
                self.pool.dismiss(worker)
        return [self.outcomes[position] for position in range(len(self.requests))]

    def _hand_out(self, worker: _Worker) -> None:
        self.busy[worker.channel] = worker
        fair = -(-len(self.waiting) // (SHARES * self.pool.workers))
        most = min(BATCH, fair, self.pool.recycle_after - worker.num_graded)
        batch: list[bytes] = []
        size_bytes = 0
        while self.waiting and len(batch) < most:
            request = pickle.dumps(self.requests[self.waiting[0]])
            size_bytes += len(request)
            if batch and size_bytes > BATCH_BYTES:
                break
            batch.append(request)
            worker.given.append(self.waiting.popleft())
        worker.mark(self.pool.deadline_seconds)
        with contextlib.suppress(ConnectionError):  # it died while idle: reading from it will say so
            worker.channel.send(batch)

    def _collect(self) -> None:
        """Wait for a reply or a deadline, and act on it."""
        pulse()
        first = min(worker.look_at_seconds for worker in self.busy.values())
        for channel in wait(list(self.busy), max(0.0, first - time.monotonic())):
            assert isinstance(channel, Connection)
            self._receive(self.busy[channel])
        for worker in list(self.busy.values()):
            if how := worker.overdue(self.pool.deadline_seconds):
                self.pool.counts.timed_out += 1
                late: Outcome[V] = Outcome(Ending.TIMED_OUT, cause=f"not done in {self.pool.deadline_seconds} seconds")
                self._replace(worker, late, innocent=how == "waited")

    def _receive(self, worker: _Worker) -> None:
        try:
            reply: Reply = worker.channel.recv()
        except (EOFError, OSError):
            self.pool.counts.died += 1
            self._replace(worker, None, innocent=True)
            return
        returned, value, leaves = reply
        worker.mark(self.pool.deadline_seconds)
        worker.num_graded += 1
        position = worker.given.popleft()
        self.outcomes[position] = Outcome(Ending.GRADED, verdict=value) if returned else Outcome(Ending.CRASHED, cause=value)
        if leaves or worker.num_graded >= self.pool.recycle_after:
            self.pool.counts.left += leaves
            self.pool.counts.recycled += not leaves
            self._part_with(worker)
        elif not worker.given:
            self.pool.give_back(self.busy.pop(worker.channel))

    def _replace(self, worker: _Worker, outcome: Outcome[V] | None, *, innocent: bool) -> None:
        """End a worker over the request in work; its outcome, or None for a crash that the worker's end explains.

        One that may be `innocent` is tried once more: the kernel or a person may have ended the worker, or held the machine.
        """
        position = worker.given[0]
        again = innocent and position not in self.suspects
        self.suspects.add(position)
        if not again:
            worker.given.popleft()
        how = self._part_with(worker, has_died=outcome is None)
        if not again:
            self.outcomes[position] = outcome or Outcome(Ending.CRASHED, cause=how)

    def _part_with(self, worker: _Worker, has_died: bool = False) -> str:
        """Dismiss a worker, or bury it; what it was given and has not done goes to others, first in line."""
        del self.busy[worker.channel]
        self.waiting.extendleft(reversed(worker.given))
        return self.pool.lose(worker) if has_died else self.pool.dismiss(worker)
