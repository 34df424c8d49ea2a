"""The cache of keys and values: memory by need, and attention that sees what stands before a token, in its own row."""

from __future__ import annotations

import torch

from megatron_ext.generation.kv_cache import POSITIONS_MULTIPLE, KVCache

GROUPS, QUERIES, CHANNELS = 2, 3, 4


def cache(layers: int = 1) -> KVCache:
    return KVCache(layers, GROUPS, CHANNELS, torch.float32, torch.device("cpu"))


def room(of: KVCache) -> tuple[int, int]:
    """Rows and positions that it has memory for."""
    return tuple(of._layers[0].shape[i] for i in (1, 3))  # type: ignore[return-value]


def projections(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, GROUPS, QUERIES, CHANNELS, generator=generator),
        torch.randn(tokens, GROUPS, 2, CHANNELS, generator=generator),
    )


def by_hand(queries: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """Attention of the last token of a text over all of it, head by head."""
    found = []
    for group in range(GROUPS):
        keys, values = both[:, group, 0], both[:, group, 1]
        found += [(keys @ queries[-1, group, head] / CHANNELS**0.5).softmax(0) @ values for head in range(QUERIES)]
    return torch.cat(found)


def test_memory_grows_with_the_texts_and_not_beyond_what_they_may_become():
    held = cache()
    held.reserve(2, 5, 10_000)
    assert room(held) == (2, POSITIONS_MULTIPLE)
    held.reserve(3, 65, 10_000)
    assert room(held) == (3, 2 * POSITIONS_MULTIPLE)
    held.reserve(1, 129, 10_000)
    assert room(held) == (3, 3 * POSITIONS_MULTIPLE)
    held.reserve(1, 193, 200)  # half more would be 288
    assert room(held) == (3, 200)
    held.clear()
    assert room(held) == (0, 0)


def test_growing_keeps_what_is_there():
    held = cache(layers=2)
    held.reserve(2, 3, 64)
    queries, both = projections(6, 0)
    before = held.prefill([0, 1], 3).attend(1, queries, both)
    kept = held._layers[1].clone()
    held.reserve(5, 1000, 1000)
    assert torch.equal(held._layers[1][:, :2, :, : kept.shape[3]], kept)
    assert torch.equal(held.prefill([0, 1], 3).attend(1, queries, both), before)


def test_ragged_rows_see_their_own_past_alone():
    held = cache()
    held.reserve(3, 8, 64)
    lengths, rows = [5, 2, 4], [2, 0, 1]
    texts = [projections(length + 1, seed) for seed, length in enumerate(lengths)]
    for (queries, both), length, row in zip(texts, lengths, rows, strict=True):
        held.prefill([row], length).attend(0, queries[:length], both[:length])
    places = held.decode([2, 4, 5])
    order = [rows.index(row) for row in range(3)]
    found = places.attend(0, torch.stack([texts[i][0][-1] for i in order]), torch.stack([texts[i][1][-1] for i in order]))
    expected = torch.stack([by_hand(*texts[i]) for i in order])
    assert places.positions_T.tolist() == [2, 4, 5]
    assert torch.allclose(found, expected, atol=1e-6)


def test_padding_behind_a_prompt_changes_nothing():
    held = cache()
    held.reserve(2, 8, 64)
    queries, both = projections(6, 0)
    found = held.prefill([0], 6).attend(0, queries, both).view(6, -1)
    short = held.prefill([1], 3).attend(0, queries[:3], both[:3]).view(3, -1)
    assert torch.allclose(found[:3], short, atol=1e-6)
    assert torch.allclose(found[-1], by_hand(queries, both), atol=1e-6)


def test_a_copied_row_is_the_row():
    held = cache(layers=2)
    held.reserve(4, 8, 64)
    for layer in range(2):
        held.prefill([1], 8).attend(layer, *projections(8, layer))
    held.copy_row(1, [0, 3], 5)
    for layer in held._layers:
        assert torch.equal(layer[:, 3, :, :5], layer[:, 1, :, :5])
        assert torch.equal(layer[:, 0, :, :5], layer[:, 1, :, :5])
        assert not layer[:, [0, 3], :, 5:].any()
        assert not layer[:, 2].any()
