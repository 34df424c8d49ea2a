"""`doctor` on reinforcement learning: memory, graders, engine, groups, and the files of problems."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.cluster import Cluster
from megatron_ext.config.rl import CapFrom, ProgressLengths, TruncationLengths
from megatron_ext.config.rl_memory import rl_memory
from megatron_ext.config.stages import RLStage
from megatron_ext.config.tasks import ProblemSet, Validation
from megatron_ext.launch import doctor_problems, doctor_rl
from megatron_ext.launch.doctor_problems import problem_findings
from megatron_ext.launch.findings import Finding
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.plan import plan_text
from recipes import clusters, octothinker
from tests.benchmark_files import BENCHMARKS
from tools.asset_table import ASSETS

H100 = clusters.h100()
ONE = octothinker.rl_llama_3b()  # convert, one stage of reinforcement learning, report


def rl_findings(graph: Graph, cluster: Cluster | None) -> list[Finding]:
    return doctor_rl.rl_findings(graph, graph.stages, cluster)


def changed(**values: Any) -> Graph:
    stages = tuple(replace(stage, **values) if isinstance(stage, RLStage) else stage for stage in ONE.stages)
    return replace(ONE, stages=stages)


def planned(**plan: Any) -> Graph:
    return changed(plan=replace(ONE.stage("rl_base").plan, **plan))


def of(found: list[Finding], what: str) -> list[Finding]:
    return [one for one in found if one.what.startswith(what)]


def test_what_does_not_fit_names_a_change_that_does() -> None:
    for graph, way_out in (
        (planned(engine_slots=256), "rl_base.plan.engine_slots=64"),
        (planned(recompute="none", tokens_per_micro_batch=32_768), "rl_base.plan.recompute=full"),
        (planned(recompute="none", engine="vllm_process"), "rl_base.plan.recompute=full"),
    ):
        (found,) = of(rl_findings(graph, H100), "memory")
        assert (found.level, found.way_out) == ("error", way_out)
        assert "10% should stay free" in found.found
        fitting = with_overrides(graph, [way_out]).stage("rl_base")
        assert rl_memory(fitting, H100.gpu_memory_bytes).fits(H100.gpu_memory_bytes)
    huge = planned(tokens_per_micro_batch=10_000_000)
    assert "more nodes" in of(rl_findings(huge, replace(H100, gpu_memory_bytes=10**9)), "memory")[0].way_out


def test_without_a_cluster_memory_is_not_compared() -> None:
    (found,) = of(rl_findings(ONE, None), "memory")
    assert (found.level, found.way_out) == ("warning", "add --cluster NAME")
    assert of(rl_findings(ONE, None), "graders") == []  # whose machine is unknown


def test_graders_against_a_node() -> None:
    assert [one.level for one in of(rl_findings(ONE, H100), "graders")] == ["ok"]
    (found,) = of(rl_findings(planned(grading_workers=100, grading_memory_bytes=11 * 10**9), H100), "graders")
    assert (found.level, found.found) == ("warning", "100 grading workers may take 1.1 TB of a machine's 2.0 TB, more than 50%")
    (cores,) = of(rl_findings(planned(grading_workers=105), H100), "cores")
    assert "8 ranks x 1 threads and 105 grading workers exceed 112 cores" in cores.found


def test_graders_of_a_cpu_stage_against_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"total": 8 * 10**9})
    monkeypatch.setattr(doctor_rl.psutil, "virtual_memory", memory)
    monkeypatch.setattr(doctor_rl.os, "cpu_count", lambda: 2)
    plan = replace(ONE.stage("rl_base").plan, device="cpu", nodes=1, ranks_per_node=2, recompute="none", grading_workers=2)
    graph = changed(precision="fp32", plan=plan)
    assert [one.level for one in (*of(rl_findings(graph, None), "graders"), *of(rl_findings(graph, None), "cores"))] == ["warning"]
    smaller = changed(precision="fp32", plan=replace(plan, grading_memory_bytes=10**9))
    assert [one.level for one in of(rl_findings(smaller, H100), "graders")] == ["ok"]  # the cluster's nodes are not asked


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor_rl, "find_spec", lambda name: asked.append(name))
    (found,) = of(rl_findings(planned(engine="vllm_process"), H100), "engine")
    assert (found.level, asked) == ("error", ["vllm"])
    assert "rl_base.plan.engine=megatron" in found.way_out
    (second,) = of(rl_findings(planned(validation_engine="vllm_process"), H100), "engine")
    assert (second.level, second.way_out) == ("error", "install vLLM where stages run, or rl_base.plan.validation_engine=same")
    assert "validation_engine=vllm_process asks for vLLM, which is not installed" in second.found
    monkeypatch.setattr(doctor_rl, "find_spec", lambda name: name)
    for plan in ({"engine": "vllm_process"}, {"validation_engine": "vllm_process"}):
        assert of(rl_findings(planned(**plan), H100), "engine")[0].level == "ok"


def test_a_second_vllm_that_does_not_fit_is_named() -> None:
    graph = planned(validation_engine="vllm_process", engine_slots=8, engine_memory_share=0.7)
    (found,) = of(rl_findings(graph, H100), "memory")
    assert (found.level, found.way_out) == ("error", "rl_base.plan.validation_engine=same")


def test_generation_by_turns_of_pipeline_stages_is_warned_of() -> None:
    (found,) = of(rl_findings(planned(pipeline=2), H100), "engine")
    assert (found.level, found.stage) == ("warning", "rl_base")
    assert "takes turns stage by stage: 1/2 of what its GPUs could sample" in found.found
    assert of(rl_findings(ONE, H100), "engine") == []


def test_a_group_of_one_and_another_bos_are_warned_of() -> None:
    rollouts = replace(ONE.stage("rl_base").rollouts, responses_per_prompt=1)
    (found,) = of(rl_findings(changed(rollouts=rollouts), H100), "groups")
    assert found.level == "warning"
    paper = octothinker.llama_3b()
    other = replace(paper, stages=tuple(replace(one, bos=True) if one.name == "rl_long" else one for one in paper.stages))
    (prompts,) = of(rl_findings(other, H100), "prompts")
    assert (prompts.stage, prompts.way_out) == ("rl_long", "rl_long.bos=false")
    assert of(rl_findings(paper, H100), "prompts") == []


@pytest.mark.parametrize(
    ("lengths", "late"),
    [
        (ProgressLengths(caps=(CapFrom(after=0, cap_tokens=16), CapFrom(after=199, cap_tokens=32))), ""),
        (ProgressLengths(caps=(CapFrom(after=0, cap_tokens=16), CapFrom(after=200, cap_tokens=32))), "32"),
        (TruncationLengths(caps_tokens=(16, 32, 64), share=0.5, steps=100), "64"),
        (TruncationLengths(caps_tokens=(16, 32, 64), share=0.5, steps=99), ""),
        (ProgressLengths(unit="response_tokens", caps=(CapFrom(after=0, cap_tokens=16), CapFrom(after=10**9, cap_tokens=32))), "32"),
        (ProgressLengths(unit="response_tokens", caps=(CapFrom(after=0, cap_tokens=16), CapFrom(after=10**6, cap_tokens=32))), ""),
    ],
)
def test_a_cap_that_no_step_can_come_to_is_warned_of(lengths: Any, late: str) -> None:
    found = of(rl_findings(changed(steps=200, lengths=lengths), H100), "caps")
    assert [one.level for one in found] == (["warning"] if late else [])
    assert [one.found for one in found] == ([f"no step is sampled under {late} tokens, for step 200 is the last"] if late else [])
    plan = plan_text(changed(steps=200, lengths=lengths))
    assert (f"WARNING: no step is sampled under {late} tokens" in plan) == bool(late)


# --- files of problems ---------------------------------------------------------------------------------


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(number: int, **values: Any) -> dict[str, Any]:
    return {"id": str(number), "question": f"What is {number} + 1?", "answer": str(number + 1), **values}


def stage_with(train: str, *held_out: str, **values: Any) -> RLStage:
    """The stage with arithmetic problems in these files."""
    sets = [ProblemSet(name=Path(path).stem, path=path, form="arithmetic") for path in (train, *held_out)]
    stage: RLStage = replace(ONE.stage("rl_base"), problems=sets[0], validation=Validation(sets=tuple(sets[1:])), **values)
    return stage


def test_whole_files_are_counted_once_for_all_stages(tmp_path: Path) -> None:
    train, held = written(tmp_path / "train.jsonl", row(1), row(2)), written(tmp_path / "held.jsonl", row(3))
    stage = stage_with(train, held)
    found = problem_findings([stage, replace(stage, name="rl_other")])
    assert [(one.level, one.what, one.found) for one in found] == [
        ("ok", "problems train", f"2 in {train}"),
        ("ok", "problems held", f"1 in {held}"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, answer=None)], "train.jsonl:1: no key 'answer'"),
        ([row(1), row(2, id="1")], "1 ids stand more than once: '1' on lines 1, 2"),
        ([row(1, answer="\\frac{1}{")], "train.jsonl: 1 answers that"),
        ([], "no problem in it"),
    ],
)
def test_what_is_wrong_with_a_file_is_what_the_stage_would_say(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    found = problem_findings([stage_with(written(tmp_path / "train.jsonl", *rows), written(tmp_path / "held.jsonl", row(3)))])
    assert [one.level for one in found] == ["error", "ok"]
    assert message in found[0].found


def test_a_file_that_is_not_there_and_one_that_is_yet_to_be_written(tmp_path: Path) -> None:
    held = written(tmp_path / "held.jsonl", row(3))
    missing, fine = problem_findings([stage_with(str(tmp_path / "gone.jsonl"), held)])
    assert (missing.level, missing.found) == ("error", f"1 of 2 files are not there: gone: {tmp_path}/gone.jsonl")
    assert missing.way_out == "correct their paths"
    assert fine.level == "ok"
    (later,) = problem_findings([stage_with("train.jsonl", "held.jsonl", text="text")])
    assert (later.level, later.found) == ("ok", "written by stage text")


def test_what_can_be_fetched_is_named_in_the_command_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (missing,) = problem_findings([stage_with("own.jsonl", "assets/math500.jsonl", "/data/gsm8k_test.jsonl", "assets/amc23.jsonl")])
    fetch = "python -m tools.fetch_assets"
    ways = (f"(now {tmp_path})", f"or fetch with `{fetch} math500 amc23`", f"or fetch with `{fetch} gsm8k --into /data`")
    assert all(way in missing.way_out for way in ways)


def test_the_files_that_can_be_fetched_are_those_of_the_tool() -> None:
    assert {asset.target: asset.name for asset in ASSETS.values() if asset.form} == doctor_problems.FETCHED


def test_held_out_problems_that_are_trained_on(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", *(row(number) for number in range(5)))
    held = written(tmp_path / "held.jsonl", row(3, id="a", question="What  is 3 +\n1?"), row(7))
    found = problem_findings([stage_with(train, held)])
    (shared,) = [one for one in found if one.level == "warning"]
    assert (shared.what, shared.found) == ("problems held", "1 of its questions stand in train too, which is trained on")


def test_a_reader_that_dies_is_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_problems, "READER", "megatron_ext.no_such_module")
    (found,) = problem_findings([stage_with(written(tmp_path / "train.jsonl", row(1)))])
    assert found.level == "error"
    assert "exit code 1" in found.found
    assert "No module named megatron_ext.no_such_module" in found.found


@pytest.mark.shared
def test_the_benchmarks_are_read() -> None:
    sets = {one.name: replace(one, path=str(BENCHMARKS / f"{one.name}.jsonl")) for one in ONE.stage("rl_base").validation.sets}
    known = tuple(one for name, one in sets.items() if name != "amc23")
    found = problem_findings([replace(ONE.stage("rl_base"), problems=sets["math500"], validation=Validation(sets=known))])
    assert {one.what: one.found.split(" in ")[0] for one in found if one.level == "ok"} == {
        "problems math500": "500", "problems gsm8k": "1,319", "problems olympiad_bench": "673",
    }  # fmt: skip
    (shared,) = [one for one in found if one.level == "warning"]
    assert shared.found.startswith("500 of its questions stand in math500 too")
