"""A chain of 60 requeues of the 200B-token stage under random faults: tokens, steps, the job's ledger and goodput add up.

The files are those of a simulated life (tests/simulated_chain.py); the check of them must fail where one of them is wrong.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.goodput import Goodput, goodput, goodput_words, interval, interval_words
from megatron_ext.metrics import attempt_steps, read_metrics
from megatron_ext.runs import Run, open_run, write_run
from recipes import octothinker
from tests.simulated_chain import BETWEEN_FAULTS, KINDS, NODES, STALL, STEP, WRITE, Life

REQUEUES, TOKENS_PER_BATCH, STEPS = 60, 4_194_304, 50_000
Lines = list[dict[str, Any]]


def lived(folder: Path, asynchronous: bool, seed: int = 24) -> Life:
    stage = octothinker.llama_3b().stage("stable")
    plan = replace(stage.plan, log_every_steps=100, asynchronous_saves=asynchronous)
    life = Life(write_run(folder, "octothinker_3b", replace(stage, plan=plan), {}), random.Random(seed), REQUEUES)
    life.live()
    return life


@pytest.fixture(scope="module", params=[True, False], ids=["asynchronous saves", "saves"])
def life(request, tmp_path_factory) -> Life:
    return lived(tmp_path_factory.mktemp("chain") / "stable", request.param)


def check(run: Run, life: Life) -> Goodput:
    """That the run folder tells what happened."""
    steps_add_up(run)
    ledger_adds_up(run, life)
    found = goodput(run)
    truth = life.parts()
    measured = {part: getattr(found.seconds, part) for part in truth}
    assert measured == pytest.approx(truth, abs=0.1)  # of some 600,000 s; ticks and whole-second times
    assert found.seconds.total == pytest.approx(sum(truth.values()), abs=0.01)
    assert found.node_seconds.total == NODES * found.seconds.total
    assert found.failures == life.failures
    return found


def steps_add_up(run: Run) -> None:
    """Every step stands once, at its tokens, and each attempt went on from the newest checkpoint."""
    records = read_metrics(run.metrics_path)
    ranges = [(first, last) for _, first, last in attempt_steps(records, 0, STEPS)]
    assert [step for first, last in ranges for step in range(first, last + 1)] == list(range(1, STEPS + 1))
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [1, *range(100, STEPS + 1, 100)]
    assert all(r["tokens"] == r["step"] * TOKENS_PER_BATCH for r in trained)
    assert trained[-1]["tokens"] == 209_715_200_000
    published = 0
    for record in map(json.loads, run.metrics_path.read_text().splitlines()):
        if record["kind"] == "attempt":
            assert record["step"] == published
        elif record["kind"] == "checkpoint":
            published = record["step"]
    assert published == STEPS


def ledger_adds_up(run: Run, life: Life) -> None:
    """Each start of the job has its begin and, unless its node was lost, its end."""
    events = [json.loads(line) for line in (run.path / "job" / "events.jsonl").read_text().splitlines()]
    named = {kind: [e["restart_count"] for e in events if e["event"] == kind] for kind in ("start", "end")}
    assert named["start"] == list(range(REQUEUES + 1))
    lost = [i for i, what in enumerate(life.events) if what.startswith("lost")]
    assert named["end"] == [i for i in range(REQUEUES + 1) if i not in lost]
    assert [e["at"] for e in events] == sorted(e["at"] for e in events)
    assert events[-1]["decision"] == "done"


def test_every_second_and_every_step_of_sixty_requeues_is_accounted_for(life: Life) -> None:
    found = check(life.run, life)
    assert (found.starts, found.job_starts) == (REQUEUES + 1, REQUEUES + 1)
    kinds = {what.split()[0] for what in life.events}
    assert kinds == {*KINDS, "never", "done"}
    assert any("in a save" in what for what in life.events)
    assert found.seconds.productive >= STEPS * STEP  # and held-out losses
    assert found.seconds.recomputed > 20 * STEP
    assert 0.5 < (found.seconds.goodput_with_queue or 0) < (found.seconds.goodput or 0) < 1


def test_the_save_interval_follows_the_failures_that_were_simulated(life: Life) -> None:
    found = goodput(life.run)
    measured = interval(life.run, found)
    assert measured is not None
    assert measured.between_failures_seconds == pytest.approx(life.looped / life.failures, rel=1e-4)
    assert measured.step_seconds == pytest.approx(STEP, rel=0.02)  # and held-out losses
    stall = STALL if life.run.stage.plan.asynchronous_saves else STALL + WRITE
    assert measured.save_seconds == pytest.approx(stall, rel=1e-4)
    share = sum(number for kind, number in KINDS.items() if kind != "preempted") / sum(KINDS.values())
    truth = (2 * stall * BETWEEN_FAULTS / share) ** 0.5
    assert measured.suggested_seconds == pytest.approx(truth, rel=0.25)  # some 40 failures; the interval goes with their root
    assert measured.suggested_steps == round(measured.suggested_seconds / measured.step_seconds)
    assert (measured.planned_steps, measured.planned_seconds) == (500, pytest.approx(500 * STEP, rel=0.02))
    assert interval_words(interval(life.run, goodput(life.run))).startswith("saves every 500 steps (50 min); ")
    assert f"suggest every {measured.suggested_steps} (" in interval_words(interval(life.run, goodput(life.run)))
    assert goodput_words(goodput(life.run)).startswith("goodput ")


def drop_start(events: Lines, _: Lines) -> None:
    events.remove(next(e for e in events if e["event"] == "start" and e["restart_count"] == 30))


def drop_end(events: Lines, _: Lines) -> None:
    events.remove([e for e in events if e["event"] == "end"][-2])


def double_step(_: Lines, records: Lines) -> None:
    [r for r in records if r["kind"] == "attempt" and r["step"] > 0][-1]["step"] -= 1


def drop_save(_: Lines, records: Lines) -> None:
    records.remove([r for r in records if r["kind"] == "checkpoint" and r["step"] == 25_000][-1])


def drop_attempt(_: Lines, records: Lines) -> None:
    records.remove([r for r in records if r["kind"] == "attempt"][-1])


def other_tokens(_: Lines, records: Lines) -> None:
    next(r for r in records if r["kind"] == "train" and r["step"] == 40_000)["tokens"] -= 1


def late_record(_: Lines, records: Lines) -> None:
    [r for r in records if r["kind"] == "attempt"][-1]["at"] += 10


@pytest.mark.parametrize("fault", [drop_start, drop_end, double_step, drop_save, drop_attempt, other_tokens, late_record])
def test_a_wrong_file_is_seen(life: Life, fault: Callable[[Lines, Lines], None], tmp_path: Path) -> None:
    folder = tmp_path / "stable"
    shutil.copytree(life.run.path, folder)  # keeps the times of files
    paths = folder / "job" / "events.jsonl", folder / "metrics.jsonl"
    before = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    after = [[dict(one) for one in lines] for lines in before]
    fault(*after)
    assert after != before
    for path, lines in zip(paths, after, strict=True):
        path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(AssertionError):
        check(open_run(folder), life)
