"""The paper's reinforcement learning, its numbers written here a second time as literals, and the arms that derive from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_ext.config.stages import Branch, RLStage, Weights
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan_rl import rl_rows
from recipes import ablations, clusters, octothinker

SIZES = [octothinker.llama_1b, octothinker.llama_3b, octothinker.llama_8b]
GROWING = [(0, 2048), (100, 4096), (160, 8192)]  # rollout steps; 200 and 320 of the paper's updates
FIXED, FIXED_8K = [(0, 4096)], [(0, 8192)]


def learnt(graph: Graph) -> dict[str, RLStage]:
    return {stage.name: stage for stage in graph.stages if isinstance(stage, RLStage)}


def differing(one: Any, other: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)}


def caps(stage: RLStage) -> list[tuple[int, int]]:
    assert stage.lengths.kind == "progress"
    assert stage.lengths.unit == "rollout_steps"
    return [(row.after, row.cap_tokens) for row in stage.lengths.caps]


@pytest.mark.parametrize("recipe", SIZES)
def test_the_papers_numbers(recipe):
    graph = recipe()
    for stage in learnt(graph).values():
        rollouts, objective = stage.rollouts, stage.objective
        assert (rollouts.prompts_per_step, rollouts.responses_per_prompt, rollouts.prompts_per_update) == (128, 16, 64)
        assert (stage.steps, rollouts.updates_per_step, rollouts.responses_per_step) == (200, 2, 2048)
        assert (rollouts.sampling.temperature, rollouts.max_prompt_tokens, rollouts.max_staleness) == (1.0, 400, 0)
        assert (stage.learning_rate, stage.warmup_steps, stage.reward, stage.seed) == (1e-6, 0, "correct", 1)
        assert (objective.kl_coefficient, objective.clip_low, objective.clip_high, objective.mean_over) == (0.0, 0.2, 0.2, "tokens")
        assert (stage.optimizer.beta1, stage.optimizer.beta2, stage.optimizer.weight_decay) == (0.9, 0.999, 0.01)
        assert stage.model == graph.stage(stage.start.stage).model
        assert (stage.plan.save_every_steps, stage.plan.validate_every_steps, stage.plan.engine) == (40, 4, "megatron")
        assert stage.problems.path == "assets/math8k.jsonl"
        assert [one.name for one in stage.validation.sets] == ["math500", "gsm8k", "olympiad_bench", "amc23"]
        assert {one.name: one.leave_out for one in stage.validation.sets}["olympiad_bench"] == ("1965", "2045")
        assert (stage.validation.cap_tokens, stage.validation.max_prompt_tokens) == (None, 1024)


@pytest.mark.parametrize("recipe", SIZES)
def test_where_each_starts_and_how_long_it_may_answer(recipe):
    found = {name: (stage.start, stage.template, caps(stage)) for name, stage in learnt(recipe()).items()}
    assert found == {
        "rl_base": (Weights(stage="llama"), "simple", FIXED),
        "rl_stable": (Weights(stage="stable"), "simple", FIXED),
        "rl_long": (Weights(stage="decay_long"), "complex", GROWING),
        "rl_short": (Weights(stage="decay_short"), "simple", FIXED),
        "rl_hybrid": (Weights(stage="decay_hybrid"), "complex", FIXED),
    }


@pytest.mark.parametrize("recipe", SIZES)
def test_the_runs_differ_in_name_start_template_and_lengths_alone(recipe):
    stages = list(learnt(recipe()).values())
    for one in stages:
        for other in stages:
            assert differing(one, other) <= {"name", "start", "template", "lengths"}
    assert differing(stages[0], dataclasses.replace(stages[1], seed=7)) == {"name", "start", "seed"}  # the check does see more


@pytest.mark.parametrize("recipe", [*SIZES, octothinker.llama_3b_fp8, octothinker.llama_3b_released_rl, octothinker.rl_qwen_3b])
def test_the_plans_fit_an_h100(recipe):
    rows = rl_rows(recipe(), clusters.h100())
    assert rows
    for row in rows:
        assert row["memory"]["fits"], row["stage"]
        assert row["parallel"]["nodes"] <= 4


@pytest.mark.parametrize("recipe", SIZES)
def test_the_plans_fit_an_h100_with_vllm_too(recipe):
    stages = [
        dataclasses.replace(stage, plan=dataclasses.replace(stage.plan, engine="vllm_process")) for stage in learnt(recipe()).values()
    ]
    graph = recipe()
    by_name = {stage.name: stage for stage in stages}
    graph = dataclasses.replace(graph, stages=tuple(by_name.get(stage.name, stage) for stage in graph.stages))
    assert all(row["memory"]["fits"] for row in rl_rows(graph, clusters.h100()))


def test_fp8_is_the_mid_trainings_alone():
    assert {stage.precision for stage in learnt(octothinker.llama_3b_fp8()).values()} == {"bf16"}


def test_the_released_scripts_share_the_branches_and_differ_in_batch():
    paper, released = octothinker.llama_3b(), octothinker.llama_3b_released_rl()
    assert released.name == paper.name
    assert list(learnt(released)) == ["rl_long_released", "rl_hybrid_released"]
    for name, stage in learnt(released).items():
        theirs = paper.stage(name.removesuffix("_released"))
        assert differing(stage, theirs) == {"name", "rollouts"}
        assert differing(stage.rollouts, theirs.rollouts) == {"prompts_per_step", "prompts_per_update"}
        assert (stage.rollouts.prompts_per_step, stage.rollouts.prompts_per_update, stage.rollouts.updates_per_step) == (256, 16, 16)
    assert released.stages[:6] == paper.stages[:6]


def test_rl_straight_from_llama_is_the_control_and_from_qwen_the_same():
    llama, qwen = octothinker.rl_llama_3b(), octothinker.rl_qwen_3b()
    assert [(stage.name, stage.kind) for stage in llama.stages] == [("llama", "convert"), ("rl_base", "rl"), ("report_rl_base", "report")]
    assert llama.name == octothinker.llama_3b().name
    assert llama.stage("rl_base") == octothinker.llama_3b().stage("rl_base")
    assert differing(llama.stage("rl_base"), qwen.stage("rl_base")) == {"start", "model"}
    source = qwen.stage("qwen")
    assert (source.model_id, source.model.name) == ("Qwen/Qwen2.5-3B", "qwen2_5_3b")
    assert source.revision == "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b"
    assert octothinker.llama_3b().name != qwen.name


def test_the_template_arms_differ_in_the_template():
    simple, complex_ = learnt(ablations.template()).values()
    assert differing(simple, complex_) == {"name", "template"}
    assert (simple.template, complex_.template) == ("simple", "complex")
    assert caps(simple) == caps(complex_) == FIXED_8K
    assert simple.start == complex_.start == Weights(stage="long_cot_instruction")


def test_the_length_arms_differ_in_the_lengths():
    fixed, growing = learnt(ablations.lengths()).values()
    assert differing(fixed, growing) == {"name", "lengths"}
    assert (caps(fixed), caps(growing)) == (FIXED_8K, GROWING)
    assert fixed.template == growing.template == "complex"
    assert fixed == ablations.template().stage(fixed.name)  # one run for both experiments


def test_every_arm_learns_and_long_chains_may_take_8192_tokens():
    for recipe in (ablations.web_quality, ablations.qa_format, ablations.instruction):
        graph = recipe()
        arms = [stage.name for stage in graph.stages if stage.kind == "train"]
        assert list(learnt(graph)) == [f"rl_{name}" for name in arms]
        for name, stage in zip(arms, learnt(graph).values(), strict=True):
            assert stage.start == Weights(stage=name)
            assert (stage.template, caps(stage)) == ("simple", FIXED_8K if name.startswith("long_cot") else FIXED)
        assert graph.stages[-1].stages == (*arms, *learnt(graph))


def test_the_token_budget_learns_from_three_points_of_one_run():
    rows = rl_rows(ablations.token_budget(), clusters.h100())
    assert [(row["stage"], row["start"]["step"], row["start"]["tokens"]) for row in rows] == [
        ("rl_web_pro_max_20b", 4_768, 19_998_441_472),
        ("rl_web_pro_max_70b", 16_689, 69_998_739_456),
        ("rl_web_pro_max_100b", 23_842, 100_000_595_968),
    ]


def test_the_pilots_with_openr1_take_the_complex_template():
    graph = ablations.decay_qa()
    found = learnt(graph)
    assert len(found) == 15
    for name, stage in found.items():
        pilot = graph.stage(stage.start.stage)
        assert isinstance(pilot.start, Branch)
        with_long_chains = "openr1" in name
        assert (stage.template, caps(stage)) == (("complex", FIXED_8K) if with_long_chains else ("simple", FIXED))
