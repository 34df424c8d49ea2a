"""One seed, one loss: under every layout, every accumulation, with recomputation, and with documents packed or alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_ext.config.stages import Documents
from tests import ranks
from tests.layouts import CPU, INTERLEAVED, LAYOUTS, SEED, STEPS, batches, observe_layout, observe_stage, observed, toy_stage, train_steps
from tests.small_corpus import EOD, LENGTH, VOCAB_SIZE
from tests.training_runs import MODEL


def difference(one: Any, other: Any) -> float:
    """The largest relative difference of losses and gradient norms."""
    a, b = np.array(one), np.array(other)
    assert a.shape == b.shape
    return float(np.abs(a / b - 1).max())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_every_layout_trains_as_one_rank(name):
    one, other = observed("one rank"), observed(name)
    assert len(other.steps) == STEPS
    assert difference(other.steps, one.steps) < 1e-5
    assert other.last.keys() == one.last.keys()
    for key, weights in one.last.items():
        assert np.allclose(other.last[key], weights, rtol=0, atol=1e-5), key  # a step moves a weight by up to 1e-3
    moved = [float(np.abs(one.last[key] - one.first[key]).max()) for key in one.first]
    assert min(moved) > 1e-3


def test_batched_messages_of_an_interleaved_pair_are_noticed():
    """The fault that the plan refuses: with them Megatron-Core trains on wrong gradients, and says nothing."""
    wrong = toy_stage(INTERLEAVED)
    object.__setattr__(wrong.plan, "overlap_p2p", False)
    assert difference(observe_stage(wrong, 1).steps, observed("one rank").steps[:1]) > 0.01


def test_recomputation_changes_nothing():
    """Not one bit, with dropout: the recomputed layers must draw the same random numbers."""
    dropping = replace(MODEL, hidden_dropout=0.1, attention_dropout=0.1)
    kept, *others = (
        observe_layout(replace(CPU, recompute=recompute, micro_batch=4), steps=3, model=dropping).steps
        for recompute in ("none", "selective", "full")
    )
    assert others == [kept, kept]
    assert difference(kept, observed("one rank").steps[:3]) > 1e-4  # it does drop


def accumulated(groups: Any, fault: bool) -> list[tuple[float, float]]:
    """The first step of 8 sequences in micro-batches of 1, 2, 4 and 8."""
    from megatron_ext.training import step as steps
    from megatron_ext.training.state import build_state

    if fault:
        true_loss = steps._loss

        def mean_of_means(mask_BS: Any, losses_BS: Any) -> Any:
            total, count, report = true_loss(mask_BS, losses_BS)
            return total / count, count // count, report / report[1]

        steps._loss = mean_of_means
    found = []
    for micro_batch in (1, 2, 4, 8):
        stage = toy_stage(replace(CPU, micro_batch=micro_batch))
        found += train_steps(build_state(stage, groups, SEED), stage, [0])
    return found


def test_accumulation_equals_one_large_batch():
    valid = [int(batch["loss_mask"].sum()) for batch in batches(toy_stage(), 0, 0)]
    assert len(set(valid)) > 4  # ragged
    first, *others = ranks.run(accumulated, CPU, False)[0]
    assert difference(others, [first] * 3) < 1e-6
    assert first == observed("one rank").steps[0]


def test_a_mean_of_means_is_noticed():
    first, *others = ranks.run(accumulated, CPU, True)[0]
    assert min(difference([other], [first]) for other in others) > 1e-4


RNG = np.random.default_rng(5)
ONE, TWO = (np.append(RNG.integers(3, VOCAB_SIZE, size=size), EOD) for size in (6, LENGTH - 8))
AFTER = 5  # the label of the last token


def per_token_losses(groups: Any, documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two documents packed into one sequence, and of each alone, end to end."""
    import torch

    from megatron_ext.data.loader import make_batch
    from megatron_ext.training.state import build_state

    stage = toy_stage(documents=documents, model=replace(MODEL, init_std=0.3))  # large weights: attention matters
    model = build_state(stage, groups, SEED).chunks[0]

    def losses(text: Any) -> Any:
        batch = make_batch([np.array(text)], documents, EOD)
        with torch.no_grad():
            return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])[0].numpy()

    packed = losses([*ONE, *TWO, AFTER])
    return packed, np.concatenate([losses([*ONE, TWO[0]]), losses([*TWO, AFTER])])


@pytest.mark.parametrize("positions", ["restart", "continue"])
def test_packed_documents_are_as_if_alone(positions):
    packed, alone = ranks.run(per_token_losses, CPU, Documents(attention="within", positions=positions))[0]
    assert packed.shape == alone.shape == (len(ONE) + len(TWO),)
    assert np.abs(packed - alone).max() < 1e-5


def test_attention_across_documents_is_another_computation():
    packed, alone = ranks.run(per_token_losses, CPU, Documents(attention="across"))[0]
    assert np.abs(packed - alone)[: len(ONE)].max() < 1e-5  # nothing stands before the first
    assert np.abs(packed - alone)[len(ONE) :].min() > 1e-4


def test_documents_apart_under_a_layout():
    within = Documents(attention="within", positions="restart", eod_loss=False)
    sharp = replace(MODEL, init_std=0.3)
    one, other = (observe_layout(LAYOUTS[name], 2, documents=within, model=sharp) for name in ("one rank", "tensor 2 x pipeline 2"))
    assert difference(other.steps, one.steps) < 1e-5
    across = observe_layout(CPU, 2, model=sharp)
    assert difference(across.steps, one.steps) > 1e-3
