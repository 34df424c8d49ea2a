"""A step computed again is the recorded one to the bit, under every layout, and shows what was in it; nothing is written."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.faults import Faults
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.metrics import MetricsWriter
from megatron_ext.runs import Run, write_run
from megatron_ext.training.recorded import find_step
from megatron_ext.training.why_text import why_text
from tests import ranks, training_runs
from tests.faulty_runs import trained
from tests.small_corpus import LENGTH, train_run, write_corpus

ROOT = Path(__file__).resolve().parents[2]
CPU = TrainPlan(device="cpu")
TWO = replace(CPU, ranks_per_node=2)
PLANS = {
    "one rank": CPU,
    "data 2": replace(TWO, micro_batch=2),
    "data 2, plain optimizer": replace(TWO, distributed_optimizer=False),
    "tensor 2": replace(TWO, tensor=2, sequence_parallel=True),
    "pipeline 2": replace(TWO, pipeline=2, micro_batch=2),
}
STEP = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("why"), {"web": 60, "qa": 30})


def stage(name: str, plan: TrainPlan = CPU, **changes: Any) -> Any:
    return replace(training_runs.stage(steps=6, save_every_steps=3, plan=plan), name=name, **changes)


def looked_at(run: Run, *steps: int, fault: str = "") -> list[dict[str, Any]]:
    """What rank 0 finds of each step."""
    return ranks.run(look, run.stage.plan, str(run.path), steps, fault)[0]


def look(groups: Any, path: str, steps: tuple[int, ...], fault: str = "") -> list[dict[str, Any]]:
    from megatron_ext.training import gradients, why

    if fault == "copies counted twice":
        gradients.param_is_not_tensor_parallel_duplicate = lambda *_: True
    if fault == "swapped sample":
        training_runs._swap_samples(why)
    return [why.replay(groups, find_step(Path(path), step)) for step in steps]


def train_and_look(groups: Any, path: str) -> Any:
    training_runs._train(groups, path, None, "")
    before = files(Path(path).parent)
    found = look(groups, path, (STEP,))[0]
    return found, files(Path(path).parent) == before


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def seen(corpus):
    """Layout -> a run under it, what its step 5 shows, and whether its folder stayed as it was."""

    @functools.cache
    def of(name: str) -> tuple[Run, dict[str, Any], bool]:
        run = train_run(corpus, stage(name, PLANS[name]))
        found = ranks.run(train_and_look, run.stage.plan, str(run.path))
        return run, *found[0]

    return of


@pytest.mark.parametrize("name", PLANS)
def test_the_replay_is_the_record_to_the_bit_and_writes_nothing(seen, name):
    _, found, untouched = seen(name)
    assert found["equal"] is True
    assert found["recorded"]["kind"] == "train"
    assert all(found[key] == found["recorded"][key] for key in ("loss", "grad_norm", "samples_sha256", "learning_rate", "valid_tokens"))
    assert found["replayed_from"] == {"start": "resume", "step": 3}
    assert untouched


@pytest.mark.parametrize("name", PLANS)
def test_layers_add_up_to_the_gradient_norm_and_do_not_depend_on_the_layout(seen, name):
    found, single = seen(name)[1], seen("one rank")[1]
    assert list(found["layers"]) == ["embedding", "layer 1", "layer 2", "layer 3", "layer 4", "final norm"]
    assert math.sqrt(sum(norm**2 for norm in found["layers"].values())) == pytest.approx(found["grad_norm"], rel=1e-6)
    assert found["layers"] == pytest.approx(single["layers"], rel=1e-5)
    assert [one["loss"] for one in found["sequences"]] == pytest.approx([one["loss"] for one in single["sequences"]], rel=1e-5)
    assert [one["documents"] for one in found["sequences"]] == [one["documents"] for one in single["sequences"]]


def test_a_copy_that_counts_twice_is_noticed(seen):
    found = looked_at(seen("tensor 2")[0], STEP, fault="copies counted twice")[0]
    assert math.sqrt(sum(norm**2 for norm in found["layers"].values())) != pytest.approx(found["grad_norm"], rel=1e-6)


def test_losses_and_documents_of_the_batch(seen):
    _, found, _ = seen("one rank")
    assert [row["source"] for row in found["sources"]] == ["qa", "web"]
    assert sum(row["valid_tokens"] for row in found["sources"]) == found["valid_tokens"]
    total = sum(row["loss"] * row["valid_tokens"] for row in found["sources"])
    assert total / found["valid_tokens"] == pytest.approx(found["loss"], rel=1e-6)
    assert len(found["sequences"]) == 8
    for one in found["sequences"]:
        assert sum(document["end_token"] - document["first_token"] for document in one["documents"]) == LENGTH
        assert all(document["id"].startswith(f"{one['source']}/train/") for document in one["documents"])


def test_the_text_says_what_the_numbers_say(seen):
    run, found, _ = seen("one rank")
    text = why_text(found)
    assert text.startswith(
        f"stage '{run.name}', step 5, trained on: 128 tokens, 8 sequences\nreplayed from step 3 (resume) and 1 step done again"
    )
    assert "equal to the record of attempt 1, to the bit" in text
    worst = max(found["sequences"], key=lambda one: one["loss"])
    first = text[text.index("documents [tokens]") :].splitlines()[1]
    assert worst["documents"][0]["id"] in first
    json.dumps(found, allow_nan=False)


def test_the_command_starts_the_ranks_of_the_plan_and_prints_json(seen):
    run, found, _ = seen("tensor 2")
    words = [sys.executable, "-m", "megatron_ext", "why", str(run.path), "--step", str(STEP), "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["equal"] is True
    same = ("loss", "grad_norm", "layers", "sources", "sequences")
    assert {key: printed[key] for key in same} == {key: found[key] for key in same}


def test_another_plan_and_other_data_are_told_apart_from_the_record(seen):
    run, _, _ = seen("one rank")
    other = write_run(run.path, run.graph, replace(run.stage, plan=replace(run.stage.plan, micro_batch=4)), run.inputs)
    try:
        found = looked_at(other, 6)[0]
        assert found["equal"] is False
        assert "plan.micro_batch: 1 -> 4" in found["causes"]
        assert found["loss"] == pytest.approx(found["recorded"]["loss"], rel=1e-5)
        assert "plan.micro_batch: 1 -> 4" in why_text(found)
    finally:
        write_run(run.path, run.graph, run.stage, run.inputs)
    swapped = looked_at(run, 6, fault="swapped sample")[0]
    assert swapped["equal"] is False
    assert not any("plan" in cause for cause in swapped["causes"])


def test_the_step_at_which_nan_stopped_the_stage(corpus):
    run = train_run(corpus, stage("exploding", schedule=Schedule(shape="constant", peak=1e30)))
    error = trained(run, {})[0]["error"]
    assert "step 2: loss is nan" in error or "step 2: gradient norm is" in error, error
    first, found = looked_at(run, 1, 2)
    assert first["equal"] is True
    assert first["replayed_from"] == {"start": "scratch", "step": 0}
    assert (found["recorded"]["kind"], found["equal"]) == ("stop", True)
    assert found["grad_norm"] is None
    assert None in found["layers"].values()  # and which layers it was
    assert "where the stage stopped" in why_text(found)
    with pytest.raises(RunError, match="did not come to a step 3; choose one of 1 to 2"):
        find_step(run.path, 3)


def test_steps_that_were_left_out_stay_left_out(corpus):
    run = train_run(corpus, stage("leaving", faults=Faults(non_finite="skip", most_in_a_row=1)))
    trained(run, {5: "nan"})
    bad, after = looked_at(run, 5, 6)
    assert after["equal"] is True  # step 5 was not trained on, here either
    assert (bad["recorded"]["kind"], bad["equal"]) == ("skip", False)  # the fault was put in from outside
    assert bad["loss"] == bad["recorded"]["loss"]
    assert bad["differences"] == [f"grad_norm: not finite recorded, {bad['grad_norm']} replayed"]
    assert "the machine, or a library, computed something else" in why_text(bad)


def test_a_step_that_was_never_begun_or_to_which_nothing_leads_is_refused(corpus, seen):
    run, _, _ = seen("one rank")
    with pytest.raises(RunError, match="did not come to a step 7; choose one of 1 to 6"):
        find_step(run.path, 7)
    with pytest.raises(RunError, match="did not come to a step 0; choose"):
        find_step(run.path, 0)
    with pytest.raises(RunError, match="kind 'tokenize', and has no training steps"):
        find_step(corpus.path, 1)
    parent = train_run(corpus, stage("parent"))
    child = train_run(corpus, stage("child", start=Branch(stage="parent", tokens=256)), parent)
    with pytest.raises(RunError, match="did not come to a step 1; train it first"):
        find_step(child.path, 1)
    writer = MetricsWriter(child.metrics_path, 1, 0)
    writer.write("train", 3, {"loss": 1.0})
    writer.close()
    with pytest.raises(CheckpointError, match="step 2 cannot be computed again, nor any other: no checkpoint of the stage before it"):
        find_step(child.path, 2)
