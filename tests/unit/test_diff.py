"""`diff`: science, plan, data, code and lineage apart, on real run folders; what is equal says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.__main__ import main
from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.stages import Branch, Weights
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.launch.diff import diff_text, difference
from megatron_ext.launch.graph import Graph
from megatron_ext.metrics import MetricsWriter
from megatron_ext.provenance import Consumed, Manifest, Parent, environment, file_sha256, write_manifest
from megatron_ext.runs import Run, open_run, write_json, write_run
from megatron_ext.snapshot import PACKAGE, files_hash, source_files, take_snapshot
from recipes import demo
from tests.small_corpus import TOKENIZER_HASH, write_corpus
from tests.small_graphs import training_alone
from tests.unit.test_cli import without_torch

SMOKE = training_alone(demo.smoke())
TOKENS = 512  # of a step
PARTS = ("science", "plan", "data", "code")


def write_stage(folder: Path, name: str, graph: Graph = SMOKE, **changes: Any) -> Run:
    """A train run of the smoke graph in a folder that has its corpus and its parent."""
    stage = replace(graph.stage(name), **changes)
    start = {} if name == "base" else {"start": folder / stage.start.stage}
    return write_run(folder / name, "smoke", stage, {"corpus": folder / "corpus", **start})


def save(run: Run, step: int, parent: tuple[Run, int] | None = None, **changes: Any) -> Path:
    """A checkpoint as a run leaves it: manifest and tracker."""
    stage = run.stage
    ledger = tuple(
        Consumed(source=r.source, position=step, tokens=step * TOKENS, stage_tokens=round(r.weight * step * TOKENS), epochs=0.5)
        for r in stage.mixture.rows
    )
    values: dict[str, Any] = {
        "stage": run.name, "graph": "smoke", "attempt": 1, "iteration": step, "tokens": step * TOKENS, "lineage_tokens": step * TOKENS,
        "learning_rate": 3e-3, "science_hash": run.science_hash, "mixture_hash": "m", "tokenizer_hash": "t", "code_hash": "c" * 64,
        "parent": _recorded(run, *parent) if parent else None, "ledger": ledger, "optimizer_layout": "replicated",
        "plan": to_json(stage.plan), "model": to_json(stage.model), "files": {},
    }  # fmt: skip
    folder = run.checkpoints_path / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    write_manifest(folder, Manifest(**{**values, **changes}))
    (run.checkpoints_path / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    return folder


def _recorded(run: Run, parent: Run, step: int) -> Parent:
    manifest = parent.checkpoints_path / f"iter_{step:07d}" / "manifest.json"
    return Parent(stage=parent.name, start=run.stage.start.kind, iteration=step, tokens=step * TOKENS, lineage_tokens=step * TOKENS,
                  learning_rate=3e-3, science_hash=parent.science_hash, manifest_sha256=file_sha256(manifest))  # fmt: skip


def write_lineage(folder: Path) -> dict[str, Run]:
    """Corpus, base, stable and the three decays; base and stable have run."""
    sources = dict.fromkeys(("math_web", "general_web", "short_cot", "long_cot", "instruction"), 10)
    runs = {"corpus": write_corpus(folder, sources, heldout=2, num_shards=1)}
    for name in ("base", "stable", "decay_long", "decay_short", "decay_hybrid"):
        runs[name] = write_stage(folder, name)
    save(runs["base"], 6)
    save(runs["stable"], 6, (runs["base"], 6), pinned=True)
    save(runs["stable"], 12, (runs["base"], 6))
    return runs


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Run]:
    return write_lineage(tmp_path / "runs" / "smoke")


def between(a: Run | Path, b: Run | Path, with_code: bool = False) -> dict[str, Any]:
    paths = [one.path if isinstance(one, Run) else one for one in (a, b)]
    return difference(paths[0], paths[1], with_code)


def test_two_decays_differ_in_name_and_mixture_and_nothing_else(runs: dict[str, Run]) -> None:
    found = between(runs["decay_long"], runs["decay_short"])
    assert found["science"] == [
        'name: "decay_long" -> "decay_short"',
        'mixture.rows.long_cot: {"weight": 0.65} -> null',
        'mixture.rows.short_cot: null -> {"weight": 0.65}',
    ]
    assert found["plan"] == found["code"] == []
    assert found["data"] == ["mixture.long_cot: 0.65 -> null", "mixture.short_cot: null -> 0.65"]
    assert found["lineage"]["a"][1:] == found["lineage"]["b"][1:]
    text = diff_text(found).splitlines()
    for line in ("nothing differs in plan", "nothing differs in code", "nothing differs in lineage before the two"):
        assert line in text
    assert text[-1].startswith("  nearest common ancestor: stable at 6,144 tokens (")
    hybrid = between(runs["decay_long"], runs["decay_hybrid"])  # one row more: the others do not shift
    assert {line.partition(":")[0] for line in hybrid["science"]} == {"name", "mixture.rows.long_cot.weight", "mixture.rows.short_cot"}


def test_a_run_differs_from_itself_in_nothing(runs: dict[str, Run]) -> None:
    found = between(runs["stable"], runs["stable"])
    assert not any(found[part] for part in PARTS)
    assert found["lineage"]["common"]["tokens"] == 12 * TOKENS


def test_plan_is_of_the_newest_attempt_or_the_checkpoint(runs: dict[str, Run]) -> None:
    begin_attempt(runs["decay_long"]).finish("failed")
    write_stage(runs["base"].path.parent, "decay_short", plan=replace(SMOKE.stage("decay_short").plan, save_every_steps=3))
    assert between(runs["decay_long"], runs["decay_short"])["plan"] == ["save_every_steps: 6 -> 3"]
    changed = replace(SMOKE.stage("decay_long").plan, save_every_steps=4)
    begin_attempt(write_stage(runs["base"].path.parent, "decay_long", plan=changed)).finish("failed")
    write_stage(runs["base"].path.parent, "decay_long")  # the recipe's plan is back, the attempt's stays
    assert between(runs["decay_long"], runs["decay_short"])["plan"] == ["save_every_steps: 4 -> 3"]
    old = save(runs["decay_long"], 2, (runs["stable"], 12), plan={"save_every_steps": 1})
    new = save(runs["decay_long"], 4, (runs["stable"], 12), plan={"save_every_steps": 2})
    found = between(old, new)
    assert found["plan"] == ["save_every_steps: 1 -> 2"]
    assert found["science"] == []
    assert "ledger.math_web.stage_tokens: 205 -> 410" in found["data"]
    assert found["lineage"]["common"] == {**found["lineage"]["common"], "stage": "decay_long", "tokens": 2 * TOKENS}


def test_data_differs_by_what_the_shards_hold(runs: dict[str, Run], tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", {"math_web": 10, "general_web": 11}, heldout=2, num_shards=1, tokenizer_hash="e" * 64)
    same = write_corpus(tmp_path / "same", dict.fromkeys(("math_web", "general_web"), 10), heldout=2, num_shards=1)
    lines = {line.partition(":")[0]: line for line in between(same, other)["data"]}
    assert lines["corpus.tokenizer_hash"] == f'corpus.tokenizer_hash: "{TOKENIZER_HASH}" -> "{"e" * 64}"'
    assert lines["corpus.sources.general_web.documents"].endswith("10 -> 11")
    assert "corpus.sources.general_web.train" in lines  # the digests of the shards
    assert not any("math_web" in key for key in lines)
    (other.path / "corpus.json").unlink()
    assert '-> "not tokenized yet"' in between(same, other)["data"][-1]


def test_science_names_what_the_inputs_were(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "other"
    write_corpus(folder, {"math_web": 99})
    base = write_stage(folder, "base")
    found = between(runs["base"], base)
    hashes = [one.science_hash[:12] for one in (runs["corpus"], write_corpus(folder, {"math_web": 99}))]
    assert found["science"] == [f'inputs.corpus: "{hashes[0]}" -> "{hashes[1]}"']


def test_code_differs_by_files_where_both_snapshots_are_there(runs: dict[str, Run], tmp_path: Path) -> None:
    package = tmp_path / "old" / "megatron_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "errors.py").write_text((package / "errors.py").read_text() + "# one\n# two\n")
    (package / "cluster.py").write_text("x = 1\n")
    old, new = (files_hash(source_files(one)) for one in (package, PACKAGE))
    for name, code in (("decay_long", old), ("decay_short", new)):
        attempt = begin_attempt(runs[name])
        write_json(attempt.path / "plan.json", {**attempt.record, "code_hash": code})
        write_json(runs[name].path / "provenance.json", {**environment(), "python": "3.11.7" if code == old else "3.12.1"})
        attempt.finish("failed")
    take_snapshot(tmp_path / "runs", package)
    found = between(runs["decay_long"], runs["decay_short"])
    assert found["code"] == [f'code_hash: "{old[:12]}" -> "{new[:12]}"', 'python: "3.11.7" -> "3.12.1"']
    assert found["files_unknown"].startswith("no code snapshot at ")
    assert f"  files: {found['files_unknown']}" in diff_text(found)
    take_snapshot(tmp_path / "runs")
    found = between(runs["decay_long"], runs["decay_short"])
    assert found["files"] == {"cluster.py": {"added": 0, "removed": 1}, "errors.py": {"added": 0, "removed": 2}}
    assert "  errors.py: +0 -2" in diff_text(found).splitlines()
    assert "# two" not in diff_text(found)
    assert "-# two" in diff_text(between(runs["decay_long"], runs["decay_short"], with_code=True)).splitlines()


def test_attempts_of_one_run_that_ran_other_code_are_named(runs: dict[str, Run]) -> None:
    for code in ("a" * 64, "b" * 64):
        attempt = begin_attempt(runs["decay_long"])
        write_json(attempt.path / "plan.json", {**attempt.record, "code_hash": code})
        attempt.finish("failed")
    text = diff_text(between(runs["decay_short"], runs["decay_long"]))
    assert "  B: attempt 1 ran code aaaaaaaaaaaa, attempt 2 ran code bbbbbbbbbbbb" in text


def attempt(run: Run, from_step: int, steps: int, **plan: Any) -> Run:
    """An attempt that trained so many steps under a changed plan."""
    changed = write_stage(run.path.parent, run.name, plan=replace(run.stage.plan, **plan))
    begun = begin_attempt(changed)
    writer = MetricsWriter(run.metrics_path, begun.number, from_step)
    for step in range(from_step + 1, from_step + steps + 1):
        writer.write("train", step, {"loss": 1.0})
    writer.close()
    begun.finish("failed")
    return changed


def test_steps_that_ran_another_plan_are_named(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs["decay_long"], runs["decay_short"]
    attempt(a, 0, 4, save_every_steps=2)
    attempt(a, 3, 2, ranks_per_node=2, micro_batch=2)
    attempt(a, 5, 3, ranks_per_node=2, micro_batch=2)  # all of it was done again
    attempt(a, 5, 1, ranks_per_node=2, micro_batch=2)
    attempt(a, 6, 1)
    for begin in (0, 1):
        attempt(b, begin, 1)
    found = between(b, a)
    assert found["plan"] == []
    assert found["plans"] == {
        "b": [
            {"first_attempt": 1, "last_attempt": 1, "first_step": 1, "last_step": 3, "plan": {"save_every_steps": 2}},
            {"first_attempt": 2, "last_attempt": 4, "first_step": 4, "last_step": 6, "plan": {"ranks_per_node": 2, "micro_batch": 2}},
        ]
    }
    lines = diff_text(found).splitlines()
    at = lines.index("plan")
    assert lines[at + 1 : at + 4] == [
        "  B: attempt 1 (steps 1 to 3) ran save_every_steps 2",
        "  B: attempts 2 to 4 (steps 4 to 6) ran ranks_per_node 2, micro_batch 2",
        "",
    ]
    attempt(a, 7, 2, ranks_per_node=2, micro_batch=2)  # what is other is so against the newest; attempt 5 parts what was alike
    rows = between(a, b)["plans"]["a"]
    assert [(one["last_attempt"], one["last_step"], [*one["plan"]]) for one in rows] == [
        (1, 3, ["ranks_per_node", "save_every_steps", "micro_batch"]),
        (5, 7, ["ranks_per_node", "micro_batch"]),
    ]
    point = save(a, 4, (runs["stable"], 12), plan={**to_json(a.stage.plan), "ranks_per_node": 2, "micro_batch": 2})
    found = between(point, b)  # of a checkpoint, what led to it
    assert [(one["last_step"], one["plan"]["micro_batch"]) for one in found["plans"]["a"]] == [(3, 8)]
    assert between(b, b)["plans"] == {}
    assert main(["diff", str(a.path), str(b.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]["a"] == rows


def common(a: Run | Path, b: Run | Path) -> tuple[str, int] | None:
    found = between(a, b)["lineage"]["common"]
    return None if found is None else (found["stage"], found["tokens"])


def test_the_nearest_common_ancestor(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = runs["base"].path.parent
    early = write_run(
        folder / "early", "smoke", replace(SMOKE.stage("decay_long"), name="early", start=Branch(stage="stable", tokens=6 * TOKENS)),
        {"corpus": folder / "corpus", "start": folder / "stable"},
    )  # fmt: skip
    deep = replace(SMOKE.stage("decay_long"), name="deep", start=Weights(stage="early", tokens=2 * TOKENS))
    deep_run = write_run(folder / "deep", "smoke", deep, {"corpus": folder / "corpus", "start": early.path})
    assert common(early, runs["decay_long"]) == ("stable", 6 * TOKENS)  # before either has a checkpoint, and after
    save(early, 2, (runs["stable"], 6))
    save(runs["decay_long"], 2, (runs["stable"], 12))
    assert common(early, runs["decay_long"]) == ("stable", 6 * TOKENS)
    assert common(runs["decay_long"], deep_run) == ("stable", 6 * TOKENS)
    assert common(deep_run, early) == ("early", 2 * TOKENS)
    assert common(runs["stable"], runs["decay_long"]) == ("stable", 12 * TOKENS)
    assert common(runs["base"], runs["decay_short"]) == ("base", 6 * TOKENS)
    assert common(runs["stable"].checkpoints_path / "iter_0000006", early) == ("stable", 6 * TOKENS)
    other = write_lineage(tmp_path / "elsewhere" / "smoke")["base"]
    assert common(other, runs["base"]) == ("base", 6 * TOKENS)  # to the byte the same, wherever it was trained
    shutil.rmtree(other.checkpoints_path)
    save(other, 6, learning_rate=1e-3)
    assert common(other, runs["base"]) is None
    lines = between(deep_run, runs["base"])["lineage"]["a"]
    assert lines == [
        "deep at 0 tokens", "weights of early at 1,024 tokens, LR 0.002897 -> 0.003",
        "branch of stable at 3,072 tokens, LR 0.003", "weights of base at 3,072 tokens, LR 0.003",
    ]  # fmt: skip


def test_a_copied_lineage_has_the_ancestor_and_one_trained_again_has_not(runs: dict[str, Run], tmp_path: Path) -> None:
    save(runs["decay_long"], 2, (runs["stable"], 12))
    copied = tmp_path / "copied" / "smoke"
    shutil.copytree(runs["base"].path.parent, copied)
    assert common(runs["decay_long"], copied / "decay_long") == ("decay_long", 2 * TOKENS)
    shutil.rmtree(copied / "decay_long" / "checkpoints")
    save(open_run(copied / "decay_long"), 4, (runs["stable"], 12))
    assert common(runs["decay_long"], copied / "decay_long") == ("stable", 12 * TOKENS)
    stable = runs["stable"].checkpoints_path / "iter_0000012"
    before = file_sha256(stable / "manifest.json")
    shutil.rmtree(stable)
    save(runs["stable"], 12, (runs["base"], 6), learning_rate=1e-3)
    save(runs["decay_short"], 2, (runs["stable"], 12))
    assert common(runs["decay_long"], runs["decay_short"]) == ("base", 6 * TOKENS)
    assert common(runs["stable"], runs["decay_long"]) == ("base", 6 * TOKENS)
    assert common(runs["stable"], runs["decay_short"]) == ("stable", 12 * TOKENS)
    shutil.rmtree(stable)
    save(runs["stable"], 12, (runs["base"], 6), thinned_from=before)  # it lost its optimizer state: its weights are the same
    shutil.rmtree(runs["decay_short"].checkpoints_path)
    save(runs["decay_short"], 2, (runs["stable"], 12))
    assert common(runs["decay_long"], runs["decay_short"]) == ("stable", 12 * TOKENS)


def test_a_checkpoint_that_stands_alone(runs: dict[str, Run], tmp_path: Path) -> None:
    save(runs["decay_long"], 2, (runs["stable"], 12))
    alone = tmp_path / "alone" / "iter_0000012"
    shutil.copytree(runs["stable"].checkpoints_path / "iter_0000012", alone)
    found = between(alone, runs["stable"].checkpoints_path / "iter_0000012")
    assert not found["science"]
    assert not found["plan"]
    found = between(alone, runs["decay_long"])
    assert {line.partition(":")[0] for line in found["science"]} == {"name", "science_hash"}
    unbegun = between(alone, runs["decay_short"])
    assert "mixture_hash" in {line.partition(":")[0] for line in unbegun["science"]}


def test_what_cannot_be_compared_is_named(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{tmp_path}: neither a run folder .* nor a checkpoint"):
        between(tmp_path, runs["base"])
    with pytest.raises(RunError, match="absent: neither a run folder"):
        between(runs["base"], tmp_path / "absent")
    newest = runs["stable"].checkpoints_path / "iter_0000012"
    (newest / "manifest.json").unlink()
    for path in (newest, runs["stable"]):
        with pytest.raises((CheckpointError, RunError), match="iter_0000012"):
            between(path, runs["base"])


def test_the_command_needs_no_torch_and_writes_nothing(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(runs[name].path) for name in ("decay_long", "decay_short")]
    before = sorted(tmp_path.rglob("*"))
    out, _ = without_torch(["diff", *paths], tmp_path)
    assert out.splitlines()[0] == "A  runs/smoke/decay_long: decay_long, no checkpoint yet"
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["diff", *paths, "--json"]) == 0
    assert set(PARTS) < set(json.loads(capsys.readouterr().out))
    assert main(["diff", paths[0], str(tmp_path)]) == 2
    assert "neither a run folder" in capsys.readouterr().err
