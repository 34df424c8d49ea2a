"""Two layers of the CPU path, where Megatron-Core's own need apex, Transformer Engine or more memory.

Shapes: S sequence (query), K sequence (key), B batch, N heads of this rank, G query groups of this
rank, D channels per head, H hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism (Megatron's torch norm asserts it off)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        # Megatron sums the gradients of marked weights over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CoreAttention(MegatronModule):
    """Causal attention by torch's fused kernel: no S x K matrix is kept, groups are not repeated.

    Without a mask attention is causal; a mask (True = hidden) is taken as it is.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        del layer_number, attn_mask_type, attention_type, cp_comm_type, pg_collection  # part of Megatron's call
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Queries SBND, keys and values KBGD, mask B1SK or None; returns SB(ND)."""
        del attn_mask_type
        assert attention_bias is None, "the CPU attention takes no bias"
        assert packed_seq_params is None, "the CPU attention takes masks, not packed sequences"
        query_BNSD, key_BGKD, value_BGKD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_BNSD,
            key_BGKD,
            value_BGKD,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and query.size(0) == key.size(0),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        context_SBND = context_BNSD.permute(2, 0, 1, 3)
        return context_SBND.reshape(*context_SBND.shape[:2], -1)
