"""Memory, tokens, FLOPs and disk of reinforcement learning against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_ext.config.memory import memory
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import CapFrom, Objective, ProgressLengths, TruncationLengths
from megatron_ext.config.rl_memory import (
    cache_bytes,
    caps_by_step,
    kept_rl_checkpoints,
    response_tokens_at_most,
    rl_checkpoints_bytes,
    rl_memory,
    rollouts_bytes_at_most,
    update_flops_at_most,
)
from megatron_ext.config.stages import RLStage
from megatron_ext.errors import ConfigError
from recipes import octothinker

LONG: RLStage = octothinker.llama_3b().stage("rl_long")
PARAMETERS = 3_212_749_824


def planned(stage: RLStage = LONG, **changes: Any) -> RLStage:
    return dataclasses.replace(stage, plan=dataclasses.replace(stage.plan, **changes))


def test_llama_3b_on_16_gpus():
    parts = rl_memory(LONG, None)
    assert parts.weights_bytes == 2 * PARAMETERS
    assert parts.gradients_bytes == 4 * PARAMETERS
    assert parts.optimizer_bytes == 12 * PARAMETERS // 16
    layer = 2 * (201_326_592 + 134_217_728 + 786_432 + 402_653_184)  # of 16,384 tokens: twice the 8,192 of mid-training
    assert parts.activations_bytes == 28 * 100_663_296 + layer + 2 * 100_663_296
    assert parts.logits_bytes == 10 * 1024 * 128_256 + 6 * 128_256 * 3072  # a chunk, and the gradient of the output matrix
    assert parts.cache_bytes == 2 * 28 * 8 * 128 * 2 * 48 * 9216
    assert (parts.reference_bytes, parts.vllm_bytes) == (0, 0)
    stays = parts.weights_bytes + parts.gradients_bytes + parts.optimizer_bytes
    assert parts.total_bytes == stays + parts.cache_bytes  # in turn with activations and logits, which are less


def test_the_cache_takes_turns_with_an_update():
    few = rl_memory(planned(engine_slots=1), None)
    assert few.cache_bytes < few.activations_bytes + few.logits_bytes
    assert few.total_bytes == few.weights_bytes + few.gradients_bytes + few.optimizer_bytes + few.activations_bytes + few.logits_bytes


def test_the_cache_is_divided_by_tensor_and_pipeline_and_holds_the_longer_validation():
    whole = 2 * 28 * 8 * 128 * 2 * 48
    assert cache_bytes(LONG) == whole * (1024 + 8192)
    assert cache_bytes(planned(tensor=2, pipeline=2)) == whole * 9216 // 4
    alone = dataclasses.replace(LONG, validation=dataclasses.replace(LONG.validation, sets=()))
    assert cache_bytes(alone) == whole * (400 + 8192)
    held_out = dataclasses.replace(LONG, validation=dataclasses.replace(LONG.validation, cap_tokens=16_384))
    assert cache_bytes(held_out) == whole * (1024 + 16_384)


def test_vllm_keeps_its_share_beside_the_update():
    stage = planned(engine="vllm_process", engine_memory_share=0.25)
    here, unknown = rl_memory(stage, 80 * 10**9), rl_memory(stage, None)
    assert (here.vllm_bytes, here.cache_bytes, unknown.vllm_bytes) == (20 * 10**9, 0, None)
    assert here.total_bytes - unknown.total_bytes == 20 * 10**9
    assert here.fits(80 * 10**9)
    assert not rl_memory(planned(stage, engine_memory_share=0.75), 80 * 10**9).fits(80 * 10**9)


def test_a_vllm_that_validates_takes_a_share_of_its_own():
    share = {"engine_memory_share": 0.25}
    beside = rl_memory(planned(validation_engine="vllm_process", **share), 80 * 10**9)
    assert (beside.vllm_bytes, beside.cache_bytes) == (20 * 10**9, rl_memory(LONG, None).cache_bytes)
    assert beside.total_bytes == rl_memory(LONG, None).total_bytes + 20 * 10**9
    assert rl_memory(planned(engine="vllm_process", validation_engine="vllm_process", **share), 80 * 10**9).vllm_bytes == 40 * 10**9
    with pytest.raises(ConfigError, match=r"engine_memory_share 0\.5 of a GPU each.*validation_engine=same"):
        planned(engine="vllm_process", validation_engine="vllm_process")


def test_a_penalty_against_a_reference_holds_its_weights():
    with_penalty = dataclasses.replace(LONG, objective=Objective(kl_coefficient=0.001))
    assert rl_memory(with_penalty, None).total_bytes - rl_memory(LONG, None).total_bytes == 2 * PARAMETERS


def test_all_but_logits_and_cache_are_those_of_a_training_step():
    """The last stage of four, whose micro-batches fill the pipeline, interleaved or not."""
    for changes in ({"pipeline": 4}, {"pipeline": 4, "virtual_pipeline": 7}, {"tensor": 2, "sequence_parallel": True}):
        stage = planned(**changes, engine_slots=1)
        plan = TrainPlan(nodes=2, ranks_per_node=8, recompute="full", **changes)
        budget = dataclasses.replace(octothinker.BATCH, sequences_per_batch=64 * plan.data_parallel, sequence_length=16_384)
        theirs, ours = memory(stage.model, budget, "bf16", plan), rl_memory(stage, None)
        for key in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes"):
            assert getattr(ours, key) == getattr(theirs, key), (changes, key)


def test_the_caps_that_a_run_comes_to():
    assert caps_by_step(LONG) == [(100, 2048), (60, 4096), (40, 8192)]
    assert caps_by_step(dataclasses.replace(LONG, steps=120)) == [(100, 2048), (20, 4096)]
    assert caps_by_step(dataclasses.replace(LONG, steps=50)) == [(50, 2048)]
    caps = (CapFrom(after=0, cap_tokens=10), CapFrom(after=1000, cap_tokens=20))
    by_tokens = dataclasses.replace(LONG, lengths=ProgressLengths(unit="response_tokens", caps=caps))
    assert caps_by_step(by_tokens) == [(200, 20)]  # when is not known before
    by_share = dataclasses.replace(LONG, lengths=TruncationLengths(caps_tokens=(10, 20, 30), share=0.2, steps=3))
    assert caps_by_step(by_share) == [(200, 30)]


def test_tokens_flops_and_records_at_most():
    tokens = 2048 * (100 * 2048 + 60 * 4096 + 40 * 8192)
    assert response_tokens_at_most(LONG) == tokens == 1_593_835_520
    assert rollouts_bytes_at_most(LONG) == 12 * tokens
    assert rollouts_bytes_at_most(planned(keep_rollouts_bytes=10**9)) == 10**9
    redrawn = dataclasses.replace(LONG, rollouts=dataclasses.replace(LONG.rollouts, resample_uninformative=2))
    assert rollouts_bytes_at_most(redrawn) == 3 * 12 * tokens
    one_cap = dataclasses.replace(LONG, lengths=ProgressLengths(caps=(CapFrom(after=0, cap_tokens=1600),)))
    assert update_flops_at_most(one_cap) == pytest.approx(409_600 * 2000 * LONG.model.flops_per_token(2000), rel=1e-12)


def test_checkpoints_and_the_export():
    assert kept_rl_checkpoints(LONG) == 5  # 40, 80, 120, 160, 200
    assert rl_checkpoints_bytes(LONG) == 5 * 14 * PARAMETERS
    assert kept_rl_checkpoints(planned(keep_checkpoints=2)) == 3
    assert kept_rl_checkpoints(planned(save_every_steps=1000)) == 1
    assert rl_checkpoints_bytes(planned(keep_checkpoints=2, export_last=True)) == (3 * 14 + 2) * PARAMETERS
