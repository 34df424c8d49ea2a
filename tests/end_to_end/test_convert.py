"""A Hugging Face model through a recipe: converted, trained on, branched, exported beside the training; its checkpoints exported again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.__main__ import main
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import open_run, read_done
from megatron_ext.tokenizer import load_tokenizer

RECIPE = """
from dataclasses import replace

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, ConvertStage, ReportStage, Source, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from recipes.mixtures import mix


def run() -> Graph:
    prose = Source(name="prose", paths=("{folder}/prose.jsonl",), max_epochs=9.0)
    corpus = TokenizeStage(name="corpus", sources=(prose,), tokenizer="{folder}/model")
    model = ModelConfig(
        name="tiny", num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=300,
        max_positions=128, head_dim=8, family="qwen2", norm_epsilon=1e-6,
    )
    qwen = ConvertStage(name="qwen", model_id="{folder}/model", model=model)
    stable = TrainStage(
        name="stable", start=Weights(stage="qwen"), corpus="corpus", model=model, mixture=mix(prose=1.0), precision="fp32",
        budget=Budget(steps=4, sequences_per_batch=4, sequence_length=32), schedule=Schedule(shape="constant", peak=1e-3),
        plan=TrainPlan(device="cpu", export_tokens=(2 * 128,), validation_sequences=0),
    )
    decay = replace(
        stable, name="decay", start=Branch(stage="stable"), schedule=Schedule(shape="cosine", peak=1e-3),
        plan=replace(stable.plan, export_tokens=(), export_last=True),
    )
    report = ReportStage(name="report", stages=("stable", "decay"), title="From a tiny Qwen2.5")
    return Graph(name="tiny", stages=(corpus, qwen, stable, decay, report))
"""


def megatron_ext(folder: Path, *words: str) -> str:
    """Output of one command in `folder`."""
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, some text, the recipe, and its runs."""
    from tests.small_models import hugging_face_folder

    folder = tmp_path_factory.mktemp("converted")
    hugging_face_folder(folder / "model", family="qwen2")
    words = ["the quick brown fox", "jumps over 12 lazy dogs", "and counts to 345"]
    lines = [json.dumps({"id": str(i), "text": " ".join(words[(i + j) % 3] for j in range(30))}) for i in range(40)]
    (folder / "prose.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "my.py").write_text(RECIPE.replace("{folder}", str(folder)))
    (folder / "out.txt").write_text(megatron_ext(folder, "launch", "./my.py:run", "--local"))
    return folder


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor that transformers reads from a folder."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").state_dict())


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    import torch

    assert left.keys() == right.keys()
    assert [name for name in left if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])] == []


@pytest.mark.slow
def test_training_goes_on_from_the_converted_model(here: Path) -> None:
    run = here / "runs" / "tiny" / "qwen"
    manifest = read_manifest(run / "checkpoints" / "iter_0000000")
    assert (manifest.tokens, manifest.lineage_tokens, manifest.optimizer_layout, manifest.pinned) == (0, 0, "none", True)
    assert manifest.hugging_face["source"] == str(here / "model")
    assert read_done(open_run(run))["parameters"] == open_run(run).stage.model.num_parameters
    trained = read_manifest(here / "runs/tiny/stable/checkpoints/iter_0000004")
    assert trained.parent is not None
    assert (trained.parent.stage, trained.parent.start, trained.parent.iteration, trained.lineage_tokens) == ("qwen", "weights", 0, 512)
    tree = megatron_ext(here, "tree", "runs")
    assert "weights of qwen" in tree
    assert "LR 0 ->" not in tree
    assert "exported at 256 tokens" in tree


@pytest.mark.slow
def test_every_checkpoint_of_the_graph_exports_and_generates(here: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert_equal(weights(_export(here, "qwen", 0)), weights(here / "model"))
    for stage, step in (("stable", 2), ("stable", 4), ("decay", 4)):
        exported = _export(here, stage, step)
        tokenizer = AutoTokenizer.from_pretrained(str(exported))
        model = AutoModelForCausalLM.from_pretrained(str(exported))
        assert type(model).__name__ == "Qwen2ForCausalLM"
        prompt = tokenizer("the quick brown", return_tensors="pt")
        assert prompt.input_ids[0].tolist()[-1] == load_tokenizer(here / "model").encode("the quick brown")[-1]
        with torch.no_grad():
            assert model.generate(**prompt, max_new_tokens=8, do_sample=False).shape[1] > prompt.input_ids.shape[1]
    trained, start = weights(_export(here, "stable", 2)), weights(here / "model")
    assert all(not torch.equal(trained[name], start[name]) for name in trained if name.endswith("proj.weight"))


def _export(here: Path, stage: str, step: int) -> Path:
    target = here / "out" / f"{stage}-{step}"
    if not target.exists():
        assert main(["convert", "megatron-to-hf", str(here / f"runs/tiny/{stage}/checkpoints/iter_{step:07d}"), str(target)]) == 0
    return target


@pytest.mark.slow
def test_what_a_stage_exports_beside_its_training_is_what_the_command_exports(here: Path) -> None:
    for stage, step in (("stable", 2), ("decay", 4)):
        made = here / "runs" / "tiny" / stage / "exports"
        assert os.listdir(made) == [f"iter_{step:07d}"]
        assert_equal(weights(made / f"iter_{step:07d}"), weights(_export(here, stage, step)))
    record = json.loads((here / "runs/tiny/decay/exports/iter_0000004/conversion.json").read_text())
    assert record["base_model"] == {"source": str(here / "model"), "revision": None}
    check = megatron_ext(here, "convert", "check", "runs/tiny/decay", "runs/tiny/decay/exports/iter_0000004", "--prompt", "the quick")
    assert "bit-equal" in check


@pytest.mark.slow
def test_a_second_launch_finds_everything_done(here: Path) -> None:
    assert megatron_ext(here, "launch", "./my.py:run", "--local").count("done before, skipped") == 5
    again = megatron_ext(here, "launch", "./my.py:run", "--local", "stable.plan.export_last=true")
    assert "its export iter_0000004, which the plan asks for by now, is not there; write it with" in again
    assert "megatron-ext convert megatron-to-hf runs/tiny/stable/checkpoints/iter_0000004 runs/tiny/stable/exports/iter_0000004" in again


@pytest.mark.slow
def test_a_failed_export_keeps_the_stage_from_being_done_and_the_next_attempt_does_it(here: Path) -> None:
    run = here / "runs" / "tiny" / "stable"
    (run / "DONE").unlink()
    shutil.rmtree(run / "exports" / "iter_0000002")
    in_the_way = run / "exports" / ".attempt-2" / "iter_0000002" / "notes.txt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    command = [sys.executable, "-m", "megatron_ext", "train", str(run)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert re.search(
        r"the export of step 2 to \S+exports failed: it ended with code 2: \S+iter_0000002: not empty: holds notes.txt", failed.stderr
    )
    assert "Start the stage again, and only what is missing is exported" in failed.stderr
    assert not (run / "DONE").exists()

    # Of a checkpoint that is no longer there, because its step was trained again: made anew.
    stale = run / "exports" / "iter_0000004" / "conversion.json"
    assert json.loads(stale.read_text())["source"]["iteration"] == 4  # the plan of the launch before asked for it
    stale.write_text(stale.read_text().replace(json.loads(stale.read_text())["source"]["manifest_sha256"], "0" * 64))

    assert "error" not in megatron_ext(here, "train", str(run))
    assert json.loads(stale.read_text())["source"]["manifest_sha256"] != "0" * 64
    assert (run / "DONE").is_file()
    assert sorted(os.listdir(run / "exports")) == ["iter_0000002", "iter_0000004"]  # the second by the plan of the launch before
    assert_equal(weights(run / "exports" / "iter_0000002"), weights(_export(here, "stable", 2)))
