"""README's own recipe, from text to report: run here, looked at, skipped the second time, one stage redone by hand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import open_run, read_done

ROOT = Path(__file__).resolve().parents[2]


def megatron_ext(folder: Path, *words: str) -> str:
    """Output of one command in `folder`."""
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # thirty commands, beside other tests
def test_readmes_recipe_runs_whole(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "my.py").write_text(example)
    launch = ("launch", "./my.py:run", "--local")
    trained = ["base", "stable", "decay_long", "decay_short", "decay_hybrid"]
    learnt = ["rl_base", "rl_stable", "rl_long", "rl_short", "rl_hybrid"]
    names = ["text", "tokenizer", "corpus", *trained, *learnt, "decay_linear", "report"]
    folder = tmp_path / "runs" / "mine"

    out = megatron_ext(tmp_path, *launch)
    assert re.findall(r"^\[\d+/15\] (\w+): \w+$", out, flags=re.MULTILINE) == names
    assert out.splitlines()[-1] == "report: runs/mine/report/index.html"
    assert "decay_linear" in (folder / "report" / "index.html").read_text(encoding="utf-8")

    # The branch that is ours: a straight line from the peak, over 16 steps, from stable's last point.
    records = read_metrics(folder / "decay_linear" / "metrics.jsonl", "train")
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([3e-3 * (1 - 0.9 * step / 16) for step in range(16)], rel=1e-12)
    assert all(0 < record["loss"] < 7 for record in records)
    parent = read_manifest(folder / "decay_linear" / "checkpoints" / "iter_0000016").parent
    assert parent is not None
    assert (parent.stage, parent.start, parent.tokens) == ("stable", "branch", 12 * 512)
    assert parent.science_hash == open_run(folder / "stable").science_hash

    again = megatron_ext(tmp_path, *launch)
    assert re.findall(r"^\[\d+/15\] (\w+): \w+, done before, skipped$", again, flags=re.MULTILINE) == names
    assert "decay_linear" in megatron_ext(tmp_path, "tree", "runs")

    # Looking at it: whole checkpoints, one step computed again to the bit, nothing to remove.
    assert "runs/mine/stable/checkpoints/iter_0000012: whole" in megatron_ext(tmp_path, "verify", "runs/mine")
    assert "equal to the record of attempt 1, to the bit" in megatron_ext(tmp_path, "why", "runs/mine/stable", "--step", "10")
    assert "0 bytes would be freed" in megatron_ext(tmp_path, "gc", "runs", "--dry-run")

    # Out to Hugging Face and in again: the same model.
    megatron_ext(tmp_path, "convert", "megatron-to-hf", "runs/mine/stable", "stable-hf")
    assert "the same model" in megatron_ext(tmp_path, "convert", "check", "runs/mine/stable", "stable-hf", "--prompt", "12 + 30 =")
    megatron_ext(tmp_path, "convert", "hf-to-megatron", "stable-hf", "stable-again")
    assert "the same model" in megatron_ext(tmp_path, "convert", "check", "stable-again", "stable-hf", "--tensors-only")

    # What a branch says; the reinforcement learning from it, done; one of its steps again, from its record.
    said = megatron_ext(
        tmp_path, "generate", "runs/mine/decay_short", "--template", "plain", "--prompt", "What is 12+25?", "--max-tokens", "8"
    )
    assert "8 tokens" in said
    assert "nothing to do" in megatron_ext(tmp_path, "rl", "runs/mine/rl_short")
    replayed = megatron_ext(tmp_path, "replay", "runs/mine/rl_short", "--step", "1", "--set", "objective.clip_high=0.28")
    assert "equal to the record, bit for bit" in replayed
    assert "objective.clip_high=0.28" in replayed

    # One stage by hand, from nothing: the same losses, bit for bit.
    run = folder / "decay_long"
    before = [record["loss"] for record in read_metrics(run / "metrics.jsonl", "train")]
    for name in ("DONE", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    megatron_ext(tmp_path, "train", str(run))
    assert [record["loss"] for record in read_metrics(run / "metrics.jsonl", "train")] == before
    assert read_done(open_run(run))["tokens"] == 8 * 512
    assert "nothing to do" in megatron_ext(tmp_path, "train", str(run))
    drawn = megatron_ext(tmp_path, *launch)
    assert "[15/15] report: report\n" in drawn  # older than what it reads, so drawn again
