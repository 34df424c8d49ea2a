"""RoPE of queries and keys where they lie, the values among them left as they are: one pass over a fused product.

The frequencies are the model's own, so Llama 3's scaling is in them. Angles and products are FP32, as in Transformer Engine's kernel.

Shapes: T tokens, G query groups, R queries of a group, X the R queries with their key and value, C channels of a head, H half of
these, K positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines of some tokens' positions; 1 and 0 where the value lies."""

    cosines_T1XC: torch.Tensor
    sines_T1XC: torch.Tensor

    def rotate(self, qkv_TGXC: torch.Tensor) -> torch.Tensor:
        """Queries and keys rotated, values as they are."""
        swapped_TGXC = qkv_TGXC.roll(qkv_TGXC.shape[-1] // 2, -1)
        return torch.addcmul(qkv_TGXC * self.cosines_T1XC, swapped_TGXC, self.sines_T1XC).to(qkv_TGXC.dtype)


class RotaryTable:
    """The rotations of all positions so far asked for."""

    def __init__(self, frequencies_H: torch.Tensor, queries: int) -> None:
        self._frequencies_H, self._queries = frequencies_H.float(), queries
        self._cosines_KXC, self._sines_KXC = self._filled(0)

    def at(self, positions_T: torch.Tensor, num_positions: int) -> Rotation:
        """The rotation of tokens at these positions, all of them below `num_positions`."""
        if num_positions > self._cosines_KXC.shape[0]:
            self._cosines_KXC, self._sines_KXC = self._filled(max(num_positions, 2 * self._cosines_KXC.shape[0]))
        return Rotation(self._cosines_KXC[positions_T].unsqueeze(1), self._sines_KXC[positions_T].unsqueeze(1))

    def _filled(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        places_K = torch.arange(num_positions, dtype=torch.float32, device=self._frequencies_H.device)
        angles_KH = torch.outer(places_K, self._frequencies_H)
        cosines_KC = torch.cat((angles_KH.cos(), angles_KH.cos()), dim=-1)
        sines_KC = torch.cat((-angles_KH.sin(), angles_KH.sin()), dim=-1)
        room = (num_positions, self._queries + 2, cosines_KC.shape[-1])
        cosines_KXC, sines_KXC = cosines_KC.new_ones(room), sines_KC.new_zeros(room)
        cosines_KXC[:, :-1], sines_KXC[:, :-1] = cosines_KC.unsqueeze(1), sines_KC.unsqueeze(1)
        return cosines_KXC, sines_KXC
