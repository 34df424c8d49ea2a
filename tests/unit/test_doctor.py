"""`doctor` without --deep: each thing that can be known to fail is found, all of them at once, without torch."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.__main__ import main
from megatron_ext.attempts import begin_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.memory import memory, save_host_bytes
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import Source
from megatron_ext.launch import doctor_deep, doctor_machine
from megatron_ext.launch.doctor import examine
from megatron_ext.launch.findings import Finding, findings_text
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.runs import mark_done, open_run, write_json, write_run
from recipes import clusters, demo, models, octothinker
from tests.small_checkpoints import write_files
from tests.small_graphs import training_alone
from tests.unit.test_tree import parent_at, trained, write_all

SMOKE = training_alone(demo.smoke())
LARGE = octothinker.llama_8b()
H100 = clusters.h100()
Usage = namedtuple("Usage", "total used free")


def problems(found: list[Finding], what: str) -> list[Finding]:
    return [one for one in found if one.what.startswith(what) and one.level != "ok"]


def changed(graph: Graph, name: str, **values: Any) -> Graph:
    """The graph with one stage's values replaced."""
    stages = tuple(replace(stage, **values) if stage.name == name else stage for stage in graph.stages)
    return replace(graph, stages=stages)


def test_it_needs_no_torch_writes_nothing_and_finds_the_demo_fit(tmp_path: Path) -> None:
    block = "; ".join(f"sys.modules['{name}'] = None" for name in ("torch", "megatron", "transformers", "numpy"))
    words = ["doctor", "demo:smoke", "--runs", str(tmp_path / "runs")]
    program = f"import sys; {block}; from megatron_ext.__main__ import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 error" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_all_findings_are_listed_and_an_error_exits_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["octothinker:llama_8b", "--cluster", "h100", "stable.plan.tensor=1", "stable.plan.sequence_parallel=false"]
    assert main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    for part in ("memory of stable: 91.9 GB a GPU", "text of corpus: 12 of 12 paths match no file", "tokenizer of corpus: no such file"):
        assert f"error    {part}" in out
    assert "memory of decay_long, decay_short, decay_hybrid: 46.3 GB" in out  # said once of three
    assert "octothinker_8b would fail" in err


def test_a_recipe_that_cannot_be_read_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "octothinker:llama_8b", "stable.plan.nodes=256"]) == 2
    assert "feeds at most 512 data-parallel ranks" in capsys.readouterr().err


def test_what_does_not_fit_names_a_change_that_does(tmp_path: Path) -> None:
    wide = with_overrides(LARGE, ["stable.plan.tensor=1", "stable.plan.sequence_parallel=false"])
    (found,) = problems(examine(wide, H100, tmp_path), "memory")
    assert (found.level, found.stage, found.way_out) == ("error", "stable", "stable.plan.recompute=full")
    stage = with_overrides(wide, [found.way_out]).stage("stable")
    assert memory(stage.model, stage.budget, stage.precision, stage.plan).fits(H100.gpu_memory_bytes)


def test_no_cluster_no_comparison(tmp_path: Path) -> None:
    assert {one.level for one in problems(examine(LARGE, None, tmp_path), "memory")} == {"warning"}


def test_host_memory_of_a_pinned_save() -> None:
    model, plan = models.llama_3_1_8b(), replace(octothinker.PLAN_8B, asynchronous_saves=False)
    held = 4_015_263_744  # parameters of a GPU under tensor 2
    bucket = 64_000_000 + 128_256 * 4096 // 2
    assert save_host_bytes(model, "bf16", plan) == 8 * (12 * held + 8 * bucket)
    beside = replace(plan, asynchronous_saves=True)
    assert save_host_bytes(model, "bf16", beside) - save_host_bytes(model, "bf16", plan) == 2 * 14 * held
    assert save_host_bytes(model, "bf16", replace(plan, distributed_optimizer=False)) == 0
    deep = TrainPlan(ranks_per_node=8, pipeline=2)  # one bucket a stage
    assert save_host_bytes(model, "bf16", deep) == 8 * 20 * ((model.num_parameters - 4096) // 2 + 4096)


def test_a_node_that_cannot_hold_a_pinned_save(tmp_path: Path) -> None:
    small = replace(H100, memory_bytes_per_node=400 * 10**9)
    found = problems(examine(LARGE, small, tmp_path), "host memory")
    assert found[0].level == "error"
    assert "every rank gathers the optimizer state" in found[0].found


def test_more_processes_than_cores(tmp_path: Path) -> None:
    (found,) = problems(examine(with_overrides(LARGE, ["stable.plan.loader_workers=14"]), H100, tmp_path), "cores")
    assert "8 ranks x (1 threads + 14 loader workers) = 120 exceed the 112 cores" in found.found


def test_a_plan_that_its_arithmetic_refuses_is_found_stage_by_stage(tmp_path: Path) -> None:
    over = replace(H100, gpus_per_node=4)
    found = problems(examine(LARGE, over, tmp_path), "plan")
    learnt = ["rl_base", "rl_stable", "rl_long", "rl_short", "rl_hybrid"]
    assert [one.stage for one in found] == ["stable", "decay_long", "decay_short", "decay_hybrid", *learnt]
    assert all("exceeds the 4 GPUs of a node" in one.found for one in found)


def test_every_run_folder_with_another_recipe_is_named(tmp_path: Path) -> None:
    other = with_overrides(SMOKE, ["text.seed=1", "tokenizer.vocab_size=480"])
    for stage in other.stages[:2]:
        parents = {role: tmp_path / "smoke" / parent for parent, child, role in SMOKE.edges() if child == stage.name}
        write_run(tmp_path / "smoke" / stage.name, "smoke", stage, parents)
        (tmp_path / "smoke" / stage.name / "attempts" / "1").mkdir(parents=True)
    found = problems(examine(SMOKE, None, tmp_path), "run folder")
    assert [one.stage for one in found] == ["text", "tokenizer"]
    assert "seed: 1 -> 20250625" in found[0].found


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


def test_a_runs_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for runs, why in ((tmp_path / "file", f"{tmp_path}/file is a file, not a folder"), (Path("/proc/x"), "")):
        (found,) = problems(examine(SMOKE, None, runs), "writing")
        assert (found.level, why in found.found) == ("error", True)
        assert "name another --runs" in found.way_out


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


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl.gz").write_text("")
    names = {"a": "a.jsonl", "b": "b.*", "c": "c/*.jsonl"}
    sources = tuple(Source(name=name, paths=(path,), max_epochs=1.0) for name, path in names.items())
    graph = changed(SMOKE, "corpus", text=None, sources=sources)
    missing, packed = problems(examine(graph, None, tmp_path), "text of corpus")
    assert missing.found == "1 of 3 paths match no file: c: c/*.jsonl"
    assert packed.found == "compressed files cannot be read: b: b.jsonl.gz"


@pytest.mark.parametrize(
    ("vocabulary", "level", "part"),
    [
        ({"a": 0, "b": 511}, "ok", "512 ids, which the models hold"),
        ({"a": 0, "b": 512}, "error", "513 ids, but model smallest has 512"),
        ([["a", -1.0]] * 512, "ok", "512 ids"),
        (None, "error", "is no tokenizer of the tokenizers library"),
    ],
)
def test_vocabularies(tmp_path: Path, vocabulary: Any, level: str, part: str) -> None:
    values = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 3}]} if vocabulary else {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    found = [one for one in examine(changed(SMOKE, "corpus", tokenizer=str(tmp_path)), None, tmp_path) if one.what == "tokenizer of corpus"]
    assert found[0].level == level
    assert part in found[0].found


def test_a_vocabulary_far_smaller_than_the_models(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 31_999}}}))
    (found,) = problems(examine(changed(LARGE, "corpus", tokenizer=f"{tmp_path}/"), None, tmp_path), "tokenizer")
    assert found.found.startswith("32,000 ids, far fewer than the 128,256")


def test_a_tokenizer_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (found,) = problems(examine(changed(SMOKE, "corpus", tokenizer=f"{tmp_path}/"), None, tmp_path), "tokenizer")
    assert "holds neither tokenizer.json nor" in found.found
    (tmp_path / "tokenizer.model").write_text("")
    assert problems(examine(changed(SMOKE, "corpus", tokenizer=f"{tmp_path}/"), None, tmp_path), "tokenizer") == []


def test_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"torch": "2.13.0+cpu", "megatron-core": "0.15.0", "transformer-engine": None}
    true = doctor_machine._version
    monkeypatch.setattr(doctor_machine, "_version", lambda name: versions.get(name, "x") if name in versions else true(name))
    torch, megatron, engine = problems(examine(LARGE, H100, tmp_path), "packages")
    assert (torch.level, torch.found.split(" in ")[0]) == ("error", "torch 2.13.0+cpu")
    assert (megatron.level, megatron.found) == ("warning", "megatron-core is 0.15.0; this version was tested with 0.16.1")
    assert engine.level == "error"
    assert "not installed" in engine.found
    (only,) = problems(examine(SMOKE, None, tmp_path), "packages")  # a CPU's torch will do there, without Transformer Engine
    assert only.found == megatron.found


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: Usage(10**13, 0, 4 * 10**12))
    (found,) = problems(examine(LARGE, H100, tmp_path), "disk")
    # 42 checkpoints of training, 25 of reinforcement learning, one aside, known shards, recorded rollouts
    assert (found.level, found.found.split(" still")[0]) == ("error", "8.5 TB")
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: Usage(10**13, 0, 9 * 10**12))
    assert problems(examine(LARGE, H100, tmp_path), "disk") == []
    (tmp_path / LARGE.name / "stable").mkdir(parents=True)
    (tmp_path / LARGE.name / "stable" / "DONE").touch()
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: Usage(10**13, 0, 6 * 10**12))
    assert problems(examine(LARGE, H100, tmp_path), "disk") == []  # what is done needs no more


def test_inodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: Usage(10**13, 0, 9 * 10**12))
    monkeypatch.setattr(doctor_machine.os, "statvfs", lambda _: namedtuple("S", "f_files f_favail")(10**6, 6443))
    (found,) = problems(examine(LARGE, H100, tmp_path), "disk")
    assert found.found == "checkpoints are 6,444 files, 6,443 inodes are free"  # 42 x 132 + 25 x 36


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(doctor_machine.os, "fsync", full)
    (found,) = problems(examine(SMOKE, None, tmp_path), "writing")
    assert (found.level, found.found) == ("error", f"not possible: {os.strerror(errno.EDQUOT)}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_other_nodes_do_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine, "_file_system", lambda _: "xfs")
    assert [one.level for one in problems(examine(LARGE, H100, tmp_path), "writing")] == ["warning"]
    assert problems(examine(SMOKE, None, tmp_path), "writing") == []  # one node
    monkeypatch.setattr(doctor_machine, "_file_system", lambda _: "lustre")
    assert problems(examine(LARGE, H100, tmp_path), "writing") == []


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many = with_overrides(LARGE, ["stable.plan.nodes=128"])
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (1024, 1 << 20))
    found = problems(examine(many, H100, tmp_path), "open files")
    assert found[0].found == "this shell allows 1,024 a process; rank 0 of 1024 may need 3,072"
    assert [one.what for one in problems(examine(many, H100, tmp_path), "locked memory")] == ["locked memory"]
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [*problems(examine(many, H100, tmp_path), "open files"), *problems(examine(many, H100, tmp_path), "locked")] == []


def test_shared_memory_of_loader_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: Usage(0, 0, 1 << 20 if path == Path("/dev/shm") else 10**14))
    (found,) = problems(examine(LARGE, H100, tmp_path), "shared memory")
    assert "may hold 14.7 MB" in found.found  # 8 ranks x 2 workers x 4 micro-batches x 8,192 tokens x 28 bytes


def test_a_rank_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "octothinker:llama_8b", "--deep", "--rank", "517"]) == 2
    assert "stable has ranks 0 to 127 (16 nodes x 8)" in capsys.readouterr().err
    assert main(["doctor", "octothinker:llama_8b", "--rank", "5"]) == 2
    assert "add --deep" in capsys.readouterr().err
    assert main(["doctor", "octothinker:llama_8b", "--deep", "--stage", "corpus"]) == 2
    assert "--deep rehearses training stages" in capsys.readouterr().err


def test_a_rehearsal_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_deep, "REHEARSAL", "megatron_ext.launch.load")  # exits with 0 and answers nothing
    (found,) = doctor_deep.rehearsed(SMOKE, "stable", 0)
    assert (found.level, found.what) == ("error", "deep")
    assert "ended with exit code 0" in found.found


def test_what_a_rehearsal_says_becomes_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"what": "parameters", "built": 7, "planned": 8, "allowed": 0, "agrees": False}
    failed = {"what": "groups", "why": "AssertionError: 3", "where": ["megatron/core/a.py:1 f"]}
    empty: dict[str, Any] = {"compared": [], "errors": [], "checkpoints": {}}
    answer = {"ranks": [{**empty, "rank": 0, "compared": [row], "errors": [failed]}], "whole": empty, "peak_bytes": 1}
    monkeypatch.setattr(doctor_deep, "_ask", lambda *_: answer)
    died, differs, _ = doctor_deep.rehearsed(SMOKE, None, 0)
    assert (died.level, differs.level) == ("error", "error")
    assert died.found == "groups: AssertionError: 3\n  at megatron/core/a.py:1 f\nA job would stop here"
    assert differs.found == "parameters: built 7, but the plan's arithmetic says 8"


def test_text_merges_stages_and_puts_errors_last() -> None:
    text = findings_text([Finding("error", "a", "b", "c", "x"), Finding("ok", "d", "e", stage="y"), Finding("ok", "d", "e", stage="z")])
    assert text.splitlines() == ["ok       d of y, z: e", "error    a of x: b; way out: c", "1 ok, 0 warning, 1 error"]
