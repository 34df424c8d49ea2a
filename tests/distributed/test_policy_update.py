"""An update of given samples: a naive implementation's gradients, the same numbers under every layout and packing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.errors import TrainingError
from tests import ranks
from tests.layouts import TWO
from tests.policy_updates import CASES, LAYOUTS, PLAIN, TEMPERATURE, VOCAB_SIZE, Updated, given, model, observed, put_in, update

ONE = LAYOUTS["one rank"]


def difference(one: Updated, other: Updated) -> float:
    """The largest difference of loss and norm (relative), log-probabilities and weights."""
    assert one.weights.keys() == other.weights.keys()
    numbers = [abs(one.loss - other.loss), abs(one.grad_norm / other.grad_norm - 1)]
    arrays = [*zip(one.scores, other.scores, strict=True), *((weights, other.weights[name]) for name, weights in one.weights.items())]
    return max(*numbers, *(float(np.abs(a - b).max(initial=0.0)) for a, b in arrays))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_every_layout_updates_as_one_rank(name):
    """Also where there are fewer samples than ranks: the last case has one."""
    one, other = observed("one rank"), observed(name)
    for case in CASES:
        assert difference(other[case], one[case]) < 1e-5, case  # a step moves a weight by up to 1e-3
        assert other[case].statistics == pytest.approx(one[case].statistics, rel=1e-5, abs=1e-6)


def test_packed_equals_unpacked():
    packed, unpacked = observed("one rank"), observed("one rank", "one sequence a row")
    for case in CASES:
        assert difference(packed[case], unpacked[case]) < 1e-5
    assert difference(observed("one rank", "attention across sequences")["first"], unpacked["first"]) > 1e-3


def test_a_denominator_of_each_micro_batch_is_noticed():
    wrong, one = observed("data 2", "a denominator of each micro-batch")["first"], observed("one rank")["first"]
    assert abs(wrong.grad_norm / one.grad_norm - 1) > 0.01


# against an implementation of the test's own: each sequence by itself, full logits, autograd


def naive(chunk: Any, settings: Any, samples: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and log-probabilities, straight from the equations."""
    losses, shares, found = [], 0.0, []
    for one in samples:
        if not len(one.response):
            found.append(torch.empty(0))
            continue
        tokens = torch.tensor([[*one.prompt, *one.response.tolist()]])
        logits = chunk(tokens, torch.arange(tokens.shape[1])[None], None)[0, :, :VOCAB_SIZE] / TEMPERATURE
        logprobs = logits.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[len(one.prompt) - 1 :, 0]
        found.append(logprobs)
        old = logprobs.detach() if one.old_logprobs is None else torch.from_numpy(one.old_logprobs)
        ratio = (logprobs - old).exp()
        loss = -torch.minimum(ratio * one.advantage, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * one.advantage)
        if settings.importance_cap:
            loss = loss * (old - torch.from_numpy(one.engine_logprobs)).exp().clamp(max=settings.importance_cap)
        if settings.kl_coefficient:
            gap = torch.from_numpy(one.reference_logprobs) - logprobs
            loss = loss + settings.kl_coefficient * (gap.exp() - gap - 1)
        if one.weight:
            losses.append((loss * one.weight).sum())
            shares += one.share
    return torch.stack(losses).sum() / shares, found


def against_naive(groups: Any, fault: str) -> dict[str, float]:
    """The largest differences of loss, log-probabilities and each gradient (relative to its largest number)."""
    from megatron_ext.model.build import build_model
    from tests.layouts import SEED

    put_in(fault)
    differences: dict[str, float] = {}
    for (settings, samples), tied in itertools.product(CASES.values(), (True, False)):
        changes = {"vocab_size": 128} if fault == "padding in the softmax" else {}
        result, scores, _, state = update(groups, settings, samples, tied, **changes)
        (chunk,) = build_model(model(tied), "fp32", groups, SEED)
        loss, logprobs = naive(chunk, settings, samples)
        loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in chunk.parameters()]).norm()
        found = {"loss": abs(result.loss - loss.item()), "norm": abs(result.grad_norm / norm.item() - 1)}
        found["logprobs"] = max(float(np.abs(a - b.detach().numpy()).max(initial=0)) for a, b in zip(scores, logprobs, strict=True))
        for (name, one), other in zip(state.chunks[0].named_parameters(), chunk.parameters(), strict=True):
            found[name] = float((one.main_grad - other.grad).abs().max() / other.grad.abs().max())
        differences = {name: max(value, differences.get(name, 0.0)) for name, value in found.items()}
    return differences


def test_gradients_are_those_of_a_naive_implementation():
    found = ranks.run(against_naive, ONE, "")[0]
    assert len(found) > 20
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("fault", ["padding in the softmax", "positions off by one", "attention across sequences"])
def test_faults_differ_from_the_naive_implementation(fault):
    found = ranks.run(against_naive, ONE, fault)[0]
    assert min(found["norm"], found["logprobs"]) > 1e-3, found


# what an update does


def behaviour(groups: Any) -> dict[str, Any]:
    """Updates of one rank, each from the same weights."""
    from megatron_ext.rl.update import score
    from tests.policy_updates import NUMBERS

    samples = given(PLAIN)
    good = replace(samples[1], advantage=1.0)
    _, before, _, state = update(groups, PLAIN, [good])
    after = score(state.chunks, [good], groups, **NUMBERS)
    everything, informative = (update(groups, PLAIN, samples, informative_only=only) for only in (False, True))
    nothing = update(groups, PLAIN, [replace(one, weight=0.0, share=0.0) for one in samples])
    return {
        "gain": float((after[0] - before[0]).mean()),
        "sums": [(one[0].loss, one[0].grad_norm) for one in (everything, informative)],
        "weights": max(float(np.abs(a[3] - b[3]).max()) for a, b in zip(everything[2], informative[2], strict=True)),
        "tokens": [one[0].statistics["tokens"] for one in (everything, informative)],
        "nothing": (nothing[0].loss, nothing[0].grad_norm, nothing[0].statistics["tokens"]),
        "names": nothing[0].statistics.keys() == everything[0].statistics.keys(),
        "again": all(np.array_equal(a[3], b[3]) for a, b in zip(everything[2], update(groups, PLAIN, samples)[2], strict=True)),
    }


def test_what_an_update_does():
    found = ranks.run(behaviour, ONE)[0]
    assert found["gain"] > 0.01  # a response with a positive advantage becomes likelier
    assert found["sums"][1] == pytest.approx(found["sums"][0], rel=1e-5)  # advantage 0: counted, and nothing to learn
    assert found["weights"] < 1e-5
    assert found["tokens"] == [75, 57]
    assert found["nothing"] == (0.0, 0.0, 0.0)
    assert found["names"]
    assert found["again"]


def spoilt(groups: Any) -> tuple[str, bool]:
    """An update whose loss is not finite: what is said, and whether the weights stayed."""
    from megatron_ext.rl import update as updating
    from megatron_ext.training.state import build_state
    from tests.layouts import SEED, toy_stage
    from tests.policy_updates import NUMBERS

    state = build_state(toy_stage(groups.plan, model=model()), groups, SEED)
    first = [parameter.detach().clone() for parameter in state.chunks[0].parameters()]
    samples = given(PLAIN)
    samples[0] = replace(samples[0], advantage=float("nan"))
    try:
        updating.policy_update(state, PLAIN, samples, learning_rate=1e-3, seed=1, updates_before=0, **NUMBERS)
    except TrainingError as error:
        same = all(torch.equal(one, other) for one, other in zip(first, state.chunks[0].parameters(), strict=True))
        return str(error), same
    return "", False


def test_numbers_that_are_not_finite_stop_every_rank_before_the_weights_move():
    for said, same in ranks.run(spoilt, TWO):
        assert "not finite" in said or "is nan" in said
        assert "recorded rollouts" in said
        assert same
