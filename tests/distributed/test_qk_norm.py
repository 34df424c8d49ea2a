"""Norms on each head's queries and keys under tensor parallelism.

Every rank holds the same norm and applies it to its own heads, so its gradient is the sum over ranks. A sum
that is left out stops nothing: the ranks' copies drift apart, and a checkpoint keeps one of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import ranks
from tests.layouts import CPU, LAYOUTS, SEED, Observed, observe_layout, parts, toy_stage, train_steps, whole
from tests.training_runs import MODEL

QWEN3 = replace(MODEL, family="qwen3", num_layers=2, init_std=0.2)  # large weights: attention and its norms matter
STEPS = 4
SPLIT = ("tensor 2", "tensor 2, sequence parallel")
NORMS = ("decoder.layers.self_attention.q_layernorm.weight", "decoder.layers.self_attention.k_layernorm.weight")


@functools.cache
def one_rank() -> Observed:
    return observe_layout(CPU, STEPS, model=QWEN3)


@pytest.mark.parametrize("name", SPLIT)
def test_training_agrees_with_one_rank(name):
    one, other = one_rank(), observe_layout(LAYOUTS[name], STEPS, model=QWEN3)
    assert np.abs(np.array(other.steps) / np.array(one.steps) - 1).max() < 1e-5  # losses and gradient norms
    assert set(NORMS) < set(one.last)
    for key, weights in one.last.items():
        assert np.allclose(other.last[key], weights, rtol=0, atol=1e-5), key
    for key in NORMS:
        assert one.last[key].shape == (QWEN3.num_layers, QWEN3.channels_per_head)
        assert np.abs(one.last[key] - 1).max() > 1e-3  # they learn


def unsummed(groups: Any, of: Any) -> Any:
    """The fault: each rank keeps the gradient of its own heads."""
    from megatron_ext.training.state import build_state, sharded_model

    state = build_state(of, groups, SEED)
    state.chunks[0].config.qk_layernorm = False
    for name, parameter in state.chunks[0].named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            parameter.sequence_parallel = False
    return train_steps(state, of, range(STEPS)), parts(sharded_model(state))


@pytest.mark.parametrize("name", SPLIT)
def test_gradients_that_are_not_summed_are_noticed(name):
    steps, last = zip(*ranks.run(unsummed, LAYOUTS[name], toy_stage(LAYOUTS[name], model=QWEN3)), strict=True)
    (loss, norm), (right_loss, right_norm) = steps[0][0], one_rank().steps[0]
    assert abs(loss / right_loss - 1) < 1e-6  # nothing is wrong with the first loss
    assert abs(norm / right_norm - 1) > 1e-4
    with pytest.raises(AssertionError, match=r"ranks differ in decoder\.layers\.self_attention\.[qk]_layernorm\.weight"):
        whole(list(last))
