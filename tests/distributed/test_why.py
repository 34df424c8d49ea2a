"""A step computed again is the recorded one to the bit, under every layout, and shows what was in it; nothing is written."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import to_json
from megatron_ext.config.faults import Faults
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.metrics import MetricsWriter, read_metrics
from megatron_ext.runs import Run, read_json, write_json, write_run
from megatron_ext.snapshot import code_hash
from megatron_ext.training.recorded import find_step
from megatron_ext.training.why_text import NEVER_COMPUTES, causes, why_text
from tests import ranks, training_runs
from tests.documented_metrics import undocumented
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
    return [why.replay(groups, Path(path), step) for step in steps]


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


def look_elsewhere(groups: Any, path: str, others: str) -> tuple[dict[str, Any], str]:
    """What each rank finds where rank 0 sees the run at `path`, and the others see it as at `others`."""
    from megatron_ext.training import why

    own = Path(path if groups.rank == 0 else others)
    found = why.replay(groups, own, STEP)
    try:
        why.replay(groups, own, STEP if groups.rank else 99)
    except RunError as refusal:
        return found, str(refusal)
    return found, ""


def test_all_that_is_recorded_is_documented(seen):
    records = read_metrics(seen("one rank")[0].metrics_path)
    assert {one["kind"] for one in records} == {"attempt", "train", "checkpoint"}
    assert undocumented(records) == []
    wrong = [{**records[-1], "new_seconds": 1.0}, {"kind": "train", "step": 1, "attempt": 1}, {"kind": "new", "step": 1, "attempt": 1}]
    assert [line.partition(":")[0] for line in undocumented(wrong)] == [records[-1]["kind"], "train", "new"]


def test_the_ranks_replay_from_the_checkpoint_that_rank_0_found(seen):
    """As where the run is at work: between two ranks' looks a checkpoint is published, or a step is logged."""
    run, _, _ = seen("tensor 2")
    others = run.path.with_name("seen by others")
    shutil.copytree(run.path, others)
    shutil.rmtree(others / "checkpoints" / "iter_0000003")
    assert find_step(others, STEP).checkpoint is None
    for found, refusal in ranks.run(look_elsewhere, run.stage.plan, str(run.path), str(others)):
        assert found["equal"] is True
        assert found["replayed_from"] == {"start": "resume", "step": 3}
        assert "did not come to a step 99" in refusal


def test_a_damaged_checkpoint_is_passed_over_unless_nothing_else_leads_to_the_step(corpus, seen, tmp_path):
    run, _, _ = seen("one rank")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    folder = copy / "checkpoints"
    write_run(copy, run.graph, run.stage, run.inputs)
    (folder / "iter_0000006" / "manifest.json").write_text("{")
    assert find_step(copy, STEP).checkpoint == folder / "iter_0000003"
    (folder / "iter_0000003" / "manifest.json").write_text("{")
    assert find_step(copy, STEP).checkpoint is None  # its start leads to every step
    parent = train_run(corpus, stage("absent"))
    child = train_run(corpus, stage("orphan", start=Branch(stage="absent", tokens=256)), parent)
    shutil.copytree(folder, child.checkpoints_path)
    shutil.copy(run.metrics_path, child.metrics_path)
    with pytest.raises(CheckpointError, match=r"nor any other: .*Damaged are: .*iter_0000003/manifest.json: .*; .*iter_0000006/manifest"):
        find_step(child.path, STEP)


def test_another_plan_and_other_data_are_told_apart_from_the_record(seen):
    run, _, _ = seen("one rank")
    other = write_run(run.path, run.graph, replace(run.stage, plan=replace(run.stage.plan, micro_batch=4)), run.inputs)
    try:
        found = looked_at(other, 6)[0]
        assert found["equal"] is False
        assert found["causes"] == ["steps 4 to 6 were computed by attempt 1 under micro_batch 1 (here 4)"]
        assert found["loss"] == pytest.approx(found["recorded"]["loss"], rel=1e-5)
        assert f"  {found['causes'][0]}" in why_text(found).splitlines()
    finally:
        write_run(run.path, run.graph, run.stage, run.inputs)
    swapped = looked_at(run, 6, fault="swapped sample")[0]
    assert swapped["equal"] is False
    assert swapped["causes"] == []


def train_on_and_look(groups: Any, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run that goes on shows of a step: from the checkpoint it went on from, and without that from the start."""
    training_runs._train(groups, path, None, "")
    near = look(groups, path, (STEP,))[0]
    shutil.rmtree(Path(path) / "checkpoints" / "iter_0000003")
    return near, look(groups, path, (STEP,))[0]


def test_steps_that_another_plan_computed_are_named(seen):
    """Two ranks came to step 3, one went on: from step 0 on one rank alone, other bits come out at step 5, and it is said why."""
    run, _, _ = seen("data 2, plain optimizer")
    path = run.path.with_name("gone on")
    shutil.copytree(run.path, path)
    shutil.rmtree(path / "checkpoints" / "iter_0000006")
    (path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
    changed = write_run(path, run.graph, replace(run.stage, plan=replace(run.stage.plan, ranks_per_node=1)), run.inputs)
    near, far = ranks.run(train_on_and_look, changed.stage.plan, str(path))[0]
    assert (near["equal"], near["causes"], near["recorded"]["attempt"]) == (True, [], 2)
    assert (far["equal"], far["replayed_from"]["step"]) == (False, 0)
    assert far["causes"] == ["steps 1 to 3 were computed by attempt 1 under ranks_per_node 2 (here 1)"]
    assert f"  {far['causes'][0]}" in why_text(far).splitlines()
    assert "the machine" not in why_text(far)
    first = path / "attempts" / "1" / "plan.json"
    write_json(first, {**read_json(first, ""), "plan": read_json(path / "attempts" / "2" / "plan.json", "")["plan"]})
    assert causes(changed, far["recorded"], 0, STEP) == []  # it is the attempts' own records that say so
    text = why_text({**far, "causes": []})
    assert "code and plan are those under which steps 1 to 5 were recorded: it was not the data" in text
    assert "it was the data" in why_text({**far, "causes": [], "samples_sha256": "other"})


def attempt(run: Run, number: int, from_step: int, code: str = "", **plan: Any) -> None:
    """An attempt that trained one step."""
    record = run.path / "attempts" / str(number) / "plan.json"
    record.parent.mkdir(parents=True)
    write_json(record, {**({"code_hash": code} if code else {}), "plan": {**to_json(run.stage.plan), **plan}})
    writer = MetricsWriter(run.metrics_path, number, from_step)
    writer.write("train", from_step + 1, {"loss": 1.0})
    writer.close()


def test_which_attempts_computed_the_steps_of_a_replay(corpus):
    run = train_run(corpus, stage("often begun"))
    attempt(run, 1, 0, micro_batch=2)
    attempt(run, 2, 10, micro_batch=4)  # all of it was done again
    attempt(run, 3, 10, save_every_steps=1, code="a" * 64)
    attempt(run, 4, 20, recompute="full", distributed_optimizer=False)
    attempt(run, 5, 30, recompute="full", distributed_optimizer=False)
    attempt(run, 6, 40, log_every_steps=5)
    attempt(run, 7, 44, tensor=2)

    def of(start_step: int, step: int, number: int = 6) -> list[str]:
        return causes(run, {"attempt": number}, start_step, step)

    one = "steps 1 to 10 were computed by attempt 1 under micro_batch 2 (here 1)"
    three = f"steps 11 to 20 were computed by attempt 3 under code aaaaaaaaaaaa (here {code_hash()[:12]})"
    alike = "were computed by attempts 4 to 5 under distributed_optimizer false (here true), recompute full (here none)"
    assert of(0, 42) == [one, three, f"steps 21 to 40 {alike}"]
    assert of(25, 42) == [f"steps 26 to 40 {alike}"]
    assert of(39, 42) == ["step 40 was" + alike.replace("were", "").replace("attempts 4 to 5", "attempt 5")]
    assert of(5, 10, number=1) == [one.replace("1 to 10", "6 to 10")]
    assert of(40, 43) == []
    assert of(40, 46, number=7) == ["steps 45 to 46 were computed by attempt 7 under tensor 2 (here 1)"]
    shutil.rmtree(run.path / "attempts" / "1")
    assert of(9, 12, number=3)[0].startswith("step 10 was computed by attempt 1 under a plan and code that are not known, for there is no ")


def test_what_never_computes_is_of_the_plan():
    assert set(to_json(CPU)) >= NEVER_COMPUTES
    assert set(to_json(CPU)) - NEVER_COMPUTES == {
        "device", "nodes", "ranks_per_node", "tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "overlap_p2p", "context",
        "micro_batch", "distributed_optimizer", "recompute", "threads_per_rank",
    }  # fmt: skip


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
    assert undocumented(read_metrics(run.metrics_path)) == []
    with pytest.raises(RunError, match="did not come to a step 3; choose one of 1 to 2"):
        find_step(run.path, 3)


def test_steps_that_were_left_out_stay_left_out(corpus):
    run = train_run(corpus, stage("leaving", faults=Faults(non_finite="skip", most_in_a_row=1)))
    trained(run, {5: "nan"})
    bad, after = looked_at(run, 5, 6)
    assert undocumented(read_metrics(run.metrics_path)) == []
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
