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


def test_weights_that_did_not_arrive_stop_the_run_at_the_hand_over(start):
    run = rl_run(start, stage(start.path.parent, steps=2, plan=replace(CPU, engine="vllm")), "stale")
    with pytest.raises(AssertionError, match="is not what the engine samples with"):
        trace(run, fault="weights stay behind")
