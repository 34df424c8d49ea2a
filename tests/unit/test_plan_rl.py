"""What a plan says of reinforcement learning, as rows and as text; what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_ext.config.rl import CapFrom, ProgressLengths, TruncationLengths
from megatron_ext.config.stages import RLStage
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.plan import plan_json, plan_text
from megatron_ext.launch.plan_rl import rl_rows
from megatron_ext.launch.plan_rl_words import rl_lines
from recipes import ablations, clusters, octothinker

PAPER = octothinker.llama_3b()
H100 = clusters.h100()


def rows_of(graph: Graph, cluster: Any = None) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in rl_rows(graph, cluster)}


def changed(**values: Any) -> Graph:
    """The paper's graph with a changed `rl_long`."""
    return dataclasses.replace(
        PAPER, stages=tuple(dataclasses.replace(stage, **values) if stage.name == "rl_long" else stage for stage in PAPER.stages)
    )


def lines_of(graph: Graph, cluster: Any = None) -> dict[str, str]:
    lines = rl_lines(rows_of(graph, cluster)["rl_long"])[1:]
    return {line[2:11].strip(): line[11:] for line in lines}


def test_the_papers_numbers():
    row = rows_of(PAPER, H100)["rl_long"]
    expected = {
        "steps": 200, "updates_per_step": 2, "updates": 400, "prompts_per_step": 128, "prompts_per_update": 64,
        "responses_per_prompt": 16, "responses_per_step": 2048, "prompts": 25_600, "responses": 409_600,
        "response_tokens_at_most": 1_593_835_520, "longest_tokens": 8592, "template": "complex", "reward": "correct",
        "learning_rate": 1e-6, "lineage_tokens": 230_686_720_000, "rollouts_bytes_at_most": 19_126_026_240,
        "start": {"kind": "weights", "stage": "decay_long", "tokens": 20_971_520_000, "step": 5000},
        "problems": {"name": "math8k", "path": "assets/math8k.jsonl", "left_out": 0},
        "validation": {"sets": ["math500", "gsm8k", "olympiad_bench", "amc23"], "every_steps": 4, "times": 51, "cap_tokens": None},
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert row["checkpoints"]["disk_bytes"] == 5 * 14 * 3_212_749_824
    assert (row["parallel"]["ranks"], row["parallel"]["data"], row["memory"]["fits"]) == (16, 16, True)


def test_a_control_starts_from_what_was_converted_and_one_from_reinforcement_learning():
    rows = rows_of(PAPER)
    assert rows["rl_base"]["start"] == {"kind": "weights", "stage": "llama", "tokens": None, "step": None}
    assert (rows["rl_base"]["lineage_tokens"], rows["rl_stable"]["lineage_tokens"]) == (0, 209_715_200_000)
    on = dataclasses.replace(PAPER.stage("rl_long"), name="rl_on", start=dataclasses.replace(PAPER.stage("rl_long").start, stage="rl_long"))
    row = rows_of(dataclasses.replace(PAPER, stages=(*PAPER.stages, on)))["rl_on"]
    assert row["start"] == {"kind": "weights", "stage": "rl_long", "tokens": None, "step": 200}
    assert row["lineage_tokens"] == 230_686_720_000


def test_gpu_hours_are_those_of_the_updates_and_an_upper_bound():
    compute = rows_of(PAPER, H100)["rl_base"]["compute"]
    flops = 409_600 * 4496 * PAPER.stage("llama").model.flops_per_token(4496)
    assert compute["update_flops_at_most"] == pytest.approx(flops, rel=1e-12)
    assert compute["update_gpu_hours_at_most"] == pytest.approx(flops / (989e12 * 0.4) / 3600, rel=1e-12)
    assert rows_of(PAPER)["rl_base"]["compute"]["update_gpu_hours_at_most"] is None
    assert "sampling is not in it" in lines_of(PAPER, H100)["compute"]


def test_the_lines_of_a_stage():
    lines = lines_of(PAPER, H100)
    assert lines == {
        "start": "weights of decay_long at step 5,000 (20.97B tokens), fresh optimizer; 230.69B tokens of training before it",
        "steps": "200 rollout steps x 2 updates = 400 updates; the paper's plots count updates, everything here counts rollout steps",
        "samples": "128 prompts x 16 responses a step, 64 prompts an update; 25,600 prompts and 409,600 responses in all",
        "caps": "2,048 tokens, 4,096 from step 100 (update 200), 8,192 from step 160 (update 320); "
        "with a prompt of 400, 8,592 tokens at most",
        "task": "math8k (assets/math8k.jsonl), template complex, reward correct, temperature 1",
        "held out": "math500, gsm8k, olympiad_bench, amc23; greedy at the cap in force, before the first step and every 4 steps: 51 times",
        "rate": "constant 1e-06",
        "ranks": "16 GPUs on 2 nodes, bf16: tensor 1 x pipeline 1 x data 16; micro-batches of 16,384 tokens; engine megatron, "
        "48 responses at a time on each copy; 32 grading workers",
        "memory": "72.4 GB a rank (weights 6.4 GB, gradients 12.9 GB, optimizer 2.4 GB, activations 4.5 GB, logits 3.7 GB, "
        "cached keys and values 50.7 GB in turn with the two before); fits in 85.5 GB with 10% to spare: yes",
        "compute": "updates: at most 3.89e+19 FLOPs, 27 GPU-hours, were every response as long as its cap; "
        "sampling is not in it: lengths and the engine decide",
        "disk": "5 checkpoints x 45.0 GB = 224.9 GB, at most 20 files each; "
        "recorded rollouts 19.1 GB at most, at 12 bytes a token, compressed",
    }


def test_words_of_what_the_paper_does_not_do():
    long: RLStage = PAPER.stage("rl_long")
    by_share = changed(lengths=TruncationLengths(caps_tokens=(1024, 2048), share=0.25, steps=3))
    expected = (
        "1,024, 2,048 tokens, the next one when more than 25% are cut off 3 steps in a row; with a prompt of 400, 2,448 tokens at most"
    )
    assert lines_of(by_share)["caps"] == expected
    caps = (CapFrom(after=0, cap_tokens=1024), CapFrom(after=5_000_000, cap_tokens=2048))
    assert "2,048 from 5.00M tokens" in lines_of(changed(lengths=ProgressLengths(unit="response_tokens", caps=caps)))["caps"]
    with_rise = lines_of(changed(warmup_steps=1, rollouts=dataclasses.replace(long.rollouts, resample_uninformative=2)))
    assert with_rise["rate"] == "constant 1e-06, after a linear rise over 1 rollout step"
    assert "a step, drawn up to 3 times, 64 prompts" in with_rise["samples"]
    assert lines_of(changed(validation=dataclasses.replace(long.validation, sets=())))["held out"].startswith("nothing")
    fixed = changed(validation=dataclasses.replace(long.validation, cap_tokens=4096))
    assert "greedy at 4,096 tokens" in lines_of(fixed)["held out"]
    vllm = with_overrides(PAPER, ["rl_long.plan.engine=vllm_process"])
    assert "vLLM its share of an unknown GPU" in lines_of(vllm)["memory"]
    assert "vLLM 42.8 GB" in lines_of(vllm, H100)["memory"]
    assert "engine vllm_process, 48 responses at a time" in lines_of(vllm)["ranks"]
    beside = with_overrides(PAPER, ["rl_long.plan.validation_engine=vllm_process", "rl_long.plan.engine_memory_share=0.1"])
    assert "in turn with the two before, vLLM 8.6 GB)" in lines_of(beside, H100)["memory"]
    assert "; validated by a vLLM of its own beside the next step; 32 grading" in lines_of(beside)["ranks"]
    turns = with_overrides(PAPER, ["rl_long.plan.pipeline=4"])
    assert "at a time on each copy, its 4 pipeline stages by turns for every token; 32 grading" in lines_of(turns)["ranks"]
    assert "reference 6.4 GB" in lines_of(changed(objective=dataclasses.replace(long.objective, kl_coefficient=0.1)))["memory"]


def test_a_stage_that_does_not_fit_says_so():
    graph = with_overrides(PAPER, ["rl_long.plan.engine_slots=128"])
    assert rows_of(graph, H100)["rl_long"]["memory"]["fits"] is False
    assert plan_text(graph, H100).count("to spare: NO") == 1


def test_json_has_the_rows():
    values = json.loads(plan_json(PAPER, H100))
    assert values["rl"] == json.loads(json.dumps(rl_rows(PAPER, H100)))
    assert [row["stage"] for row in values["stages"]] == ["stable", "decay_long", "decay_short", "decay_hybrid"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_long.rollouts.max_prompt_tokens=130000", "a prompt of 130,000 tokens and a response of 8,192 are 138,192.*131,072 positions"),
        ("rl_long.plan.tokens_per_micro_batch=8192", "8,192 is less than the longest prompt and response, 8,592 tokens"),
        ("rl_long.rollouts.prompts_per_update=60", "128 prompts a step are no multiple of 60 prompts an update"),
        ("rl_long.plan.engine=vllm", "beside a single rank, but nodes 2 x ranks_per_node 8 = 16 ranks; use engine=vllm_process"),
        ("rl_long.plan.context=2", "context 2 in reinforcement learning"),
        ("rl_long.start.tokens=1000", "1,000 tokens is no step of this stage"),
    ],
)
def test_what_is_refused_when_the_recipe_is_read(override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(PAPER, [override])


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"stage rl_long: plan.ranks_per_node 16 exceeds the 8 GPUs of a node of h100"):
        rl_rows(with_overrides(PAPER, ["rl_long.plan.ranks_per_node=16"]), H100)


def test_a_point_that_reinforcement_learning_starts_from_is_pinned():
    off = 31_000 * 4_194_304
    start = dataclasses.replace(PAPER.stage("rl_stable").start, tokens=off)
    stages = tuple(dataclasses.replace(stage, start=start) if stage.name == "rl_stable" else stage for stage in PAPER.stages)
    graph = dataclasses.replace(PAPER, stages=stages)
    with pytest.raises(ConfigError, match=r"stage rl_stable: starts from 'stable' at step 31,000 .*may be removed"):
        rl_rows(graph)
    assert rows_of(with_overrides(graph, []))["rl_stable"]["start"]["step"] == 31_000
    assert with_overrides(graph, []).stage("stable").plan.pin_tokens == (off,)


@pytest.mark.parametrize("recipe", [getattr(ablations, name) for name in ("template", "lengths", "token_budget", "decay_qa")])
def test_the_ablations_can_be_planned(recipe):
    graph = recipe()
    assert len(rl_rows(graph, H100)) == len([stage for stage in graph.stages if isinstance(stage, RLStage)])
    assert plan_text(graph, H100)
