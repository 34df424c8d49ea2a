"""Named tensors on their way from a running model to an engine. Needs no Megatron-Core: an engine's process starts without it."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """Named Hugging Face tensors that travel together, in the table's order, on the model's device."""

    tensors: tuple[tuple[str, torch.Tensor], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors)

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes. Computed when asked for: it costs a copy to the host."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors:
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()
