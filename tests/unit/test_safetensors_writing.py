"""Safetensors files written tensor by tensor: what the library writes and reads, hashed and looked through on the way."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_ext.conversion import safetensors_writing
from megatron_ext.conversion.safetensors_writing import Entry, count_nonfinite, writing
from megatron_ext.provenance import file_sha256

Tensors = dict[str, torch.Tensor]


def same(one: Tensors, other: Tensors) -> bool:
    """Equal names, dtypes and bits (NaN too)."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype and a.shape == other[name].shape and torch.equal(bits(a), bits(other[name])) for name, a in one.items()
    )


def test_a_file_is_to_the_byte_what_the_library_writes(tmp_path):
    tensors = {f"layer.{i}": torch.randn(3, i + 1).to(torch.bfloat16) for i in range(5)} | {"ü": torch.randn(7).to(torch.bfloat16)}
    with writing(tmp_path / "ours", [Entry(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]) as stream:
        for one in tensors.values():
            stream.add(one)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (stream.written.size_bytes, stream.written.sha256) == ((tmp_path / "ours").stat().st_size, file_sha256(tmp_path / "ours"))
    for name, one in tensors.items():
        assert stream.written.tensors[name] == hashlib.sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_large_tensors_go_through_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writing, "PIECE_BYTES", 64)
    tensor = torch.randn(31, 7)
    for dtype in safetensors_writing.DTYPES:
        with writing(tmp_path / str(dtype), [Entry("a", dtype, (31, 7)), Entry("b", dtype, (7, 31))]) as stream:
            assert stream.add(tensor) == 217 * dtype.itemsize
            stream.add(tensor.t())  # in another order in memory
        assert same(load_file(tmp_path / str(dtype)), {"a": tensor.to(dtype), "b": tensor.t().to(dtype)})
        assert stream.written.sha256 == file_sha256(tmp_path / str(dtype))


def test_a_wrong_offset_would_be_noticed(tmp_path, monkeypatch):
    true = safetensors_writing.header
    monkeypatch.setattr(safetensors_writing, "header", lambda entries: true([*entries[:1], *entries]))  # a tensor that is not there
    with writing(tmp_path / "f", [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]) as stream:
        stream.add(torch.zeros(2))
        stream.add(torch.ones(2))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "f")


@pytest.mark.parametrize("dtype", list(safetensors_writing.DTYPES))
def test_every_nan_and_infinity_is_counted(dtype):
    for size in (1, 7, 64, 100):
        for bad in (float("nan"), float("inf"), float("-inf")):
            for at in range(size):
                tensor = torch.randn(size).to(dtype)
                assert count_nonfinite(tensor) == 0
                tensor[at] = bad
                assert count_nonfinite(tensor) == 1
    limits = torch.finfo(dtype)
    assert count_nonfinite(torch.tensor([limits.max, limits.min, limits.tiny, 0.0]).to(dtype)) == 0
