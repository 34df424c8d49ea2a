"""Grading processes that end unasked, from outside or by themselves: each is replaced, counted, and told of with its cause."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

from megatron_ext.attempts import begin_attempt
from megatron_ext.distributed import Groups
from megatron_ext.metrics import read_metrics
from megatron_ext.rl.grading import grading_pool
from megatron_ext.rl.stage import RLMetricsHook
from megatron_ext.runs import open_run
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.workers import Ending, GradingPool
from megatron_ext.training.hooks import Context, say
from megatron_ext.training.state import Progress
from tests import ranks, rl_runs
from tests.unit.test_grading_workers import after_a_death_in_between, gone, make_pool, verdicts, wait_for
from tests.unit.test_rl_bad_inputs import stage_run


def lost(num_workers: int, harm) -> tuple[int, list[str]]:
    """How many processes a pool counts as lost over `harm`, and what it says of each."""
    told: list[str] = []
    with make_pool(num_workers, tell=told.append) as one:
        harm(one)
        return one.counts.lost, told


WORKER = r"grading lost a worker \(pid \d+\): its process "


def test_each_worker_that_ends_unasked_is_counted_and_told_with_its_signal_or_exit_code(tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")
    number, told = lost(1, lambda one: one.grade_all([("double", 1), ("die once", marker), ("exit",), ("double", 2)]))
    endings = ["was ended by SIGKILL", *["ended with exit code 0"] * 2]  # what may be innocent is tried once more
    assert number == 3
    assert all(re.fullmatch(f"{WORKER}{end}; another takes its place", line) for line, end in zip(told, endings, strict=True)), told


def kill_idle(one: GradingPool) -> None:
    """From outside, between two calls."""
    [pid] = set(verdicts(one.grade_all([("pid",)])))
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid))
    assert verdicts(one.grade_all([("double", 2)])) == [4]


def test_a_worker_that_is_killed_while_idle_is_told_too(monkeypatch) -> None:
    number, told = lost(1, kill_idle)
    assert number == len(told) == 1
    assert re.match(WORKER + "was ended by SIGKILL", told[0])
    monkeypatch.setattr(GradingPool, "lose", GradingPool.dismiss)  # as if it were one of those that are ended on purpose
    assert lost(1, kill_idle) == (0, [])


def test_a_nursery_that_is_killed_is_told_once_with_all_its_workers() -> None:
    def harm(one: GradingPool) -> None:
        assert after_a_death_in_between(one) is Ending.GRADED

    number, told = lost(2, harm)
    assert number == len(told) == 1
    assert re.match(r"grading lost the nursery \(pid \d+\), and with it every worker: its process was ended by SIGKILL; ", told[0])


def test_what_is_ended_on_purpose_is_not_lost() -> None:
    def harm(one: GradingPool) -> None:
        one.deadline_seconds, one.recycle_after = 0.3, 3
        one.grade_all([("double", 1)] * 4 + [("spin",), ("raise", "x")])
        assert one.counts.timed_out >= 1  # a machine that is held up costs the answer a second try
        assert one.counts.left == 1
        assert one.counts.recycled

    assert lost(1, harm) == (0, [])


def test_a_step_records_how_many_were_lost_since_the_record_before(tmp_path: Path) -> None:
    run = stage_run(tmp_path, 4)
    counts, printed = ranks.run(_recorded, rl_runs.CPU, str(run.path))[0]
    assert counts == [0, 1, 0]
    assert re.match(WORKER + "was ended by SIGKILL; another takes its place\n", printed)
    assert [one["graders_lost"] for one in read_metrics(run.metrics_path, "rl")] == counts


def _recorded(groups: Groups, path: str) -> tuple[list[int], str]:
    """What three steps record, of which the second finds its idle worker killed; and what the pool says."""
    run, log = open_run(Path(path)), io.StringIO()
    with grading_pool(run.stage.plan, tell=say) as pool, contextlib.redirect_stdout(log):
        hook = RLMetricsHook(pool)
        at_start = Context(run, begin_attempt(run), groups, None, Progress(0, 0, 0), "weights")  # the hook looks at no weights
        hook.start(at_start)
        for step in (1, 2, 3):
            if step == 2:
                [worker] = pool._idle
                os.kill(worker.pid, signal.SIGKILL)
                wait_for(lambda: worker.channel.poll())  # noqa: B023 - waited for here
            [outcome] = pool.grade_all([(Problem("p", "3+4=", ("7",), ""), "\\boxed{7}", "correct")])
            assert outcome.ending is Ending.GRADED
            hook.step(replace(at_start, progress=Progress(step, 0, 0)), {"loss": 0.0})
        hook.end(at_start)
    return [one["graders_lost"] for one in read_metrics(run.metrics_path, "rl")], log.getvalue()
