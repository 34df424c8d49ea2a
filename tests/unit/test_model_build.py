"""The built model is the one that was asked for: parameters, first weights, precision, rotary frequencies."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_ext import device
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Precision, TrainPlan
from megatron_ext.errors import ConfigError
from tests import ranks
from tests.layouts import CPU, LAYOUTS, SEED, Observed, observe_layout, observed, parts, whole
from tests.training_runs import MODEL

UNTIED = replace(MODEL, tied_embeddings=False, family="qwen2", head_dim=16, init_std=0.1)
VARIANTS = {
    "tied": MODEL,
    "untied": replace(MODEL, tied_embeddings=False),
    "qkv bias": replace(MODEL, family="qwen2"),
    "qk norm": replace(MODEL, family="qwen3"),
    "wide heads": replace(MODEL, head_dim=16),
    "untied, qkv bias, wide heads": UNTIED,
    "one group": replace(MODEL, num_query_groups=1),
    "padded vocabulary": replace(MODEL, vocab_size=300),
}


def counted(groups: Any, models: list[ModelConfig]) -> list[int]:
    from megatron_ext.model.build import build_model

    return [sum(p.numel() for p in build_model(model, "fp32", groups, SEED)[0].parameters()) for model in models]


def test_the_built_models_have_the_parameters_that_the_config_counts():
    counts = ranks.run(counted, CPU, list(VARIANTS.values()))[0]
    assert dict(zip(VARIANTS, counts, strict=True)) == {name: model.num_parameters for name, model in VARIANTS.items()}
    assert len(set(counts)) == len(VARIANTS)


# ---- first weights

INITIAL_LAYOUTS = ("tensor 2, sequence parallel", "pipeline 2, interleaved", "tensor 2 x pipeline 2")


@functools.cache
def untied(name: str) -> Observed:
    return observe_layout(LAYOUTS[name], steps=0, model=UNTIED)


def assert_equal_weights(one: Observed, other: Observed) -> None:
    assert one.first.keys() == other.first.keys()
    for key, weights in one.first.items():
        assert np.array_equal(weights, other.first[key]), key


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_first_weights_do_not_depend_on_the_layout(name):
    assert_equal_weights(observed("one rank"), observed(name))


@pytest.mark.parametrize("name", INITIAL_LAYOUTS)
def test_nor_do_those_of_an_untied_model_with_biases(name):
    assert_equal_weights(untied("one rank"), untied(name))


def megatrons_own(groups: Any) -> Any:
    import torch

    from megatron_ext.model.build import build_model

    torch.manual_seed(SEED)
    return parts([chunk.sharded_state_dict() for chunk in build_model(MODEL, "fp32", groups, None)])


def test_weights_that_depend_on_the_layout_are_noticed():
    """The fault: Megatron-Core's own first weights, drawn one tensor after the other on each rank."""
    one, other = (Observed(whole(ranks.run(megatrons_own, LAYOUTS[name])), [], {}) for name in ("one rank", "pipeline 2"))
    with pytest.raises(AssertionError, match=r"decoder\.layers"):
        assert_equal_weights(one, other)


def test_first_weights_have_the_deviation_that_was_asked_for():
    for found, model in ((observed("one rank"), MODEL), (untied("one rank"), UNTIED)):
        kinds = set()
        for key, weights in found.first.items():
            if "norm" in key:
                kinds.add("norm")
                assert (weights == 1).all(), key
            elif key.endswith("bias"):
                kinds.add("bias")
                assert (weights == 0).all(), key
            else:
                into_residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
                kinds.add("into the residual" if into_residual else "other")
                std = model.init_std / math.sqrt(2 * model.num_layers) if into_residual else model.init_std
                assert weights.std() == pytest.approx(std, rel=4 / math.sqrt(2 * weights.size)), key  # four standard errors
                assert abs(weights.mean()) < 4 * std / math.sqrt(weights.size), key
        assert kinds == {"norm", "into the residual", "other"} | ({"bias"} if model.qkv_bias else set())


def test_no_two_tensors_and_no_two_layers_begin_alike():
    weights = [w for key, w in untied("one rank").first.items() if "norm" not in key and not key.endswith("bias")]
    rows = [layer.ravel()[:64] for tensor in weights for layer in (tensor if tensor.ndim == 3 else tensor[None])]
    assert len(rows) == 2 + 4 * UNTIED.num_layers
    assert len({row.tobytes() for row in rows}) == len(rows)


def with_seed(groups: Any, seed: int) -> Any:
    from megatron_ext.model.build import build_model

    return next(build_model(MODEL, "fp32", groups, seed)[0].parameters()).detach().numpy().copy()


def test_another_seed_gives_other_weights():
    one, same, other = (ranks.run(with_seed, CPU, seed)[0] for seed in (SEED, SEED, SEED + 1))
    assert np.array_equal(one, same)
    assert not np.isclose(one, other).any(axis=1).all()


# ---- rotary embedding


def published(base: float, channels: int, factor: float) -> np.ndarray:
    """Llama 3.1's frequencies: wavelengths over 8192 / 1 slow down by the factor, under 8192 / 4 stay, between them blend."""
    found = []
    for i in range(0, channels, 2):
        frequency = base ** (-i / channels)
        turns = 8192 * frequency / (2 * math.pi)  # within the original context
        smooth = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(found)


def rotary(groups: Any, models: list[ModelConfig]) -> list[np.ndarray]:
    from megatron_ext.model.build import build_model

    return [build_model(model, "fp32", groups, None)[0].rotary_pos_emb.inv_freq.numpy() for model in models]


def test_rotary_frequencies_are_the_published_ones():
    llama = replace(MODEL, num_layers=1, head_dim=128, rope_base=500_000.0, max_positions=8192)
    factors = {1.0: llama, 8.0: replace(llama, rope_scaling_factor=8.0), 32.0: replace(llama, rope_scaling_factor=32.0, head_dim=64)}
    found = dict(zip(factors, ranks.run(rotary, CPU, list(factors.values()))[0], strict=True))
    for factor, model in factors.items():
        channels = model.channels_per_head
        expected = published(500_000.0, channels, factor)
        assert found[factor].shape == (channels // 2,)
        assert np.allclose(found[factor], expected, rtol=1e-5, atol=0), factor
        unscaled = published(500_000.0, channels, 1.0)
        assert np.allclose(unscaled, 500_000.0 ** (-np.arange(0, channels, 2) / channels))
        if factor > 1:
            slowed = unscaled / found[factor]
            assert slowed.min() == pytest.approx(1, rel=1e-5)  # the fastest stay
            assert slowed.max() == pytest.approx(factor, rel=1e-5)  # the slowest slow down whole
            assert ((slowed > 1.01) & (slowed < factor - 0.01)).any()  # some lie between


# ---- precision

GPU = TrainPlan(device="gpu", ranks_per_node=2, tensor=2, sequence_parallel=True)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
def test_a_gpu_without_transformer_engine_is_refused(monkeypatch, precision):
    from megatron_ext.model.build import check_precision

    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        ConfigError, match=rf"precision: {precision} on a GPU runs through Transformer Engine, which is not installed; .*\[te\]"
    ):
        check_precision(precision, GPU)


def test_fp8_is_refused_on_an_older_gpu(monkeypatch):
    from megatron_ext.model.build import check_precision

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(device, "compute_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"precision: fp8 needs compute capability \(8, 9\) or newer, this GPU has \(8, 0\); use bf16"):
        check_precision("fp8", GPU)
    check_precision("bf16", GPU)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    check_precision("fp8", GPU)


@pytest.mark.parametrize(
    ("precision", "fp8", "dtype"), [("fp8", "hybrid", "bfloat16"), ("bf16", None, "bfloat16"), ("fp32", None, "float32")]
)
def test_the_settings_of_a_gpu_can_be_made_without_one(precision: Precision, fp8: str | None, dtype: str):
    import torch

    from megatron_ext.model.build import transformer_config

    settings = transformer_config(
        replace(UNTIED, hidden_dropout=0.1), precision, replace(GPU, pipeline=2, ranks_per_node=4, recompute="full")
    )
    assert settings.fp8 == fp8
    assert settings.params_dtype == settings.pipeline_dtype == getattr(torch, dtype)
    assert settings.bf16 is (precision != "fp32")
    assert (settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size, settings.sequence_parallel) == (2, 2, True)
    assert (settings.kv_channels, settings.num_query_groups, settings.add_qkv_bias) == (16, 2, True)
    assert (settings.recompute_granularity, settings.hidden_dropout, settings.init_method_std) == ("full", 0.1, 0.1)
    assert settings.calculate_per_token_loss
    assert not settings.use_cpu_initialization
