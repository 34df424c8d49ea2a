"""Grading in processes: hostile answers cost bounded time and their own grade, and no process outlives its caller.

Deadlines are of processor time and generous; nothing here asserts how long a thing took.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.tasks import nursery, workers
from megatron_ext.tasks.grading import grade
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.workers import Ending, GradingPool, Outcome, count_outcomes

ROOT = Path(__file__).resolve().parents[2]
GIBIBYTE = 2**30
SOON_SECONDS = 60  # for a thing that happens at once on a machine that is not overloaded
MARKS: list[str] = []  # what this process writes here, no worker sees


@dataclass(frozen=True)
class Word:
    """The smallest verdict."""

    outcome: str


def act(what: str, x: object = None) -> object:
    """Stands for a grader: an honest answer doubles its number, the others do harm."""
    match what, x:
        case "double", int():
            return 2 * x
        case "judge", str():
            return Word(x)
        case "pid", _:
            return os.getpid()
        case "hash", str():
            return hash(x)
        case "caller", _:
            return MARKS, threading.active_count(), os.environ["CUDA_VISIBLE_DEVICES"]
        case "allocate", int():
            return len(bytearray(x))
        case "hoard", int():
            MARKS.append("x" * x)
            return len(MARKS)
        case "raise", _:
            raise ValueError(x)
        case "die once", str():
            if not Path(x).exists():
                Path(x).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return "survived"
        case "announce and hang", str():
            Path(x).write_text(f"{os.getpid()} {os.getppid()}")
            spin()
    return HOSTILE[what]()


def spin() -> None:
    while True:
        pass


HOSTILE = {
    "spin": spin,
    "sleep": lambda: time.sleep(10**6),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "tower": lambda: 9**9**9**9,
    "factorial": lambda: math.factorial(10**9),
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "memory": lambda: [bytearray(2**24) for _ in range(10**6)],
    "nested": lambda: eval("[" * 10**5 + "]" * 10**5),
    "exit": lambda: os._exit(0),
    "leave": sys.exit,
    "kill": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}
LATE = {"spin", "sleep", "stop", "tower", "factorial", "regex"}


def make_pool(num_workers: int = 2, deadline_seconds: float = 20.0, memory_bytes: int = GIBIBYTE, recycle_after: int = 1000, **more):
    return GradingPool(
        act, workers=num_workers, deadline_seconds=deadline_seconds, memory_bytes=memory_bytes, recycle_after=recycle_after, **more
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with make_pool() as one:
        yield one


def verdicts(outcomes: list[Outcome]) -> list[object]:
    return [one.verdict for one in outcomes]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # an orphan's burial is the machine's business
    except psutil.NoSuchProcess:
        return True


def wait_for(condition) -> None:
    until = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_results_come_in_the_order_of_the_requests(pool: GradingPool) -> None:
    outcomes = pool.grade_all([("double", number) for number in range(1000)])
    assert outcomes == [Outcome(Ending.GRADED, 2 * number) for number in range(1000)]
    assert pool.grade_all([]) == []


@pytest.mark.slow
def test_hostile_answers_cost_their_own_grade_only_whatever_the_number_of_workers(monkeypatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 2)
    requests = []
    for number, harm in enumerate(HOSTILE):
        requests += [("double", 2 * number), (harm,), ("double", 2 * number + 1)]
    found = []
    for num_workers in (1, 3):
        with make_pool(num_workers, deadline_seconds=0.3, memory_bytes=GIBIBYTE // 32) as one:
            found.append(one.grade_all(requests))
    for outcomes in found:
        assert verdicts(outcomes[0::3]) == [4 * number for number in range(len(HOSTILE))]
        assert verdicts(outcomes[2::3]) == [4 * number + 2 for number in range(len(HOSTILE))]
        endings = {harm: one.ending for harm, one in zip(HOSTILE, outcomes[1::3], strict=True)}
        assert endings == {harm: Ending.TIMED_OUT if harm in LATE else Ending.CRASHED for harm in HOSTILE}
    assert found[0] == found[1]


ENDLESS = "\\int \\frac{\\sin(x^{5} + \\cos x)}{x^{7} + e^{x}} dx"  # nothing refuses it, and sympy tries for minutes
HOSTILE_LATEX = (
    "9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}", "(10^{8})!", "\\sum_{n=1}^{10^{9}} \\frac{1}{n^{2}}",
    "\\sqrt{" * 5000 + "2" + "}" * 5000, "\\frac{" * 90 + "1" + "}{2}" * 90, "(" * 290 + "1" + ")" * 290, "1+" * 50000 + "1",
    "{" * 100000, "\\boxed{" * 12000, "\\text{" + " " * 100000 + "}", "x" * 100000, "10^{10^{10}} - 10^{10^{10}} + \\frac{1}{2} + 0",
    "(9^{9})^{9^{9}}", "2^{x+9^{9}}", "(x+1)^{9999}", ENDLESS,
)  # fmt: skip


@pytest.mark.slow
def test_hostile_answers_to_the_real_grader_from_a_thread() -> None:
    half, root = (Problem(id="", question="", answers=(gold,), source="") for gold in ("\\frac{1}{2}", "2\\sqrt{3}"))
    requests = []
    for harm in HOSTILE_LATEX:
        requests += [(half, "\\boxed{0.5}"), (half, f"\\boxed{{{harm}}}"), (root, "\\boxed{\\sqrt{12}}"), (root, "\\boxed{\\sqrt{6}}")]
    settings = {
        "workers": 2,
        "deadline_seconds": 1.0,
        "memory_bytes": GIBIBYTE,
        "recycle_after": 20,
        "warm_up": requests[:1] + requests[2:4],
    }
    with GradingPool(grade, **settings) as one, ThreadPoolExecutor(1) as thread:
        outcomes = thread.submit(one.grade_all, requests).result()
    counts = [count_outcomes(outcomes[start::4]) for start in range(4)]
    assert (counts[0], counts[2], counts[3]) == tuple({kind: len(HOSTILE_LATEX)} for kind in ("correct", "correct", "wrong"))
    assert set(counts[1]) <= {"timed_out", "crashed", "unparseable", "wrong", "error"}
    assert counts[1].total() == len(HOSTILE_LATEX)
    assert outcomes[1::4][HOSTILE_LATEX.index(ENDLESS)].ending is Ending.TIMED_OUT


def test_the_four_counts_are_apart(pool: GradingPool) -> None:
    outcomes = pool.grade_all([("judge", "right"), ("judge", "wrong"), ("judge", "wrong"), ("judge", "unparseable"), ("exit",)])
    outcomes.append(Outcome(Ending.TIMED_OUT))
    assert count_outcomes(outcomes) == {"right": 1, "wrong": 2, "unparseable": 1, "crashed": 1, "timed_out": 1}


def test_a_crash_says_why(pool: GradingPool) -> None:
    raised, ended, killed = pool.grade_all([("raise", "y" * 10**5), ("exit",), ("kill",)])
    assert raised.cause.startswith("ValueError: yyy")
    assert len(raised.cause) <= nursery.ERROR_CHARACTERS
    assert "exit code 0" in ended.cause
    assert "SIGSEGV" in killed.cause


@pytest.mark.parametrize(("memory_bytes", "ending"), [(GIBIBYTE // 8, Ending.CRASHED), (2**38, Ending.GRADED)])
def test_memory_is_limited(memory_bytes: int, ending: Ending) -> None:
    with make_pool(memory_bytes=memory_bytes) as one:
        assert one.grade_all([("allocate", GIBIBYTE // 4)])[0].ending is ending


def test_what_an_answer_leaves_in_memory_meets_no_neighbour() -> None:
    with make_pool(1, memory_bytes=GIBIBYTE // 4) as one:
        outcomes = one.grade_all([("hoard", GIBIBYTE // 6), ("hoard", GIBIBYTE // 6), ("hoard", GIBIBYTE // 6)])
        assert verdicts(outcomes) == [1, 1, 1]
        assert one.counts.left == 3


def test_a_request_too_large_for_a_worker_costs_only_itself() -> None:
    with make_pool(1, memory_bytes=GIBIBYTE // 16) as one:
        outcomes = one.grade_all([("double", 1), ("judge", "x" * (GIBIBYTE // 16)), ("double", 2)])
    assert [one.ending for one in outcomes] == [Ending.GRADED, Ending.CRASHED, Ending.GRADED]


def test_an_answer_whose_worker_is_killed_is_tried_once_more(pool: GradingPool, tmp_path: Path) -> None:
    died = pool.counts.died
    first, second = pool.grade_all([("die once", str(tmp_path / "marker")), ("kill",)])
    assert first.verdict == "survived"
    assert second.ending is Ending.CRASHED
    assert pool.counts.died == died + 3


def test_workers_are_replaced_after_so_many_answers() -> None:
    with make_pool(1, recycle_after=5) as one:
        pids = verdicts(one.grade_all([("pid",)] * 20))
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [5, 5, 5, 5]
    assert one.counts == workers.WorkerCounts(started=4, recycled=4)


def test_a_worker_is_no_fork_of_the_caller(pool: GradingPool) -> None:
    MARKS.append("in the caller")
    [outcome] = pool.grade_all([("caller",)])
    MARKS.clear()
    assert outcome.verdict == ([], 1, "")


def test_all_workers_hash_alike(monkeypatch) -> None:
    def hashes() -> set[object]:
        found = set()
        for _ in range(2):
            with make_pool(1) as one:
                found |= set(verdicts(one.grade_all([("hash", "text")])))
        return found

    assert len(hashes()) == 1
    honest = nursery._environment
    monkeypatch.setattr(nursery, "_environment", lambda: {**honest(), "PYTHONHASHSEED": "random"})
    assert len(hashes()) == 2


def test_it_works_from_threads_that_come_and_go() -> None:
    made: list[GradingPool] = []
    maker = threading.Thread(target=lambda: made.append(make_pool()))
    maker.start()
    maker.join()
    with made[0] as one, ThreadPoolExecutor(4) as threads:
        batches = [[("double", 100 * turn + number) for number in range(50)] for turn in range(8)]
        for batch, outcomes in zip(batches, threads.map(one.grade_all, batches), strict=True):
            assert verdicts(outcomes) == [2 * number for _, number in batch]


def interrupted(one: GradingPool) -> list[object]:
    """What a pool says after a call that failed with a worker at work."""
    with pytest.raises((TypeError, AttributeError)):
        one.grade_all([("double", 7), ("double", threading.Lock())])
    return verdicts(one.grade_all([("double", number) for number in range(100)]))


def test_a_call_that_failed_leaves_no_replies_to_the_next(monkeypatch) -> None:
    right = [2 * number for number in range(100)]
    with make_pool() as one:
        assert interrupted(one) == right

        def keep(worker) -> str:
            worker.given.clear()
            one.give_back(worker)
            return ""

        monkeypatch.setattr(one, "dismiss", keep)
        monkeypatch.setattr(one, "take_worker", lambda: one._idle.pop() if one._idle else GradingPool.take_worker(one))
        assert interrupted(one) != right


def test_the_death_of_all_processes_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with make_pool(1, deadline_seconds=1.0) as one, ThreadPoolExecutor(1) as thread:
        running = thread.submit(one.grade_all, [("double", 1), ("announce and hang", str(told)), ("double", 2)])
        wait_for(lambda: told.exists() and len(told.read_text().split()) == 2)
        worker, parent = map(int, told.read_text().split())
        os.kill(parent, signal.SIGKILL)
        assert verdicts(running.result()) == [2, None, 4]
        assert gone(worker)
        assert gone(parent)
        assert verdicts(one.grade_all([("double", 5)])) == [10]


def after_a_death_in_between(one: GradingPool) -> Ending:
    """How a grade ends after two workers and their nursery were killed between two calls."""
    [pid, *_] = verdicts(one.grade_all([("pid",)] * 100))
    assert isinstance(pid, int)
    children = [psutil.Process(pid).parent(), *psutil.Process(pid).parent().children()]
    assert len(children) == 3
    for process in children:
        process.kill()
    wait_for(lambda: all(gone(process.pid) for process in children))
    return one.grade_all([("double", 1)])[0].ending


def test_workers_that_died_while_idle_get_no_answers(monkeypatch) -> None:
    with make_pool() as one:
        assert after_a_death_in_between(one) is Ending.GRADED
        monkeypatch.setattr(one, "take_worker", lambda: one._idle.pop() if one._idle else GradingPool.take_worker(one))
        assert after_a_death_in_between(one) is Ending.CRASHED


@pytest.mark.parametrize("bystander", ["", "if os.fork() == 0: time.sleep(200)"], ids=["alone", "with_a_fork_that_holds_its_sockets"])
def test_no_process_outlives_a_caller_that_is_killed(tmp_path: Path, bystander: str) -> None:
    told = tmp_path / "told"
    program = (
        "import os, time\n"
        "from tests.unit.test_grading_workers import make_pool\n"
        f"pool = make_pool(deadline_seconds=1000.0)\n{bystander}\n"
        f"pool.grade_all([('announce and hang', {str(told)!r})])\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_for(lambda: caller.poll() is not None or (told.exists() and len(told.read_text().split()) == 2))
    pids = [int(word) for word in told.read_text().split()]
    assert not any(gone(pid) for pid in pids)
    forks = [child for child in psutil.Process(caller.pid).children() if child.pid not in pids]
    assert len(forks) == bool(bystander)
    caller.kill()
    caller.wait()
    wait_for(lambda: all(gone(pid) for pid in pids))
    for fork in forks:
        fork.kill()


def test_no_process_outlives_the_pool() -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyError), make_pool() as one:  # noqa: PT012 - the body is what fails
        one.grade_all([("pid",)] * 100)
        assert len(set(psutil.Process().children(recursive=True)) - before) >= 2
        raise KeyError
    assert set(psutil.Process().children(recursive=True)) <= before


def test_bad_settings_are_refused() -> None:
    for setting in ("num_workers", "deadline_seconds", "memory_bytes", "recycle_after"):
        with pytest.raises(ConfigError, match="must be above zero"):
            make_pool(**{setting: 0})
    closed = make_pool()
    closed.close()
    with pytest.raises(AssertionError, match="closed"):
        closed.grade_all([])
    with pytest.raises(ConfigError, match="top of a module"):
        GradingPool(lambda: 1, workers=1, deadline_seconds=1.0, memory_bytes=GIBIBYTE, recycle_after=1)


def test_a_grader_that_cannot_start_is_named() -> None:
    with pytest.raises(LaunchError, match="ValueError: no such thing"):
        make_pool(warm_up=[("raise", "no such thing")])
    with pytest.raises(LaunchError, match="the first one ended"):
        make_pool(warm_up=[("exit",)])
