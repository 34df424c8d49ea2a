"""GRPO's equations against numbers worked out by hand, finite differences, and faults that must not pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.rl import Objective
from megatron_ext.errors import ConfigError
from megatron_ext.rl import objective
from megatron_ext.rl.objective import (
    ResponseTokens,
    clipped_surrogate,
    group_advantages,
    importance_weights,
    informative_groups,
    k3,
    overlong_penalty,
    policy_loss_sum,
    shaped_rewards,
)

GRPO = Objective()
PLAIN = Objective(divide_by_deviation=False)


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


# rewards -> advantages


def check_advantages(advantages) -> None:
    rewards = f64([1, 1, -1, -1], [1, -1, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1])
    halves = 1 / (math.sqrt(4 / 3) + 1e-6)
    expected = f64([halves, halves, -halves, -halves], [1.5 / 1.000001, *[-0.5 / 1.000001] * 3], [0] * 4, [0] * 4)
    assert torch.allclose(advantages(GRPO, rewards, every(rewards)), expected, rtol=1e-14, atol=0)
    plain = f64([1, 1, -1, -1], [1.5, -0.5, -0.5, -0.5], [0] * 4, [0] * 4)
    assert torch.allclose(advantages(PLAIN, rewards, every(rewards)), plain, rtol=1e-14, atol=0)


def test_advantages_by_hand():
    check_advantages(group_advantages)


def test_a_population_deviation_would_be_noticed():
    def population(settings, rewards, counted):
        found = group_advantages(PLAIN, rewards, counted)
        return found / (rewards.std(-1, keepdim=True, unbiased=False) + 1e-6) if settings.divide_by_deviation else found

    with pytest.raises(AssertionError):
        check_advantages(population)


def test_a_mean_over_the_batch_would_be_noticed():
    with pytest.raises(AssertionError):
        check_advantages(lambda _settings, rewards, _counted: rewards - rewards.mean())


def test_what_does_not_count_enters_neither_mean_nor_deviation():
    rewards, counted = f64([1, -1, 50, 0], [1, 9, 9, 9], [9, 9, 9, 9]), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.allclose(group_advantages(GRPO, rewards, counted)[0], f64(1, -1, 0, 0) / 1.000001)
    assert group_advantages(GRPO, rewards, counted)[1:].tolist() == [[0.0] * 4] * 2  # one is left to compare with nothing, or none
    assert informative_groups(rewards, counted).tolist() == [True, False, False]


def test_groups_of_one_are_rewards_themselves():
    rewards = f64([1], [-1], [0.5], [0])
    assert torch.allclose(group_advantages(GRPO, rewards, every(rewards)), rewards / 1.000001, rtol=1e-14)  # mean 0, deviation 1
    assert torch.equal(group_advantages(PLAIN, rewards, every(rewards)), rewards)
    assert informative_groups(rewards, every(rewards)).tolist() == [False] * 4, "there is nothing to differ from"
    assert group_advantages(GRPO, rewards, ~every(rewards)).tolist() == [[0.0]] * 4


@given(value=st.floats(-3, 3, width=32), size=st.integers(2, 16))
def test_equal_rewards_move_nothing_whatever_their_mean_rounds_to(value, size):
    rewards = torch.full((1, size), value)
    assert group_advantages(GRPO, rewards, every(rewards)).tolist() == [[0.0] * size]
    assert informative_groups(rewards, every(rewards)).double().mean().item() == 0.0


def test_rounding_alone_would_have_moved_equal_rewards():
    rewards = torch.full((1, 3), 0.1)
    found = [(torch.full((n,), x) - torch.full((n,), x).sum() / n).abs().max().item() for n in (3, 5, 6, 7) for x in (0.1, 0.7, 1.1)]
    assert max(found) > 0
    assert group_advantages(GRPO, rewards, every(rewards)).tolist() == [[0.0] * 3]


def test_share_of_informative_groups():
    rewards = f64([1, -1], [1, 1], [-1, -1], [-1, 1])
    assert informative_groups(rewards, every(rewards)).tolist() == [True, False, False, True]
    assert informative_groups(rewards, every(rewards)).double().mean().item() == 0.5


def test_a_reward_that_is_no_number_does_not_pass_for_no_difference():
    with pytest.raises(AssertionError, match="not a number"):
        group_advantages(GRPO, f64([1, math.nan]), torch.ones(1, 2, dtype=torch.bool))


@given(rewards=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 1.0]), min_size=8, max_size=8), order=st.permutations(range(4)))
def test_advantages_follow_their_responses(rewards, order):
    groups = torch.tensor(rewards, dtype=torch.float64).view(2, 4)
    found = group_advantages(GRPO, groups, every(groups))
    assert torch.allclose(group_advantages(GRPO, groups[:, order], every(groups)), found[:, order], rtol=1e-14)
    assert torch.allclose(group_advantages(GRPO, groups.flip(0), every(groups)), found.flip(0), rtol=0)
    assert found.sum(-1).abs().max() < 1e-12


# truncated responses

REWARDS, TRUNCATED = f64([1, -1, 1, -2]), torch.tensor([[False, False, True, True]])
LENGTHS, CAPS = torch.tensor([[50, 90, 100, 100]]), torch.full((1, 4), 100)


@pytest.mark.parametrize(
    ("rule", "rewards", "counted"),
    [
        ("graded", [1, -1, 1, -2], [True] * 4),
        ("wrong", [1, -1, -1, -2], [True] * 4),  # a box before the cut no longer helps, and what was worse stays worse
        ("masked", [1, -1, 1, -2], [True, True, False, False]),
        ("soft_penalty", [1, -1.5, 0, -3], [True] * 4),  # 80 tokens are free, 90 are half way
    ],
)
def test_rules_for_truncated_responses(rule, rewards, counted):
    found, counts = shaped_rewards(Objective(truncated=rule), REWARDS, TRUNCATED, LENGTHS, CAPS, wrong_reward=-1.0)
    assert torch.allclose(found, f64(rewards))
    assert counts.tolist() == [counted]


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (15_000, 0), (16_384, 0), (17_408, 0.25), (18_432, 0.5), (20_480, 1), (30_000, 1)])
def test_the_overlong_penalty_is_dapos(length, penalty):
    found = overlong_penalty(torch.tensor([[length]]), torch.tensor([[20_480]]), 0.2)  # its 16,384 + 4,096 tokens
    assert found.item() == pytest.approx(penalty, abs=1e-12)


def test_the_penalty_follows_the_cap_of_each_response():
    found = overlong_penalty(torch.tensor([[90, 90, 90]]), torch.tensor([[90, 100, 200]]), 0.2)
    assert found.tolist() == [[pytest.approx(1.0), pytest.approx(0.5), 0.0]]
    half = Objective(truncated="soft_penalty", overlong_penalty=0.5)
    assert torch.allclose(shaped_rewards(half, REWARDS, TRUNCATED, LENGTHS, CAPS, -1.0)[0], f64([1, -1.25, 0.5, -2.5]))


# the clipped surrogate


SURROGATE = [  # ratio, advantage, loss, gradient by the token's log-probability; the clip at 0.8 and 1.2
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 1.0, -1.1, -1.1),
    (1.3, 1.0, -1.2, 0.0),  # far enough up
    (0.7, 1.0, -0.7, -0.7),  # on the wrong way: always pulled back
    (1.3, -1.0, 1.3, 1.3),  # the same for what is to become rarer
    (0.7, -1.0, 0.8, 0.0),  # far enough down
    (0.9, -2.0, 1.8, 1.8),
    (1.3, 0.0, 0.0, 0.0),
]


def token(ratio: float, advantage: float, **more) -> ResponseTokens:
    return ResponseTokens(f64(math.log(ratio)).requires_grad_(), f64(0.0), f64(advantage), f64(1.0), **more)


def loss_and_gradient(settings: Objective, tokens: ResponseTokens, loss=policy_loss_sum) -> tuple[float, float]:
    value = loss(settings, tokens)
    (gradient,) = torch.autograd.grad(value, tokens.logprobs_T)
    return value.item(), gradient.sum().item()


def check_surrogate() -> None:
    for ratio, advantage, *expected in SURROGATE:
        assert loss_and_gradient(GRPO, token(ratio, advantage)) == pytest.approx(tuple(expected), rel=1e-12)


def test_the_surrogate_by_hand():
    check_surrogate()


def on_the_wrong_side(settings, log_ratios, advantages):
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -torch.minimum(ratios, clipped) * advantages, clipped < ratios  # right for positive advantages alone


def without_pulling_back(settings, log_ratios, advantages):
    clipped = log_ratios.exp().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -clipped * advantages, clipped != log_ratios.exp()


@pytest.mark.parametrize("fault", [on_the_wrong_side, without_pulling_back])
def test_a_clip_on_the_wrong_side_would_be_noticed(fault, monkeypatch):
    monkeypatch.setattr(objective, "clipped_surrogate", fault)
    with pytest.raises(AssertionError):
        check_surrogate()


@pytest.mark.parametrize(("ratio", "loss", "slope"), [(1.25, -1.25, -1.25), (1.3, -1.28, 0.0)])
def test_an_asymmetric_clip_leaves_more_room_above(ratio, loss, slope):
    dapo = Objective(clip_high=0.28)
    assert loss_and_gradient(dapo, token(ratio, 1.0)) == pytest.approx((loss, slope))
    assert loss_and_gradient(dapo, token(0.7, -1.0)) == pytest.approx((0.8, 0.0))


def test_where_the_clip_binds():
    _, bound = clipped_surrogate(GRPO, f64(*[math.log(row[0]) for row in SURROGATE]), f64(*[row[1] for row in SURROGATE]))
    assert bound.tolist() == [row[3] == 0.0 and row[1] != 0.0 for row in SURROGATE]


def test_hopeless_ratios_stay_numbers_in_fp32():
    logprobs = torch.tensor([0.0, -200.0, 0.0, -200.0], requires_grad=True)
    tokens = ResponseTokens(logprobs, torch.tensor([-200.0, 0.0, -200.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4))
    settings = Objective(kl_coefficient=0.1, importance_cap=2.0)
    value = policy_loss_sum(settings, replace(tokens, engine_logprobs_T=tokens.old_logprobs_T, reference_logprobs_T=tokens.old_logprobs_T))
    (gradient,) = torch.autograd.grad(value, logprobs)
    assert value.isfinite()
    assert gradient.tolist() == [0.0, pytest.approx(-math.exp(-20), abs=1e-8), 0.0, 0.0]


# KL and importance


KL = [  # log(reference / policy), k3 within +-10, its gradient by the policy's log-probability
    (0.0, 0.0, 0.0),
    (math.log(2), 1 - math.log(2), -1.0),
    (-math.log(2), math.log(2) - 0.5, 0.5),
    (3.0, 10.0, 0.0),  # e^3 - 4 = 16.1
    (-12.0, 10.0, 0.0),
    (300.0, 10.0, 0.0),
]


@pytest.mark.parametrize(("difference", "penalty", "slope"), KL)
def test_the_kl_penalty_by_hand(difference, penalty, slope):
    tokens = token(1.0, 0.0, reference_logprobs_T=f64(difference))
    found = loss_and_gradient(Objective(kl_coefficient=0.5), tokens)
    assert found == pytest.approx((0.5 * penalty, 0.5 * slope), abs=1e-12)
    assert loss_and_gradient(GRPO, tokens) == (0.0, 0.0)


def test_k3_is_unbiased_and_never_negative():
    p, q = f64(0.5, 0.3, 0.2), f64(0.1, 0.2, 0.7)
    estimates = k3(q.log() - p.log())
    assert estimates.min() >= 0
    assert (p * estimates).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-12)


@pytest.mark.parametrize(("trainer", "engine", "weight"), [(0.5, 0.5, 1.0), (0.3, 0.2, 1.5), (0.2, 0.4, 0.5), (0.6, 0.2, 2.0)])
def test_truncated_importance_by_hand(trainer, engine, weight):
    old = f64(math.log(trainer))
    tokens = ResponseTokens((old + math.log(1.1)).requires_grad_(), old, f64(1.0), f64(1.0), f64(math.log(engine)))
    assert loss_and_gradient(Objective(importance_cap=2.0), tokens) == pytest.approx((-1.1 * weight, -1.1 * weight))
    assert loss_and_gradient(GRPO, tokens) == pytest.approx((-1.1, -1.1))


def test_the_importance_weight_carries_no_gradient():
    old = f64(-1.0).requires_grad_()
    assert not importance_weights(old, f64(-2.0), torch.tensor([True]), 2.0).requires_grad


def test_importance_makes_the_engines_samples_the_trainers():
    trainer, engine, reward = f64(0.5, 0.3, 0.2), f64(0.3, 0.3, 0.4), f64(1.0, -1.0, 3.0)
    weights = importance_weights(trainer.log(), engine.log(), torch.ones(3, dtype=torch.bool), 2.0)
    assert (engine * weights * reward).sum().item() == pytest.approx((trainer * reward).sum().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [(Objective(importance_cap=2.0), "engine's log-prob"), (Objective(kl_coefficient=0.1), "reference's log-prob")],
)
def test_missing_log_probabilities_are_not_passed_over(settings, message):
    with pytest.raises(AssertionError, match=message):
        policy_loss_sum(settings, token(1.0, 1.0))


# settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_low": 1.0}, r"clip_low is 1.0, must lie in \[0, 1\)"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"kl_coefficient": math.inf}, "kl_coefficient is inf"),
        ({"overlong_share": 0.0}, r"overlong_share is 0.0, must lie in \(0, 1\]"),
        ({"importance_cap": 0.0}, "importance_cap is 0.0, must be positive; 2 is usual"),
        ({"mean_over": "constant"}, "mean_over is 'constant' and constant_tokens is None"),
        ({"constant_tokens": 5}, "mean_over is 'tokens' and constant_tokens is 5"),
        ({"mean_over": "constant", "constant_tokens": 0}, "constant_tokens is 0, must be at least 1"),
        ({"truncated": "dropped"}, "truncated.*dropped"),
    ],
)
def test_impossible_settings_name_the_value(values, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**values)


def test_settings_go_to_json_and_back_and_begin_as_the_papers():
    for settings in (GRPO, Objective(mean_over="constant", constant_tokens=16, importance_cap=2.0), Objective(truncated="masked")):
        assert from_json(Objective, to_json(settings)) == settings
    assert (GRPO.clip_low, GRPO.clip_high, GRPO.kl_coefficient, GRPO.mean_over, GRPO.divide_by_deviation) == (0.2, 0.2, 0.0, "tokens", True)
