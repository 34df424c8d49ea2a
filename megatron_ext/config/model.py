"""What a model is: sizes, and the arithmetic on them (parameters, FLOPs). No torch."""

from __future__ import annotations

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

VOCABULARY_MULTIPLE = 128  # design: padded once, recorded, the same for every tensor-parallel size


@config
class ModelConfig:
    """A Llama-shaped decoder: RMSNorm, SwiGLU, RoPE, grouped queries, no biases but QKV's."""

    name: str
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
    qkv_bias: bool = False
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

    @property
    def channels_per_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary, padded to a multiple of 128."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer: attention, SwiGLU and two norms."""
        queries = self.num_attention_heads * self.channels_per_head
        keys_values = 2 * self.num_query_groups * self.channels_per_head
        bias = queries + keys_values if self.qkv_bias else 0
        attention = self.hidden_size * (queries + keys_values) + bias + queries * self.hidden_size
        return attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size

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
        layer_matrices = self.num_layer_parameters - 2 * self.hidden_size
        matrices = self.num_layers * layer_matrices + self.num_embedding_parameters
        attention = 6 * self.num_layers * self.num_attention_heads * self.channels_per_head * sequence_length
        return 6.0 * matrices + attention
