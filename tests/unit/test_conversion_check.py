"""`convert check`: a folder is its checkpoint, and every way in which it is not is named."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.conversion.check import check_command
from megatron_ext.conversion.compare_logits import compare_logits
from megatron_ext.conversion.compare_tensors import largest_difference
from megatron_ext.conversion.to_hugging_face import megatron_to_hf
from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.errors import CheckpointError, ConfigError, DataError
from megatron_ext.provenance import read_manifest, write_manifest
from tests import ranks
from tests.small_models import hugging_face_folder
from tests.unit import small_tokenizers

PROMPT = "the fox counts 12, so it rests"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and the folder that it was converted from: tied embeddings, a vocabulary that is padded."""
    path = tmp_path_factory.mktemp("pair")
    folder = hugging_face_folder(path / "folder", "qwen2", tie_word_embeddings=True, num_hidden_layers=2)
    return hf_to_megatron(str(folder), path / "checkpoint"), folder


def changed(folder: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, path)
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def tensors_differ(checkpoint: Path, folder: Path, capsys) -> tuple[str, str]:
    """What the command prints of tensors alone, and the error that it ends with."""
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="differs from") as caught:
        check_command(checkpoint, folder, PROMPT, True)
    return capsys.readouterr().out, str(caught.value)


# --- tensors ------------------------------------------------------------------------------------------


def test_the_folder_that_a_checkpoint_came_from(pair, capsys):
    checkpoint, folder = pair
    check_command(checkpoint, folder, PROMPT, True)
    shown = capsys.readouterr().out
    assert "config    the same model\n" in shown
    assert "tensors   26 compared: 26 bit-equal, 0 different\n" in shown
    assert re.search(r"^digest    sha256 [0-9a-f]{64} ", shown, re.MULTILINE)
    assert shown.endswith("logits    not compared: --tensors-only\nverdict   the same model\n")


def test_a_changed_weight_is_named_with_its_place(pair, tmp_path, capsys):
    checkpoint, folder = pair
    value = float(load_file(folder / WEIGHTS)[UP][5, 7])

    def change(tensors):
        tensors[UP][5, 7] += 0.5
        tensors[GATE][0, 0] = torch.nextafter(tensors[GATE][0, 0], torch.tensor(9.0))

    shown, error = tensors_differ(checkpoint, changed(folder, tmp_path / "changed", change), capsys)
    assert "26 compared: 24 bit-equal, 2 different" in shown
    assert f"{UP}: 0.5 apart: {value:.6g} and {value + 0.5:.6g} at [5, 7], sha256 " in shown
    assert shown.index(UP) < shown.index(GATE)  # the worst first
    assert error.endswith(f"2 tensor(s) different, first {UP}")


def test_gate_and_up_exchanged(pair, tmp_path, capsys):
    def change(tensors):
        tensors[GATE], tensors[UP] = tensors[UP], tensors[GATE]

    shown, error = tensors_differ(pair[0], changed(pair[1], tmp_path / "changed", change), capsys)
    assert GATE in shown
    assert UP in shown
    assert "2 tensor(s) different" in error


def test_zeros_of_the_other_sign_are_other_bits(pair, tmp_path, capsys):
    zeros = changed(pair[1], tmp_path / "zeros", lambda tensors: tensors[UP].zero_())
    checkpoint = hf_to_megatron(str(zeros), tmp_path / "checkpoint")
    negative = changed(zeros, tmp_path / "negative", lambda tensors: tensors[UP].neg_())
    assert f"{UP}: 0 apart: 0 and -0 at" in tensors_differ(checkpoint, negative, capsys)[0]


def test_missing_and_unknown_tensors(pair, tmp_path, capsys):
    def change(tensors):
        tensors["model.layers.1.mlp.other.weight"] = tensors.pop(UP)

    shown, error = tensors_differ(pair[0], changed(pair[1], tmp_path / "changed", change), capsys)
    assert f"1 missing in the folder: {UP}\n" in shown
    assert "1 in the folder alone: model.layers.1.mlp.other.weight\n" in shown
    assert f"1 tensor(s) missing, first {UP}; 1 tensor(s) in the folder alone" in error


def test_a_second_copy_of_tied_embeddings(pair, tmp_path, capsys):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def add_another(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    check_command(pair[0], changed(pair[1], tmp_path / "same", add), PROMPT, True)
    assert "27 compared: 27 bit-equal" in capsys.readouterr().out
    assert tensors_differ(pair[0], changed(pair[1], tmp_path / "other", add_another), capsys)[1].endswith("first lm_head.weight")


def test_another_shape(pair, tmp_path, capsys):
    def change(tensors):
        tensors[UP] = tensors[UP][:-1].clone()

    shown, _ = tensors_differ(pair[0], changed(pair[1], tmp_path / "changed", change), capsys)
    assert f"{UP}: inf apart: shape (48, 32) in the checkpoint, (47, 32) in the folder" in shown


def test_another_config(pair, tmp_path, capsys):
    """The tensors fit, and are the same; what the config says is computed with them is not."""
    other = shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    shown, error = tensors_differ(pair[0], other, capsys)
    assert "26 bit-equal, 0 different" in shown
    assert "norm_epsilon: 1e-06 in the checkpoint, 0.01 in config.json" in error


def test_an_architecture_that_is_none_of_ours(pair, tmp_path):
    other = shutil.copytree(pair[1], tmp_path / "other")
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"], "model_type": "other"}))
    with pytest.raises(ConfigError, match="OtherForCausalLM"):
        check_command(pair[0], other, PROMPT, True)


def test_no_tokenizer_needs_tensors_only(pair, tmp_path):
    bare = shutil.copytree(pair[1], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(DataError, match=r"no tokenizer.*--tensors-only"):
        check_command(pair[0], bare, PROMPT)


# --- logits: in a process of their own, for Megatron is taught to do without a GPU in it ----------------


def outcomes(commands: list[list[str]]) -> list[tuple[str, str]]:
    """What each `megatron-ext convert check` prints, and the error that it ends with ('' for none)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_outcomes, args=(commands, sending))
    process.start()
    sending.close()
    found: list[tuple[str, str]] = receiving.recv()  # EOFError where the process ended without
    process.join()
    return found


def _outcomes(commands: list[list[str]], sending: Any) -> None:
    from megatron_ext.__main__ import main

    torch.set_num_threads(1)  # many times faster for tensors of this size
    found = []
    for words in commands:
        shown, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(error):
            code = main(["convert", "check", *words])
        message = error.getvalue().partition("error: ")[2]  # transformers has its progress bars there
        assert code == (2 if message else 0)
        found.append((shown.getvalue(), message))
    sending.send(found)


def without_tokenizer(checkpoint: Path, path: Path) -> Path:
    """A copy of a checkpoint as versions before conversion wrote them: its manifest alone knows the tokenizer."""
    shutil.copytree(checkpoint, path, ignore=shutil.ignore_patterns("tokenizer*"))
    manifest = read_manifest(path)
    files = {name: digest for name, digest in manifest.files.items() if not name.startswith("tokenizer")}
    write_manifest(path, replace(manifest, files=files))
    return path


@pytest.fixture(scope="module")
def compared(pair, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """The whole command, once for each pair of folders."""
    checkpoint, folder = pair
    path = tmp_path_factory.mktemp("others")
    other_tokenizer = shutil.copytree(folder, path / "tokenizer")
    small_tokenizers.hugging_face(other_tokenizer, 280)
    not_finite = changed(folder, path / "nan", lambda tensors: tensors[UP].fill_(float("nan")))
    half = hugging_face_folder(path / "half", "llama", torch.bfloat16, num_hidden_layers=2)
    older = without_tokenizer(checkpoint, path / "older")
    commands: dict[str, list[Any]] = {
        "same": [checkpoint, folder, "--prompt", PROMPT],
        "changed": [checkpoint, changed(folder, path / "changed", lambda tensors: tensors[UP].mul_(1.5))],
        "not finite": [hf_to_megatron(str(not_finite), path / "nan_checkpoint"), not_finite],
        "tokenizer": [checkpoint, other_tokenizer],
        "older": [older, folder],
        "older, tokenizer": [older, other_tokenizer],
        "half": [hf_to_megatron(str(half), path / "half_checkpoint"), half],
        "rounded": [checkpoint, megatron_to_hf(checkpoint, path / "rounded", "bf16")],
        "too long": [checkpoint, folder, "--prompt", "fox " * 200],
        "no text": [checkpoint, folder, "--prompt", "\udc80"],
    }
    return dict(zip(commands, outcomes([[str(word) for word in words] for words in commands.values()]), strict=True))


def differing(shown: str) -> float:
    """The largest difference of logits that was printed."""
    found = re.search(r"^logits +(\S+) apart at most", shown, re.MULTILINE)
    assert found, shown
    return float(found[1])


def test_the_same_model_gives_the_same_logits(compared):
    shown, error = compared["same"]
    assert not error
    assert differing(shown) < 1e-5
    assert re.search(rf"^prompt    '{PROMPT}' \(\d+ tokens\)$", shown, re.MULTILINE)
    assert re.search(r"^next      ('.*' \(\d+\)  ){4}'.*' \(\d+\)$", shown, re.MULTILINE)
    assert "by the folder's model" not in shown
    assert shown.endswith("verdict   the same model\n")


def test_logits_that_are_not_finite_are_the_same_as_nothing(compared):
    shown, error = compared["not finite"]
    assert "different" in shown
    assert "logits    not compared: they are not finite" in shown
    assert error.rstrip().endswith("its logits are not finite")


def test_a_changed_weight_shows_in_the_logits(compared):
    shown, error = compared["changed"]
    assert differing(shown) > 1e-2
    assert re.search(rf"1 tensor\(s\) different, first {re.escape(UP)}; logits \S+ apart, above [12]\.\de-04$", error.strip())
    assert "verdict" not in shown


def test_a_tokenizer_of_another_model(compared):
    shown, error = compared["tokenizer"]
    assert "its tokenizer is another" in error
    assert re.search(r"^tokens    the folder's tokenizer is .*: .* by the folder's, .* by the checkpoint's$", shown, re.MULTILINE)


def test_a_checkpoint_that_carries_no_tokenizer(compared):
    assert compared["older"][0].endswith("verdict   the same model\n")
    shown, error = compared["older, tokenizer"]
    assert "its tokenizer is another" in error
    assert re.search(r"^tokens    the folder's tokenizer is [0-9a-f]{12}, the checkpoint's [0-9a-f]{12}$", shown, re.MULTILINE)


def test_half_precision_is_the_same_numbers_on_both_sides(compared):
    shown, error = compared["half"]
    assert not error
    assert "21 bit-equal, 0 different" in shown
    assert differing(shown) < 1e-5


def test_an_export_in_half_precision_is_compared_after_rounding(compared):
    shown, error = compared["rounded"]
    assert not error
    assert "0 bit-equal, 26 equal once rounded to bfloat16, 0 different" in shown
    assert differing(shown) < 1e-5


def test_prompts_that_cannot_be_used(compared):
    assert re.search(r"--prompt: has \d+ tokens, the model 128 positions", compared["too long"][1])
    assert "--prompt: is not UTF-8 text" in compared["no text"][1]


# --- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "largest", "place"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.5, 4.0]], 0.5, (1, 0)),
        ([[1.0, float("nan")]], [[1.0, float("nan")]], 0.0, (0, 0)),
        ([[1.0, float("nan")]], [[7.0, 2.0]], float("inf"), (0, 1)),
        ([[float("inf"), 1.0]], [[float("inf"), 1.25]], 0.25, (0, 1)),
    ],
)
def test_largest_difference(one, other, largest, place):
    assert largest_difference(torch.tensor(one), torch.tensor(other)) == (largest, place)


def test_the_bound_of_logits_grows_with_them():
    small, large = torch.randn(1, 3, 10), 100 * torch.randn(1, 3, 10)
    assert compare_logits(small / 10, small / 10).bound == 1e-4
    assert compare_logits(large, large).bound > 5e-3
    assert compare_logits(small, small).same
    assert not compare_logits(small, small + 1).same
