"""Sizes of the models: Llama 3.1 and 3.2, Qwen2.5, and toys. Values from each model's published config.json."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.model import ModelConfig

LLAMA_3_VOCABULARY = 128_256  # 128,000 text tokens and 256 special ones; a multiple of 128 as it is
LLAMA_3_POSITIONS = 131_072


def llama_3_2_1b() -> ModelConfig:
    """Llama-3.2-1B: 1,235,814,400 parameters."""
    return ModelConfig(
        name="llama_3_2_1b",
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=LLAMA_3_VOCABULARY,
        max_positions=LLAMA_3_POSITIONS,
        rope_base=500_000.0,
        rope_scaling_factor=32.0,  # Llama 3.2; 3.1 has 8
        tied_embeddings=True,
    )


def llama_3_2_3b() -> ModelConfig:
    """Llama-3.2-3B: 3,212,749,824 parameters."""
    return replace(llama_3_2_1b(), name="llama_3_2_3b", num_layers=28, hidden_size=3072, num_attention_heads=24)


def llama_3_1_8b() -> ModelConfig:
    """Llama-3.1-8B: 8,030,261,248 parameters."""
    return replace(
        llama_3_2_1b(),
        name="llama_3_1_8b",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14_336,
        rope_scaling_factor=8.0,
        tied_embeddings=False,
    )


def qwen2_5_1_5b() -> ModelConfig:
    """Qwen2.5-1.5B: 1,543,714,304 parameters.

    `vocab_size` is the number of embedding rows that the checkpoint holds (151,936 = 128 x 1,187),
    more than its tokenizer's 151,665 ids.
    """
    return ModelConfig(
        name="qwen2_5_1_5b",
        family="qwen2",
        num_layers=28,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_attention_heads=12,
        num_query_groups=2,
        vocab_size=151_936,
        max_positions=131_072,
        rope_base=1_000_000.0,
        tied_embeddings=True,
        norm_epsilon=1e-6,
    )


def qwen2_5_3b() -> ModelConfig:
    """Qwen2.5-3B: 3,085,938,688 parameters; the paper's RL comparison."""
    return replace(
        qwen2_5_1_5b(),
        name="qwen2_5_3b",
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=11_008,
        num_attention_heads=16,
        max_positions=32_768,
    )


def qwen2_5_7b() -> ModelConfig:
    """Qwen2.5-7B: 7,615,616,512 parameters; its embedding has 152,064 rows (128 x 1,188)."""
    return replace(
        qwen2_5_1_5b(),
        name="qwen2_5_7b",
        hidden_size=3584,
        ffn_hidden_size=18_944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152_064,
        tied_embeddings=False,
    )


def toy(vocab_size: int) -> ModelConfig:
    """A Llama of 4 layers x 128 for a CPU: as many grouped queries and as much SwiGLU as the real one, in small."""
    return ModelConfig(
        name="toy",
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=vocab_size,
        max_positions=1024,
        tied_embeddings=True,
    )


def smallest(vocab_size: int) -> ModelConfig:
    """A toy of 2 layers x 64, for runs of seconds."""
    return replace(toy(vocab_size), name="smallest", num_layers=2, hidden_size=64, ffn_hidden_size=192)
