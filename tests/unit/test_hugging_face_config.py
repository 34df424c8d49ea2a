"""config.json both ways, against `transformers` itself: published files, its defaults, its own reading and writing of ours."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import Json
from megatron_ext.config.hugging_face import KEYS, KIN, REPLACED, config_from_model, contradictions, model_from_config, parse_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import ConfigError
from recipes import models

# As published, but for the token ids.
LLAMA_3_2_1B: Json = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1_8B: Json = {
    **{key: value for key, value in LLAMA_3_2_1B.items() if key != "head_dim"},
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
    "rope_scaling": {**LLAMA_3_2_1B["rope_scaling"], "factor": 8.0},
}  # fmt: skip
QWEN_2_5_7B: Json = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN_3_8B: Json = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
    "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MISTRAL_7B: Json = {  # v0.3; v0.1 is the same but for its sliding window, smaller base and vocabulary
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32768,
}  # fmt: skip
TINY = ModelConfig(
    name="tiny", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=99,
    max_positions=64, rope_base=500_000.0, init_std=0.01,
)  # fmt: skip
SHAPES = [
    TINY,
    replace(TINY, tied_embeddings=True, rope_scaling_factor=8.0, max_positions=131_072),
    replace(TINY, head_dim=16, num_query_groups=4, norm_epsilon=1e-6, attention_dropout=0.1),
    replace(TINY, family="mistral", head_dim=64, hidden_size=36),
    replace(TINY, family="qwen2", tied_embeddings=True, rope_scaling_factor=32.0),
    replace(TINY, family="qwen2", head_dim=4, num_query_groups=1),
    replace(TINY, family="qwen3", head_dim=128),
    replace(TINY, family="qwen3", rope_scaling_factor=4.0, tied_embeddings=True),
]


def read(values: Json) -> ModelConfig:
    return model_from_config(values, "model/config.json", "m")


def refusal(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(values)
    return str(caught.value)


def without(values: Json, *keys: str) -> Json:
    return {key: value for key, value in values.items() if key not in keys}


def theirs(values: Json) -> Any:
    """What transformers makes of a config.json."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]].from_dict(json.loads(json.dumps(values)))


def as_transformers_computes(values: Json) -> dict[str, Any]:
    """The fields of our model, from the attributes that transformers' modules are built from."""
    config = theirs(values)
    rope = config.rope_parameters
    assert rope["rope_type"] in ("default", "llama3")
    if rope["rope_type"] == "llama3":
        assert (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]) == (1, 4, 8192)
    return {
        "family": config.model_type,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "num_query_groups": config.num_key_value_heads,
        "channels_per_head": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "max_positions": config.max_position_embeddings,
        "rope_base": rope["rope_theta"],
        "rope_scaling_factor": rope.get("factor", 1.0),
        "tied_embeddings": config.tie_word_embeddings,
        "norm_epsilon": config.rms_norm_eps,
    }


def as_we_say(model: ModelConfig) -> dict[str, Any]:
    return {field: getattr(model, field) for field in KEYS}


# ---- reading


@pytest.mark.parametrize(
    ("published", "recipe"),
    [(LLAMA_3_2_1B, models.llama_3_2_1b()), (LLAMA_3_1_8B, models.llama_3_1_8b()), (QWEN_2_5_7B, models.qwen2_5_7b())],
)
def test_published_configs_are_the_recipes_models(published, recipe):
    assert model_from_config(published, "config.json", recipe.name) == recipe


@pytest.mark.parametrize(("published", "parameters"), [(QWEN_3_8B, 8_190_735_360), (MISTRAL_7B, 7_248_023_552)])
def test_published_configs_have_the_published_parameters(published, parameters):
    assert read(published).num_parameters == parameters


@pytest.mark.parametrize("published", [LLAMA_3_2_1B, LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_8B, MISTRAL_7B])
def test_published_configs_mean_what_transformers_makes_of_them_in_either_key_style(published):
    model = read(published)
    assert as_we_say(model) == as_transformers_computes(published)
    newer = json.loads(theirs(published).to_json_string())
    assert "rope_parameters" in newer
    assert "dtype" in newer
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & set(newer)
    assert read(newer) == model


@pytest.mark.parametrize("family", KIN)
def test_missing_keys_mean_what_they_mean_to_transformers(family):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    least = {"model_type": family, **dict.fromkeys(sizes, 64), "hidden_size": 2048}
    if family == "mistral":  # its class has a window of 4096, so a model that is longer is refused
        assert theirs(least).sliding_window == KIN["mistral"].window == 4096
        assert "sliding_window: is missing, which means 4096, within the model's 131072 positions" in refusal(least)
        least["sliding_window"] = None
    model = read(least)
    assert as_we_say(model) == as_transformers_computes(least)
    defaults = theirs(least)
    assert (model.init_std, model.attention_dropout) == (defaults.initializer_range, defaults.attention_dropout) == (0.02, 0.0)
    assert (defaults.hidden_act, getattr(defaults, "attention_bias", False), getattr(defaults, "mlp_bias", False)) == ("silu", False, False)
    for key in sizes:  # transformers has a default for them too, which fits one model of the world
        assert f"{key}: must be a whole number of at least 1, is missing" in refusal(without(least, key))


@pytest.mark.parametrize(
    ("published", "changes"),
    [
        (LLAMA_3_2_1B, {"num_key_value_heads": None}),
        (QWEN_2_5_7B, {"num_key_value_heads": None}),
        (QWEN_3_8B, {"num_key_value_heads": None}),
        (LLAMA_3_2_1B, {"head_dim": None}),
        (LLAMA_3_2_1B, {"attention_dropout": None}),
        (LLAMA_3_2_1B, {"rope_scaling": None}),
        (LLAMA_3_2_1B, {"rope_scaling": {"type": "default"}}),
        (LLAMA_3_2_1B, {"rope_scaling": without({**LLAMA_3_2_1B["rope_scaling"], "type": "llama3"}, "rope_type")}),
        (LLAMA_3_2_1B, {"rope_scaling": {**LLAMA_3_2_1B["rope_scaling"], "rope_theta": 500_000}}),
        (without(LLAMA_3_2_1B, "rope_scaling", "rope_theta"), {"rope_parameters": {"rope_type": "default"}}),
        (without(LLAMA_3_2_1B, "rope_scaling"), {"rope_parameters": {"rope_type": "default"}}),
        (LLAMA_3_2_1B, {"rope_theta": 10_000, "partial_rotary_factor": 1.0}),
        (LLAMA_3_2_1B, {"hidden_act": "swish"}),
        (LLAMA_3_2_1B, {"dtype": "float32"}),  # the weights' dtype is read from the weights
        (MISTRAL_7B, {"sliding_window": 32_768}),  # as long as the model: hides nothing
        (QWEN_2_5_7B, {"sliding_window": 5}),  # not in use
        (QWEN_2_5_7B, {"layer_types": ["full_attention"] * 28}),
        (QWEN_2_5_7B, {"attention_bias": True}),  # no key of Qwen2's, which has them whatever it says
        (QWEN_3_8B, {"quantization_config": None, "num_experts": 0}),
    ],
)
def test_spellings_mean_what_they_mean_to_transformers(published, changes):
    values = {**published, **changes}
    assert as_we_say(read(values)) == as_transformers_computes(values)


def test_architectures_and_model_type_stand_for_each_other():
    assert read(without(QWEN_3_8B, "architectures")) == read(without(QWEN_3_8B, "model_type")) == read(QWEN_3_8B)


def test_a_mistral_may_say_null_for_as_many_groups_as_heads():
    assert read({**MISTRAL_7B, "num_key_value_heads": None}).num_query_groups == 32  # as transformers 4 did; 5 refuses the config


@pytest.mark.parametrize("family", KIN)
def test_transformers_computes_from_no_key_that_we_do_not_know(family):
    """A newer version may read a new key, which must then be read or refused here."""
    source = inspect.getsource(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    used = set(re.findall(r'\bconfig(?:\.|, ")([a-z]\w*)', source))
    assert used > {"hidden_size", "head_dim"}
    assert used <= {*KEYS.values(), *REPLACED, "hidden_act", "attention_bias", "attention_dropout", "pad_token_id"}


# ---- refusing

SCALING = LLAMA_3_2_1B["rope_scaling"]
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5}
PER_LAYER = {"full_attention": {"rope_theta": 1e6}}
REFUSALS: list[tuple[Json, Json, str]] = [
    (LLAMA_3_2_1B, {"architectures": ["GPT2LMHeadModel"]}, 'architectures: ["GPT2LMHeadModel"] is not known; known: LlamaForCausalLM'),
    (LLAMA_3_2_1B, {"architectures": ["LlamaForCausalLM", "LlamaModel"]}, "is not known; known: LlamaForCausalLM"),
    (LLAMA_3_2_1B, {"architectures": "LlamaForCausalLM"}, "is not known; known: LlamaForCausalLM"),
    (LLAMA_3_2_1B, {"architectures": [["LlamaForCausalLM"]]}, "is not known; known: LlamaForCausalLM"),
    (LLAMA_3_2_1B, {"architectures": None, "model_type": "gemma"}, 'architectures: is missing, and model_type "gemma" does not name one'),
    (LLAMA_3_2_1B, {"architectures": None, "model_type": ["llama"]}, 'model_type ["llama"] does not name one'),
    (LLAMA_3_2_1B, {"model_type": "qwen2"}, 'model_type: "qwen2" contradicts architectures, which say LlamaForCausalLM'),
    (QWEN_3_8B, {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "num_experts: 128: a mixture of experts"),
    (MISTRAL_7B, {"num_local_experts": 8}, "num_local_experts: 8: a mixture of experts"),
    (LLAMA_3_2_1B, {"text_config": {"hidden_size": 8}}, 'text_config: {"hidden_size": 8}: a model of more than text'),
    (LLAMA_3_2_1B, {"quantization_config": {"quant_method": "fp8"}}, 'quantization_config: {"quant_method": "fp8"}: quantized weights'),
    (LLAMA_3_2_1B, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: .*code of its own, which is never run"),
    (LLAMA_3_2_1B, {"mlp_bias": True}, "mlp_bias: true: biases in the feed-forward layers"),
    (LLAMA_3_2_1B, {"attention_bias": True}, "attention_bias: true: biases in attention, which LlamaForCausalLM has not here"),
    (QWEN_3_8B, {"attention_bias": True}, "attention_bias: true: biases in attention, which Qwen3ForCausalLM has not here"),
    (LLAMA_3_2_1B, {"hidden_act": "gelu"}, 'hidden_act: "gelu" is not known; known: silu'),
    (QWEN_2_5_7B, {"is_causal": False}, "is_causal: false: attention that sees later tokens"),
    (QWEN_2_5_7B, {"use_sliding_window": True}, "use_sliding_window: true: attention within a sliding window"),
    (QWEN_2_5_7B, {"use_mrope": True}, "use_mrope: true: rotary embedding of several axes"),
    (QWEN_2_5_7B, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types: .* is not 'full_attention' for each"),
    (MISTRAL_7B, {"sliding_window": 4096}, "sliding_window: is 4096, within the model's 32768 positions: .*; null says that there is none"),
    (MISTRAL_7B, {"sliding_window": "4096"}, "sliding_window: is \"4096\""),
    (LLAMA_3_2_1B, {"sliding_window": 4096}, "sliding_window: is 4096"),
    (LLAMA_3_2_1B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type: "linear" is not known; known: def'),
    (QWEN_2_5_7B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, '"yarn" is not known'),
    (QWEN_2_5_7B, {"rope_scaling": {"type": "mrope", "rope_type": "default"}}, 'rope_type: "default" and "mrope" is not known'),
    (LLAMA_3_2_1B, {"rope_scaling": {"rope_type": ["llama3"]}}, 'rope_type: ["llama3"] is not known'),
    (LLAMA_3_2_1B, {"rope_scaling": "llama3"}, 'rope_scaling: must be a table of keys, is "llama3"'),
    (LLAMA_3_2_1B, {"rope_scaling": {**SCALING, "low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor: 2 is not 1, the only value"),
    (LLAMA_3_2_1B, {"rope_scaling": {**SCALING, "high_freq_factor": 8}}, "rope_scaling.high_freq_factor: 8 is not 4"),
    (LLAMA_3_2_1B, {"rope_scaling": {**SCALING, "original_max_position_embeddings": 4096}}, "embeddings: 4096 is not 8192"),
    (LLAMA_3_2_1B, {"original_max_position_embeddings": 4096}, "embeddings: the 4096 beside rope_scaling is not 8192"),
    (LLAMA_3_2_1B, {"rope_scaling": without(SCALING, "factor")}, "rope_scaling.factor: must be a number, is missing"),
    (LLAMA_3_2_1B, {"rope_scaling": {**SCALING, "attention_factor": 1.1}}, "attention_factor: 1.1 is not known with rope_type 'llama3'"),
    (QWEN_2_5_7B, {"rope_parameters": PER_LAYER}, "rope_parameters.full_attention: "),
    (LLAMA_3_2_1B, {"rope_scaling": HALF}, "rope_scaling.partial_rotary_factor: 0.5: rotation of a part"),
    (LLAMA_3_2_1B, {"partial_rotary_factor": 0.25}, "partial_rotary_factor: 0.25: rotation of a part"),
    (LLAMA_3_2_1B, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling: contradicts rope_parameters"),
    (QWEN_2_5_7B, {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta: 1e+06 contradicts 10000 in rope_parameters"),
    (LLAMA_3_2_1B, {"rope_theta": None}, "rope_theta: must be a number, is null"),
    (LLAMA_3_2_1B, {"rope_theta": float("inf")}, "rope_theta: must be a number, is Infinity"),
    (LLAMA_3_2_1B, {"rope_theta": 10**400}, "rope_theta: must be a number, is 1000"),
    (LLAMA_3_2_1B, {"hidden_size": 2048.0}, "hidden_size: must be a whole number of at least 1, is 2048.0"),
    (LLAMA_3_2_1B, {"num_hidden_layers": True}, "num_hidden_layers: must be a whole number of at least 1, is true"),
    (LLAMA_3_2_1B, {"tie_word_embeddings": "true"}, 'tie_word_embeddings: must be true or false, is "true"'),
    (LLAMA_3_2_1B, {"rms_norm_eps": "1e-5"}, 'rms_norm_eps: must be a number, is "1e-5"'),
    (QWEN_3_8B, {"head_dim": None}, "head_dim: must be a whole number of at least 1, is null"),
    (LLAMA_3_2_1B, {"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_query_groups 5"),
    (LLAMA_3_2_1B, {"head_dim": 65}, "a head has 65 channels; RoPE rotates pairs"),
    (LLAMA_3_2_1B, {"rms_norm_eps": 0}, "norm_epsilon is 0.0, must lie between 0 and 1"),
    (LLAMA_3_2_1B, {"rope_scaling": {**SCALING, "factor": 0.5}}, "rope_scaling_factor is 0.5, must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("published", "changes", "expected"), REFUSALS, ids=[str(i) for i in range(len(REFUSALS))])
def test_what_cannot_be_represented_is_refused_by_name(published, changes, expected):
    said = refusal({**published, **changes})
    assert said.startswith("model/config.json: ")
    pieces = expected.split(".*")
    assert all(piece in said for piece in pieces), said


def test_all_that_is_wrong_is_said_at_once():
    wrong = {"mlp_bias": True, "rope_scaling": {"type": "yarn"}, "hidden_size": "8", "num_experts": 2, "hidden_act": "gelu"}
    lines = refusal({**without(LLAMA_3_2_1B, "vocab_size"), **wrong}).splitlines()
    assert lines[0] == "model/config.json: not a model that can be converted:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "num_experts", "mlp_bias", "hidden_size", "vocab_size", "rope_scaling.rope_type", "hidden_act",
    ]  # fmt: skip


def test_what_is_no_config_is_refused():
    for text, said in [
        (b"{", r"model/config\.json: not JSON \(Expecting property name"),
        (b"\xff\xfe\x00", r"model/config\.json: not JSON"),
        (b"", r"model/config\.json: not JSON"),
        (b"[" * 100_000, r"model/config\.json: not JSON"),
        (b"[1]", r"model/config\.json: a config\.json holds one object, this holds \[1\]; fetch"),
        (b"null", "this holds null"),
    ]:
        with pytest.raises(ConfigError, match=said):
            parse_config(text, "model/config.json")
    assert parse_config(b'{"a": 1}', "x") == {"a": 1}
    assert "this holds [1]" in refusal([1])


# ---- writing


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_is_written_and_its_own_writing_of_that_reads_back(model, dtype, tmp_path: Path):
    from transformers import AutoConfig

    made = config_from_model(model, dtype)
    (tmp_path / "config.json").write_text(json.dumps(made))
    config = AutoConfig.from_pretrained(tmp_path)
    assert as_transformers_computes(made) == as_we_say(model)
    assert str(config.dtype) == f"torch.{dtype}"
    assert config.architectures == [KIN[model.family].architecture]
    assert (config.bos_token_id, config.eos_token_id) == (None, None)  # not Llama's 1 and 2
    assert getattr(config, "sliding_window", None) is None
    config.save_pretrained(tmp_path)
    again = parse_config((tmp_path / "config.json").read_bytes(), "config.json")
    assert "rope_parameters" in again
    assert model_from_config(again, "config.json", model.name) == model_from_config(made, "config.json", model.name) == model


def test_what_is_written_has_the_keys_that_transformers_4_reads():
    made = config_from_model(SHAPES[1], "bfloat16")
    assert (made["rope_theta"], made["rope_scaling"]["rope_type"], made["torch_dtype"]) == (500_000.0, "llama3", "bfloat16")
    assert not {"rope_parameters", "dtype"} & set(made)


@pytest.mark.parametrize("field", [field for field in KEYS if field != "family"])
def test_a_written_config_that_says_anything_else_is_noticed(field):
    """The fault: one key at a time says something else; transformers then computes something else, and so do we."""
    model = SHAPES[1]
    made = config_from_model(model, "float32")
    table, key = (made["rope_scaling"], "factor") if field == "rope_scaling_factor" else (made, KEYS[field])
    table[key] = (not table[key]) if isinstance(table[key], bool) else table[key] * 2
    found = model_from_config(made, "config.json", "m")
    changed = [line.split(":")[0] for line in contradictions(model, found)]
    assert field in changed
    assert set(changed) <= {field, "channels_per_head"}
    assert as_transformers_computes(made) == as_we_say(found) if field != "hidden_size" else True


@pytest.mark.parametrize("published", [LLAMA_3_2_1B, LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_8B, MISTRAL_7B])
def test_the_originals_other_keys_are_kept(published):
    made = config_from_model(read(published), "bfloat16", like=published)
    known = {"head_dim", "sliding_window", "use_mrope", "rope_scaling", "rope_theta"}  # made explicit, or a "no" left out
    assert without(made, *known) == {**without(published, *known), **({"attention_bias": False} if "attention_bias" in published else {})}
    assert made["rope_theta"] == published["rope_theta"]
    assert made["rope_scaling"] == published.get("rope_scaling")


def test_an_original_in_the_newer_style_leaves_nothing_that_contradicts():
    original = json.loads(theirs({**QWEN_2_5_7B, "rope_scaling": SCALING}).to_json_string())
    assert {"rope_parameters", "dtype", "layer_types"} <= set(original)
    trained = replace(read(original), num_layers=3, rope_base=2e6, rope_scaling_factor=1.0, vocab_size=100, tied_embeddings=True)
    made = config_from_model(trained, "float16", like=original)
    assert not {"rope_parameters", "dtype", "layer_types"} & set(made)
    assert (made["bos_token_id"], made["eos_token_id"]) == (151643, 151643)
    assert as_transformers_computes(made) == as_we_say(trained)
    assert str(theirs(made).dtype) == "torch.float16"


def test_an_original_of_another_family_does_not_colour_the_model():
    made = config_from_model(replace(TINY, family="llama"), "float32", like={**QWEN_2_5_7B, "use_sliding_window": True})
    assert as_transformers_computes(made) == as_we_say(TINY)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match=r"dtype 'int8': weights are written as one of float32, bfloat16, float16"):
        config_from_model(TINY, "int8")
    with pytest.raises(ConfigError, match=r"hidden_size 30 is not a multiple of num_attention_heads 4, which transformers refuses"):
        config_from_model(replace(TINY, hidden_size=30, head_dim=8), "float32")
    with pytest.raises(Exception, match="not a multiple"):
        theirs({**config_from_model(TINY, "float32"), "hidden_size": 30})
    with pytest.raises(ConfigError, match="is_causal: false"):
        config_from_model(TINY, "float32", like={"is_causal": False})


# ---- comparing


def test_contradictions_name_the_key_and_both_values():
    recipe = models.llama_3_2_1b()
    assert contradictions(recipe, replace(recipe, name="x", init_std=0.5, hidden_dropout=0.1, attention_dropout=0.1, head_dim=64)) == []
    found = replace(recipe, family="qwen2", num_layers=28, rope_scaling_factor=8.0, head_dim=128, tied_embeddings=False)
    assert contradictions(recipe, found) == [
        "family: 'llama' in the recipe, 'qwen2' in config.json (architectures)",
        "num_layers: 16 in the recipe, 28 in config.json (num_hidden_layers)",
        "channels_per_head: 64 in the recipe, 128 in config.json (head_dim)",
        "rope_scaling_factor: 32.0 in the recipe, 8.0 in config.json (rope_scaling.factor)",
        "tied_embeddings: True in the recipe, False in config.json (tie_word_embeddings)",
    ]
