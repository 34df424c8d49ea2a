"""Each rule of a plan: what it refuses, the arithmetic it shows, and the nearest thing that it lets through."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Precision, TrainPlan, check_plan, micro_batches
from megatron_ext.errors import ConfigError

MODEL = ModelConfig(
    name="m",
    num_layers=12,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=1000,
    max_positions=4096,
)
BUDGET = Budget(steps=10, sequences_per_batch=512, sequence_length=1024)


def check(precision: Precision = "bf16", budget: Budget = BUDGET, **plan: Any) -> None:
    check_plan(MODEL, budget, precision, TrainPlan(**plan))


def test_sizes_follow_from_the_plan():
    plan = TrainPlan(nodes=4, ranks_per_node=8, tensor=2, pipeline=2, micro_batch=4)
    assert (plan.num_ranks, plan.model_parallel, plan.data_parallel) == (32, 4, 8)
    assert micro_batches(plan, BUDGET) == 16


def ranks(number: int, **plan: Any) -> dict[str, Any]:
    return {"ranks_per_node": number, **plan}


RULES = [
    # Of the plan alone
    (ranks(6, tensor=4), r"= 6 ranks is no multiple of tensor 4 x pipeline 1 x context 1 = 4", ranks(8, tensor=4)),
    (ranks(2, sequence_parallel=True), "sequence_parallel needs tensor > 1", ranks(2, tensor=2, sequence_parallel=True)),
    (ranks(4, virtual_pipeline=3), "virtual_pipeline 3 needs pipeline > 1", ranks(4, pipeline=4, virtual_pipeline=3)),
    ({"micro_batch": 0}, "micro_batch is 0, must be at least 1", {"micro_batch": 1}),
    ({"loader_workers": -1}, "loader_workers is -1, must not be negative", {"loader_workers": 0}),
    # Of the model
    (
        ranks(8, tensor=8),
        r"tensor 8 does not divide num_query_groups 4 .*\(4 / 8 = 0.5\); the next smaller size that fits is 4",
        ranks(8, tensor=4),
    ),
    (ranks(8, pipeline=8), "12 layers of model m do not divide into pipeline 8 x virtual_pipeline 1 = 8 chunks", ranks(8, pipeline=4)),
    (
        ranks(4, pipeline=4, virtual_pipeline=2),
        "12 layers of model m do not divide into pipeline 4 x virtual_pipeline 2 = 8 chunks",
        ranks(4, pipeline=4, virtual_pipeline=3),
    ),
    # Of the batch
    (
        {"micro_batch": 3},
        r"batch of 512 sequences is no multiple of micro_batch 3 x data-parallel 1 \(= 1 ranks / 1\) = 3",
        {"micro_batch": 4},
    ),
    (ranks(8, nodes=128), "a batch of 512 feeds at most 512 data-parallel ranks", ranks(8, nodes=64)),
    (ranks(8, nodes=64, micro_batch=2), "feeds at most 256 data-parallel ranks", ranks(8, nodes=32, micro_batch=2)),
]


@pytest.mark.parametrize(("refused", "message", "allowed"), RULES)
def test_a_rule_and_its_way_out(refused, message, allowed):
    with pytest.raises(ConfigError, match=message):
        check(**refused)
    check(**allowed)


def test_interleaving_two_stages_without_overlap_is_refused():
    both: dict[str, Any] = {"ranks_per_node": 2, "pipeline": 2, "virtual_pipeline": 2}
    with pytest.raises(ConfigError, match=r"trains on wrong gradients.*Set overlap_p2p=true, or pipeline=4, or virtual_pipeline=1"):
        check(**both)
    check(**both, overlap_p2p=True)
    check(ranks_per_node=4, pipeline=4, virtual_pipeline=3)
    check(ranks_per_node=2, pipeline=2)


def test_interleaving_needs_whole_rounds_of_micro_batches():
    few = Budget(steps=1, sequences_per_batch=6, sequence_length=1024)
    with pytest.raises(ConfigError, match=r"micro-batches per step \(6\) to be a multiple of pipeline 4"):
        check(budget=few, ranks_per_node=4, pipeline=4, virtual_pipeline=3)
    check(budget=few, ranks_per_node=3, pipeline=3, virtual_pipeline=2)


@pytest.mark.parametrize(
    ("length", "plan", "message"),
    [
        (8192, {}, "sequence_length 8192 exceeds the 4096 positions of model m"),
        (1023, {"ranks_per_node": 2, "tensor": 2, "sequence_parallel": True}, "sequence_length 1023 is no multiple of tensor = 2"),
        (1022, {"ranks_per_node": 2, "context": 2}, "sequence_length 1022 is no multiple of 2 x context = 4"),
    ],
)
def test_rules_of_the_sequence_length(length, plan, message):
    with pytest.raises(ConfigError, match=message):
        check(budget=Budget(steps=1, sequences_per_batch=512, sequence_length=length), **plan)
    check(budget=Budget(steps=1, sequences_per_batch=512, sequence_length=1024), **plan)


def test_the_sequence_length_need_not_divide_without_sequence_parallel():
    check(budget=Budget(steps=1, sequences_per_batch=512, sequence_length=1023), ranks_per_node=2, tensor=2)


@pytest.mark.parametrize(
    ("precision", "plan", "message"),
    [
        ("bf16", {}, "bf16 is not available with plan.device=cpu .*use fp32 or plan.device=gpu"),
        ("fp8", {}, "fp8 is not available with plan.device=cpu .*FP8 needs Transformer Engine and a GPU of the Hopper generation"),
        ("fp32", {"ranks_per_node": 2, "context": 2}, "context 2 needs Transformer Engine and plan.device=gpu"),
    ],
)
def test_what_a_cpu_cannot_do(precision, plan, message):
    with pytest.raises(ConfigError, match=message):
        check(precision, device="cpu", **plan)
    check("fp32", device="cpu")
    check("fp32", device="cpu", nodes=2)
