"""Hugging Face's config.json <-> `ModelConfig`, for LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.

A key that is missing means what it means to `transformers` (the family's default), except for the sizes
of tensors, which must stand there. What a `ModelConfig` cannot say is refused, all of it in one error:
a config that was read with something left out computes other numbers without a word.

Both key styles are read: `rope_theta`, `rope_scaling`, `torch_dtype` (transformers 4) and `rope_parameters`,
`dtype` (5). The older one is written, because both generations read it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.config.model import Family, ModelConfig
from megatron_ext.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Kin:
    """A family's class in `transformers`, and what that class takes where a key is missing."""

    architecture: str
    positions: int
    groups: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    window: int | None = None  # sliding window, in tokens; None: whole sequence


KIN: dict[Family, _Kin] = {
    "llama": _Kin("LlamaForCausalLM", positions=2048),
    "mistral": _Kin("MistralForCausalLM", positions=131_072, groups=8, window=4096),
    "qwen2": _Kin("Qwen2ForCausalLM", positions=32_768, groups=32),
    "qwen3": _Kin("Qwen3ForCausalLM", positions=32_768, groups=32, head_dim=128),
}
NORM_EPSILON, INIT_STD, ROPE_BASE = 1e-6, 0.02, 10_000.0  # the same in all four

SIZES = {  # our field: their key
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
KEYS = {
    "family": "architectures",
    **SIZES,
    "num_query_groups": "num_key_value_heads",
    "channels_per_head": "head_dim",
    "max_positions": "max_position_embeddings",
    "rope_base": "rope_theta",
    "rope_scaling_factor": "rope_scaling.factor",
    "tied_embeddings": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}

EXPERTS = "a mixture of experts; only dense models are known here"
NESTED = "a model of more than text; only text models are known here"
REFUSED = {  # keys that make it another model as soon as they hold anything but null, false, 0 or nothing
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "text_config": NESTED,
    "vision_config": NESTED,
    "audio_config": NESTED,
    "quantization_config": "quantized weights; take the model's float weights",
    "mlp_bias": "biases in the feed-forward layers, which no family has here",
    "use_sliding_window": "attention within a sliding window; only attention over the whole sequence is known here",
    "use_mrope": "rotary embedding of several axes; only that of positions in a text is known here",
    "per_layer_config": "layers that differ from one another",
    "auto_map": "the model brings code of its own, which is never run here; delete the key if the architecture alone describes it",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # Megatron-Core's constants
ANY_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_KEYS = {"default": ANY_ROPE, "llama3": {*ANY_ROPE, "factor", *LLAMA3}}

# What never passes from an original to a written config: the newer key style, and what says nothing but "no" in all that we write.
REPLACED = {
    *("rope_parameters", "dtype", "layer_types", "sliding_window", "partial_rotary_factor", "original_max_position_embeddings"),
    *REFUSED,
}


class _Reader:
    """Typed reading of one table of keys; what is wrong goes to `problems`, and a stand-in is returned."""

    def __init__(self, values: Json, prefix: str = "", problems: list[str] | None = None) -> None:
        self.values, self.prefix = values, prefix
        self.problems = [] if problems is None else problems

    def refuse(self, key: str, why: str) -> None:
        """Note that a key cannot be taken."""
        self.problems.append(f"{self.prefix}{key}: {why}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._value(key, default)
        if type(value) is int and value >= 1:
            return value
        return int(self._wrong(key, value, "a whole number of at least 1"))

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, whole or not."""
        value = self._value(key, default)
        if type(value) in (int, float) and abs(value) < 1e300:  # neither NaN nor what no float holds
            return float(value)
        return float(self._wrong(key, value, "a number"))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        return value if type(value) is bool else bool(self._wrong(key, value, "true or false"))

    def _value(self, key: str, default: Any) -> Any:
        return self.values.get(key, _MISSING if default is None else default)

    def _wrong(self, key: str, value: Any, expected: str) -> int:
        self.refuse(key, f"must be {expected}, {'is missing' if value is _MISSING else f'is {_short(value)}'}")
        return 1


_MISSING = object()


def parse_config(text: bytes, where: str) -> Json:
    """The object that a config.json holds; `ConfigError` for anything that is not one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets without end
        raise ConfigError(f"{where}: not JSON ({error}); fetch the file again") from None
    return _object(values, where)


def model_from_config(values: Json, where: str, name: str) -> ModelConfig:
    """The model that a config.json describes; `where` (its file) opens the error that lists what cannot be represented."""
    reader = _Reader(_object(values, where))
    for key, why in REFUSED.items():
        if values.get(key):
            reader.refuse(key, f"{_short(values[key])}: {why}")
    family = _family(reader)
    fields: Json = {}
    if family is not None:
        fields = {"family": family, **_sizes(reader, family), **_numbers(reader)}
        _check_attention(reader, family, fields["max_positions"], fields["num_layers"])
    if reader.problems:
        raise ConfigError("\n".join([f"{where}: not a model that can be converted:", *(f"  {line}" for line in reader.problems)]))
    try:
        return ModelConfig(name=name, **fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def config_from_model(model: ModelConfig, dtype: str, like: Json | None = None) -> Json:
    """The config.json of a model, for transformers 4.45 and newer, vLLM among its readers.

    `dtype` is that of the weights beside it. Of `like`, the config that the model came with, all keys are kept
    that say nothing about the model: token ids, versions. Without it the token ids are null, as nobody knows
    them here; `transformers` would take Llama's where they are missing.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: weights are written as one of {', '.join(DTYPES)}")
    if model.family == "llama" and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model {model.name}: hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}, "
            f"which transformers refuses in a Llama; family='mistral' computes the same and may have it"
        )
    unknown = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kept = {key: value for key, value in (unknown if like is None else like).items() if key not in REPLACED}
    made = {**kept, **_keys(model), "torch_dtype": dtype}
    assert not contradictions(model, model_from_config(made, "config.json", model.name)), made
    return made


def contradictions(model: ModelConfig, found: ModelConfig, whose: str = "the recipe") -> list[str]:
    """A line for each thing that a model (a recipe's, or `whose` it is) and one read from a config.json say differently.

    Names do not count, nor what only training sees: first weights' deviation and dropout.
    """
    pairs = ((field, key, getattr(model, field), getattr(found, field)) for field, key in KEYS.items())
    return [f"{field}: {ours!r} in {whose}, {theirs!r} in config.json ({key})" for field, key, ours, theirs in pairs if ours != theirs]


def _object(values: Any, where: str) -> Json:
    if isinstance(values, dict):
        return values
    raise ConfigError(f"{where}: a config.json holds one object, this holds {_short(values)}; fetch the file again")


def _family(reader: _Reader) -> Family | None:
    """From `architectures`, and from `model_type` where that is missing; None is noted."""
    architectures, kind = reader.values.get("architectures"), reader.values.get("model_type")
    known = f"known: {', '.join(kin.architecture for kin in KIN.values())}"
    for family, kin in KIN.items():
        if architectures == [kin.architecture] and kind not in (None, family):
            reader.refuse("model_type", f"{_short(kind)} contradicts architectures, which say {kin.architecture}")
        if architectures == [kin.architecture] or (not architectures and kind == family):
            return family
    if architectures:
        reader.refuse("architectures", f"{_short(architectures)} is not known; {known}")
    else:
        reader.refuse("architectures", f"is missing, and model_type {_short(kind)} does not name one; {known}")
    return None


def _sizes(reader: _Reader, family: Family) -> Json:
    kin, values = KIN[family], reader.values
    fields: Json = {field: reader.whole(key) for field, key in SIZES.items()}
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    null_groups = "num_key_value_heads" in values and values["num_key_value_heads"] is None
    fields["num_query_groups"] = heads if null_groups else reader.whole("num_key_value_heads", kin.groups or heads)
    fields["max_positions"] = reader.whole("max_position_embeddings", kin.positions)
    null_head_dim = kin.head_dim is None and values.get("head_dim") is None  # Qwen3's may be missing, and is not null
    head_dim = None if null_head_dim else reader.whole("head_dim", kin.head_dim)
    fields["head_dim"] = None if head_dim is None or head_dim * heads == hidden else head_dim  # as a recipe says it
    return fields


def _numbers(reader: _Reader) -> Json:
    base, factor = _rope(reader)
    null_dropout = reader.values.get("attention_dropout") is None
    return {
        "rope_base": base,
        "rope_scaling_factor": factor,
        "tied_embeddings": reader.flag("tie_word_embeddings", False),
        "norm_epsilon": reader.number("rms_norm_eps", NORM_EPSILON),
        "init_std": reader.number("initializer_range", INIT_STD),
        "attention_dropout": 0.0 if null_dropout else reader.number("attention_dropout"),
    }


def _check_attention(reader: _Reader, family: Family, positions: int, layers: int) -> None:
    values, kin = reader.values, KIN[family]
    window = values.get("sliding_window", kin.window)
    if family in ("llama", "mistral") and window is not None:  # Qwen's has no effect without use_sliding_window
        given = "is missing, which means" if "sliding_window" not in values else "is"
        if type(window) is not int or window < positions:
            why = f"{given} {_short(window)}, within the model's {positions} positions: a sliding window is not known here"
            reader.refuse("sliding_window", f"{why}; null says that there is none")
    kinds = values.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        reader.refuse("layer_types", f"{_short(kinds)} is not 'full_attention' for each of {layers} layers, the only kind known here")
    if values.get("attention_bias") and family != "qwen2":
        reader.refuse("attention_bias", f"{_short(values['attention_bias'])}: biases in attention, which {kin.architecture} has not here")
    if values.get("is_causal", True) is not True:
        reader.refuse("is_causal", f"{_short(values['is_causal'])}: attention that sees later tokens")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        reader.refuse("hidden_act", f"{_short(values['hidden_act'])} is not known; known: silu")


def _rope(reader: _Reader) -> tuple[float, float]:
    """Base and Llama 3 factor (1.0: unscaled), the same from every place that names them."""
    values = reader.values
    top = reader.number("rope_theta", ROPE_BASE)
    _check_whole_rotation(reader)
    found = {key: _rope_table(reader, key, top) for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    if len(set(found.values())) > 1:
        reader.refuse("rope_scaling", "contradicts rope_parameters; delete the one that is wrong")
    for key, (base, _) in found.items():
        if "rope_theta" in values and base != top:
            reader.refuse("rope_theta", f"{top:g} contradicts {base:g} in {key}; delete the one that is wrong")
    return next(iter(found.values()), (top, 1.0))


def _rope_table(reader: _Reader, key: str, top: float) -> tuple[float, float]:
    table = reader.values[key]
    if not isinstance(table, dict):
        reader.refuse(key, f"must be a table of keys, is {_short(table)}")
        return top, 1.0
    inner = _Reader(table, f"{key}.", reader.problems)
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in list(ROPE_KEYS) or table.get("type", kind) != kind:  # a list, as the kind may be anything
        said = sorted({_short(table[word]) for word in ("rope_type", "type") if word in table})
        inner.refuse("rope_type", f"{' and '.join(said)} is not known; known: {', '.join(ROPE_KEYS)}")
        return top, 1.0
    for word in sorted(set(table) - ROPE_KEYS[kind]):
        inner.refuse(word, f"{_short(table[word])} is not known with rope_type '{kind}'")
    _check_whole_rotation(inner)
    base = inner.number("rope_theta", top)
    return base, _llama3_factor(inner, reader.values) if kind == "llama3" else 1.0


def _llama3_factor(table: _Reader, values: Json) -> float:
    outer = "original_max_position_embeddings"
    for key, fixed in LLAMA3.items():
        given = table.number(key)
        if given != fixed and key in table.values:
            table.refuse(key, f"{given:g} is not {fixed:g}, the only value that Megatron-Core computes with")
    if values.get(outer, LLAMA3[outer]) != LLAMA3[outer]:  # transformers 5 prefers it to the table's
        table.refuse(outer, f"the {_short(values[outer])} beside {table.prefix[:-1]} is not {LLAMA3[outer]:g}")
    return table.number("factor")


def _check_whole_rotation(reader: _Reader) -> None:
    part = reader.values.get("partial_rotary_factor")
    if part is not None and part != 1:
        reader.refuse("partial_rotary_factor", f"{_short(part)}: rotation of a part of each head; only of the whole is known here")


def _keys(model: ModelConfig) -> Json:
    """Every key by which a reader learns what the model is."""
    scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3} if model.rope_scaling_factor != 1.0 else None
    made: Json = {
        "architectures": [KIN[model.family].architecture],
        "model_type": model.family,
        **{key: getattr(model, field) for field, key in SIZES.items()},
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.channels_per_head,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "rope_theta": model.rope_base,
        "rope_scaling": scaling,
        "attention_dropout": model.attention_dropout,
    }
    absent: dict[Family, Json] = {  # what the family's class could have and this model has not
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": None},
        "qwen2": {"sliding_window": None, "use_sliding_window": False},
        "qwen3": {"sliding_window": None, "use_sliding_window": False, "attention_bias": False},
    }
    return {**made, **absent[model.family]}


def _short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    return json.dumps(value)[:120]
