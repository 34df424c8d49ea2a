"""What a rank holds before the first step: its part of a batch, a random state that layers may fork, no pickles in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ext.config.plan import TrainPlan
from megatron_ext.metrics import read_metrics
from tests import ranks
from tests.small_corpus import train_run, write_corpus
from tests.training_runs import stage, trace

TWO = TrainPlan(device="cpu", ranks_per_node=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("placing"), {"web": 60, "qa": 30})


def placed_tokens(groups, context):
    """This rank's part of a batch of 2 x 8 tokens, its two ranks taken for a context-parallel group."""
    import torch

    from megatron_ext.training.trainer import place

    groups = replace(groups, plan=replace(groups.plan, context=context), collection=SimpleNamespace(cp=groups.collection.dp))
    batch = {name: torch.arange(16).view(2, 8) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    placed = place(batch, groups)
    assert placed.pop("attention_mask") is None
    assert all(torch.equal(value, placed["tokens"]) for value in placed.values())
    return placed["tokens"].tolist()


def test_context_parallel_ranks_share_a_sequence_evenly_under_the_causal_mask():
    first, second = ranks.run(placed_tokens, TWO, 2)
    assert first == [[0, 1, 6, 7], [8, 9, 14, 15]]  # the first and the last of four pieces
    assert second == [[2, 3, 4, 5], [10, 11, 12, 13]]


def test_without_context_parallelism_every_rank_has_whole_sequences():
    assert ranks.run(placed_tokens, TWO, 1) == [[list(range(8)), list(range(8, 16))]] * 2


def test_sequence_parallel_ranks_validate_before_the_first_step(corpus):
    one = stage(steps=2, save_every_steps=2)
    two = replace(one, name="sequence parallel", plan=replace(TWO, tensor=2, sequence_parallel=True, validation_sequences=8))
    runs = [train_run(corpus, s) for s in (replace(one, name="one rank", plan=replace(one.plan, validation_sequences=8)), two)]
    losses = []
    for run in runs:
        trace(run)
        losses.append({r["source"]: r["loss"] for r in read_metrics(run.metrics_path, "validation") if r["step"] == 0})
    assert set(losses[0]) == {"web", "qa"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def saved_names(groups, path):
    from pathlib import Path

    from megatron_ext.checkpoint.safe_reading import read_metadata

    return sorted(read_metadata(Path(path)).state_dict_metadata)


def test_checkpoints_hold_no_extra_state(corpus):
    run = train_run(corpus, replace(stage(steps=1, save_every_steps=1), name="names"))
    trace(run)
    (names,) = ranks.run(saved_names, TrainPlan(device="cpu"), str(run.checkpoints_path / "iter_0000001"))
    assert any(name.endswith("linear_qkv.weight") for name in names)
    assert [name for name in names if "_extra_state" in name] == []
