"""The forward pass of a trainer's own parameters, made for generation: few operations a layer, no Megatron in it.

Parameters are looked up once and used as they are, so a change in place is seen at the next call. Tensor, pipeline and virtual
pipeline parallelism as in training; sequence parallelism changes only where training keeps its activations. Products are in the
parameters' dtype: BF16 also where training computes them in FP8.

Shapes: T tokens laid flat, H hidden, F features of a product that is split over ranks, G query groups of this rank, R queries of a
group, X the R queries with their key and value, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.nn.functional import embedding, linear, rms_norm, silu

from megatron_ext.config.model import ModelConfig
from megatron_ext.distributed import Groups
from megatron_ext.generation.kv_cache import Attend, KVCache, Places
from megatron_ext.generation.rotary import RotaryTable, Rotation


@dataclass(frozen=True)
class _Layer:
    """References to a layer's parameters. The qkv rows lie as Megatron has them: each group's queries, its key, its value."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    projection: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """A virtual stage: its layers, and what stands before the first and behind the last of the model."""

    layers: tuple[_Layer, ...]
    embedding: torch.Tensor | None
    final_norm: torch.Tensor | None
    output: torch.Tensor | None


class LeanModel:
    """One copy of a model; all ranks of the copy call it alike."""

    def __init__(self, chunks: Sequence[GPTModel], model: ModelConfig, groups: Groups) -> None:
        self._chunks = [_chunk(chunk) for chunk in chunks]
        self._model, self._groups = model, groups
        self._tensor_group = groups.collection.tp if groups.plan.tensor > 1 else None
        self._stages = dist.get_process_group_ranks(groups.collection.pp)
        self.dtype = self._chunks[0].layers[0].qkv.dtype
        self._channels, self._epsilon = model.channels_per_head, model.norm_epsilon
        self._queries = model.num_attention_heads // model.num_query_groups
        # One rounding instead of two. In BF16 that would be another number than the trainer's, which rounds the product first.
        self._fuse_residual = self._tensor_group is None and self.dtype == torch.float32
        self._table = RotaryTable(chunks[0].rotary_pos_emb.inv_freq.to(groups.device), self._queries)

    def empty_cache(self) -> KVCache:
        """A cache for this rank's layers and query groups."""
        num_layers = sum(len(chunk.layers) for chunk in self._chunks)
        num_groups = self._model.num_query_groups // self._groups.plan.tensor
        return KVCache(num_layers, num_groups, self._channels, self.dtype, self._groups.device)

    def forward(self, tokens_T: torch.Tensor, places: Places, with_logits: bool) -> torch.Tensor | None:
        """FP32 logits TV on the last pipeline stage, without the rows that pad the vocabulary; None elsewhere, or where not asked for."""
        rotation = self._table.at(places.positions_T, places.num_positions)
        hidden_TH: torch.Tensor | None = None
        index = 0
        for chunk in self._chunks:
            hidden_TH = self._embed(chunk.embedding, tokens_T) if chunk.embedding is not None else self._receive(tokens_T.shape[0])
            for layer in chunk.layers:
                hidden_TH = self._layer(layer, index, hidden_TH, rotation, places.attend)
                index += 1
            if chunk.final_norm is None:
                self._send(hidden_TH)
            elif with_logits:
                return self._logits_TV(chunk, hidden_TH)
        return None

    def _layer(self, layer: _Layer, index: int, hidden_TH: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        size = hidden_TH.shape[-1:]
        qkv_TF = linear(rms_norm(hidden_TH, size, layer.attention_norm, self._epsilon), layer.qkv, layer.qkv_bias)
        qkv_TGXC = qkv_TF.view(hidden_TH.shape[0], -1, self._queries + 2, self._channels)
        if layer.query_norm is not None:
            self._norm_heads(layer, qkv_TGXC)
        qkv_TGXC = rotation.rotate(qkv_TGXC)
        context_TF = attend(index, qkv_TGXC[:, :, : self._queries], qkv_TGXC[:, :, self._queries :])
        hidden_TH = self._add(hidden_TH, context_TF, layer.projection)
        gate_TF, up_TF = linear(rms_norm(hidden_TH, size, layer.mlp_norm, self._epsilon), layer.gate_up).chunk(2, dim=-1)
        return self._add(hidden_TH, silu(gate_TF).mul_(up_TF), layer.down)

    def _norm_heads(self, layer: _Layer, qkv_TGXC: torch.Tensor) -> None:
        """Qwen 3's norms of queries and keys, in place."""
        heads, size = self._queries, (self._channels,)
        qkv_TGXC[:, :, :heads] = rms_norm(qkv_TGXC[:, :, :heads], size, layer.query_norm, self._epsilon)
        qkv_TGXC[:, :, heads] = rms_norm(qkv_TGXC[:, :, heads], size, layer.key_norm, self._epsilon)

    def _add(self, hidden_TH: torch.Tensor, wide_TF: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The residual plus a row-parallel product."""
        if self._fuse_residual:
            return torch.addmm(hidden_TH, wide_TF, weight.t())
        product_TH = linear(wide_TF, weight)
        if self._tensor_group is not None:
            dist.all_reduce(product_TH, group=self._tensor_group)
        return product_TH.add_(hidden_TH)

    def _embed(self, weight: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        if self._tensor_group is None:
            return embedding(tokens_T, weight)
        own_T = tokens_T - self._groups.tensor_rank * weight.shape[0]
        elsewhere_T = (own_T < 0) | (own_T >= weight.shape[0])
        hidden_TH = embedding(own_T.masked_fill(elsewhere_T, 0), weight).masked_fill_(elsewhere_T.unsqueeze(-1), 0.0)
        dist.all_reduce(hidden_TH, group=self._tensor_group)
        return hidden_TH

    def _logits_TV(self, chunk: _Chunk, hidden_TH: torch.Tensor) -> torch.Tensor:
        assert chunk.final_norm is not None
        assert chunk.output is not None
        logits_TV = linear(rms_norm(hidden_TH, hidden_TH.shape[-1:], chunk.final_norm, self._epsilon), chunk.output).float()
        if self._tensor_group is not None:
            parts_TV = [torch.empty_like(logits_TV) for _ in range(self._groups.plan.tensor)]
            dist.all_gather(parts_TV, logits_TV, group=self._tensor_group)
            logits_TV = torch.cat(parts_TV, dim=-1)
        return logits_TV[:, : self._model.vocab_size]

    def _receive(self, num_tokens: int) -> torch.Tensor:
        """From the stage before this one; of the first stage that is the last, one virtual stage earlier."""
        hidden_TH = torch.empty(num_tokens, self._model.hidden_size, dtype=self.dtype, device=self._groups.device)
        dist.recv(hidden_TH, src=self._stages[self._groups.pipeline_rank - 1])
        return hidden_TH

    def _send(self, hidden_TH: torch.Tensor) -> None:
        dist.send(hidden_TH, dst=self._stages[(self._groups.pipeline_rank + 1) % len(self._stages)])


def _chunk(chunk: GPTModel) -> _Chunk:
    held = dict(chunk.named_parameters())
    count = len(chunk.decoder.layers)
    output = None
    if chunk.post_process:
        output = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else held["output_layer.weight"]
    return _Chunk(
        layers=tuple(_layer(held, f"decoder.layers.{index}.") for index in range(count)),
        embedding=held["embedding.word_embeddings.weight"] if chunk.pre_process else None,
        final_norm=held["decoder.final_layernorm.weight"] if chunk.post_process else None,
        output=output,
    )


def _layer(held: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
    """Transformer Engine keeps a norm with the product behind it, under that one's name."""

    def norm(product: str, own: str) -> torch.Tensor:
        fused = f"{prefix}{product}.layer_norm_weight"
        return held[fused] if fused in held else held[f"{prefix}{own}.weight"]

    return _Layer(
        attention_norm=norm("self_attention.linear_qkv", "input_layernorm"),
        qkv=held[f"{prefix}self_attention.linear_qkv.weight"],
        qkv_bias=held.get(f"{prefix}self_attention.linear_qkv.bias"),
        query_norm=held.get(f"{prefix}self_attention.q_layernorm.weight"),
        key_norm=held.get(f"{prefix}self_attention.k_layernorm.weight"),
        projection=held[f"{prefix}self_attention.linear_proj.weight"],
        mlp_norm=norm("mlp.linear_fc1", "pre_mlp_layernorm"),
        gate_up=held[f"{prefix}mlp.linear_fc1.weight"],
        down=held[f"{prefix}mlp.linear_fc2.weight"],
    )
