"""Fingerprints of weights: exact, blind to nothing that a stale engine may hold; which tensors are read back, and what the error names."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import TrainingError
from megatron_ext.generation import read_back
from megatron_ext.generation.read_back import EMBEDDING, HEAD, check_held, drawn_names, fingerprint, watched
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.weights import table

MODEL = ModelConfig(
    name="toy", num_layers=6, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
    vocab_size=100, max_positions=64, tied_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_bit_of_any_number_shows_and_so_does_its_place(dtype):
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    known = {fingerprint(whole, dtype)}
    words = read_back.WORDS[dtype.itemsize]
    for place in range(35):
        other = whole.clone()
        other.view(words).view(-1)[place] ^= 1
        known.add(fingerprint(other, dtype))
    assert len(known) == 36
    assert fingerprint(whole.flip(0), dtype) not in known
    assert fingerprint(whole.t(), dtype) not in known


def test_it_is_the_same_wherever_it_is_computed(monkeypatch):
    whole = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    expected = sum(word * (2 * place + 1) for place, word in enumerate(whole.view(torch.int32).flatten().tolist())) % 2**64
    assert fingerprint(whole, torch.float32) == expected
    assert fingerprint(whole.t().contiguous().t(), torch.float32) == expected
    monkeypatch.setattr(read_back, "CHUNK", 7)
    assert fingerprint(whole, torch.float32) == expected
    assert fingerprint(whole, torch.bfloat16) == fingerprint(whole.bfloat16(), torch.bfloat16) != expected
    assert fingerprint(torch.tensor([-0.0]), torch.float32) == fingerprint(torch.tensor([0.0]), torch.float32)


def test_every_tensor_is_read_back_of_some_version():
    everything = {name for row in table(MODEL) for name in row.names} | {HEAD}
    drawn = [drawn_names(MODEL, version) for version in range(0, 120, 2)]  # of two updates a step
    assert set().union(*drawn) == everything
    assert all({EMBEDDING, HEAD, "model.norm.weight"} < set(names) for names in drawn)
    assert {len(names) for names in drawn} == {3 + (len(everything) - 3) // 6}
    assert drawn_names(MODEL, 4) == drawn_names(MODEL, 4)


def test_what_is_not_what_was_sent_is_named():
    tensors = ((EMBEDDING, torch.ones(3, 2)), ("model.norm.weight", torch.ones(2)), ("other", torch.ones(2)))
    sent: dict[str, int] = {}
    passed = list(watched([Bucket(tensors)], [EMBEDDING, HEAD, "model.norm.weight"], torch.float32, sent))
    assert [bucket.tensors for bucket in passed] == [tensors]
    assert sent.keys() == {EMBEDDING, HEAD, "model.norm.weight"}
    check_held(dict(sent), sent, 3)
    stale = fingerprint(torch.ones(2) + 1e-6, torch.float32)
    with pytest.raises(TrainingError, match=r"weights version 3 is not what the engine samples with: model\.norm\.weight read back"):
        check_held({**sent, "model.norm.weight": stale}, sent, 3)
    with pytest.raises(TrainingError, match=r"lm_head\.weight read back"):
        check_held({name: number for name, number in sent.items() if name != HEAD}, sent, 3)
