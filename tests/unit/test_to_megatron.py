"""Hugging Face folders become checkpoints: exact, said to be what they are, finished after any interruption, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.checkpoint import stream_writing
from megatron_ext.checkpoint.hashing import HashingStream
from megatron_ext.checkpoint.stream_reading import CheckpointReader
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.base import from_json
from megatron_ext.config.hugging_face import model_from_config
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion import source as sources
from megatron_ext.conversion import to_megatron
from megatron_ext.conversion.source import open_source
from megatron_ext.conversion.to_megatron import EMBEDDING, HEAD, hf_to_megatron, import_model
from megatron_ext.errors import CheckpointError, ConfigError, DataError
from megatron_ext.model.weights import table
from megatron_ext.provenance import file_sha256, read_manifest
from megatron_ext.tokenizer import load_tokenizer
from tests.small_models import VOCAB_SIZE, change_tensor, hugging_face_folder
from tests.unit import small_tokenizers

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An untied model in three files, and a tied one in one."""
    folder = tmp_path_factory.mktemp("models")
    untied = hugging_face_folder(folder / "untied", "qwen3", torch.bfloat16, "50KB")
    return {"untied": untied, "tied": hugging_face_folder(folder / "tied", "llama", torch.bfloat16, tie_word_embeddings=True)}


@pytest.fixture
def untied(made, tmp_path):
    return Path(shutil.copytree(made["untied"], tmp_path / "untied"))


@pytest.fixture
def tied(made, tmp_path):
    return Path(shutil.copytree(made["tied"], tmp_path / "tied"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights of a converted checkpoint under their Hugging Face names."""
    model: ModelConfig = from_json(ModelConfig, verify(checkpoint).model)
    reader, found = CheckpointReader(checkpoint), {}
    for row in table(model):
        found |= dict(zip(row.names, row.to_hugging_face(reader.read(row.key, row.layer)), strict=True))
    return found


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_manifest_says_where_it_came_from(untied, tmp_path, capsys):
    target = hf_to_megatron(str(untied), tmp_path / "made" / "checkpoint")
    manifest, source = verify(target), open_source(untied)
    assert manifest.hugging_face == {
        "source": str(untied),
        "revision": None,
        "files": {path.name: [path.stat().st_size, file_sha256(path)] for path in source.files},
        "dtype": "bfloat16",
        "dtypes": {"bfloat16": len(source.names)},
        "nonfinite": {},
    }
    assert from_json(ModelConfig, manifest.model) == model_from_config(source.config, "", "untied")
    assert manifest.tokenizer_hash == load_tokenizer(untied).identity_hash == load_tokenizer(target).identity_hash
    assert (manifest.stage, manifest.iteration, manifest.pinned, manifest.optimizer_layout) == ("convert", 0, True, "none")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(manifest.files)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    said = capsys.readouterr().out
    assert re.search(r"^Convert untied: .* bytes \(100%\)", said, re.M)
    assert "warning" not in said


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_every_bit_arrives_and_comes_back(made, tmp_path, name):
    source = open_source(made[name])
    found = tensors(hf_to_megatron(str(made[name]), tmp_path / "checkpoint"))
    assert found.keys() == set(source.names)
    assert all(bits(found[key]) == bits(source.read(key)) for key in found)


def test_numbers_of_several_kinds_keep_their_values(untied, tmp_path, capsys):
    change_tensor(untied, NORM, torch.Tensor.float)
    change_tensor(untied, "model.layers.1.mlp.up_proj.weight", torch.Tensor.half)
    target = hf_to_megatron(str(untied), tmp_path / "checkpoint")
    found, source, record = tensors(target), open_source(untied), read_manifest(target).hugging_face
    assert record["dtype"] == "float32"
    assert record["dtypes"] == {"bfloat16": len(found) - 2, "float32": 1, "float16": 1}
    assert all(torch.equal(found[name].float(), source.read(name).float()) for name in found)
    widened = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert widened == {NORM, *(f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(4) for kind in ("gate", "up"))}
    assert "mixed numbers: " in capsys.readouterr().out


def test_nan_is_said_and_converted_as_it_is(untied, tmp_path, capsys):
    change_tensor(untied, EMBEDDING, lambda tensor: tensor.index_fill_(0, torch.tensor([3]), float("nan")))
    change_tensor(untied, NORM, lambda tensor: tensor.index_fill_(0, torch.tensor([7, 8]), float("inf")))
    target = hf_to_megatron(str(untied), tmp_path / "checkpoint")
    assert read_manifest(target).hugging_face["nonfinite"] == {EMBEDDING: 32, NORM: 2}
    said = re.search(r"warning: NaN or infinite numbers in 2 tensors, converted as they are: (.*)", capsys.readouterr().out)
    assert said
    assert set(said[1].split(", ")) == {f"{EMBEDDING} (32)", f"{NORM} (2)"}
    assert all(bits(tensor) == bits(open_source(untied).read(name)) for name, tensor in tensors(target).items())


# ---- refused before anything is written


def refusal(kind: type[Exception], source: Path, **options: Any) -> str:
    """What is said; and nothing is written."""
    target = source.parent / "refused"
    with pytest.raises(kind) as error:
        hf_to_megatron(str(source), target, **options)
    assert not [path.name for path in source.parent.iterdir() if "refused" in path.name]
    return str(error.value)


def test_weights_that_contradict_the_config_are_all_listed(untied):
    change_tensor(untied, NORM, lambda _: None)
    change_tensor(untied, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor[:-1])
    change_tensor(untied, "model.layers.0.self_attn.q_norm.weight", torch.clone, new="model.layers.9.self_attn.q_norm.weight")
    edit_config(untied, vocab_size=VOCAB_SIZE - 1)
    lines = refusal(DataError, untied).splitlines()
    assert lines[0] == f"{untied}: its weights contradict config.json:"
    assert sorted(line.strip() for line in lines[1:-1]) == [
        f"lm_head.weight: has shape [{VOCAB_SIZE}, 32], where [{VOCAB_SIZE - 1}, 32] was expected",
        f"model.embed_tokens.weight: has shape [{VOCAB_SIZE}, 32], where [{VOCAB_SIZE - 1}, 32] was expected",
        "model.layers.2.mlp.up_proj.weight: has shape [47, 32], where [48, 32] was expected",
        "model.layers.9.self_attn.q_norm.weight: no tensor of a qwen3 model like this",
        "model.norm.weight: missing",
    ]
    assert "download both again" in lines[-1]


def test_a_tied_model_may_hold_its_head_if_it_is_the_embedding(tied, tmp_path):
    change_tensor(tied, EMBEDDING, lambda tensor: tensor.index_fill_(0, torch.tensor([3]), float("nan")))
    change_tensor(tied, EMBEDDING, torch.clone, new=HEAD)
    assert HEAD in open_source(tied).names
    assert HEAD not in tensors(hf_to_megatron(str(tied), tmp_path / "checkpoint"))
    change_tensor(tied, HEAD, lambda tensor: tensor.index_fill_(0, torch.tensor([4]), -0.0))
    assert f"{HEAD}: differs from {EMBEDDING}, though tie_word_embeddings says" in refusal(DataError, tied)
    change_tensor(tied, HEAD, torch.Tensor.float)
    assert f"{HEAD}: differs from {EMBEDDING}" in refusal(DataError, tied)
    change_tensor(tied, HEAD, lambda _: None)
    edit_config(tied, tie_word_embeddings=False)
    assert f"{HEAD}: missing" in refusal(DataError, tied)


def test_a_recipe_that_says_another_model_is_refused(untied, tmp_path):
    model = model_from_config(open_source(untied).config, "", "recipe")
    imported = import_model(untied, tmp_path / "work", name="x", expected=replace(model, init_std=0.5))
    assert imported.model == replace(model, init_std=0.5)
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(ConfigError, match=r"is another model than the recipe's recipe:\n  .*num_layers(.|\n)*rope_base"):
        import_model(untied, tmp_path / "work", name="x", expected=replace(model, num_layers=3, rope_base=5.0))
    assert not (tmp_path / "work").exists()


def test_a_folder_without_a_tokenizer_is_refused(untied):
    for path in untied.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer" in refusal(DataError, untied)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_larger_tokenizer_is_refused_unless_rows_may_be_added(made, tmp_path, name, capsys):
    source = Path(shutil.copytree(made[name], tmp_path / name))
    small_tokenizers.hugging_face(source, VOCAB_SIZE + 10)
    size = load_tokenizer(source).vocab_size
    assert VOCAB_SIZE < size <= VOCAB_SIZE + 10
    said = refusal(DataError, source)
    assert f"its tokenizer has ids up to {size - 1}, the embedding {VOCAB_SIZE} rows" in said
    assert "--resize-vocabulary" in said
    target = hf_to_megatron(str(source), tmp_path / "checkpoint", resize_vocabulary=True)
    manifest, found, opened = read_manifest(target), tensors(target), open_source(source)
    assert (manifest.model["vocab_size"], manifest.hugging_face["resized_from"]) == (size, VOCAB_SIZE)
    assert f"vocabulary grown from {VOCAB_SIZE} to {size} rows" in capsys.readouterr().out
    for key in (EMBEDDING, HEAD)[: 2 if name == "untied" else 1]:
        old = opened.read(key)
        assert bits(found[key][:VOCAB_SIZE]) == bits(old)
        mean = old.double().mean(0).bfloat16()
        assert all(torch.equal(row, mean) for row in found[key][VOCAB_SIZE:])
        assert len(found[key]) == size
    assert all(bits(found[key]) == bits(opened.read(key)) for key in found if key not in (EMBEDDING, HEAD))


def test_a_target_that_holds_something_stands(untied, tmp_path):
    target = tmp_path / "checkpoint"
    target.mkdir()
    hf_to_megatron(str(untied), target)  # an empty folder is none
    for taken in (target, untied / "config.json"):
        with pytest.raises(CheckpointError, match=f"{taken}: is there already; name a folder that is not, or is empty"):
            hf_to_megatron(str(untied), taken)
    with pytest.raises(CheckpointError, match="iter_0000003: a converted model is iteration 0"):
        hf_to_megatron(str(untied), tmp_path / "iter_0000003")
    verify(target)
    verify(hf_to_megatron(str(untied), tmp_path / "iter_0000000"))


def test_a_source_that_changes_meanwhile_is_refused(untied, tmp_path, monkeypatch):
    true = sources.survey

    def touching(*arguments: Any) -> Any:
        os.utime(untied / "config.json", (1, 1))
        return true(*arguments)

    monkeypatch.setattr(to_megatron, "survey", touching)
    with pytest.raises(DataError, match="was changed while it was converted"):
        hf_to_megatron(str(untied), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_pickles_give_the_same_checkpoint(tied, tmp_path):
    expected = hf_to_megatron(str(tied), tmp_path / "expected")
    weights = {name: tensor.clone() for name, tensor in load_file(tied / "model.safetensors").items()}
    torch.save(weights, tied / "pytorch_model.bin")
    (tied / "model.safetensors").unlink()
    with pytest.raises(DataError, match="allow-pickle"):
        hf_to_megatron(str(tied), tmp_path / "checkpoint")
    target = hf_to_megatron(str(tied), tmp_path / "checkpoint", allow_pickle=True)
    assert verify(target).files == verify(expected).files


# ---- memory


@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "mixed dtypes"])
def test_no_more_memory_than_the_largest_tensors(tmp_path, monkeypatch, mixed):
    vocab, hidden = 20_000, 256
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": vocab, "num_hidden_layers": 1}
    folder = hugging_face_folder(tmp_path / "wide", dtype=torch.bfloat16, **sizes)
    if mixed:
        change_tensor(folder, "model.layers.0.mlp.up_proj.weight", torch.Tensor.float)
    largest_bytes = vocab * hidden * (4 if mixed else 2)
    before, seen = anonymous_bytes(), []
    true = HashingStream.write

    def write(stream: HashingStream, data: Any) -> int:
        written = true(stream, data)
        seen.append(anonymous_bytes() - before)
        return written

    monkeypatch.setattr(HashingStream, "write", write)
    monkeypatch.setattr(stream_writing, "HELD_BYTES", 0)
    files = import_model(folder, tmp_path / "work", name="wide").files
    assert max(seen) < (2 if mixed else 1) * largest_bytes  # four pass: they are written from where they lie in the file
    assert all(file_sha256(tmp_path / "work" / name) == sha256 for name, (_, sha256) in files.items())


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
