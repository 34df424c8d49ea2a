"""`doctor` on run folders: other recipes and what is made from them, plans that load no checkpoint, starts, owners, codes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.launch.doctor import examine
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.runs import mark_done, open_run, write_json, write_run
from tests.small_checkpoints import write_files
from tests.unit.test_doctor import SMOKE, problems
from tests.unit.test_tree import parent_at, trained, write_all


def test_every_run_folder_with_another_recipe_is_named(tmp_path: Path) -> None:
    other = with_overrides(SMOKE, ["text.seed=1", "tokenizer.vocab_size=480"])
    for stage in other.stages[:2]:
        parents = {role: tmp_path / "smoke" / parent for parent, child, role in SMOKE.edges() if child == stage.name}
        write_run(tmp_path / "smoke" / stage.name, "smoke", stage, parents)
        (tmp_path / "smoke" / stage.name / "attempts" / "1").mkdir(parents=True)
    found = problems(examine(SMOKE, None, tmp_path), "run folder")
    assert [one.stage for one in found] == ["text", "tokenizer"]
    assert "seed: 1 -> 20250625" in found[0].found


def test_what_is_made_from_a_changed_stage_is_counted_with_it(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "smoke")
    for run in runs.values():
        (run.path / "attempts" / "1").mkdir(parents=True)
    text, changed = problems(examine(with_overrides(SMOKE, ["text.seed=1", "decay_long.seed=5"]), None, tmp_path), "run folder")
    assert (text.stage, changed.stage) == ("text", "decay_long")
    made = "tokenizer, corpus, base, stable, decay_short, decay_hybrid, report"
    assert text.found.endswith(f"\n7 stages made from it would have to start over too: {made}")
    assert "inputs" not in changed.found  # what it is made from does not count as its own change
    assert "made from it" not in changed.found
    shutil.rmtree(runs["corpus"].path / "attempts")
    (found,) = problems(examine(with_overrides(SMOKE, ["text.seed=1"]), None, tmp_path), "run folder")
    assert "7 stages made from it" in found.found
    assert "corpus" not in found.found


def begun(tmp_path: Path, overrides: list[str]) -> tuple[Graph, Path]:
    """The graph under `overrides`, written down to its `base` stage; and that stage's folder."""
    graph = with_overrides(SMOKE, overrides)
    for stage in graph.stages[:4]:
        parents = {role: tmp_path / "smoke" / parent for parent, child, role in graph.edges() if child == stage.name}
        write_run(tmp_path / "smoke" / stage.name, "smoke", stage, parents)
    return graph, tmp_path / "smoke" / "base"


TWO = ["base.plan.ranks_per_node=2", "base.plan.micro_batch=4"]


@pytest.mark.parametrize(
    ("layout", "overrides", "part"),
    [
        ("dp_reshardable", [*TWO, "base.plan.tensor=2"], "now tensor 1 -> 2"),
        ("fully_reshardable", [*TWO, "base.plan.tensor=2"], ""),
        ("dp_reshardable", TWO, ""),  # other data-parallel sizes load
        ("fully_reshardable", ["base.plan.distributed_optimizer=false"], "now distributed_optimizer True -> False"),
    ],
)
def test_a_plan_that_cannot_load_the_newest_checkpoint(tmp_path: Path, layout: str, overrides: list[str], part: str) -> None:
    _, base = begun(tmp_path, [])
    write_files(base / "checkpoints", 6, optimizer_layout=layout, plan=to_json(SMOKE.stage("base").plan))
    (base / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("6")
    found = [*problems(examine(with_overrides(SMOKE, overrides), None, tmp_path), "resume")]
    assert [part in one.found for one in found] == ([True] if part else [])


def test_a_checkpoint_without_its_manifest(tmp_path: Path) -> None:
    graph, base = begun(tmp_path, [])
    write_files(base / "checkpoints", 6)
    (base / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("6")
    (base / "checkpoints" / "iter_0000006" / "manifest.json").write_text("{}")
    (found,) = problems(examine(graph, None, tmp_path), "resume")
    assert "has no readable manifest" in found.found


def test_a_parent_that_was_trained_again_is_a_warning(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "smoke")
    checkpoint = trained(runs["stable"], 12, 4.0)
    trained(runs["decay_long"], 8, 3.0, parent_at(runs["stable"], 12, "branch", checkpoint))
    for run in runs.values():
        mark_done(run, {})
    assert problems(examine(SMOKE, None, tmp_path), "start") == []
    shutil.rmtree(checkpoint)
    trained(runs["stable"], 12, 4.5, learning_rate=9.0)
    (found,) = problems(examine(SMOKE, None, tmp_path), "start")
    assert (found.level, found.stage) == ("warning", "decay_long")
    assert "is not the one that it started from" in found.found
    assert str(runs["decay_long"].path) in found.way_out


def test_a_start_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    graph = with_overrides(SMOKE, ["decay_long.start.tokens=2048"])
    runs = write_all(tmp_path / "smoke", graph)
    plan = to_json(SMOKE.stage("stable").plan)
    trained(runs["stable"], 2, 5.0, optimizer_layout="none", plan=plan)
    assert problems(examine(graph, None, tmp_path), "start") == []  # the parent may come to it yet
    trained(runs["stable"], 12, 4.0, plan=plan)  # past it
    (found,) = problems(examine(graph, None, tmp_path), "start")
    assert (found.level, found.stage) == ("error", "decay_long")
    assert "starts from 'stable' at 2,048 tokens, but " in found.found
    assert "checkpoints holds 1,024, 6,144 tokens. Name a point that is there, or remove" in found.found
    weightless = with_overrides(SMOKE, ["decay_long.start.tokens=1024"])
    (found,) = problems(examine(weightless, None, tmp_path), "start")
    assert "iter_0000002 holds weights only. Way out: branch from 6,144 tokens, or start with Weights(...)" in found.found
    trained(runs["decay_long"], 1, 5.0, plan=plan)  # it goes on from its own
    assert problems(examine(graph, None, tmp_path), "start") == []


def test_a_finished_parent_without_its_last_checkpoint(tmp_path: Path) -> None:
    runs = write_all(tmp_path / "smoke")
    assert problems(examine(SMOKE, None, tmp_path), "start") == []
    mark_done(runs["base"], {})
    (found,) = problems(examine(SMOKE, None, tmp_path), "start")
    assert "stage 'stable' starts from 'base' at its last checkpoint, but" in found.found
    assert "holds no checkpoint that can be read" in found.found
    path = trained(runs["base"], 6, 5.0, optimizer_layout="none")
    assert problems(examine(SMOKE, None, tmp_path), "start") == []  # weights are all that it asks for
    (path.parent / "latest_checkpointed_iteration.txt").write_text("x")
    (found,) = problems(examine(SMOKE, None, tmp_path), "start")
    assert "holds 'x', not an iteration" in found.found


def test_a_stage_that_is_at_work_and_one_of_other_code(tmp_path: Path) -> None:
    graph, base = begun(tmp_path, [])
    attempt = begin_attempt(open_run(base))  # this process's: it lives
    (found,) = problems(examine(graph, None, tmp_path), "run folder")
    assert "attempt 1" in found.found
    assert "a second one is refused" in found.found
    attempt.finish("failed")
    assert problems(examine(graph, None, tmp_path), "run folder") == []
    record = attempt.path / "plan.json"
    write_json(record, {**attempt.record, "code_hash": "0" * 64})
    (found,) = problems(examine(graph, None, tmp_path), "run folder")
    assert "ran code 000000000000" in found.found
