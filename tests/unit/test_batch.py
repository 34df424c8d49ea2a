"""Packing: every sequence is placed once, evenly, in one shape; the tensors of a micro-batch by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.plan import ParallelPlan
from megatron_ext.rl.batch import Sample, Shape, micro_batch, place

CPU = ParallelPlan(device="cpu")
GPU = ParallelPlan(device="gpu")
PLANS = [
    CPU,
    replace(CPU, ranks_per_node=3),
    replace(CPU, ranks_per_node=2, pipeline=2),
    replace(CPU, ranks_per_node=4, pipeline=2, virtual_pipeline=2, overlap_p2p=True),
    replace(CPU, ranks_per_node=4, tensor=2, sequence_parallel=True),
    GPU,
    replace(GPU, ranks_per_node=4, tensor=2, sequence_parallel=True),
]


@given(st.lists(st.integers(0, 60), max_size=40), st.sampled_from(PLANS), st.sampled_from([1, 64, 200]))
def test_every_sequence_has_one_place_in_one_shape(lengths, plan, budget):
    shape, placing = place(lengths, plan, budget)
    placed = sorted(i for rank in placing for rows in rank for row in rows for i in row)
    assert placed == [i for i, length in enumerate(lengths) if length]
    assert len(placing) == plan.data_parallel
    assert {len(rank) for rank in placing} == {shape.num_micro_batches}
    assert all(len(rows) <= shape.num_rows for rank in placing for rows in rank)
    assert all(sum(lengths[i] for i in row) <= shape.row_tokens for rank in placing for rows in rank for row in rows)
    assert shape.num_micro_batches % (plan.pipeline if plan.virtual_pipeline > 1 else 1) == 0
    assert shape.row_tokens % (plan.tensor if plan.sequence_parallel else 1) == 0
    longest = max((*lengths, 1))
    assert shape.num_rows * shape.row_tokens <= max(budget, longest) + 32  # rounded up for sequence parallelism and FP8
    assert plan.device == "cpu" or shape.num_rows == 1
    assert place(lengths, plan, budget) == (shape, placing)


def test_the_split_is_even_and_has_little_padding():
    """256 sequences of 50 to 130 positions on 4 ranks."""
    lengths = np.random.default_rng(0).integers(50, 131, size=256).tolist()
    for plan, least_share in ((replace(CPU, ranks_per_node=4), 0.75), (replace(GPU, ranks_per_node=4), 0.9)):
        shape, placing = place(lengths, plan, 2048)
        tokens = [sum(lengths[i] for rows in rank for row in rows for i in row) for rank in placing]
        assert max(tokens) < 1.05 * min(tokens)
        assert sum(lengths) > least_share * 4 * shape.num_micro_batches * shape.num_rows * shape.row_tokens


def sample(prompt: list[int], response: list[int], share: float = 0.0) -> Sample:
    nothing = np.zeros(len(response), dtype=np.float32)
    return Sample(tuple(prompt), np.array(response, dtype=np.int32), nothing, 1.0, 1.0, share)


SAMPLES = [sample([5, 6], [7, 8], 2.0), sample([9], [3], 1.0), sample([4, 4, 4], [1, 2])]


def test_a_micro_batch_by_hand():
    """Row 0: 5 6 7 | 9, row 1: 4 4 4 1 (of 5); the last response token is no input."""
    found = micro_batch(SAMPLES, [[0, 1], [2]], Shape(1, 2, 5), CPU, torch.device("cpu"))
    assert found.tokens_RS.tolist() == [[5, 6, 7, 9, 0], [4, 4, 4, 1, 0]]
    assert found.position_ids_RS.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert found.positions_N.tolist() == [2, 4, 6, 5, 7]  # s x 2 + r
    assert found.targets_N.tolist() == [7, 8, 3, 1, 2]
    assert (found.samples, found.lengths, found.shares) == ((0, 1, 2), (2, 1, 2), 3)
    assert found.packed is None
    assert found.mask_R1SS is not None
    visible = (~found.mask_R1SS[:, 0]).int().tolist()
    assert visible[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert visible[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(("row_tokens", "ends", "longest"), [(7, [0, 3, 4, 7], 3), (4, [0, 3, 4], 3), (9, [0, 3, 4, 9], 5)])
def test_on_a_gpu_a_row_has_boundaries_in_place_of_a_mask(row_tokens, ends, longest):
    found = micro_batch(SAMPLES, [[0, 1]], Shape(1, 1, row_tokens), GPU, torch.device("cpu"))
    assert found.mask_R1SS is None
    assert found.packed is not None
    assert found.packed.qkv_format == "thd"
    assert found.packed.cu_seqlens_q.tolist() == found.packed.cu_seqlens_kv.tolist() == ends
    assert found.packed.cu_seqlens_q.dtype == torch.int32
    assert found.packed.max_seqlen_q == found.packed.max_seqlen_kv == longest
    assert found.positions_N.tolist() == [1, 2, 3]


def test_a_filler_holds_nothing():
    found = micro_batch(SAMPLES, [], Shape(1, 2, 4), CPU, torch.device("cpu"))
    assert (found.samples, found.shares, len(found.positions_N), len(found.targets_N)) == ((), 0, 0, 0)
    assert found.mask_R1SS is not None
    assert not found.mask_R1SS.all(dim=-1).any()  # a position that sees nothing would be nan
    assert micro_batch(SAMPLES, [], Shape(1, 1, 4), GPU, torch.device("cpu")).packed.cu_seqlens_q.tolist() == [0, 4]
