"""Logits of one prompt by Megatron from a checkpoint and by transformers from a folder: FP32, on the CPU.

Shapes: B sequences (one), S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext import device
from megatron_ext.checkpoint.weights import load_chunks
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.conversion.compare_tensors import largest_difference
from megatron_ext.distributed import process_groups
from megatron_ext.errors import CheckpointError
from megatron_ext.model.logits import logits_BSV

# FP32 sums in another order differ by some 1e-7 of the largest number in them, and a deep model adds up many such;
# a wrong weight, RoPE base or epsilon shows from 1e-3 on.
BOUND = 1e-4  # of the largest logit, where that is above 1
NEXT_TOKENS = 5


@dataclass(frozen=True)
class LogitsApart:
    """How far two models' logits of one prompt are apart."""

    largest: float
    position: int  # in the prompt, where that is
    token_id: int
    largest_logit: float
    next_ids: tuple[int, ...]  # the likeliest next tokens by the checkpoint
    next_ids_of_folder: tuple[int, ...]

    @property
    def bound(self) -> float:
        """What rounding may make of it."""
        return BOUND * max(1.0, self.largest_logit)

    @property
    def same(self) -> bool:
        """Whether rounding explains the difference."""
        return self.largest <= self.bound


def compare_logits(checkpoint_BSV: torch.Tensor, folder_BSV: torch.Tensor) -> LogitsApart:
    """The largest difference of one sequence's logits, and the likeliest next tokens of each."""
    ours_SV, theirs_SV = checkpoint_BSV[0], folder_BSV[0]
    largest, (position, token_id) = largest_difference(ours_SV, theirs_SV)
    count = min(NEXT_TOKENS, ours_SV.shape[-1])
    ours, theirs = (tuple(logits_SV[-1].topk(count).indices.tolist()) for logits_SV in (ours_SV, theirs_SV))
    return LogitsApart(largest, position, token_id, float(theirs_SV.abs().max()), ours, theirs)


def folder_logits_BSV(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """What transformers computes, from safetensors alone and without any code that the folder brings along."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as cause:
        raise CheckpointError(f"{folder}: transformers cannot load it: {cause}") from cause
    with torch.no_grad():
        logits_BSV: torch.Tensor = model(tokens_BS, use_cache=False).logits
    return logits_BSV


def checkpoint_logits_BSV(
    checkpoint: Path, model: ModelConfig, tokens_BS: torch.Tensor, rounded_to: torch.dtype | None = None
) -> torch.Tensor:
    """What Megatron computes on one rank, from a published checkpoint; its weights first rounded to a dtype where one is given."""
    device.activate("cpu", torch.get_num_threads())
    with process_groups(TrainPlan(device="cpu")) as groups:
        chunks = load_chunks(checkpoint, model, "fp32", groups)
        if rounded_to is not None:
            for chunk in chunks:
                chunk.to(rounded_to).to(torch.float32)
        return logits_BSV(chunks, tokens_BS, groups, model.vocab_size)
