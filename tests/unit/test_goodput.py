"""Goodput: every second of a run in one part, by hand-counted lives; the parts add up to the whole exactly, whatever the files say."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext import goodput as module
from megatron_ext import run_times
from megatron_ext.config.budget import Budget
from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Scratch, TextStage, TrainStage
from megatron_ext.goodput import Goodput, Seconds, goodput, goodput_words, interval, interval_words, total
from megatron_ext.launch.job_events import Ledger, Start
from megatron_ext.metrics import MetricsWriter
from megatron_ext.run_times import EVENTS, run_periods
from megatron_ext.runs import Run, write_json, write_run
from tests.simulated_chain import clock, touch

T = 1_800_000_000.0  # when all of it begins
MODEL = ModelConfig(name="toy", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                    vocab_size=500, max_positions=64)  # fmt: skip
STAGE = TrainStage(
    name="stable",
    start=Scratch(),
    corpus="corpus",
    model=MODEL,
    mixture=Mixture(rows=(Row(source="web", weight=1.0),)),
    budget=Budget(steps=1000, sequences_per_batch=4, sequence_length=32),
    precision="fp32",
    schedule=Schedule(shape="constant", peak=1e-3),
    plan=TrainPlan(device="cpu", save_every_steps=10),
)
TEXT = TextStage(
    name="text", math_prose_bytes=1, general_prose_bytes=1, short_problems=1, long_problems=1, instruction_problems=1, rl_problems=1,
    evaluation_problems=1, seed=1,
)  # fmt: skip
Said = tuple[str, int, float, dict[str, Any]]  # kind, step, seconds after T, values


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "stable", "small", STAGE, {})


def attempt(
    run: Run,
    number: int,
    began: float,
    records: Sequence[Said] = (),
    *,
    end: tuple[str, float] | None = None,
    pulse: float | None = None,
    restart: int | None = None,
    nodes: int = 1,
) -> None:
    """An attempt's files; all times are seconds after T. `restart`: which start of job 7 it belongs to."""
    folder = run.path / "attempts" / str(number)
    folder.mkdir(parents=True)
    job_id = "" if restart is None else "7"
    write_json(
        folder / "plan.json",
        {"started_at": clock(T + began), "job_id": job_id, "restart_count": restart or 0, "plan": {"nodes": nodes}},
    )
    if end:
        write_json(folder / "exit.json", {"reason": end[0], "at": clock(T + end[1])})
    if pulse is not None:
        touch(folder / "pulse", T + pulse)
    if records:
        kind, step, at, _ = records[0]
        assert kind == "attempt"
        writer = At(run.metrics_path, number, step, T + at)
        for kind, step, at, values in records[1:]:
            writer.write(kind, step, {"at": T + at, **values})
        writer.close()


class At(MetricsWriter):
    """The run's own writer, with the time of its first record."""

    def __init__(self, path: Path, number: int, from_step: int, at: float) -> None:
        self._at = at
        super().__init__(path, number, from_step)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        super().write(kind, step, {"at": self._at, **values})


def job(run: Run, restart: int, submitted: float, eligible: float, started: float, end: float | None, nodes: int = 2) -> None:
    """The ledger of one start of job 7."""
    ledger = Ledger(run.path, Start(7, restart), [f"n{i}" for i in range(nodes)])
    times = {"submitted_at": T + submitted, "eligible_at": T + eligible, "started_at": T + started, "ends_at": None}
    ledger.append("start", at=T + started + 1, iteration=None, **times)
    if end is not None:
        ledger.append("end", at=T + end, exit_code=1, decision="requeue", reason="", iteration=None)


def trained(steps: range, began: float, each: float) -> list[Said]:
    """Records of steps that take `each` seconds, the first of which begins at `began`."""
    return [("train", step, began + each * (i + 1), {"step_seconds": each}) for i, step in enumerate(steps)]


def saved(step: int, at: float, stall: float, seconds: float | None = None) -> Said:
    return ("checkpoint", step, at, {"stall_seconds": stall, "seconds": stall if seconds is None else seconds})


def parts(run: Run) -> dict[str, float]:
    found = goodput(run)
    named = {name: value for name, value in vars(found.seconds).items() if value}
    assert sum(vars(found.seconds).values()) == found.seconds.total
    return named


def test_nothing_has_begun(run: Run) -> None:
    assert goodput(run) == Goodput()
    assert (goodput_words(goodput(run)), interval_words(interval(run, goodput(run)))) == (
        "",
        "saves every 10 steps; no failure yet to suggest another interval",
    )


def test_a_run_of_one_attempt_without_a_job(run: Run) -> None:
    records = [("attempt", 0, 20, {}), *trained(range(1, 11), 20, 3), saved(10, 54, 4)]
    attempt(run, 1, 0, records, end=("done", 60), pulse=54, nodes=4)
    assert parts(run) == {"starting": 20, "productive": 30, "saving": 4, "idle": 6}
    found = goodput(run)
    assert found.node_seconds == found.seconds.of_nodes(4)
    assert (found.starts, found.job_starts, found.failures, found.steps, found.saves) == (1, 0, 0, 10, 1)
    assert goodput_words(goodput(run)) == "goodput 50.0 %: 33.3 % starting, 6.7 % saving, 10.0 % idle"


def test_a_job_that_is_killed_goes_on_from_its_checkpoint(run: Run) -> None:
    job(run, 0, submitted=0, eligible=50, started=100, end=190)
    first = [("attempt", 0, 120, {}), *trained(range(1, 11), 120, 3), saved(10, 154, 4), *trained(range(11, 16), 154, 3)]
    attempt(run, 1, 105, first, pulse=171, restart=0)  # killed in step 17, which nobody recorded; step 16 shows in the pulse
    job(run, 1, submitted=190, eligible=311, started=320, end=380)
    attempt(run, 2, 325, [("attempt", 10, 340, {}), *trained(range(11, 21), 340, 3), saved(20, 374, 4)], end=("done", 375), restart=1)
    assert parts(run) == {
        "queued": 50 + 130,  # from eligible; then from the requeue
        "starting": 20 + 20,
        "productive": 60,
        "saving": 8,
        "recomputed": 15 + 2,  # steps 11 to 15, and what the pulse shows of the next
        "idle": 19 + 6,
    }
    found = goodput(run)
    assert found.node_seconds.total == 2 * found.seconds.total == 2 * (380 - 50)
    assert found.failures == 1
    assert found.seconds.goodput == 60 / 150
    assert found.seconds.goodput_with_queue == 60 / 330
    assert interval_words(interval(run, goodput(run))) == "saves every 10 steps (30 s); 1 failure, too few to suggest another interval"


def test_a_lost_node_is_held_until_slurm_requeues_the_job(run: Run) -> None:
    job(run, 0, submitted=0, eligible=0, started=0, end=None)
    attempt(run, 1, 5, [("attempt", 0, 10, {}), *trained(range(1, 6), 10, 2)], restart=0, pulse=20)
    job(run, 1, submitted=300, eligible=421, started=430, end=440)
    assert parts(run) == {"starting": 10 + 10, "productive": 10, "idle": 280, "queued": 130}  # the second start never came to its loop
    attempt(run, 2, 432, [("attempt", 0, 435, {})], restart=1, pulse=435)
    assert parts(run) == {"starting": 10 + 5, "recomputed": 10, "idle": 280 + 5, "queued": 130}


def test_of_two_starts_that_overlap_the_newer_one_has_the_time(run: Run) -> None:
    job(run, 0, submitted=0, eligible=0, started=0, end=500)  # cut off; it hears of it late
    attempt(run, 1, 5, [("attempt", 0, 10, {}), *trained(range(1, 31), 10, 10)], restart=0, pulse=500)
    job(run, 1, submitted=95, eligible=95, started=110, end=210)
    attempt(run, 2, 112, [("attempt", 0, 120, {}), *trained(range(1, 9), 120, 10)], restart=1, end=("done", 205), pulse=200)
    found = goodput(run).seconds
    assert found.total == 210
    assert found == Seconds(starting=10 + 10, recomputed=100, productive=80, idle=10)


def test_two_jobs_one_after_the_other_are_not_charged_for_the_time_between(run: Run) -> None:
    attempt(run, 1, 0, [("attempt", 0, 10, {}), *trained(range(1, 6), 10, 2)], end=("stopped", 25), pulse=20)
    job(run, 0, submitted=1000, eligible=1000, started=1060, end=1090)
    attempt(run, 2, 1065, [("attempt", 5, 1070, {}), *trained(range(6, 11), 1070, 2)], end=("done", 1085), pulse=1080, restart=0)
    assert parts(run) == {"starting": 10 + 10, "productive": 20, "idle": 5 + 10, "queued": 60}


@pytest.mark.parametrize(("every", "standing"), [(1, 60), (5, 60), (10, 60), (20, 60)])
def test_steps_between_two_records_are_shared_out(run: Run, every: int, standing: float) -> None:
    """However few steps have a record: a save tells of its step by itself."""

    def logged(records: list[Said]) -> list[Said]:
        return [r for r in records if r[0] != "train" or r[1] % every == 0]

    first = [("attempt", 0, 10, {}), *trained(range(1, 11), 10, 3), saved(10, 44, 4), *trained(range(11, 21), 44, 3)]
    attempt(run, 1, 0, logged(first), end=("failed", 80), pulse=74)
    attempt(run, 2, 100, logged([("attempt", 10, 110, {}), *trained(range(11, 21), 110, 3)]), end=("done", 140), pulse=140)
    assert parts(run) == {"starting": 20, "productive": standing, "recomputed": 30, "saving": 4, "idle": 6}


def test_a_save_beside_the_training_is_charged_for_its_stall_alone(run: Run) -> None:
    """Begun after step 10, published as step 14 ends; killed at step 16: steps 11 to 16 are lost. The last save is waited for."""
    steps = [*trained(range(1, 11), 10, 3), *trained(range(11, 15), 42, 3), saved(10, 54, 2, seconds=14), *trained(range(15, 17), 54, 3)]
    attempt(run, 1, 0, [("attempt", 0, 10, {}), *steps], end=("failed", 61), pulse=60)
    attempt(run, 2, 70, [("attempt", 10, 80, {}), *trained(range(11, 21), 80, 3), saved(20, 124, 2, seconds=14)], end=("done", 125))
    assert parts(run) == {"starting": 20, "productive": 60, "recomputed": 18, "saving": 2 + 14, "idle": 2}
    assert goodput(run).stall_seconds == 4


def test_a_roll_back_does_its_steps_again_and_a_step_left_out_stands(run: Run) -> None:
    records: list[Said] = [("attempt", 0, 0, {}), *trained(range(1, 11), 0, 2), saved(10, 20, 0), *trained(range(11, 14), 20, 2)]
    records += [("roll_back", 10, 31, {"at_step": 14}), *trained(range(11, 14), 31, 2), ("skip", 14, 39, {"reason": "loss spike"})]
    attempt(run, 1, 0, [*records, *trained(range(15, 16), 39, 2)], end=("done", 41), pulse=41)
    assert parts(run) == {"productive": 20 + 10, "recomputed": 6 + 5}  # step 14 the first time, and loading, take 5 s


def test_held_out_losses_stand_with_their_step_but_not_those_of_a_start_from_there(run: Run) -> None:
    measured = ("validation", 0, 15, {"source": "web"})
    first = [("attempt", 0, 10, {}), measured, *trained(range(1, 3), 15, 2), ("validation", 2, 26, {"source": "web"}), saved(2, 27, 1)]
    attempt(run, 1, 0, first, end=("failed", 30), pulse=27)
    attempt(run, 2, 40, [("attempt", 2, 45, {}), ("validation", 2, 48, {"source": "web"})], end=("failed", 48), pulse=48)
    assert parts(run) == {"starting": 15, "productive": 5 + 4 + 7 + 3, "saving": 1, "idle": 3}
    attempt(run, 3, 50, [("attempt", 2, 55, {}), *trained(range(3, 4), 55, 2)], end=("done", 57), pulse=57)
    assert parts(run) == {"starting": 20, "productive": 5 + 4 + 7 + 2, "recomputed": 3, "saving": 1, "idle": 3}


def test_an_attempt_that_may_still_run_has_lost_nothing_yet(run: Run) -> None:
    attempt(run, 1, 0, [("attempt", 0, 10, {}), *trained(range(1, 6), 10, 2)], pulse=23)
    assert parts(run) == {"starting": 10, "productive": 13}
    assert goodput(run).failures == 0


def test_torn_lines_are_left_out(run: Run) -> None:
    job(run, 0, submitted=0, eligible=0, started=0, end=30)
    attempt(run, 1, 5, [("attempt", 0, 10, {}), *trained(range(1, 6), 10, 2)], end=("done", 25), pulse=20, restart=0)
    before = goodput(run)
    for path in (run.path / EVENTS, run.metrics_path):
        with path.open("a") as file:
            file.write('{"at": 18000')
    assert goodput(run) == before


def test_records_without_a_time_are_dated_by_what_they_say_that_they_took(run: Run) -> None:
    records = [("attempt", 0, 20, {}), *trained(range(1, 11), 20, 3), saved(10, 54, 4)]
    attempt(run, 1, 0, records, end=("done", 60), pulse=54)
    before = goodput(run)
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    run.metrics_path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "at"}) + "\n" for line in lines))
    assert goodput(run) == before


def test_a_copied_folder_whose_files_are_touched_later_is_read_by_its_records(run: Run, tmp_path: Path) -> None:
    attempt(run, 1, 0, [("attempt", 0, 20, {}), *trained(range(1, 11), 20, 3)], end=("done", 60), pulse=50)
    before = goodput(run)
    shutil.copytree(run.path, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "attempts" / "1" / "pulse", (T + 1e6, T + 1e6))
    assert goodput(replace(run, path=tmp_path / "copy")) == before


def test_a_stage_without_steps_stands_where_it_ended_well(tmp_path: Path) -> None:
    run = write_run(tmp_path / "text", "small", TEXT, {})
    job(run, 0, submitted=0, eligible=0, started=10, end=100, nodes=1)
    attempt(run, 1, 20, end=("failed", 90), restart=0)
    assert parts(run) == {"queued": 10, "starting": 10, "recomputed": 70, "idle": 10}
    job(run, 1, submitted=100, eligible=100, started=110, end=200, nodes=1)
    attempt(run, 2, 120, end=("done", 200), restart=1)
    assert parts(run) == {"queued": 20, "starting": 20, "recomputed": 70, "productive": 80, "idle": 10}
    assert interval(run, goodput(run)) is None
    assert interval_words(interval(run, goodput(run))) == ""


def test_youngs_interval_against_its_formula(run: Run) -> None:
    """Two failures in 2 x 116 s of the loop, saves of 8 s, steps of 4 s: sqrt(2 x 8 x (2 x 116 + 4) / 2) = 43.4 s, 11 steps."""
    for i, began in enumerate((0, 200)):
        start = 10 * i
        records = [
            ("attempt", start, began + 10, {}),
            *trained(range(start + 1, start + 11), began + 10, 4),
            saved(start + 10, began + 58, 8),
        ]
        attempt(run, i + 1, began, [*records, *trained(range(start + 11, start + 28), began + 58, 4)], pulse=began + 126)
    assert goodput(run).failures == 1, "the second may still run"
    attempt(run, 3, 400, [("attempt", 20, 410, {}), *trained(range(21, 22), 410, 4)], end=("interrupted", 420), pulse=414)
    found = interval(run, goodput(run))
    assert found is not None
    assert (found.failures, found.save_seconds, found.step_seconds) == (2, 8, 4)
    assert found.between_failures_seconds == (2 * 116 + 4) / 2
    assert found.suggested_seconds == pytest.approx((2 * 8 * 118) ** 0.5)
    assert (found.planned_steps, found.planned_seconds, found.suggested_steps) == (10, 40, 11)
    assert interval_words(interval(run, goodput(run))) == "saves every 10 steps (40 s); 2 failures, one in 118 s, suggest every 11 (43.5 s)"


def test_runs_of_a_graph_are_summed(run: Run, tmp_path: Path) -> None:
    other = write_run(tmp_path / "text", "small", TEXT, {})
    attempt(run, 1, 0, [("attempt", 0, 20, {}), *trained(range(1, 11), 20, 3)], end=("done", 50), pulse=50, nodes=4)
    attempt(other, 1, 0, end=("done", 10))
    both = total([goodput(run), goodput(other)])
    assert (both.seconds.total, both.node_seconds.total, both.starts) == (60, 4 * 50 + 10, 2)
    assert both.seconds == goodput(run).seconds + goodput(other).seconds


TIMES = st.floats(0, 1000, allow_nan=False)
KINDS = st.sampled_from(["train", "train", "train", "checkpoint", "validation", "skip", "roll_back", "failed_save", "attempt"])
RECORDS = st.lists(st.tuples(KINDS, st.integers(0, 30), TIMES, st.floats(0, 50), st.booleans()), max_size=8)
ATTEMPTS = st.lists(
    st.tuples(TIMES, RECORDS, st.sampled_from(["", "done", "failed", "interrupted"]), TIMES, st.one_of(st.none(), TIMES), st.booleans()),
    max_size=4,
)
STARTS = st.lists(st.tuples(TIMES, TIMES, st.one_of(st.none(), TIMES), st.one_of(st.none(), TIMES), st.integers(1, 9)), max_size=4)


def write_odd(run: Run, attempts: Any, starts: Any) -> None:
    """A run folder with whatever times: files of a cut-off node, of clocks that differ, of an altered folder."""
    for name in ("attempts", "job"):
        shutil.rmtree(run.path / name, ignore_errors=True)
    run.metrics_path.unlink(missing_ok=True)
    (run.path / "job").mkdir()
    lines = []
    for restart, (at, submitted, started, end, nodes) in enumerate(starts):
        whose = {"job_id": 7 + restart // 3, "restart_count": restart % 3, "nodes": ["n"] * nodes}
        told = {"submitted_at": T + submitted, "eligible_at": None, "started_at": None if started is None else T + started}
        lines.append({"at": T + at, "event": "start", **whose, **told})
        lines += [] if end is None else [{"at": T + end, "event": "end", **whose}]
    (run.path / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = []
    for i, (began, said, reason, ended, pulse, in_job) in enumerate(attempts):
        attempt(run, i + 1, began, end=(reason, ended) if reason else None, pulse=pulse, restart=i if in_job else None)
        for kind, step, at, seconds, dated in said:
            values: dict[str, Any] = {"attempt": i + 1, "kind": kind, "step": step, **({"at": T + at} if dated else {})}
            values |= {"step_seconds": seconds} if kind == "train" else {}
            values |= {"seconds": 2 * seconds, "stall_seconds": seconds} if kind in ("checkpoint", "failed_save") else {}
            records.append(values | ({"at_step": step + 2} if kind == "roll_back" else {}))
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))


def adds_up(run: Run) -> None:
    """To the last bit: the parts make up the time from queue to end of every start, in seconds and in node-seconds."""
    found, periods = goodput(run), run_periods(run.path)
    whole = [period.ended - period.queued_from for period in periods]
    assert sum(vars(found.seconds).values()) == sum(whole)
    assert sum(vars(found.node_seconds).values()) == sum(t * p.start.nodes for t, p in zip(whole, periods, strict=True))
    assert min(vars(found.seconds).values()) >= 0
    assert all(p.queued_from <= p.began <= p.ended for p in periods)
    assert all(a.ended <= b.queued_from for a, b in pairwise(periods))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(attempts=ATTEMPTS, starts=STARTS)
def test_the_parts_add_up_to_the_whole_exactly(run: Run, attempts: Any, starts: Any) -> None:
    write_odd(run, attempts, starts)
    adds_up(run)


def saves_of_odd_lengths(rng: random.Random) -> list[Any]:
    """Attempts with saves whose stalls no sum of binary fractions meets."""
    lives = []
    for i in range(rng.randint(1, 4)):
        at = 1000 * i + 50 * rng.random()
        said: list[Any] = [("attempt", 0, at, 0.0, True)]
        for step in range(1, 18, 3):
            at += 20 * rng.random()
            said.append((rng.choice(["train", "checkpoint"]), step, at, rng.random(), True))
        lives.append((1000.0 * i, said, "", 0.0, None, False))
    return lives


def test_without_whole_ticks_the_sum_is_not_exact(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: seconds as they stand in the files."""

    def num_wrong() -> int:
        rng, wrong = random.Random(1), 0
        for _ in range(4):
            write_odd(run, saves_of_odd_lengths(rng), [])
            try:
                adds_up(run)
            except AssertionError:
                wrong += 1
        return wrong

    assert num_wrong() == 0
    for where in (module, run_times):
        monkeypatch.setattr(where, "ticks", float)
    assert num_wrong() > 0
