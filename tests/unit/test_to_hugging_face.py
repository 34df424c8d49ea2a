"""Exports: the tensors that went in, in files that transformers reads; what does not fit is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ext.config.base import to_json
from megatron_ext.config.hugging_face import model_from_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import ASSETS, read_assets
from megatron_ext.conversion.safetensors_writing import Entry, index_text, shard_names
from megatron_ext.conversion.to_hugging_face import CONVERSION, megatron_to_hf
from megatron_ext.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError
from megatron_ext.model.weights import table
from megatron_ext.provenance import MANIFEST, file_sha256, read_manifest
from megatron_ext.tokenizer import load_tokenizer
from tests.small_models import hugging_face_folder
from tests.unit import small_tokenizers
from tests.unit.test_safetensors_writing import Tensors, same
from tests.unit.test_stream_reading import Chunked, cut, sign, whole, write_checkpoint

SHARD_BYTES = 20_000  # makes ten files of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Hugging Face model."""
    return hugging_face_folder(tmp_path_factory.mktemp("export") / "hf", "qwen2")


def model_of(folder: Path) -> ModelConfig:
    return model_from_config(json.loads((folder / "config.json").read_text()), str(folder), "small")


def megatron_tensors(folder: Path) -> Tensors:
    """The model's numbers under Megatron's names, layers stacked."""
    given, found = load_file(folder / "model.safetensors"), {}
    for row in table(model_of(folder)):
        tensor = torch.cat(row.to_megatron([given[name] for name in row.names]))
        if row.layer is None:
            found[row.key] = tensor
        else:
            found.setdefault(row.key, []).append(tensor)
    return {key: torch.stack(one) if isinstance(one, list) else one for key, one in found.items()}


def in_pieces(tensor: torch.Tensor) -> Chunked:
    """Cut as two tensor-parallel ranks cut it."""
    counts = {1: (1,), 2: (2, 1), 3: (tensor.shape[0], 2, 1)}[tensor.dim()]
    return cut(tensor, *counts)


def write(path: Path, folder: Path, tensors: Tensors, tokenizer: bool = True, **facts: Any) -> Path:
    """A checkpoint of the folder's model with these tensors."""
    facts = {"model": to_json(model_of(folder)), "tokenizer_hash": load_tokenizer(folder).identity_hash} | facts
    write_checkpoint(path, {key: in_pieces(one) for key, one in tensors.items()}, **facts)
    for name, content in read_assets(folder).items() if tokenizer else ():
        (path / name).write_bytes(content)
    sign(path, **facts)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write(folder.parent / "checkpoint", folder, megatron_tensors(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def exported(folder: Path) -> Tensors:
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


# ---- whole exports


def test_names_and_index_are_those_of_transformers(tmp_path, folder, checkpoint):
    theirs = hugging_face_folder(tmp_path / "theirs", "qwen2", max_shard_size="20KB")
    ours = megatron_to_hf(checkpoint, tmp_path / "ours", shard_bytes=SHARD_BYTES, say=quiet)
    names = sorted(path.name for path in ours.glob("*.safetensors"))
    assert names == shard_names(len(names))
    assert shard_names(1) == ["model.safetensors"]
    mine, yours = (json.loads((one / "model.safetensors.index.json").read_text()) for one in (ours, theirs))
    assert mine["metadata"] == yours["metadata"]
    assert mine["weight_map"].keys() == yours["weight_map"].keys()
    for name, file in mine["weight_map"].items():
        with safe_open(ours / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - it is no mapping
            assert opened.metadata() == {"format": "pt"}
    assert index_text({"f": [Entry("b", torch.float32, ()), Entry("a", torch.float32, (2,))]}).index('"a"') < 150  # sorted


def config_dtype(folder: Path) -> str:
    """As transformers reads it."""
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(folder).dtype).removeprefix("torch.")


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("shard_bytes", [1, SHARD_BYTES, 1 << 30])
def test_an_export_holds_the_tensors_that_went_in(tmp_path, folder, checkpoint, shard_bytes):
    out = megatron_to_hf(checkpoint, tmp_path / "out", shard_bytes=shard_bytes, say=quiet)
    assert same(exported(out), load_file(folder / "model.safetensors"))
    record = json.loads((out / CONVERSION).read_text())
    assert record["files"] == {p.name: [p.stat().st_size, file_sha256(p)] for p in out.iterdir() if p.name != CONVERSION}
    digests = {name: hashlib.sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest() for name, one in exported(out).items()}
    assert record["tensors"] == digests
    assert record["source"]["manifest_sha256"] == file_sha256(checkpoint / MANIFEST)
    assert record["source"]["tokenizer_hash"] == load_tokenizer(out).identity_hash == read_manifest(checkpoint).tokenizer_hash
    assert record["dtype"] == config_dtype(out) == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_row_in_another_order_would_be_noticed(tmp_path, folder):
    tensors = megatron_tensors(folder)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    tensors[key] = tensors[key].flip(1)
    out = megatron_to_hf(write(tmp_path / "c", folder, tensors), tmp_path / "out", say=quiet)
    assert not same(exported(out), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(("stored", "dtype", "expected"), [
    (torch.float32, "bf16", torch.bfloat16), (torch.bfloat16, "fp32", torch.float32), (torch.bfloat16, None, torch.bfloat16),
    (torch.float32, "fp32", torch.float32),
])  # fmt: skip
def test_the_dtype_is_as_stored_or_as_asked_for(tmp_path, folder, stored, dtype, expected):
    tensors = {key: one.to(stored) for key, one in megatron_tensors(folder).items()}
    out = megatron_to_hf(write(tmp_path / "c", folder, tensors), tmp_path / "out", dtype, say=quiet)
    assert same(exported(out), {name: one.to(stored).to(expected) for name, one in load_file(folder / "model.safetensors").items()})
    name = str(expected).removeprefix("torch.")
    assert config_dtype(out) == json.loads((out / CONVERSION).read_text())["dtype"] == name


def test_tensors_of_several_dtypes_keep_them_and_lie_at_multiples_of_their_width(tmp_path, folder):
    tensors = {key: one.bfloat16() if key.endswith("bias") or one.dim() == 3 else one for key, one in megatron_tensors(folder).items()}
    out = megatron_to_hf(write(tmp_path / "c", folder, tensors), tmp_path / "out", say=quiet)
    expected = load_file(folder / "model.safetensors")
    assert same(
        exported(out), {name: one.to(expected[name].bfloat16().dtype if _is_matrix(name) else one.dtype) for name, one in expected.items()}
    )
    assert config_dtype(out) == "float32"


def _is_matrix(name: str) -> bool:
    return "proj" in name


def test_nan_is_said_and_recorded(tmp_path, folder):
    tensors, said = megatron_tensors(folder), []
    tensors["decoder.layers.mlp.linear_fc2.weight"][1, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    out = megatron_to_hf(write(tmp_path / "c", folder, tensors), tmp_path / "out", say=said.append)
    assert json.loads((out / CONVERSION).read_text())["nonfinite"] == {"model.layers.1.mlp.down_proj.weight": 3}
    assert said[0] == "warning: 1 tensors hold numbers that are NaN or infinite:\n  model.layers.1.mlp.down_proj.weight: 3"


def test_a_number_too_large_for_a_dtype_is_said(tmp_path, folder):
    tensors, said = megatron_tensors(folder), []
    tensors["decoder.final_layernorm.weight"][0] = 3.4e38
    megatron_to_hf(write(tmp_path / "c", folder, tensors), tmp_path / "out", "bf16", say=said.append)
    assert "model.norm.weight: 1" in said[0]


# ---- refused


@pytest.mark.parametrize(
    ("name", "said"),
    [("full", "not empty: holds a file"), ("file", "cannot become a folder"), ("checkpoint/x", "inside of the checkpoint")],
)
def test_a_target_that_is_taken_is_refused(tmp_path, checkpoint, name, said):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        megatron_to_hf(copy, tmp_path / name, say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "file", "full"]


def test_an_empty_target_is_taken(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    megatron_to_hf(checkpoint, tmp_path / "out", say=quiet)
    assert (tmp_path / "out" / "config.json").is_file()


def test_all_that_is_wrong_with_the_tensors_is_said_together(tmp_path, folder):
    tensors = megatron_tensors(folder)
    pieces = {key: in_pieces(one) for key, one in tensors.items()}
    norm, fc1 = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc1.weight"
    del pieces[norm]
    pieces["decoder.layers.extra.weight"] = whole(torch.zeros(2))
    pieces["output_layer.weight"] = whole(torch.zeros(300, 32))
    pieces["decoder.layers.mlp.linear_fc2.weight"] = in_pieces(tensors["decoder.layers.mlp.linear_fc2.weight"].to(torch.int32))
    pieces[fc1] = Chunked(tensors[fc1], [block for block in pieces[fc1].blocks if block[0][0] != 2])  # no layer 2
    path = write_checkpoint(tmp_path / "c", pieces, model=to_json(model_of(folder)))
    with pytest.raises(CheckpointError) as error:
        megatron_to_hf(path, tmp_path / "out", say=quiet)
    for line in (
        f"{norm}: missing", "decoder.layers.extra.weight: no weight of this model", f"{fc1}: [2:3] is missing",
        "output_layer.weight: has shape (300, 32), the model's is (384, 32)", "linear_fc2.weight: is torch.int32, not one of torch.float32",
    ):  # fmt: skip
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_of_another_model_or_of_none_is_refused(tmp_path, folder):
    path = write(tmp_path / "c", folder, megatron_tensors(folder), model=to_json(model_of(folder)) | {"family": "llama", "num_layers": 3})
    with pytest.raises(
        CheckpointError, match=r"(?s)says small \(llama\).*linear_qkv.bias: no weight.*has shape \(4, 32, 48\), the model's is \(3"
    ):
        megatron_to_hf(path, tmp_path / "out", say=quiet)
    sign(path, model={})
    with pytest.raises(ConfigError, match=r"manifest\.json: model: num_layers: this key is required"):
        megatron_to_hf(path, tmp_path / "out", say=quiet)


def test_a_damaged_checkpoint_is_refused(tmp_path, checkpoint):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (copy / "__1_0.distcp").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp: missing"):
        megatron_to_hf(copy, tmp_path / "out", say=quiet)
    (copy / MANIFEST).write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        megatron_to_hf(copy, tmp_path / "out", say=quiet)
    (copy / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpointError, match="checkpoint: has no manifest"):
        megatron_to_hf(copy, tmp_path / "out", say=quiet)
    with pytest.raises(CheckpointError, match="nowhere: no such folder; name a published checkpoint"):
        megatron_to_hf(tmp_path / "nowhere", tmp_path / "out", say=quiet)


def test_a_flipped_bit_is_not_exported(tmp_path, checkpoint):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    path = sorted(copy.glob("*.distcp"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match=rf"{path.name}.*"):
        megatron_to_hf(copy, tmp_path / "out", say=quiet)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint"]


def test_numbers_that_cannot_be_read_stop_it_and_nothing_looks_whole(tmp_path, checkpoint):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    facts = {name: getattr(read_manifest(copy), name) for name in ("model", "tokenizer_hash")}
    data = bytearray((copy / "__1_0.distcp").read_bytes())
    at = data.rindex(b"PK\x05\x06")  # the end of the last archive
    (copy / "__1_0.distcp").write_bytes(bytes(data[:at]) + b"\0" * (len(data) - at))
    sign(copy, **facts)
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp: .* cannot be read"):
        megatron_to_hf(copy, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_unknown_settings_are_refused(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match="dtype 'int8': must be one of fp32, bf16"):
        megatron_to_hf(checkpoint, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="shard_bytes 0"):
        megatron_to_hf(checkpoint, tmp_path / "out", shard_bytes=0)


# ---- tokenizers


def test_a_checkpoint_without_a_tokenizer_takes_the_one_it_was_trained_with(tmp_path, folder):
    path = write(tmp_path / "c", folder, megatron_tensors(folder), tokenizer=False)
    with pytest.raises(CheckpointError, match=r"carries no tokenizer files .* --tokenizer DIR"):
        megatron_to_hf(path, tmp_path / "out", say=quiet)
    other = small_tokenizers.hugging_face(tmp_path / "other", 290)
    with pytest.raises(CheckpointError, match=r"other: gives other ids than the tokenizer that .* was trained with"):
        megatron_to_hf(path, tmp_path / "out", say=quiet, tokenizer=other)
    out = megatron_to_hf(path, tmp_path / "out", say=quiet, tokenizer=folder)
    assert load_tokenizer(out).identity_hash == load_tokenizer(folder).identity_hash
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {*contents(out)} & {*ASSETS}


def test_a_tokenizer_with_more_ids_than_the_embeddings_is_refused(tmp_path, folder):
    path = write(tmp_path / "c", folder, megatron_tensors(folder), tokenizer=False, tokenizer_hash="")
    large = small_tokenizers.hugging_face(tmp_path / "large", 400)
    with pytest.raises(DataError, match=r"ids up to \d+"):
        megatron_to_hf(path, tmp_path / "out", say=quiet, tokenizer=large)
