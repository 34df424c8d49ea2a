"""Keys and values of running requests, a row each, and attention over them.

Rows 0 to B-1 run; a row is moved or copied as requests come and go. Memory grows with the longest running text, not with what
the model could hold.

Shapes: B running requests, P prompts filled at once, S length of the longest of these, T tokens laid flat (B or P x S), G query groups
of this rank, R queries of a group, N all queries, C channels of a head, K positions attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

POSITIONS_MULTIPLE = 64  # the cache grows by steps of this many positions, and by half of itself
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, queries TGRC, keys and values TG2C -> TN x C


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward pass stand, and how each sees those before it."""

    positions_T: torch.Tensor
    num_positions: int  # more than the largest of them
    attend: Attend


class KVCache:
    """One tensor a layer of this rank: keys and values x rows x groups x positions x channels."""

    def __init__(self, num_layers: int, num_groups: int, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_groups, self._channels = num_groups, channels
        self._dtype, self._device = dtype, device
        self._layers = [self._room(0, 0) for _ in range(num_layers)]
        self._num_rows = self._num_positions = 0

    def reserve(self, num_rows: int, num_positions: int, most_positions: int) -> None:
        """Make room; what is there stays. `most_positions`: more will not be needed by those that run now."""
        rows, positions = self._num_rows, self._num_positions
        if num_rows <= rows and num_positions <= positions:
            return
        if num_positions > positions:
            wanted = max(num_positions, positions + positions // 2)
            positions = max(num_positions, min(-(-wanted // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE, most_positions))
        rows = max(rows, num_rows)
        for layer, old in enumerate(self._layers):
            self._layers[layer] = self._room(rows, positions)
            self._layers[layer][:, : self._num_rows, :, : self._num_positions] = old
        self._num_rows, self._num_positions = rows, positions

    def clear(self) -> None:
        """Give the memory back."""
        self._layers = [self._room(0, 0) for _ in self._layers]
        self._num_rows = self._num_positions = 0

    def copy_row(self, source: int, targets: Sequence[int], num_positions: int) -> None:
        """Copy the first positions of a row to others."""
        rows = list(targets)
        for layer in self._layers:
            layer[:, rows, :, :num_positions] = layer[:, source : source + 1, :, :num_positions]

    def prefill(self, rows: Sequence[int], length: int) -> Places:
        """Attention of prompts among themselves, from position 0 on; their keys and values go to `rows`.

        Shorter prompts have padding behind them up to `length`: nothing before sees it, and decoding overwrites it.
        """
        rows_P = torch.tensor(rows, device=self._device)

        def attend(layer: int, queries_TGRC: torch.Tensor, both_TG2C: torch.Tensor) -> torch.Tensor:
            queries_PSNC = queries_TGRC.reshape(len(rows), length, -1, self._channels)
            both_2PGSC = both_TG2C.view(len(rows), length, *both_TG2C.shape[1:]).permute(3, 0, 2, 1, 4)
            self._layers[layer][:, rows_P, :, :length] = both_2PGSC
            context_PNSC = scaled_dot_product_attention(
                queries_PSNC.transpose(1, 2), both_2PGSC[0], both_2PGSC[1], is_causal=True, enable_gqa=queries_TGRC.shape[2] > 1
            )
            return context_PNSC.transpose(1, 2).reshape(len(rows) * length, -1)

        return Places(torch.arange(length, device=rows_P.device).repeat(len(rows)), length, attend)

    def decode(self, positions: Sequence[int]) -> Places:
        """Attention of one token in each of the first rows, at `positions`, over what stands before it and itself."""
        num_rows, longest = len(positions), max(positions) + 1
        device = self._device
        rows_B = torch.arange(num_rows, device=device)
        positions_B = torch.tensor(positions, device=device)
        hidden_BK = torch.arange(longest, device=device) > positions_B.unsqueeze(-1)
        mask_BK = torch.zeros(hidden_BK.shape, dtype=self._dtype, device=device).masked_fill_(hidden_BK, -torch.inf)
        mask_BG1K = mask_BK[:, None, None].expand(-1, self._num_groups, -1, -1).contiguous()
        product = _attention_by_products if device.type == "cpu" else scaled_dot_product_attention

        def attend(layer: int, queries_TGRC: torch.Tensor, both_TG2C: torch.Tensor) -> torch.Tensor:
            both_2BGKC = self._layers[layer]
            both_2BGKC[:, rows_B, :, positions_B] = both_TG2C.transpose(1, 2)
            keys_BGKC, values_BGKC = both_2BGKC[:, :num_rows, :, :longest]
            # The queries of a group stand where those of a sequence would: so no key is repeated for them.
            return product(queries_TGRC, keys_BGKC, values_BGKC, mask_BG1K).reshape(num_rows, -1)

        return Places(positions_B, longest, attend)

    def _room(self, num_rows: int, num_positions: int) -> torch.Tensor:
        # Zeros, not whatever memory holds: a masked value still is multiplied by 0, and 0 x NaN is NaN.
        return torch.zeros(2, num_rows, self._num_groups, num_positions, self._channels, dtype=self._dtype, device=self._device)


def _attention_by_products(
    queries_BGRC: torch.Tensor, keys_BGKC: torch.Tensor, values_BGKC: torch.Tensor, mask_BG1K: torch.Tensor
) -> torch.Tensor:
    """Attention as two batched products: on a CPU and for this few queries a quarter faster than torch's fused kernel."""
    queries, keys, values, mask = (tensor.flatten(0, 1) for tensor in (queries_BGRC, keys_BGKC, values_BGKC, mask_BG1K))
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=queries.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1), values).view(queries_BGRC.shape)
