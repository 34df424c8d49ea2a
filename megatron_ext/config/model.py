"""What a model is: sizes, and the arithmetic on them (parameters, FLOPs). No torch."""

from __future__ import annotations

import math
from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

# What sets the families apart is small: qwen2 has biases on queries, keys and values, qwen3 norms on queries and keys;
# mistral computes what llama does, under its own name.
Family = Literal["llama", "mistral", "qwen2", "qwen3"]
VOCABULARY_MULTIPLE = 128  # design: padded once, recorded, the same for every tensor-parallel size


@config
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, SwiGLU, RoPE, grouped queries; `family` says which of its kin."""

    name: str
    family: Family = "llama"
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    max_positions: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_base: float = 10_000.0
    rope_scaling_factor: float = 1.0  # Llama 3.1/3.2's scaling (low 1, high 4, original 8192); 1.0: none
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size", "max_positions")
        for key in sizes:
            if getattr(self, key) < 1:
                raise ConfigError(f"model {self.name}: {key} is {getattr(self, key)}, must be at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model {self.name}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model {self.name}: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; set head_dim"
            )
        if self.channels_per_head < 2 or self.channels_per_head % 2:
            raise ConfigError(f"model {self.name}: a head has {self.channels_per_head} channels; RoPE rotates pairs, so make it even")
        if not 1.0 < self.rope_base < math.inf:
            raise ConfigError(f"model {self.name}: rope_base is {self.rope_base}, must be more than 1")
        if not 1.0 <= self.rope_scaling_factor < math.inf:
            raise ConfigError(f"model {self.name}: rope_scaling_factor is {self.rope_scaling_factor}, must be at least 1 (1: no scaling)")
        if not 0.0 < self.norm_epsilon < 1.0:
            raise ConfigError(f"model {self.name}: norm_epsilon is {self.norm_epsilon}, must lie between 0 and 1")

    @property
    def channels_per_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys pass an RMSNorm before RoPE."""
        return self.family == "qwen3"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary, padded to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer: attention, SwiGLU and its norms."""
        queries = self.num_attention_heads * self.channels_per_head
        keys_values = 2 * self.num_query_groups * self.channels_per_head
        bias = queries + keys_values if self.qkv_bias else 0
        attention = self.hidden_size * (queries + keys_values) + bias + queries * self.hidden_size
        return attention + 3 * self.hidden_size * self.ffn_hidden_size + self.num_layer_norm_parameters

    @property
    def num_layer_norm_parameters(self) -> int:
        """Parameters of one layer's norms, which every tensor-parallel rank holds whole."""
        return 2 * self.hidden_size + (2 * self.channels_per_head if self.qk_norm else 0)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of one (padded) embedding matrix."""
        return self.padded_vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters, the padded vocabulary included; tied embeddings count once."""
        matrices = 1 if self.tied_embeddings else 2
        return self.num_layers * self.num_layer_parameters + matrices * self.num_embedding_parameters + self.hidden_size

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs to train on one token: 6 x the matrix parameters + causal attention.

        The matrices are the layers' and the output head; attention is 12 x layers x heads x channels
        x length / 2, the half for causality (Narayanan et al. 2021, appendix; PaLM appendix B).
        Recomputation is not counted: this is the M in MFU.
        """
        layer_matrices = self.num_layer_parameters - self.num_layer_norm_parameters
        matrices = self.num_layers * layer_matrices + self.num_embedding_parameters
        attention = 6 * self.num_layers * self.num_attention_heads * self.channels_per_head * sequence_length
        return 6.0 * matrices + attention
