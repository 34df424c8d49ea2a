"""The tree of real run folders: lineage, states, points, and what is odd."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.stages import inputs
from megatron_ext.errors import RunError
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.local import summary_text
from megatron_ext.launch.tree import columns, state, tree_text
from megatron_ext.metrics import MetricsWriter
from megatron_ext.provenance import CorpusIndex, Manifest, Parent, SourceRecord, file_sha256, write_manifest
from megatron_ext.runs import Run, mark_done, write_json, write_run
from recipes import demo
from tests.small_graphs import training_alone

SMOKE = training_alone(demo.smoke())


def write_all(folder: Path, graph: Graph = SMOKE) -> dict[str, Run]:
    """Every run folder of a graph, nothing run."""
    return {s.name: write_run(folder / s.name, graph.name, s, {r: folder / p for r, p in inputs(s).items()}) for s in graph.stages}


def manifest(run: Run, iteration: int, parent: Parent | None, **changes: Any) -> Manifest:
    budget = run.stage.budget
    values = {
        "stage": run.name, "graph": run.graph, "attempt": 1, "iteration": iteration, "tokens": budget.tokens_before(iteration),
        "lineage_tokens": 1, "learning_rate": 1e-3, "science_hash": run.science_hash, "mixture_hash": "", "tokenizer_hash": "",
        "code_hash": "", "parent": parent, "ledger": (), "optimizer_layout": "replicated", "plan": {}, "model": {}, "files": {},
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def trained(run: Run, step: int, loss: float, parent: Parent | None = None, **changes: Any) -> Path:
    """What a train run leaves after some steps: metrics and a checkpoint, whose folder it returns."""
    writer = MetricsWriter(run.metrics_path, 1, 0)
    writer.write("train", step, {"loss": loss, "tokens": run.stage.budget.tokens_before(step), "lineage_tokens": 10_000 + step})
    writer.close()
    folder = run.checkpoints_path / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    write_manifest(folder, manifest(run, step, parent, **changes))
    (run.checkpoints_path / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    return folder


def parent_at(run: Run, step: int, start: str, checkpoint: Path) -> Parent:
    """What a child records of the checkpoint that it starts from."""
    tokens = run.stage.budget.tokens_before(step)
    return Parent(
        stage=run.name, start=start, iteration=step, tokens=tokens, lineage_tokens=tokens, learning_rate=2e-3, science_hash="",
        manifest_sha256=file_sha256(checkpoint / "manifest.json"),
    )  # fmt: skip


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if f"{name} " in line)


def test_the_tree_shows_lineage_states_and_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = write_all(tmp_path / "runs" / "smoke")
    for name in ("text", "tokenizer", "corpus"):
        mark_done(runs[name], {})
    source = SourceRecord(train=(), heldout=(), tokens=1200, heldout_tokens=9, documents=1, heldout_documents=1, max_epochs=1.0)
    sources = {"a": source, "b": replace(source, tokens=34)}
    index = CorpusIndex(tokenizer_hash="", tokenizer_path="tokenizer", vocab_size=512, eod_id=0, bos=False, sources=sources)
    write_json(runs["corpus"].path / "corpus.json", to_json(index))
    base = trained(runs["base"], 6, 5.25)
    mark_done(runs["base"], {})
    trained(runs["stable"], 6, 4.125, parent_at(runs["base"], 6, "weights", base))
    begin_attempt(runs["stable"])
    attempt = begin_attempt(runs["decay_long"])
    attempt.finish("failed", error="DataError: no such source\nand more")
    lines = tree_text(Path("runs")).splitlines()
    assert lines[0] == "smoke  (runs/smoke)"
    assert [line.split()[0] for line in lines[1:4]] == ["text", "tokenizer", "corpus"]
    assert "tokens 1,234" in lines[3]
    words = {
        name: next(line for line in lines if f"{name} " in line) for name in ("base", "stable", "decay_long", "decay_hybrid", "report")
    }
    assert list(words.values()) == [lines[4], lines[5], lines[6], lines[8], lines[9]]  # the graph's order
    assert words["base"].startswith("  base ")
    assert words["stable"].startswith("  └─ stable ")
    assert words["decay_long"].startswith("     ├─ decay_long ")
    assert lines[7].startswith("     ├─ decay_short ")
    assert words["decay_hybrid"].startswith("     └─ decay_hybrid ")
    for part in (
        f"attempt 1: running, pid {os.getpid()}",
        "tokens 3,072 of 6,144",
        "lineage 10,006",
        "loss 4.1250",
        "checkpoint 6",
        "weights of base at 3,072 tokens, LR 0.002 -> 0.003",
    ):
        assert part in words["stable"]
    assert "attempt 1: failed: DataError  " in words["decay_long"]  # the rest would push the columns apart
    assert "branch of stable at its last checkpoint (6,144 tokens), LR 0.003" in words["decay_long"]
    assert lines[10:] == ["  decay_long, attempt 1, failed: DataError: no such source", "    and more"]
    assert "DONE" in words["base"]
    assert "from scratch" in words["base"]
    assert "not started" in words["report"]


def test_branches_stand_by_the_point_where_they_leave_their_parent(tmp_path: Path) -> None:
    assignments = ["decay_short.start.tokens=1024", "decay_hybrid.start.tokens=2048"]
    write_all(tmp_path, with_overrides(SMOKE, assignments))
    text = tree_text(tmp_path)
    assert [word for line in text.splitlines() for word in line.split() if word.startswith("decay_")] == [
        "decay_short", "decay_hybrid", "decay_long",
    ]  # fmt: skip
    assert "branch of stable at 1,024 tokens, LR 0.003" in line_of(text, "decay_short")
    assert "branch of stable at its last checkpoint (6,144 tokens)" in line_of(text, "decay_long")


def test_pinned_and_thinned_checkpoints_fall_backs_and_other_code_are_noted(tmp_path: Path) -> None:
    runs = write_all(tmp_path)
    stable = runs["stable"]
    trained(stable, 2, 5.0, pinned=True, thinned_from="f" * 64)
    trained(stable, 4, 5.0, pinned=True)
    trained(stable, 6, 5.0)
    for code in ("a" * 64, "a" * 64, "b" * 64):
        attempt = begin_attempt(stable)
        write_json(attempt.path / "plan.json", {**attempt.record, "code_hash": code})
        attempt.finish("failed")
    write_json(attempt.path / "fallback.json", {"from": "iter_0000008", "to": "iter_0000006", "reason": "a byte differs\nand more"})
    lines = tree_text(tmp_path).splitlines()
    start = next(i for i, line in enumerate(lines) if "stable " in line)
    assert lines[start + 1 : start + 4] == [
        "     │ pinned at 1,024, 2,048 tokens; weights only at 1,024 tokens",
        "     │ attempts 1 to 2 ran code aaaaaaaaaaaa, attempt 3 ran code bbbbbbbbbbbb",
        "     │ attempt 3 fell back from iter_0000008 to iter_0000006: a byte differs",
    ]
    assert len(lines) == 13


def test_a_parent_checkpoint_that_changed_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = write_all(tmp_path)
    base = trained(runs["base"], 6, 5.0)
    old = file_sha256(base / "manifest.json")
    trained(runs["stable"], 6, 4.0, parent_at(runs["base"], 6, "weights", base))
    quiet = tree_text(tmp_path)
    assert "parent checkpoint" not in quiet
    write_manifest(base, manifest(runs["base"], 6, None, thinned_from=old))  # its optimizer state was removed, its weights are the same
    assert "is not the one" not in tree_text(tmp_path)
    write_manifest(base, manifest(runs["base"], 6, None, learning_rate=9.0))  # trained again
    new = file_sha256(base / "manifest.json")
    change = f"its parent checkpoint {Path('base/checkpoints/iter_0000006')} is not the one that it started from"
    assert f"{change}: the manifest hashes to {new[:12]}, recorded is {old[:12]}" in tree_text(tmp_path)
    (base / "manifest.json").write_text("{")
    assert change in tree_text(tmp_path)
    (base / "manifest.json").unlink()
    assert "its parent checkpoint base/checkpoints/iter_0000006 is gone" in tree_text(tmp_path)


def test_the_tree_of_one_graph_or_one_run_is_its_part(tmp_path: Path) -> None:
    write_all(tmp_path / "smoke")
    assert len(tree_text(tmp_path).splitlines()) == len(tree_text(tmp_path / "smoke").splitlines()) == 10
    assert len(tree_text(tmp_path / "smoke" / "text").splitlines()) == 2


def test_the_tree_survives_a_checkpoint_without_manifest(tmp_path: Path) -> None:
    runs = write_all(tmp_path)
    trained(runs["base"], 6, 5.0)
    (runs["base"].checkpoints_path / "iter_0000006" / "manifest.json").write_text("{")
    assert "checkpoint 6 (no readable manifest)" in tree_text(tmp_path)


@pytest.mark.parametrize("tracker", [b"\xb2", b"\xc2\xb2", b"x\n", b"release", b"8\n", b"9" * 5000])
def test_a_broken_tracker_is_noted_and_hides_nothing(tmp_path: Path, tracker: bytes) -> None:
    runs = write_all(tmp_path)
    trained(runs["base"], 6, 5.0)
    trained(runs["stable"], 6, 4.0)
    mark_done(runs["base"], {"seconds": 1.0})
    whole = tree_text(tmp_path).splitlines()
    (runs["base"].checkpoints_path / "latest_checkpointed_iteration.txt").write_bytes(tracker)
    lines = tree_text(tmp_path).splitlines()
    row = next(i for i, line in enumerate(lines) if "base " in line)
    assert "DONE, its tracker is damaged" in lines[row]
    assert "checkpoint 6" in lines[row]
    assert f"{runs['base'].checkpoints_path}/latest_checkpointed_iteration.txt: " in lines[row + 1]
    rest = [*lines[:row], *lines[row + 2 :]]
    assert [line.split() for line in rest] == [line.split() for line in (*whole[:row], *whole[row + 1 :])]
    assert "DONE, its tracker is damaged" in summary_text([runs["base"]])


def test_an_attempt_is_alive_by_the_rule_of_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stable = write_all(tmp_path)["stable"]
    attempt = begin_attempt(stable)
    record = attempt.record
    write_json(attempt.path / "plan.json", {**record, "process_start": -1})  # the number went to another process
    assert state(stable) == "attempt 1: killed (no word of its end)"
    write_json(attempt.path / "plan.json", {**record, "host": "elsewhere", "place": "elsewhere/1", "job_id": "7"})
    assert state(stable) == f"attempt 1: running, pid {os.getpid()} on elsewhere"
    (attempt.path / "heartbeat").unlink()  # not to be timed, as where the folder cannot be written to
    assert state(stable) == f"attempt 1: running or killed, pid {os.getpid()} on elsewhere"
    (attempt.path / "heartbeat").touch()
    os.utime(attempt.path / "heartbeat", (1, 1))
    assert state(stable) == "attempt 1: killed (no word of its end)"
    (attempt.path / "heartbeat").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the scheduler has put the job of the attempt back
    assert state(stable) == "attempt 1: killed (no word of its end)"


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{tmp_path}: no run folders here"):
        tree_text(tmp_path)


def test_columns_leave_out_what_is_empty() -> None:
    assert columns([["a", "", "b"], ["long", "", ""]]) == ["a     b", "long"]
