"""Steps of GRPO whose responses vLLM samples, in process and beside: weights arrive after each update, and the scores agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.metrics import read_metrics
from megatron_ext.rl.record import read_record
from tests import ranks, rl_runs
from tests.rl_runs import CPU, rl_run, stage, trace


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return rl_runs.parent(tmp_path_factory.mktemp("vllm"))


def assert_sampled_with_new_weights(run: Any, weight_versions: list[int]) -> None:
    """Of finished steps, and of step 2, whose rollouts are recorded whether or not it came to its end."""
    records = read_metrics(run.metrics_path, "rl")
    assert [one["weight_version"] for one in records] == weight_versions
    for one in records:
        assert one["canary_gap"] < 1e-4
        assert one["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4), "of sampled tokens, at temperature 1"
    assert records[0]["grad_norm"] > 0
    batch = read_record(run.path, 2)
    assert {int(version) for one in batch.rollouts for version in one.generation.weight_versions} == {2}


def test_two_steps_end_to_end_with_an_engine_beside_two_ranks(start):
    run = rl_run(start, stage(start.path.parent, steps=2, plan=replace(CPU, engine="vllm_process", ranks_per_node=2, tensor=2)))
    seen = trace(run)
    assert_sampled_with_new_weights(run, [0, 2])
    assert len(seen["scores"]) == 2


THIRD = "the third hand-over brings what the second brought"


def _stays_behind(begun: Any) -> None:
    from megatron_ext.model.bucket import Bucket

    engine, kept = begun.actor.engine, []
    update, versions = engine.update_weights, []

    def late(version: int, tensors: Any) -> None:
        versions.append(version)
        if len(versions) < 3:
            kept[:] = [Bucket(tuple((name, tensor.clone()) for name, tensor in bucket.tensors)) for bucket in tensors]
        else:
            list(tensors)
        update(version, iter(kept))

    engine.update_weights = late


def _learn_with_the_fault(groups: Any, path: str) -> None:
    rl_runs.ENGINE_FAULTS[THIRD] = _stays_behind
    rl_runs._learn(groups, path=path, kill_after=None, fault=THIRD)


def test_weights_of_the_step_before_stop_the_run_at_the_hand_over_however_small_the_rate(start):
    """At the paper's rate, whose updates no log-probability shows; until then every step sampled with the weights before it."""
    run = rl_run(start, stage(start.path.parent, steps=2, learning_rate=1e-6, plan=replace(CPU, engine="vllm")), "late")
    with pytest.raises(AssertionError, match=r"weights version 4 is not what the engine samples with: model\.embed_tokens\.weight, "):
        ranks.run(_learn_with_the_fault, run.stage.plan, str(run.path))
    assert_sampled_with_new_weights(run, [0])


def test_an_engine_of_its_own_validates_beside_the_next_step(start):
    made = stage(start.path.parent, steps=2, plan=replace(CPU, validate_every_steps=1))
    straight = trace(rl_run(start, made, "same engine"))
    beside = trace(rl_run(start, replace(made, plan=replace(made.plan, validation_engine="vllm_process")), "engine of its own"))
    assert beside["digests"] == straight["digests"]
    assert [(step, cap) for step, _, cap in beside["scores"]] == [(step, cap) for step, _, cap in straight["scores"]]
    differences = [abs(one[1] - other[1]) for one, other in zip(beside["scores"], straight["scores"], strict=True)]
    assert max(differences) <= 1, "greedy answers differ only where two logits are within rounding"
