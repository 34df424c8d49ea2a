"""A model's weights as the part of a checkpoint that every plan can load: Megatron's sharded names, without layers' extra states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from megatron_ext.checkpoint.extra_state import EXTRA_STATE
from megatron_ext.checkpoint.load import load_state
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Precision
from megatron_ext.distributed import Groups
from megatron_ext.model.build import build_model


def sharded_weights(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """What this rank's chunks of a model give to a checkpoint, or want from one."""
    parts = [{name: entry for name, entry in chunk.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)} for chunk in chunks]
    return {"model": parts[0]} if len(parts) == 1 else {f"model{i}": part for i, part in enumerate(parts)}


def fill(chunks: Sequence[GPTModel], loaded: dict[str, Any]) -> None:
    """Put loaded weights, asked for by `sharded_weights`, into the chunks."""
    for i, chunk in enumerate(chunks):
        keys = chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{i}"], strict=False)
        wrong = [name for name in (*keys.missing_keys, *keys.unexpected_keys) if not name.endswith(EXTRA_STATE)]
        assert not wrong, f"weights that model and checkpoint do not share: {wrong}"


def load_chunks(checkpoint: Path, model: ModelConfig, precision: Precision, groups: Groups) -> list[GPTModel]:
    """This rank's part of a published checkpoint's model, without an optimizer."""
    chunks = build_model(model, precision, groups, None)
    fill(chunks, load_state(sharded_weights(chunks), checkpoint))
    return chunks
