"""Sizes of the models against published counts, and their arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import ConfigError
from recipes import models


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama_3_2_1b", 1_235_814_400),
        ("llama_3_2_3b", 3_212_749_824),
        ("llama_3_1_8b", 8_030_261_248),
        ("qwen2_5_1_5b", 1_543_714_304),
        ("qwen2_5_3b", 3_085_938_688),
        ("qwen2_5_7b", 7_615_616_512),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    model = getattr(models, name)()
    assert model.name == name
    assert model.num_parameters == parameters
    assert model.padded_vocab_size == model.vocab_size  # each is a multiple of 128: padding adds nothing
    assert dataclasses.replace(model, tied_embeddings=not model.tied_embeddings).num_parameters != parameters
    assert dataclasses.replace(model, family="llama" if model.qkv_bias else "qwen2").num_parameters != parameters


def test_rotary_embeddings_of_the_families():
    rotary = {
        name: (m.rope_base, m.rope_scaling_factor, m.max_positions, m.norm_epsilon)
        for name in ("llama_3_2_1b", "llama_3_2_3b", "llama_3_1_8b", "qwen2_5_1_5b", "qwen2_5_3b", "qwen2_5_7b")
        for m in [getattr(models, name)()]
    }
    assert rotary == {
        "llama_3_2_1b": (500_000.0, 32.0, 131_072, 1e-5),
        "llama_3_2_3b": (500_000.0, 32.0, 131_072, 1e-5),
        "llama_3_1_8b": (500_000.0, 8.0, 131_072, 1e-5),
        "qwen2_5_1_5b": (1_000_000.0, 1.0, 131_072, 1e-6),
        "qwen2_5_3b": (1_000_000.0, 1.0, 32_768, 1e-6),
        "qwen2_5_7b": (1_000_000.0, 1.0, 131_072, 1e-6),
    }


def test_heads_are_64_wide_in_1b_and_128_elsewhere():
    widths = [getattr(models, name)().channels_per_head for name in ("llama_3_2_1b", "llama_3_2_3b", "llama_3_1_8b", "qwen2_5_3b")]
    assert widths == [64, 128, 128, 128]


def tiny(**changes: object) -> ModelConfig:
    values = {"name": "t", "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2,
              "vocab_size": 100, "max_positions": 16}  # fmt: skip
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_parameters_by_hand():
    model = tiny()
    # attention 8 x (8 + 8) + 8 x 8 = 192, feed-forward 3 x 8 x 24 = 576, norms 16
    assert model.num_layer_parameters == 192 + 576 + 16
    assert model.padded_vocab_size == 128
    assert model.num_parameters == 2 * 784 + 2 * 128 * 8 + 8
    assert tiny(tied_embeddings=True).num_parameters == 2 * 784 + 128 * 8 + 8
    assert tiny(family="qwen2").num_layer_parameters == 784 + 16
    assert tiny(family="qwen3").num_layer_parameters == 784 + 2 * 2
    assert tiny(family="mistral").num_layer_parameters == 784
    assert tiny(head_dim=4).num_layer_parameters == 8 * (16 + 16) + 16 * 8 + 576 + 16


def test_flops_by_hand():
    # matrices 2 x 768 + 128 x 8 = 2,560; attention 6 x 2 layers x 4 heads x 2 channels x 10 tokens = 960
    assert tiny().flops_per_token(10) == 6 * 2560 + 960


def test_flops_of_llama_3b_at_8k():
    per_token = models.llama_3_2_3b().flops_per_token(8192)
    assert per_token == 6 * (3_212_749_824 - 57 * 3072) + 6 * 28 * 3072 * 8192  # every parameter but the 57 norms' is a matrix
    assert per_token == pytest.approx(23.5e9, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"hidden_size": 10}, "hidden_size 10 is not a multiple of num_attention_heads 4; set head_dim"),
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"head_dim": 3}, "a head has 3 channels; RoPE rotates pairs, so make it even"),
        ({"head_dim": 0}, "a head has 0 channels"),
        ({"rope_base": 1.0}, "rope_base is 1.0, must be more than 1"),
        ({"rope_base": float("nan")}, "rope_base is nan, must be more than 1"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor is 0.5, must be at least 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0, must lie between 0 and 1"),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_toys_divide_among_two_ranks():
    for model in (models.toy(1024), models.smallest(512)):
        assert [size % 2 for size in (model.num_layers, model.num_query_groups, model.num_attention_heads, model.ffn_hidden_size)] == [
            0
        ] * 4
    assert (models.toy(1024).num_parameters, models.smallest(512).num_parameters) == (918_656, 131_392)
