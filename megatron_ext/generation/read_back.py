"""Whether an engine holds the weights that it was sent: each tensor's fingerprint as it left against that of what is sampled with.

At a learning rate of 1e-6 an update moves log-probabilities by less than kernels differ in rounding, so the canary's gap cannot
tell an engine that is one version behind. A fingerprint is exact: it is computed where the tensor lies and is the same on every device.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import TrainingError
from megatron_ext.generation.engine import Engine
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.weights import table

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 1 << 24  # numbers at a time: the sums are of 8 bytes each
WORDS = {2: torch.int16, 4: torch.int32}  # by bytes of a number


class ReadableEngine(Engine, Protocol):
    """An engine with weights of its own, which answers for what it holds."""

    def held(self, names: Sequence[str]) -> dict[str, int]:
        """Fingerprints of what it samples with, by the names of Hugging Face tensors."""


@torch.no_grad()
def fingerprint(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """A number that another bit almost surely changes: its words times odd numbers by place, summed modulo 2^64. -0.0 counts as 0.0."""
    total = 0
    for first, part in enumerate(tensor.detach().reshape(-1).split(CHUNK)):
        words = (part.to(dtype) + 0.0).view(WORDS[dtype.itemsize]).to(torch.int64)
        places = torch.arange(first * CHUNK, first * CHUNK + len(words), device=words.device)
        total += int((words * (2 * places + 1)).sum())
    return total % 2**64


def drawn_names(model: ModelConfig, version: int) -> list[str]:
    """What is read back of a version: all outside the layers, and one layer, another from version to version."""
    layer = random.Random(version).randrange(model.num_layers)
    mine = [row.names for row in table(model) if row.layer is None or row.layer == layer]
    found = [name for names in mine for name in names]
    return [*found, HEAD] if model.tied_embeddings else found  # an engine may keep a copy of its own as head


def watched(buckets: Iterable[Bucket], names: Collection[str], dtype: torch.dtype, sent: dict[str, int]) -> Iterator[Bucket]:
    """The buckets as they are; `sent` gets the fingerprints of those in `names`."""
    for bucket in buckets:
        for name, tensor in bucket.tensors:
            if name in names:
                sent[name] = fingerprint(tensor, dtype)
        yield bucket
    if HEAD in names and HEAD not in sent:
        sent[HEAD] = sent[EMBEDDING]


def check_held(held: Mapping[str, int], sent: Mapping[str, int], version: int) -> None:
    """`TrainingError` that names the version and every tensor that is not what was sent."""
    other = [name for name, number in sent.items() if held.get(name) != number]
    if other:
        raise TrainingError(
            f"weights version {version} is not what the engine samples with: {', '.join(other)} read back from it is not what was sent. "
            f"Start the stage again, which makes a new engine; if it comes back, use plan.engine=megatron, and report it with the "
            f"versions of vLLM and torch"
        )
