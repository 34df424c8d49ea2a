"""Converted models compute what transformers computes, for every family and under every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import ranks
from tests.family_models import Case, base, convert, llama3, megatron_logits, random_tokens, sharp_model, transformers_logits
from tests.layouts import CPU, LAYOUTS
from tests.training_runs import MODEL

BOUND = 1e-5
LENGTH = 47  # odd: sequence parallelism has to fill it up
SEQUENCES = 3  # interleaving too
ALL_GROUPS, ONE_GROUP = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
WIDE = {"head_dim": 16}  # hidden 32 / 4 heads would be 8
ODD = {"vocab_size": 307}
LONG = {"max_position_embeddings": 131_072}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, every head its own keys": ("llama", {**ALL_GROUPS, **ODD, "rms_norm_eps": 1e-6}),
    "llama, tied, scaled by 8": ("llama", {**TIED, **LONG, "rope_parameters": llama3(8.0)}),
    "llama, tied, wide heads, scaled by 32": ("llama", {**TIED, **WIDE, **LONG, "rope_parameters": llama3(32.0)}),
    "llama, 2 layers of 8 heads": ("llama", {"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 4, "vocab_size": 384}),
    "mistral": ("mistral", {"rope_parameters": base(1e6)}),
    "mistral, wide heads, odd vocabulary": ("mistral", {**WIDE, **ODD}),
    "mistral, heads that hidden has no room for": ("mistral", {"num_attention_heads": 6, "head_dim": 8, "hidden_size": 40}),
    "qwen2": ("qwen2", {"rope_parameters": base(1e6), "rms_norm_eps": 1e-6}),
    "qwen2, tied, odd vocabulary": ("qwen2", {**TIED, **ODD, **ALL_GROUPS}),
    "qwen2, 2 layers": ("qwen2", {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_parameters": base(1e6)}),
    "qwen3": ("qwen3", {"rope_parameters": base(1e6), "rms_norm_eps": 1e-6}),
    "qwen3, tied, wide heads": ("qwen3", {**TIED, **WIDE, **ODD, "rms_norm_eps": 1e-6}),
    "qwen3, 2 layers, every head its own keys": ("qwen3", {**ALL_GROUPS, "num_hidden_layers": 2}),
    "llama, one group": ("llama", {**ONE_GROUP, **ODD}),  # these two cannot be split over tensor-parallel ranks
    "qwen2, tied, one group": ("qwen2", {**ONE_GROUP, **TIED}),
}
ALL_SHAPES_IN = ("one rank", "tensor 2", "pipeline 2", "tensor 2 x pipeline 2")
ONE_OF_EACH_IN = ("tensor 2, sequence parallel", "pipeline 2, interleaved")


Computed = dict[str, tuple[Case, torch.Tensor]]  # and what transformers computes of it


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Computed:
    """Every shape's case, and what transformers computes of it."""
    found = {}
    for number, (name, (family, config)) in enumerate(SHAPES.items()):
        model = sharp_model(family, seed=number, **config)
        tokens = random_tokens(SEQUENCES, LENGTH, model.config.vocab_size)
        checkpoint = convert(model, tmp_path_factory.mktemp("shape"))
        found[name] = Case(checkpoint, tokens.tolist()), transformers_logits(model, tokens)
    return found


def differences(computed: Computed, layout: str, names: Sequence[str]) -> dict[str, float]:
    """The largest difference of each shape under a layout."""
    ours = megatron_logits(LAYOUTS[layout], [computed[name][0] for name in names])
    return {name: apart(logits, computed[name][1]) for name, logits in zip(names, ours, strict=True)}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("layout", ALL_SHAPES_IN)
def test_logits_are_those_of_transformers(computed, layout):
    tensor = LAYOUTS[layout].tensor
    names = [name for name, (_, config) in SHAPES.items() if config.get("num_key_value_heads", tensor) % tensor == 0]
    assert len(names) >= 14
    found = differences(computed, layout, names)
    assert max(found.values()) <= BOUND, found


@pytest.mark.parametrize("layout", ONE_OF_EACH_IN)
def test_logits_of_one_shape_of_each_family(computed, layout):
    found = differences(computed, layout, ["llama", "mistral", "qwen2", "qwen3"])
    assert max(found.values()) <= BOUND, found


def test_logits_are_large_enough_for_the_bound_to_mean_something(computed):
    assert all(1.0 < float(logits.abs().max()) < 10.0 for _, logits in computed.values())


def test_wrong_models_are_noticed(computed):
    """What a wrong converter would do, each far beyond the bound."""
    faults = {
        "base": ("qwen2", (("rope_base", 1.01e6),)),
        "epsilon": ("llama", (("norm_epsilon", 1e-2),)),
        "scaling ignored": ("llama, tied, scaled by 8", (("rope_scaling_factor", 1.0),)),
        "other scaling": ("llama, tied, wide heads, scaled by 32", (("rope_scaling_factor", 8.0),)),
    }
    cases = [Case(computed[shape][0].checkpoint, computed[shape][0].tokens, change) for shape, change in faults.values()]
    wrong = megatron_logits(CPU, cases)
    found = {name: apart(logits, computed[shape][1]) for (name, (shape, _)), logits in zip(faults.items(), wrong, strict=True)}
    assert min(found.values()) > 20 * BOUND, found


SWAPS = {
    "keys and values": ("k_proj", "v_proj"),
    "gate and up": ("gate_proj", "up_proj"),
    "norms": ("input_layernorm", "post_attention_layernorm"),
}


def test_swapped_tensors_are_noticed(computed, tmp_path):
    family, config = SHAPES["llama"]
    case, theirs = computed["llama"]
    cases = []
    for number, (one, other) in enumerate(SWAPS.values()):
        model = sharp_model(family, seed=0, **config)
        weights = model.state_dict()
        moved = {name.replace(one, "?").replace(other, one).replace("?", other): weight.clone() for name, weight in weights.items()}
        model.load_state_dict(moved)
        cases.append(Case(convert(model, tmp_path / str(number)), case.tokens))
    found = {name: apart(logits, theirs) for name, logits in zip(SWAPS, megatron_logits(CPU, cases), strict=True)}
    assert min(found.values()) > 1e-2, found


# --- a model in training ------------------------------------------------------------------------------


def in_training(groups: Any) -> dict[str, bool]:
    """What holds of a model with dropout whose logits are asked for between two steps."""
    from megatron_ext.distributed import seed_step
    from megatron_ext.model.build import build_model
    from megatron_ext.model.logits import logits_BSV

    seed_step(groups, 0, 0)
    tokens = random_tokens(2, 9, MODEL.vocab_size)
    dropping, plain = (build_model(replace(MODEL, hidden_dropout=rate), "fp32", groups, seed=1) for rate in (0.5, 0.0))
    dropping[0].train()
    before = torch.get_rng_state()
    logits = logits_BSV(dropping, tokens, groups, MODEL.vocab_size)
    found = {
        "no dropout": torch.equal(logits, logits_BSV(plain, tokens, groups, MODEL.vocab_size)),
        "nothing drawn": torch.equal(before, torch.get_rng_state()),
        "still training": dropping[0].training and dropping[0].decoder.layers[0].training,
        "no graph": not logits.requires_grad,
    }
    with_dropout = dropping[0](tokens, torch.arange(9).expand(2, 9), None)[..., : MODEL.vocab_size]
    return {**found, "it would show": float((logits - with_dropout).detach().abs().max()) > 1e-3}


def test_a_model_in_training_is_left_as_it_was():
    assert all((found := ranks.run(in_training, CPU)[0]).values()), found


# --- beyond the 8,192 positions that Llama 3's scaling begins from -------------------------------------

FIRST_BEYOND = 8192
FAR = FIRST_BEYOND + 301
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, **LONG}
FAR_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, scaled by 8": ("llama", {**SMALL, "rope_parameters": llama3(8.0)}),
    "llama, scaled by 32": ("llama", {**SMALL, "rope_parameters": llama3(32.0)}),
    "qwen2": ("qwen2", {**SMALL, "rope_parameters": base(1e6)}),
}


@pytest.fixture(scope="module")
def computed_far(tmp_path_factory) -> Computed:
    found = {}
    for name, (family, config) in FAR_SHAPES.items():
        model = sharp_model(family, **config)
        tokens = random_tokens(1, FAR, model.config.vocab_size)
        found[name] = Case(convert(model, tmp_path_factory.mktemp("far")), tokens.tolist()), transformers_logits(model, tokens, "sdpa")
    return found


@pytest.mark.parametrize("layout", ["one rank", "tensor 2, sequence parallel"])
def test_logits_beyond_position_8192(computed_far, layout):
    ours = megatron_logits(LAYOUTS[layout], [case for case, _ in computed_far.values()])
    found = {
        name: apart(logits[:, FIRST_BEYOND:], computed_far[name][1][:, FIRST_BEYOND:])
        for name, logits in zip(computed_far, ours, strict=True)
    }
    assert max(found.values()) <= BOUND, found


def test_scaling_that_is_ignored_shows_beyond_position_8192(computed_far):
    changes = {name: (("rope_scaling_factor", 8.0 if name == "qwen2" else 1.0),) for name in computed_far}
    wrong = megatron_logits(CPU, [Case(case.checkpoint, case.tokens, changes[name]) for name, (case, _) in computed_far.items()])
    found = {
        name: apart(logits[:, FIRST_BEYOND:], computed_far[name][1][:, FIRST_BEYOND:])
        for name, logits in zip(computed_far, wrong, strict=True)
    }
    assert min(found.values()) > 0.1, found
