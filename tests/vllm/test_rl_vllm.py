"""Steps of GRPO whose responses vLLM samples, in process and beside: weights arrive after each update, and the scores agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.metrics import read_metrics
from megatron_ext.rl.record import read_record
from tests import rl_runs
from tests.rl_runs import CPU, rl_run, stage, trace


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("plan", [replace(CPU, engine="vllm"), replace(CPU, engine="vllm_process", ranks_per_node=2, tensor=2)])
def test_two_steps_end_to_end(start, plan):
    made = stage(start.path.parent, steps=2, plan=plan)
    run = rl_run(start, made, f"by {plan.engine}")
    seen = trace(run)
    records = read_metrics(run.metrics_path, "rl")
    assert [one["weight_version"] for one in records] == [0, 2]
    for one in records:
        assert one["canary_gap"] < 1e-4
        assert one["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4), "of sampled tokens, at temperature 1"
    assert records[0]["grad_norm"] > 0
    batch = read_record(run.path, 2)
    assert {int(version) for one in batch.rollouts for version in one.generation.weight_versions} == {2}
    assert len(seen["scores"]) == 2


def test_an_engine_of_its_own_validates_beside_the_next_step(start):
    made = stage(start.path.parent, plan=replace(CPU, validate_every_steps=1))
    straight = trace(rl_run(start, made, "same engine"))
    beside = trace(rl_run(start, replace(made, plan=replace(made.plan, validation_engine="vllm_process")), "engine of its own"))
    assert beside["digests"] == straight["digests"]
    assert [(step, cap) for step, _, cap in beside["scores"]] == [(step, cap) for step, _, cap in straight["scores"]]
    differences = [abs(one[1] - other[1]) for one, other in zip(beside["scores"], straight["scores"], strict=True)]
    assert max(differences) <= 1, "greedy answers differ only where two logits are within rounding"


def test_weights_that_did_not_arrive_stop_the_run_at_the_hand_over(start):
    run = rl_run(start, stage(start.path.parent, steps=2, plan=replace(CPU, engine="vllm")), "stale")
    with pytest.raises(AssertionError, match="is not what the engine samples with"):
        trace(run, fault="weights stay behind")
