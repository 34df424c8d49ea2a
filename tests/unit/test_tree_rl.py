"""Runs of reinforcement learning as the tree, the joints and the summary show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.base import to_json
from megatron_ext.config.stages import Weights
from megatron_ext.launch.diff import difference
from megatron_ext.launch.doctor_folders import folder_findings, start_problem
from megatron_ext.launch.joints import joint_of, readable_manifest
from megatron_ext.launch.local import _missing_exports, summary_text
from megatron_ext.launch.tree import tree_text
from megatron_ext.launch.tree_rl import accuracy_words, step_words
from megatron_ext.metrics import MetricsWriter
from megatron_ext.provenance import Manifest, Parent, file_sha256, write_manifest
from megatron_ext.runs import Run, mark_done
from recipes import octothinker
from tests.unit.test_tree import line_of, write_all

PAPER = octothinker.llama_3b()


def checkpoint(run: Run, iteration: int, tokens: int, parent: Parent | None, **changes: Any) -> Path:
    """A published checkpoint of a run, as its manifest tells it."""
    folder = run.checkpoints_path / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    values = {
        "stage": run.name, "graph": run.graph, "attempt": 1, "iteration": iteration, "tokens": tokens, "lineage_tokens": tokens,
        "learning_rate": 1e-6, "science_hash": run.science_hash, "mixture_hash": "", "tokenizer_hash": "", "code_hash": "",
        "parent": parent, "ledger": (), "optimizer_layout": "replicated", "plan": {}, "model": {}, "files": {},
    }  # fmt: skip
    write_manifest(folder, Manifest(**{**values, **changes}))
    (run.checkpoints_path / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return folder


def learnt(run: Run, steps: int, attempt: int = 1, from_step: int = 0) -> None:
    """Metrics of some rollout steps with a validation before the first and after the last, on two sets."""
    writer = MetricsWriter(run.metrics_path, attempt, from_step)
    for step in range(from_step, from_step + steps + 1):
        if step > from_step:
            writer.write("rl", step, {"updates": 2 * step, "tokens": 1000 * step, "cap_tokens": 2048, "lineage_tokens": 0, "loss": 0.5})
        if step in (0, from_step + steps):
            writer.write("rl_validation", step, {"set": "math500", "accuracy": 0.1 + step / 100})
            writer.write("rl_validation", step, {"set": "gsm8k", "accuracy": 0.25})
    writer.close()


def test_a_run_shows_steps_updates_the_cap_and_its_accuracies(tmp_path: Path) -> None:
    runs = write_all(tmp_path, PAPER)
    learnt(runs["rl_long"], 12)
    line = line_of(tree_text(tmp_path), "rl_long")
    assert "step 12 of 200 (24 updates), cap 2,048" in line
    assert "math500 0.100 -> 0.220, gsm8k 0.250 -> 0.250" in line
    assert "loss" not in line
    assert "weights of decay_long at its last checkpoint (20,971,520,000 tokens), LR 2e-06 -> 1e-06" in line
    nothing = line_of(tree_text(tmp_path), "rl_base")
    assert "step 0 of 200 (0 updates)  " in nothing
    assert "weights of llama at its last checkpoint" in nothing
    assert "->" not in nothing


def test_a_run_stands_under_what_it_starts_from(tmp_path: Path) -> None:
    write_all(tmp_path, PAPER)
    drawn = [line[2:].rstrip() for line in tree_text(tmp_path).splitlines()]
    order = [next(word for word in line.split() if word[0].isalpha()) for line in drawn[1:]]
    assert order == [
        "corpus", "llama", "stable", "decay_long", "rl_long", "decay_short", "rl_short", "decay_hybrid", "rl_hybrid", "rl_stable",
        "rl_base", "report",
    ]  # fmt: skip


def test_what_a_later_attempt_did_again_counts_once(tmp_path: Path) -> None:
    run = write_all(tmp_path, PAPER)["rl_long"]
    learnt(run, 12)
    learnt(run, 2, attempt=2, from_step=8)
    assert step_words(run) == "step 10 of 200 (20 updates), cap 2,048"
    assert accuracy_words(run) == "math500 0.100 -> 0.200, gsm8k 0.250 -> 0.250"


def test_the_point_that_a_run_started_from_is_its_own_record(tmp_path: Path) -> None:
    runs = write_all(tmp_path, PAPER)
    start = checkpoint(runs["decay_long"], 5000, 20_971_520_000, None)
    parent = Parent(
        stage="decay_long", start="weights", iteration=5000, tokens=20_971_520_000, lineage_tokens=0, learning_rate=2e-6, science_hash="",
        manifest_sha256=file_sha256(start / "manifest.json"),
    )  # fmt: skip
    own = checkpoint(runs["rl_long"], 40, 123_456, parent)
    joint = joint_of(runs["rl_long"], readable_manifest(runs["rl_long"], 40))
    assert joint is not None
    assert (joint.start, joint.stage, joint.iteration, joint.rate_before, joint.rate_after) == ("weights", "decay_long", 5000, 2e-6, 1e-6)
    found = difference(own, start)
    assert found["lineage"]["common"] == {"stage": "decay_long", "tokens": 20_971_520_000, "path": str(runs["decay_long"].path)}


def test_a_run_may_go_on_from_another_of_its_kind(tmp_path: Path) -> None:
    long = PAPER.stage("rl_long")
    again = replace(long, name="rl_on", start=Weights(stage="rl_long"))
    runs = write_all(tmp_path, replace(PAPER, stages=(*PAPER.stages, again)))
    joint = joint_of(runs["rl_on"], None)
    assert joint is not None
    assert (joint.is_last, joint.tokens, joint.rate_before) == (True, None, 1e-6)
    assert "weights of rl_long at its last checkpoint, LR 1e-06" in line_of(tree_text(tmp_path), "rl_on")


def test_an_export_that_a_plan_asks_for_by_now_is_missed(tmp_path: Path) -> None:
    run = write_all(tmp_path, PAPER)["rl_long"]
    asked = replace(run.stage, plan=replace(run.stage.plan, export_last=True))
    assert _missing_exports(run, run.stage) == []
    assert _missing_exports(run, asked) == ["iter_0000200"]
    (run.path / "exports" / "iter_0000200").mkdir(parents=True)
    assert _missing_exports(run, asked) == []


def test_what_keeps_a_run_from_starting_and_from_going_on(tmp_path: Path) -> None:
    runs = write_all(tmp_path, PAPER)
    assert start_problem(tmp_path, PAPER.stage("rl_long")) == ""  # its parent may yet come there
    mark_done(runs["decay_long"], {})
    assert "'rl_long' starts from 'decay_long' at its last checkpoint, but" in start_problem(tmp_path, PAPER.stage("rl_long"))
    checkpoint(runs["decay_long"], 5000, 20_971_520_000, None, optimizer_layout="none")
    assert start_problem(tmp_path, PAPER.stage("rl_long")) == ""  # weights are enough
    plan = {**to_json(PAPER.stage("rl_long").plan), "tensor": 2}
    checkpoint(runs["rl_long"], 40, 1000, None, plan=plan, optimizer_layout="dp_reshardable")
    (found,) = [one for one in folder_findings(PAPER, tmp_path) if one.what == "resume"]
    assert (found.level, found.stage) == ("error", "rl_long")
    assert "now tensor 2 -> 1" in found.found


def test_the_summary_tells_accuracies(tmp_path: Path) -> None:
    run = write_all(tmp_path, PAPER)["rl_long"]
    learnt(run, 4)
    (run.path / "exports" / "iter_0000200").mkdir(parents=True)
    assert "exported at step 200" in tree_text(tmp_path)
    mark_done(run, {"seconds": 3.0})
    head, line = summary_text([run]).splitlines()[1:]
    assert head.split() == ["stage", "kind", "state", "seconds", "tokens", "final", "loss", "accuracy"]
    assert "4,000" in line
    assert "0.5000" not in line  # the loss of GRPO, about 0 whatever is learnt
    assert line.endswith("math500 0.100 -> 0.140, gsm8k 0.250 -> 0.250")
