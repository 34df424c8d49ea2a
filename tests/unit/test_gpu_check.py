"""The GPU check says what it does, and where there is no GPU it says so; rules that hold for GPU plans."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import Documents
from megatron_ext.errors import ConfigError
from tests.small_corpus import STAGE


def run_tool(name, *options):
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the same on a machine with a GPU
    return subprocess.run([sys.executable, "-m", f"tools.{name}", *options], capture_output=True, text=True, check=False, env=hidden)


@pytest.mark.parametrize("name", ["gpu_check", "bench_overhead"])
def test_help_says_what_is_measured(name):
    done = run_tool(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "step" in done.stdout
    assert "Prints one JSON object" in done.stdout


def test_without_a_gpu_it_says_so_and_exits_2():
    done = run_tool("gpu_check")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "torch sees no GPU here" in done.stderr
    assert "python -m tools.gpu_check --rehearse" in done.stderr
    assert "Traceback" not in done.stderr


def test_attention_within_documents_is_refused_on_a_gpu_and_only_there():
    gpu = TrainPlan(device="gpu")
    within = Documents(attention="within")
    assert replace(STAGE, documents=within).documents == within
    assert replace(STAGE, plan=gpu).plan == gpu
    with pytest.raises(
        ConfigError, match=r"stage base: documents.attention='within' is available with plan.device=cpu only.*use attention"
    ):
        replace(STAGE, documents=within, plan=gpu)
