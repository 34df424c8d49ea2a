"""What rank 0 grades is on every rank, bit for bit what the record holds, but for what people and the grader read; and faults show."""

from __future__ import annotations

import pickle
import struct
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.generation.engine import Generation
from megatron_ext.rl import handout
from megatron_ext.rl.full_grade import Behaviour
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.order import OrderState
from megatron_ext.rl.record import read_record, write_record
from megatron_ext.rl.rollouts import Batch, Rollout
from megatron_ext.runs import open_run
from megatron_ext.tasks.grading import Verdict
from tests import ranks, rl_runs
from tests.rl_runs import CPU, rl_run, stage

TWO = replace(CPU, ranks_per_node=2)
WORDS = ("a text of the model", "the box's content", "what the comparison said", "ValueError: a cause")
ODD = [-0.0, np.nan, -np.inf, -1e-40]  # bits that a sum, a default or a rounding would lose


def rollout(number: int, tokens: int, versions: list[int]) -> Rollout:
    """Of a group of two; every other one was not graded in time."""
    draw = np.random.default_rng(number)
    logprobs = np.resize(np.array(ODD + draw.normal(size=tokens).tolist(), np.float32), tokens)
    ids = draw.integers(0, 2**31 - 1, tokens, dtype=np.int32)
    made = Generation(number, ids, logprobs, np.resize(np.array(versions, np.int32), tokens), "stop" if number % 3 else "length", WORDS[0])
    verdict = Verdict("correct" if number % 4 else "wrong", WORDS[1], "box", WORDS[2]) if number % 2 else None
    ending, cause = ("graded", "") if number % 2 else ("timed_out", WORDS[3])
    prompt = tuple(range(number // 2, number // 2 + 5))
    return Rollout(f"p{number // 2}", prompt, 9 + number, made, ending, verdict, cause, 0.1 * number, Behaviour(True, number > 3, False))


def batch(step: int) -> Batch:
    """Responses of none, one and many tokens, sampled within one version and across several; two that others were drawn in place of."""
    sizes = {1: [4, 4, 4, 4, 4, 4], 2: [7, 0, 1, 30, 2, 12]}[step]
    versions = {1: [3], 2: [3, 3, 4]}[step]
    found = [rollout(number, tokens, versions) for number, tokens in enumerate(sizes)]
    order = OrderState(draws=6, right={"p0": (1, 2)})
    return Batch(step, 30, 3, 1, tuple(found[:4]), order, LengthState(), unused=tuple(found[4:]), num_left_out=2)


def bits(one: Rollout) -> tuple[Any, ...]:
    """All of a rollout that an update may depend on."""
    made, verdict = one.generation, one.verdict
    arrays = [(array.dtype.str, array.tobytes()) for array in (made.tokens, made.logprobs, made.weight_versions)]
    graded = (one.ending, verdict and (verdict.outcome, verdict.way), struct.pack("<d", one.reward), one.behaviour)
    return made.id, one.problem, one.prompt, one.cap_tokens, made.finish, *graded, *arrays


def words(one: Rollout) -> tuple[Any, ...]:
    return one.generation.text, one.verdict and (one.verdict.answer, one.verdict.why), one.cause


def shown(found: Batch) -> dict[str, Any]:
    every = (*found.rollouts, *found.unused)
    rest = asdict(replace(found, rollouts=(), unused=(), sha256="", seconds={}))
    return {"bits": [bits(one) for one in every], "words": [words(one) for one in every], "used": len(found.rollouts), "rest": rest}


def _faulty(rollouts: Any, fault: str) -> Any:
    """What is sent, and what is wrong with it."""
    rows, arrays = PACKED(rollouts)
    middle = arrays["logprobs"].size // 2
    if fault == "rows in another order":
        rows = [rows[1], rows[0], *rows[2:]]
    elif fault == "a log-probability one bit off":
        arrays["logprobs"].view(np.int32)[middle] ^= 1
    elif fault == "lengths shifted":
        arrays["lengths"] = np.roll(arrays["lengths"], 1)
    elif fault == "one version for all":
        arrays["versions"][:] = arrays["versions"][0]
    return rows, arrays


PACKED = handout._packed
FAULTS = ("rows in another order", "a log-probability one bit off", "lengths shifted", "one version for all")


def _hand_out(groups: Any, folder: str) -> dict[str, Any]:
    """Rank 0 records batches and hands them out; and hands out the second with each fault."""
    found: dict[str, Any] = {}
    for step in (1, 2):
        if groups.rank == 0:
            write_record(Path(folder), batch(step))
        found[str(step)] = shown(handout.handed_out_batch(groups, "testing", lambda step=step: batch(step)))
    for fault in FAULTS:
        handout._packed = partial(_faulty, fault=fault)
        found[fault] = shown(handout.handed_out_batch(groups, "testing", lambda: batch(2)))
    return found


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    return folder, ranks.run(_hand_out, TWO, str(folder))


@pytest.mark.parametrize("step", [1, 2])
def test_every_rank_has_what_the_record_holds(given, step):
    folder, found = given
    recorded = shown(read_record(folder, step))
    for rank in found:
        for name in ("bits", "used", "rest"):
            assert rank[str(step)][name] == recorded[name]
    assert found[0][str(step)]["words"] == recorded["words"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_arrives_otherwise_is_noticed(given, fault):
    folder, found = given
    assert found[1][fault]["bits"] != shown(read_record(folder, 2))["bits"]
    assert found[0][fault]["bits"] == found[0]["2"]["bits"], "rank 0 keeps its own"


def test_words_stay_where_they_are_recorded(given):
    _, found = given
    assert not any(word.encode() in pickle.dumps(found[1]) for word in WORDS)
    assert all(word.encode() in pickle.dumps(found[0]) for word in WORDS)


def test_weight_versions_travel_as_runs():
    rows, arrays = handout._packed(batch(1).rollouts)
    assert (arrays["versions"].tolist(), arrays["repeats"].tolist()) == ([3], [16])
    assert len(rows) == 4
    none = handout._packed([])
    assert (none[0], [array.size for array in none[1].values()]) == ([], [0] * 5)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Of a run: sampled, graded, drawn again in place of groups without a difference, recorded; then read back as a resume does."""
    start = rl_runs.parent(tmp_path_factory.mktemp("handout"))
    made = stage(start.path.parent, plan=TWO)
    made = replace(made, rollouts=replace(made.rollouts, prompts_per_step=16, resample_uninformative=2))
    run = rl_run(start, replace(made, validation=replace(made.validation, sets=())), "handout")
    return run, ranks.run(_sampled, TWO, str(run.path))


def _sampled(groups: Any, path: str) -> list[dict[str, Any]]:
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.distributed import broadcast_object
    from megatron_ext.rl.begin import begin_learning

    run = open_run(Path(path))
    attempt = broadcast_object(begin_attempt(run) if groups.rank == 0 else None)
    begun = begin_learning(run, groups, attempt)
    first = begun.source.recorded(begun.source.next(begun.progress))
    resumed = begun.source.next(replace(begun.progress, ahead_sha256=first.sha256))
    begun.source.close()
    begun.close()
    return [{**shown(one), "sha256": one.sha256} for one in (first, resumed)]


def test_a_run_trains_every_rank_on_what_it_records(sampled):
    run, found = sampled
    batch = read_record(run.path, 1)
    recorded = shown(batch)
    assert len(batch.rollouts) == 64
    assert batch.unused, "nothing was drawn again: the test shows less"
    for rank in found:
        for one in rank:
            assert one["bits"] == recorded["bits"]
            assert (one["used"], one["rest"], one["sha256"]) == (64, recorded["rest"], batch.sha256)
    assert found[0][0]["words"] == recorded["words"]
    assert {word for one in found[1][0]["words"] for word in one if isinstance(word, str)} == {""}
