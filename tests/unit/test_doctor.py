"""`doctor` without --deep: each thing that can be known to fail is found, all of them at once, without torch."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.__main__ import main
from megatron_ext.config.memory import memory, save_host_bytes
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import Source
from megatron_ext.launch import doctor_deep, doctor_machine
from megatron_ext.launch.doctor import examine
from megatron_ext.launch.findings import Finding, findings_text
from megatron_ext.launch.graph import Graph, with_overrides
from recipes import clusters, demo, models, octothinker
from tests.small_graphs import training_alone

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


def test_what_is_done_needs_nothing(tmp_path: Path) -> None:
    graph = changed(SMOKE, "corpus", text=None)
    assert [one.level for one in problems(examine(graph, None, tmp_path), "text of corpus")] == ["error"]
    (tmp_path / "smoke" / "corpus").mkdir(parents=True)
    (tmp_path / "smoke" / "corpus" / "DONE").touch()
    assert problems(examine(graph, None, tmp_path), "text of corpus") == []


def test_a_runs_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for runs, why in ((tmp_path / "file", f"{tmp_path}/file is a file, not a folder"), (Path("/proc/x"), "")):
        (found,) = problems(examine(SMOKE, None, runs), "writing")
        assert (found.level, why in found.found) == ("error", True)
        assert "name another --runs" in found.way_out


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
