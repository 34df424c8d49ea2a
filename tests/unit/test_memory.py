"""Memory and disk against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_ext.config.budget import Budget
from megatron_ext.config.memory import (
    Memory,
    activation_bytes,
    checkpoint_bytes,
    disk_bytes,
    files_per_checkpoint,
    kept_checkpoints,
    layer_activation_bytes,
    layers_in_flight,
    logit_bytes,
    memory,
    parameters_per_gpu,
    pinned_steps,
)
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from recipes import models

BATCH = Budget(steps=50_000, sequences_per_batch=512, sequence_length=8192)
EIGHT: dict[str, Any] = {"nodes": 8, "ranks_per_node": 8}
# One small layer whose numbers fit in the head: 8 wide, 4 heads of 2, 2 groups, feed-forward 24, 10 tokens.
SMALL = ModelConfig(
    name="small",
    num_layers=8,
    hidden_size=8,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    max_positions=16,
)
TEN = Budget(steps=10, sequences_per_batch=16, sequence_length=10)


def test_llama_3b_on_64_gpus():
    parts = memory(models.llama_3_2_3b(), BATCH, "bf16", TrainPlan(**EIGHT))
    layer = 201_326_592 + 134_217_728 + 786_432 + 402_653_184  # inputs, attention, softmax statistics, feed-forward
    assert parts == Memory(
        weights_bytes=2 * 3_212_749_824,
        gradients_bytes=4 * 3_212_749_824,
        optimizer_bytes=602_390_592,  # 12 x 3,212,749,824 / 64
        activations_bytes=28 * layer + 100_663_296,  # the last norm's and the head's input
        logits_bytes=6_304_038_912,  # 6 x 8,192 x 128,256
    )
    assert parts.total_bytes == 46_975_141_952
    assert parts.fits(80 * 10**9)
    assert not parts.fits(52 * 10**9)  # 10 % stay free


def test_llama_8b_needs_two_gpus():
    model = models.llama_3_1_8b()
    plan = TrainPlan(nodes=16, ranks_per_node=8)
    assert not memory(model, BATCH, "bf16", plan).fits(80 * 10**9)
    halved = dataclasses.replace(plan, tensor=2, sequence_parallel=True)
    assert memory(model, BATCH, "bf16", halved).fits(80 * 10**9)


def test_a_layer_by_hand():
    def layer(precision: Any, **plan: Any) -> int:
        return layer_activation_bytes(SMALL, TEN, precision, TrainPlan(**plan))

    # 10 tokens: residual 80, queries 80, keys and values 80, feed-forward 240 elements; statistics 4 x 10 x 4
    assert layer("bf16") == 8 * 80 + 2 * (2 * 80 + 80) + 160 + 6 * 240
    assert layer("bf16", micro_batch=2) == 2 * layer("bf16")
    assert layer("bf16", recompute="selective") == layer("bf16") - 160
    assert layer("fp32", device="cpu") == 16 * 80 + 4 * 240 + 160 + 12 * 240
    assert layer("fp32") == layer("fp32", device="cpu") - 160 + 4 * 10 * 4 * 10  # a 10 x 10 matrix a head
    assert layer("fp8") == 6 * 80 + 2 * 240 + 80 + 160 + 5 * 240
    two = {"ranks_per_node": 2, "tensor": 2}
    assert layer("bf16", **two) == 8 * 80 + (2 * 240 + 160 + 6 * 240) // 2
    assert layer("bf16", **two, sequence_parallel=True) == layer("bf16") // 2
    dropping = dataclasses.replace(SMALL, hidden_dropout=0.1)
    assert layer_activation_bytes(dropping, TEN, "bf16", TrainPlan()) == layer("bf16") + 2 * 80


def test_context_parallel_divides_the_tokens():
    twelve = dataclasses.replace(TEN, sequence_length=12)
    one = layer_activation_bytes(SMALL, twelve, "bf16", TrainPlan())
    assert layer_activation_bytes(SMALL, twelve, "bf16", TrainPlan(ranks_per_node=2, context=2)) == one // 2


@pytest.mark.parametrize(
    ("plan", "stage", "layers"),
    [
        ({}, 0, 8),
        ({"ranks_per_node": 4, "pipeline": 4}, 0, 2 * 4),
        ({"ranks_per_node": 4, "pipeline": 4}, 1, 2 * 3),
        ({"ranks_per_node": 4, "pipeline": 4}, 3, 2 * 1),
        ({"ranks_per_node": 4, "pipeline": 4, "micro_batch": 8}, 0, 2 * 2),  # 2 micro-batches cannot fill 4 places
        ({"ranks_per_node": 4, "pipeline": 4, "virtual_pipeline": 2}, 0, 11),  # Korthikanti: 8 x (1 + 3 / (4 x 2))
        ({"ranks_per_node": 4, "pipeline": 4, "virtual_pipeline": 2}, 3, 5),
    ],
)
def test_layers_in_flight(plan, stage, layers):
    assert layers_in_flight(SMALL, TEN, TrainPlan(**plan), stage) == layers


def test_full_recomputation_keeps_inputs_and_one_whole_layer():
    plan = TrainPlan(recompute="full")
    layer = layer_activation_bytes(SMALL, TEN, "bf16", plan)
    assert activation_bytes(SMALL, TEN, "bf16", plan, 0) == 8 * 160 + layer + 2 * 160
    assert activation_bytes(SMALL, TEN, "bf16", TrainPlan(), 0) == 8 * layer + 2 * 160


def test_parameters_of_each_stage_sum_to_the_model():
    plan = TrainPlan(ranks_per_node=4, pipeline=4)
    model = models.llama_3_1_8b()
    assert sum(parameters_per_gpu(model, plan, stage) for stage in range(4)) == model.num_parameters
    tied = models.llama_3_2_3b()
    copies = sum(parameters_per_gpu(tied, plan, stage) for stage in range(4))
    assert copies == tied.num_parameters + tied.num_embedding_parameters  # first and last stage hold a copy each
    assert parameters_per_gpu(tied, TrainPlan(), 0) == tied.num_parameters


def test_tensor_parallel_divides_matrices_and_repeats_norms():
    model, plan = models.llama_3_1_8b(), TrainPlan(ranks_per_node=2, tensor=2)
    norms = 65 * 4096
    assert parameters_per_gpu(model, plan, 0) == (model.num_parameters - norms) // 2 + norms


def test_the_distributed_optimizer_divides_states_only():
    spread = memory(SMALL, TEN, "bf16", TrainPlan(ranks_per_node=4))
    whole = memory(SMALL, TEN, "bf16", TrainPlan(ranks_per_node=4, distributed_optimizer=False))
    assert whole.optimizer_bytes == 12 * SMALL.num_parameters
    assert spread.optimizer_bytes == 3 * SMALL.num_parameters
    assert dataclasses.replace(whole, optimizer_bytes=0) == dataclasses.replace(spread, optimizer_bytes=0)
    assert memory(SMALL, TEN, "fp32", TrainPlan(distributed_optimizer=False)).optimizer_bytes == 8 * SMALL.num_parameters


def test_fp8_keeps_two_bytes_more_of_each_layer_matrix():
    bf16, fp8 = (memory(SMALL, TEN, precision, TrainPlan()) for precision in ("bf16", "fp8"))
    assert fp8.weights_bytes - bf16.weights_bytes == 2 * 8 * (192 + 576)
    assert fp8.activations_bytes < bf16.activations_bytes


def test_the_fullest_stage_counts():
    plan = TrainPlan(ranks_per_node=4, pipeline=4)
    fullest = memory(SMALL, TEN, "bf16", plan)
    assert fullest.activations_bytes == activation_bytes(SMALL, TEN, "bf16", plan, 0)
    assert fullest.logits_bytes == 0  # the first stage has none
    wide = dataclasses.replace(SMALL, vocab_size=128_000)
    assert memory(wide, TEN, "bf16", plan).logits_bytes == logit_bytes(wide, TEN, "bf16", plan) == 6 * 10 * 128_000
    assert logit_bytes(wide, TEN, "fp32", plan) == 4 * 10 * 128_000


def test_checkpoints():
    model = models.llama_3_2_3b()
    plan = TrainPlan(**EIGHT, save_every_steps=500, pin_every_tokens=10**10, keep_checkpoints=3)
    assert checkpoint_bytes(model, "bf16", plan) == 14 * 3_212_749_824
    assert files_per_checkpoint(plan) == 64 + 4
    steps = pinned_steps(BATCH, plan)
    assert len(steps) == 21  # 20 multiples of 10B, and the last
    assert {2_384, 30_994, 50_000} <= set(steps)
    assert kept_checkpoints(BATCH, plan) == 24
    assert disk_bytes(model, BATCH, "bf16", plan) == 24 * 14 * 3_212_749_824
    exporting = dataclasses.replace(plan, export_tokens=(BATCH.tokens_before(10),), export_last=True)
    assert disk_bytes(model, BATCH, "bf16", exporting) == (25 * 14 + 2 * 2) * 3_212_749_824


def test_checkpoints_without_pins_and_in_fp32():
    plan = TrainPlan(save_every_steps=4, keep_checkpoints=3, distributed_optimizer=False)
    assert pinned_steps(TEN, plan) == (10,)
    assert kept_checkpoints(TEN, plan) == 3  # steps 4, 8 and the last
    assert checkpoint_bytes(SMALL, "fp32", plan) == 12 * SMALL.num_parameters
    assert checkpoint_bytes(SMALL, "fp32", TrainPlan()) == 16 * SMALL.num_parameters
    every = dataclasses.replace(plan, save_every_steps=1)
    assert kept_checkpoints(TEN, every) == 4
