"""Where reinforcement learning may start, and what a graph says where it may not; the words of `generate` and `replay`."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import __main__
from megatron_ext.__main__ import main
from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.stages import Branch, Weights
from megatron_ext.errors import ConfigError, RunError
from megatron_ext.launch import ranks
from megatron_ext.launch.commands import parse
from megatron_ext.launch.graph import Graph, with_joints
from megatron_ext.launch.verbs import FUNCTIONS, run_of_kind
from megatron_ext.rl.record_paths import record_path
from megatron_ext.runs import Run, write_run
from recipes import models, octothinker

PAPER = octothinker.llama_3b()
LONG = PAPER.stage("rl_long")


def on(stage: Any) -> Graph:
    """The paper's graph and one stage more."""
    return replace(PAPER, stages=(*PAPER.stages, stage))


def test_it_comes_back_from_json_unchanged() -> None:
    assert from_json(Graph, to_json(PAPER)) == PAPER


def test_it_starts_from_train_convert_and_rl_stages_by_weights_alone() -> None:
    for parent in ("llama", "stable", "decay_long", "rl_long"):
        graph = on(replace(LONG, name="more", start=Weights(stage=parent)))
        assert (parent, "more", "start") in graph.edges()
    with pytest.raises(ConfigError, match="stage 'more' starts from 'corpus', a tokenize stage, which has no checkpoints"):
        on(replace(LONG, name="more", start=Weights(stage="corpus")))
    with pytest.raises(ConfigError, match="start"):
        replace(LONG, start=Branch(stage="stable"))
    with pytest.raises(ConfigError, match="reads 'nothing' as its start, but no earlier stage"):
        on(replace(LONG, name="more", start=Weights(stage="nothing")))


def test_it_starts_from_a_stage_of_its_model() -> None:
    with pytest.raises(ConfigError, match=r"holds model llama_3_2_1b, but its start 'decay_long' holds llama_3_2_3b, and they differ"):
        on(replace(LONG, name="more", model=models.llama_3_2_1b()))


def test_a_point_of_a_training_stage_is_pinned_and_one_of_reinforcement_learning_is_refused() -> None:
    point = 70_000 * 4_194_304 // 2
    graph = with_joints(on(replace(LONG, name="more", start=Weights(stage="stable", tokens=point))))
    assert graph.stage("stable").plan.pin_tokens == (point,)
    with pytest.raises(ConfigError, match="tokens=40 of 'rl_long', which counts rollout steps and is started from at its last alone"):
        on(replace(LONG, name="more", start=Weights(stage="rl_long", tokens=40)))
    with pytest.raises(ConfigError, match="tokens=1 of 'llama', a converted model"):
        on(replace(LONG, name="more", start=Weights(stage="llama", tokens=1)))
    with pytest.raises(ConfigError, match="1,000 tokens is no step of this stage"):
        on(replace(LONG, name="more", start=Weights(stage="stable", tokens=1000)))


@pytest.mark.parametrize("start", [Weights(stage="rl_long"), Branch(stage="rl_long")])
def test_training_does_not_go_on_from_reinforcement_learning(start: Any) -> None:
    with pytest.raises(ConfigError, match="a train stage starts from a train or convert stage, an rl stage from any of the three"):
        on(replace(PAPER.stage("decay_long"), name="more", start=start))


# --- words of the command line -------------------------------------------------------------------------


def test_the_words_of_generate() -> None:
    few = parse(["generate", "runs/demo/rl_long", "--prompt", "1 + 1 ="])
    _, takes = FUNCTIONS["generate"]
    assert {key: getattr(few, key) for key in takes} == {
        "checkpoint": Path("runs/demo/rl_long"), "prompt": "1 + 1 =", "template": None, "max_tokens": 256, "temperature": 0.0,
        "top_p": 1.0, "top_k": None, "samples": 1, "seed": 1, "device": "cpu", "bos": False,
    }  # fmt: skip
    words = "--template complex --max-tokens 9 --temperature 1 --top-p 0.9 --top-k 5 --samples 3 --seed 7 --device gpu --bos"
    many = parse(["generate", "c", "--prompt", "x", *words.split()])
    assert [getattr(many, key) for key in takes][2:] == ["complex", 9, 1.0, 0.9, 5, 3, 7, "gpu", True]
    assert parse(["generate", "c", "--prompt", "x", "--template", "none"]).template is None


@pytest.mark.parametrize("words", [["generate", "c"], ["generate", "c", "--prompt", "x", "--template", "orz"], ["replay", "r"]])
def test_words_that_are_missing_or_unknown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)
    assert "usage: megatron-ext" in capsys.readouterr().err


def run_of(folder: Path, **plan: Any) -> Run:
    """A run folder of reinforcement learning on one node."""
    stage = PAPER.stage("rl_base")
    llama = write_run(folder / "llama", "g", PAPER.stage("llama"), {})
    run = write_run(folder / "rl_base", "g", replace(stage, plan=replace(stage.plan, nodes=1, **plan)), {"start": llama.path})
    path = record_path(run.path, 3)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b'{"cap_tokens": 2048}\n'))
    return run


def test_replay_becomes_the_ranks_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, ranks_per_node=4, threads_per_rank=3)
    for name in ranks.THREAD_VARIABLES:
        monkeypatch.setenv(name, "64")
    called: list[list[str]] = []

    def become(_: str, words: list[str]) -> None:
        called.append(words)
        raise SystemExit(0)  # as execv, it does not return

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main(["replay", str(run.path), "--step", "3", "--set", "objective.clip_high=0.28", "--set", "cap_tokens=1024", "--json"])
    words = called[0]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("megatron_ext") + 1 :] == [
        "replay", str(run.path), "--step", "3", "--set", "objective.clip_high=0.28", "--set", "cap_tokens=1024", "--json",
    ]  # fmt: skip
    assert os.environ[ranks.THREAD_VARIABLES[0]] == "3"


def test_replay_hands_its_words_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, ranks_per_node=1)
    for name in ranks.THREAD_VARIABLES:
        monkeypatch.setenv(name, "64")
    given: list[Any] = []
    module = type("Module", (), {"run_replay": staticmethod(lambda *values: given.append(values))})
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module if name == "megatron_ext.rl.replay" else None)
    assert main(["replay", str(run.path), "--step", "3"]) == 0
    ((opened, *rest),) = given
    assert (opened.path, rest) == (run.path, [3, [], False])


def test_replay_takes_reinforcement_learning_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "llama", "g", PAPER.stage("llama"), {})
    assert main(["replay", str(run.path), "--step", "3"]) == 2
    assert "stage 'llama' is of kind 'convert', and replay takes 'rl'" in capsys.readouterr().err
    with pytest.raises(RunError, match="name a run of that kind"):
        run_of_kind("replay", "rl", run.path)
