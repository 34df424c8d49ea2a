"""One table of names and reshapes between Megatron and Hugging Face, used in both directions.

A row is one tensor of a Megatron checkpoint (one layer of it, where a checkpoint stacks the layers) and
the Hugging Face tensors that hold the same numbers. `table(model)` holds every tensor of the model once
on either side. Nothing is computed: numbers are moved, so both directions are exact in every dtype.

    same     one tensor as it is
    rows     the vocabulary's rows; Megatron has zero rows behind them, up to the padded vocabulary
    qkv      queries, keys, values: Megatron lays each group's queries, its key and its value behind one another
    gate_up  SwiGLU's two projections, one behind the other

Shapes: V vocabulary, P padded vocabulary, H hidden, F feed-forward, N query heads, G groups, D channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ext.config.model import ModelConfig

Kind = Literal["same", "rows", "qkv", "gate_up"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and its Hugging Face counterparts."""

    key: str  # in a Megatron checkpoint
    layer: int | None  # its place among the stacked layers; None: not stacked
    shape: Shape  # of the Megatron tensor, without the axis of layers
    names: tuple[str, ...]  # of the Hugging Face tensors
    shapes: tuple[Shape, ...]
    kind: Kind
    groups: int  # query groups of the model

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The Megatron tensor in pieces along its first axis, from tensors in the order of `names`.

        Pieces are the given tensors themselves wherever no number changes its place, so a caller that
        writes piece by piece copies nothing.
        """
        self._check(tensors)
        if self.kind == "qkv":
            grouped = [tensor.reshape(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
            return [torch.cat(grouped, dim=1).reshape(self.shape)]
        if self.kind == "rows" and self.shape != self.shapes[0]:
            missing = self.shape[0] - self.shapes[0][0]
            return [*tensors, tensors[0].new_zeros((missing, *self.shape[1:]))]
        return list(tensors)

    def to_hugging_face(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors in the order of `names`, contiguous; views of `tensor` wherever they can be."""
        assert tuple(tensor.shape) == self.shape, (self.key, tuple(tensor.shape), self.shape)
        if self.kind == "qkv":
            grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
            parts = torch.split(grouped, [shape[0] // self.groups for shape in self.shapes], dim=1)
            return [part.reshape(shape).contiguous() for part, shape in zip(parts, self.shapes, strict=True)]
        parts = torch.split(tensor, [*[shape[0] for shape in self.shapes], *self._padding()])
        return [part.contiguous() for part in parts[: len(self.names)]]

    def _padding(self) -> list[int]:
        padding = self.shape[0] - sum(shape[0] for shape in self.shapes)
        return [padding] if padding else []

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        found = tuple(tuple(tensor.shape) for tensor in tensors)
        assert found == self.shapes, (self.names, found, self.shapes)


def table(model: ModelConfig) -> tuple[Row, ...]:
    """Every tensor of the model, in the order in which it is computed: embedding, layers, last norm, output."""
    hidden, vocabulary = model.hidden_size, (model.vocab_size, model.hidden_size)
    padded = (model.padded_vocab_size, hidden)

    def outer(key: str, name: str, shape: Shape, kind: Kind, hf_shape: Shape) -> Row:
        return Row(key, None, shape, (name,), (hf_shape,), kind, model.num_query_groups)

    rows = [outer("embedding.word_embeddings.weight", "model.embed_tokens.weight", padded, "rows", vocabulary)]
    for layer in range(model.num_layers):
        rows += _layer(model, layer)
    rows.append(outer("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), "same", (hidden,)))
    if not model.tied_embeddings:
        rows.append(outer("output_layer.weight", "lm_head.weight", padded, "rows", vocabulary))
    return tuple(rows)


def _layer(model: ModelConfig, layer: int) -> list[Row]:
    hidden, wide, width = model.hidden_size, model.ffn_hidden_size, model.channels_per_head
    queries, keys = model.num_attention_heads * width, model.num_query_groups * width

    def row(key: str, names: Sequence[str], shapes: Sequence[Shape], kind: Kind = "same") -> Row:
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        full = tuple(f"model.layers.{layer}.{name}" for name in names)
        return Row(f"decoder.layers.{key}", layer, whole, full, tuple(shapes), kind, model.num_query_groups)

    projections = [f"self_attn.{letter}_proj" for letter in "qkv"]
    rows = [
        row("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], [(hidden,)]),
        row("self_attention.linear_qkv.weight", [f"{p}.weight" for p in projections], [(n, hidden) for n in (queries, keys, keys)], "qkv"),
        row("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], [(hidden, queries)]),
        row("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], [(hidden,)]),
        row("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [(wide, hidden)] * 2, "gate_up"),
        row("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], [(hidden, wide)]),
    ]
    if model.qkv_bias:
        rows.append(row("self_attention.linear_qkv.bias", [f"{p}.bias" for p in projections], [(n,) for n in (queries, keys, keys)], "qkv"))
    if model.qk_norm:
        rows.append(row("self_attention.q_layernorm.weight", ["self_attn.q_norm.weight"], [(width,)]))
        rows.append(row("self_attention.k_layernorm.weight", ["self_attn.k_norm.weight"], [(width,)]))
    return rows
