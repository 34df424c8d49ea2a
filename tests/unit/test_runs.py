"""Run folders: identity, refusal of another recipe, marks, attempts."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.__main__ import main
from megatron_ext.attempts import begin_attempt
from megatron_ext.config.stages import TrainStage, inputs
from megatron_ext.errors import RunError
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.runs import (
    Run,
    differences,
    mark_done,
    open_run,
    read_done,
    refuse_other_science,
    science_hash,
    write_run,
)
from recipes import clusters, demo

SMOKE = demo.smoke()


def write_all(folder: Path, graph: Graph = SMOKE) -> dict[str, Run]:
    """Every run folder of a graph."""
    return {s.name: write_run(folder / s.name, graph.name, s, {r: folder / p for r, p in inputs(s).items()}) for s in graph.stages}


def test_a_run_folder_reads_back_whole(tmp_path: Path) -> None:
    runs = write_all(tmp_path)
    stable = open_run(tmp_path / "stable")
    assert stable == runs["stable"]
    assert (stable.graph, stable.name, stable.stage) == ("smoke", "stable", SMOKE.stage("stable"))
    assert stable.inputs == {"start": tmp_path / "base", "corpus": tmp_path / "corpus"}
    assert stable.cluster is None
    again = write_run(tmp_path / "x", "smoke", SMOKE.stage("text"), {}, clusters.h100())
    assert open_run(again.path).cluster == clusters.h100()


def test_run_folders_can_be_moved_together(tmp_path: Path) -> None:
    write_all(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert open_run(tmp_path / "there" / "stable").inputs["start"] == tmp_path / "there" / "base"


def test_the_plan_may_change_and_the_science_may_not(tmp_path: Path) -> None:
    write_all(tmp_path)
    before = open_run(tmp_path / "stable").science_hash
    write_all(tmp_path, with_overrides(SMOKE, ["stable.plan.save_every_steps=3"]))
    changed = open_run(tmp_path / "stable")
    assert (changed.stage.plan.save_every_steps, changed.science_hash) == (3, before)
    begin_attempt(changed)
    with pytest.raises(RunError, match=r"stable: this run was begun with another recipe.*\n  budget.steps: 12 -> 13\n.*--runs"):
        write_all(tmp_path, with_overrides(SMOKE, ["stable.budget.steps=13"]))
    assert open_run(tmp_path / "stable").stage.budget.steps == 12


def test_what_a_run_was_made_from_is_part_of_its_identity(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "a")
    begin_attempt(runs["stable"])
    other = write_all(tmp_path / "b", with_overrides(SMOKE, ["base.seed=1"]))
    assert runs["corpus"].science_hash == other["corpus"].science_hash
    assert runs["decay_long"].science_hash != other["decay_long"].science_hash
    with pytest.raises(RunError, match=r"inputs.start: \"[0-9a-f]{12}\" -> \"[0-9a-f]{12}\""):
        refuse_other_science(tmp_path / "a" / "stable", SMOKE.stage("stable"), {"start": "0" * 64, "corpus": runs["corpus"].science_hash})


def test_a_folder_that_was_never_begun_takes_another_recipe(tmp_path: Path) -> None:
    before = write_all(tmp_path)["stable"]
    after = write_all(tmp_path, with_overrides(SMOKE, ["stable.budget.steps=13"]))
    assert open_run(before.path).stage.budget.steps == 13
    assert after["decay_long"].input_hashes["start"] == after["stable"].science_hash != before.science_hash


@pytest.mark.parametrize("sign", ["attempts/1", "checkpoints"])
def test_a_sign_of_work_keeps_the_recipe(tmp_path: Path, sign: str) -> None:
    (write_all(tmp_path)["stable"].path / sign).mkdir(parents=True)
    with pytest.raises(RunError, match="stable: this run was begun with another recipe"):
        write_all(tmp_path, with_overrides(SMOKE, ["stable.budget.steps=13"]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "text", Path("/proc/x/text")):
        with pytest.raises(RunError, match=rf"{path}: the run folder cannot be written \(.*or name another --runs"):
            write_run(path, "smoke", SMOKE.stage("text"), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as a disk that is full: folders can be made, and nothing be written
        with pytest.raises(RunError, match=rf"{tmp_path}/text: the run folder cannot be written \("):
            write_run(tmp_path / "text", "smoke", SMOKE.stage("text"), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_runs_folder_that_cannot_be_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for runs in (str(tmp_path / "file"), "/proc/x"):
        assert main(["launch", "demo:smoke", "--local", "--runs", runs]) == 2
        error = capsys.readouterr().err
        assert runs in error
        assert "name another --runs" in error


def test_refusing_reads_and_writes_nothing(tmp_path: Path) -> None:
    stage = SMOKE.stage("text")
    assert refuse_other_science(tmp_path / "text", stage, {}) == science_hash(stage, {})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_edited_by_hand_is_refused(tmp_path: Path) -> None:
    path = write_all(tmp_path)["stable"].path / "recipe.json"
    values = json.loads(path.read_text())
    values["stage"]["seed"] = 99
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match="the file was edited by hand"):
        open_run(path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "not a run folder"), ("{", "not valid JSON"), ('{"format": 99}', "format 99, this program reads 1")],
)
def test_what_is_no_run_folder_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(RunError, match=message):
        open_run(tmp_path)


def test_done_holds_the_science_hash(tmp_path: Path) -> None:
    run = write_all(tmp_path)["text"]
    with pytest.raises(RunError, match=r"stage 'text' is not finished \(no DONE\); run it first: megatron-ext text"):
        read_done(run)
    mark_done(run, {"documents": 7})
    assert run.is_done()
    assert (read_done(run)["documents"], read_done(run)["science_hash"]) == (7, run.science_hash)
    with pytest.raises(RunError, match=r"holds science .* the recipe holds"):
        read_done(replace(run, science_hash="0" * 64))
    with pytest.raises(RunError, match="this run is DONE with another recipe"):
        write_all(tmp_path, with_overrides(SMOKE, ["text.seed=1"]))


def test_differences_name_every_changed_value() -> None:
    old, new = {"a": 1, "b": {"c": [1, 2], "d": "x"}}, {"a": 1, "b": {"c": [1, 3], "d": "y"}, "e": None}
    assert differences(old, new) == ["b.c.1: 2 -> 3", 'b.d: "x" -> "y"']
    assert differences([1], [1, 2], "rows") == ["rows: [1] -> [1, 2]"]


def test_the_hash_covers_every_field_outside_the_plan() -> None:
    stage: TrainStage = SMOKE.stage("stable")
    changed = [replace(stage, seed=2), replace(stage, precision="fp32", name="s"), replace(stage, budget=replace(stage.budget, steps=13))]
    hashes = {science_hash(s, {}) for s in (stage, *changed)}
    assert len(hashes) == 4
    assert science_hash(replace(stage, plan=replace(stage.plan, threads_per_rank=2)), {}) == science_hash(stage, {})
