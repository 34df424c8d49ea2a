"""The whole path by its commands, on the smoke-sized graph: run, run again, be killed, be changed, fail."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import read_manifest
from tests.documented_metrics import undocumented

TRAINED = ("base", "stable", "decay_long", "decay_short", "decay_hybrid")
LEARNT = ("rl_base", "rl_stable", "rl_long", "rl_short", "rl_hybrid")
STEPS = {"base": 6, "stable": 12, "decay_long": 8, "decay_short": 8, "decay_hybrid": 8}


def launch(runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ext", "launch", "demo:smoke", "--local", "--runs", str(runs), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    result = launch(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def last_checkpoint(runs: Path, stage: str) -> Path:
    folder = runs / "smoke" / stage / "checkpoints"
    return folder / f"iter_{int((folder / 'latest_checkpointed_iteration.txt').read_text()):07d}"


def test_every_stage_is_done_and_the_page_is_there(runs):
    for stage in (*TRAINED, *LEARNT, "text", "tokenizer", "corpus", "report"):
        assert (runs / "smoke" / stage / "DONE").is_file()
    page = runs / "smoke" / "report" / "index.html"
    assert all(stage in page.read_text() for stage in (*TRAINED, *LEARNT))
    assert "index.html" in (runs / "stdout.txt").read_text().splitlines()[-1]
    json.loads((runs / "smoke" / "report" / "summary.json").read_text())


def test_every_step_was_taken_once_and_the_tokens_add_up(runs):
    for stage in TRAINED:
        records = read_metrics(runs / "smoke" / stage / "metrics.jsonl", "train")
        assert [r["step"] for r in records] == list(range(1, STEPS[stage] + 1))
        assert [r["tokens"] for r in records] == [512 * r["step"] for r in records]
    lineage = {stage: read_manifest(last_checkpoint(runs, stage)).lineage_tokens for stage in TRAINED}
    assert lineage == {"base": 3072, "stable": 9216, "decay_long": 13312, "decay_short": 13312, "decay_hybrid": 13312}


def test_each_start_learns_and_is_scored_before_and_after_under_the_cap_of_its_step(runs):
    for stage in LEARNT:
        folder = runs / "smoke" / stage
        steps = read_metrics(folder / "metrics.jsonl", "rl")
        assert [(one["step"], one["num_responses"]) for one in steps] == [(1, 8), (2, 8)]
        assert [one["cap_tokens"] for one in steps] == ([8, 16] if stage in ("rl_long", "rl_hybrid") else [8, 8])
        assert all(one["token_mult_prob_error"] is None or abs(one["token_mult_prob_error"] - 1) < 1e-4 for one in steps)
        assert undocumented(read_metrics(folder / "metrics.jsonl")) == []
        scores = read_metrics(folder / "metrics.jsonl", "rl_validation")
        assert [one["step"] for one in scores] == [0, 1, 2]
        assert {one["num_problems"] for one in scores} == {20}
        parent = read_manifest(last_checkpoint(runs, stage)).parent
        assert parent is not None
        assert parent.stage == {"base": "base", "stable": "stable"}.get(stage[3:], f"decay_{stage[3:]}")


def test_the_branches_start_from_the_one_stable_checkpoint(runs):
    parents = [read_manifest(last_checkpoint(runs, stage)).parent for stage in TRAINED[2:]]
    assert len({p.manifest_sha256 for p in parents}) == 1
    assert {(p.stage, p.start, p.iteration, p.tokens) for p in parents} == {("stable", "branch", 12, 6144)}
    first_rates = {read_metrics(runs / "smoke" / stage / "metrics.jsonl", "train")[0]["learning_rate"] for stage in TRAINED[2:]}
    assert first_rates == {read_metrics(runs / "smoke" / "stable" / "metrics.jsonl", "train")[-1]["learning_rate"]}


def test_every_checkpoint_exports_and_transformers_generates_from_it(runs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_ext.conversion.to_hugging_face import megatron_to_hf
    from megatron_ext.tokenizer import load_tokenizer

    own = load_tokenizer(runs / "smoke" / "tokenizer" / "tokenizer")
    text = "Question: what is 12 + 30?\nAnswer:"
    checkpoints = [path for stage in TRAINED for path in sorted((runs / "smoke" / stage / "checkpoints").glob("iter_*"))]
    assert len(checkpoints) >= 9
    for number, checkpoint in enumerate(checkpoints):
        folder = megatron_to_hf(checkpoint, tmp_path / str(number), say=lambda _: None)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        assert prompt.input_ids[0].tolist() == own.encode(text)
        model = AutoModelForCausalLM.from_pretrained(str(folder))
        ids = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
        assert tokenizer.decode(ids).startswith(text)
        assert own.decode(ids) == tokenizer.decode(ids)


def test_a_second_launch_finds_everything_done(runs):
    before = {stage: (runs / "smoke" / stage / "DONE").read_bytes() for stage in TRAINED}
    started = time.monotonic()
    result = launch(runs)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 30
    assert result.stdout.count("done before, skipped") >= 8
    assert before == {stage: (runs / "smoke" / stage / "DONE").read_bytes() for stage in TRAINED}


def test_a_changed_recipe_under_a_done_folder_is_refused_with_the_difference(runs):
    result = launch(runs, "stable.schedule.peak=0.001")
    assert result.returncode == 2
    assert "stable: this run is DONE with another recipe" in result.stderr
    assert "schedule.peak: 0.003 -> 0.001" in result.stderr


def test_a_changed_plan_is_not_another_run(runs):
    assert launch(runs, "stable.plan.log_every_steps=2").returncode == 0


def test_killed_in_the_middle_and_launched_again_it_ends_as_if_undisturbed(runs, tmp_path):
    (tmp_path / "smoke").mkdir()
    for stage in ("text", "tokenizer", "corpus", "base"):
        shutil.copytree(runs / "smoke" / stage, tmp_path / "smoke" / stage)
    command = [sys.executable, "-m", "megatron_ext", "launch", "demo:smoke", "--local", "--runs", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    tracker = tmp_path / "smoke" / "stable" / "checkpoints" / "latest_checkpointed_iteration.txt"
    while not tracker.is_file():
        assert process.poll() is None
        time.sleep(0.005)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    assert not (tmp_path / "smoke" / "report" / "DONE").exists()
    result = launch(tmp_path)
    assert result.returncode == 0, result.stderr
    for stage in TRAINED:
        manifests = [read_manifest(last_checkpoint(folder, stage)) for folder in (runs, tmp_path)]
        data = [{name: entry for name, entry in m.files.items() if name.endswith(".distcp")} for m in manifests]
        assert data[0] == data[1]
        assert manifests[0].ledger == manifests[1].ledger
    losses = [[r["loss"] for r in read_metrics(folder / "smoke/stable/metrics.jsonl", "train")] for folder in (runs, tmp_path)]
    assert losses[0] == losses[1]


def test_a_failing_stage_is_named_with_its_logs_last_lines(runs, tmp_path):
    (tmp_path / "smoke").mkdir()
    for stage in ("text", "tokenizer", "corpus"):
        shutil.copytree(runs / "smoke" / stage, tmp_path / "smoke" / stage)
    result = launch(tmp_path, "base.schedule.peak=1e30")
    assert result.returncode == 2
    assert "stage 'base' ended with" in result.stderr
    assert "attempts/1/log.txt" in result.stderr
    assert "the step was stopped before the weights moved" in result.stderr
    assert not (tmp_path / "smoke" / "base" / "DONE").exists()
