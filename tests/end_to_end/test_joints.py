"""Children at several points of one parent, by `launch --local`, on a corpus of random tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.stages import Branch, Weights
from megatron_ext.launch.graph import Graph, with_overrides
from megatron_ext.launch.local import launch_local
from megatron_ext.launch.tree import tree_text
from megatron_ext.runs import mark_done
from tests.small_corpus import write_corpus
from tests.training_runs import stage as training_stage
from tests.unit.test_tree import line_of


@pytest.mark.slow
def test_children_at_several_points_of_one_parent_run_from_what_was_pinned_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would keep the parent's checkpoints: it saves at its end only."""
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path / "runs" / "points", {"web": 60, "qa": 30})
    mark_done(corpus, {"seconds": 1.0})
    parent = training_stage(steps=3, save_every_steps=100)
    starts = {"early": Weights(stage="base", tokens=128), "twin": Branch(stage="base", tokens=128), "late": Branch(stage="base")}
    children = tuple(replace(parent, name=name, start=start, budget=replace(parent.budget, steps=1)) for name, start in starts.items())
    stages = (corpus.stage, parent, *children)
    launch_local(with_overrides(Graph(name="points", stages=stages), []), tmp_path / "runs", None)
    text = tree_text(tmp_path / "runs")
    assert [line.strip() for line in text.splitlines() if "pinned" in line] == ["│ pinned at 128 tokens"]
    assert "weights of base at 128 tokens" in line_of(text, "early")
    assert "branch of base at 128 tokens" in line_of(text, "twin")
    assert "branch of base at 384 tokens" in line_of(text, "late")
    assert text.count("DONE") == 5
