"""`megatron-ext generate`: what a checkpoint says, printed; and every way in which it cannot be asked."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.errors import MegatronExtError
from megatron_ext.tokenizer import load_tokenizer
from tests import ranks
from tests.small_models import hugging_face_folder

Command = dict[str, Any]
DEFAULTS: Command = {
    "prompt": "the fox", "template": None, "max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "top_k": None, "samples": 1, "seed": 1,
    "device": "cpu",
}  # fmt: skip
ASKED: dict[str, Command] = {
    "greedy": {},
    "from the folder of the run": {"in_folder": True},
    "three samples": {"samples": 3, "temperature": 1.0, "max_tokens": 20},
    "three samples again": {"samples": 3, "temperature": 1.0, "max_tokens": 20},
    "another seed": {"samples": 3, "temperature": 1.0, "max_tokens": 20, "seed": 2},
    "a template": {"prompt": "What is 1 + 1?", "template": "plain", "max_tokens": 3},
    "with bos": {"bos": True},
    "too long": {"max_tokens": 1000},
    "no samples": {"samples": 0},
    "no prompt": {"prompt": ""},
    "cold": {"temperature": -1.0},
    "half a character": {"prompt": "\ud800"},
    "nowhere": {"checkpoint": Path("/nowhere")},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with one published checkpoint in it, as a run keeps them."""
    path = tmp_path_factory.mktemp("run")
    folder = hugging_face_folder(path / "hugging_face", "qwen3", num_hidden_layers=2)
    hf_to_megatron(str(folder), path / "checkpoints" / "iter_0000000")
    (path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("0\n")
    return path


@pytest.fixture(scope="module")
def said(run) -> dict[str, tuple[str, str]]:
    """What each command prints, and the error that it ends with; in a process of their own, as a process group is global."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_say, args=(run, sending))
    process.start()
    sending.close()
    found: dict[str, tuple[str, str]] = receiving.recv()  # EOFError where the process ended without
    process.join()
    return found


def _say(run: Path, sending: Any) -> None:
    from megatron_ext.generation.command import generate_command

    torch.set_num_threads(1)
    found = {}
    for name, change in ASKED.items():
        options = {"checkpoint": run / "checkpoints" / "iter_0000000", **DEFAULTS, **change}
        if options.pop("in_folder", False):
            options["checkpoint"] = run
        printed, error = io.StringIO(), ""
        with contextlib.redirect_stdout(printed):
            try:
                generate_command(**options)
            except MegatronExtError as raised:
                error = f"{type(raised).__name__}: {raised}"
        found[name] = printed.getvalue(), error
    sending.send(found)


def responses(printed: str) -> list[str]:
    return re.split(r"\nresponse \d+ of \d+: .*\n", printed)[1:]


def test_a_greedy_response_is_printed(said, run):
    printed, error = said["greedy"]
    assert not error
    assert printed.startswith(f"checkpoint {run / 'checkpoints' / 'iter_0000000'}\nprompt     'the fox' (")
    assert re.search(r"\nresponse 1 of 1: 12 tokens, was cut off\n", printed)
    assert responses(printed)[0].strip()
    assert said["from the folder of the run"] == said["greedy"]


def test_samples_differ_and_come_again_with_their_seed(said):
    printed, error = said["three samples"]
    assert not error
    assert len(set(responses(printed))) == 3
    assert said["three samples again"] == (printed, "")
    assert not set(responses(printed)) & set(responses(said["another seed"][0]))


def test_templates_and_bos(said, run):
    printed, error = said["a template"]
    assert not error
    assert "prompt     'What is 1 + 1?\\n' (" in printed
    count = len(load_tokenizer(run / "checkpoints" / "iter_0000000").encode("the fox"))
    assert f"({count} tokens)" in said["greedy"][0]
    assert f"({count + 1} tokens)" in said["with bos"][0]


def test_what_cannot_be_asked(said):
    reasons = {
        "too long": r"ConfigError: request 0: \d+ tokens of prompt \+ a cap of 1,000 = .* has 128 positions",
        "no samples": "ConfigError: --samples: is 0",
        "no prompt": "ConfigError: request 0: its prompt is empty",
        "cold": "ConfigError: sampling: temperature is -1",
        "half a character": "ConfigError: --prompt: is not UTF-8 text",
        "nowhere": "CheckpointError: /nowhere",
    }
    for name, reason in reasons.items():
        printed, error = said[name]
        assert re.match(reason, error), (name, error)
        assert not printed
