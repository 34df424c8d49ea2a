"""`megatron-ext generate`: what a checkpoint says, printed; and every way in which it cannot be asked."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.errors import MegatronExtError
from megatron_ext.generation.command import _marked
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
    "no tokens": {"max_tokens": 0},
    "a prompt too long": {"prompt": "the fox " * 200},
    "all of nothing": {"top_p": 0.0},
    "none of the likeliest": {"top_k": 0},
    "a seed too large": {"seed": 2**63},
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
    found = re.split(r"\nresponse \d+ of \d+: .*\n", printed)[1:]
    assert all(line.startswith("  | ") for one in found for line in one.splitlines())
    return found


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
        "too long": r"ConfigError: --max-tokens: \d+ tokens of prompt \+ 1,000 = .* has 128 positions; ask for at most \d+",
        "a prompt too long": r"ConfigError: --prompt: has [\d,]+ tokens, and the model 128 positions",
        "no samples": "ConfigError: --samples: is 0",
        "no tokens": "ConfigError: --max-tokens: is 0",
        "no prompt": "ConfigError: --prompt: is empty",
        "cold": "ConfigError: --temperature: temperature is -1",
        "all of nothing": "ConfigError: --top-p: top_p is 0",
        "none of the likeliest": "ConfigError: --top-k: top_k is 0",
        "a seed too large": "ConfigError: --seed: is 9223372036854775808",
        "half a character": "ConfigError: --prompt: is not UTF-8 text",
        "nowhere": "CheckpointError: /nowhere",
    }
    for name, reason in reasons.items():
        printed, error = said[name]
        assert re.match(reason, error), (name, error)
        assert not printed


def test_what_cannot_be_asked_is_refused_before_torch_is_loaded(run):
    """Loading it takes seconds. A process of its own: this one has torch."""
    asked = [("--samples", "0"), ("--max-tokens", "0"), ("--max-tokens", "1000"), ("--temperature", "-1"), ("--top-p", "2")]
    words = [["generate", str(run), "--prompt", "the fox", *one] for one in asked]
    words += [["generate", "/nowhere", "--prompt", "the fox"], ["generate", str(run), "--prompt", ""]]
    program = (
        "import sys\nfrom megatron_ext.__main__ import main\n"
        f"codes = [main(one) for one in {words!r}]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[2] * len(words)} False", done.stderr
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == len(words)


def test_white_space_and_control_characters_of_a_response_can_be_seen():
    assert _marked("a\n\n b") == "  | a\n  | \n  |  b"
    assert _marked("\n \n") == r"  | '\n \n'"
    assert _marked("") == "  | ''"
    assert _marked("a\r\x1b[2Jb é") == r"  | a\r\x1b[2Jb é"
