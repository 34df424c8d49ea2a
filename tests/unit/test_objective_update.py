"""GRPO's loss over a whole update: split anyhow it is the same, its gradients are right, and its statistics add up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_ext.config.rl import Objective
from megatron_ext.rl.objective import (
    ResponseTokens,
    group_advantages,
    policy_loss_sum,
    response_weights,
    shaped_rewards,
    statistic_means,
    statistic_sums,
)

GRPO = Objective()


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# denominators

EVERYTHING = Objective(kl_coefficient=0.3, importance_cap=1.5, clip_high=0.28)
LENGTHS_N, COUNTED_N = torch.tensor([7, 3, 11, 5, 2, 9]), torch.tensor([1, 1, 1, 0, 1, 1]).bool()


@pytest.mark.parametrize(
    ("mean_over", "weights", "shares"),
    [
        ("tokens", [1, 1, 0, 0], [4, 2, 0, 0]),
        ("responses", [1 / 4, 1 / 2, 0, 0], [1, 1, 0, 0]),
        ("constant", [1, 1, 0, 0], [100, 100, 0, 0]),
    ],
)
def test_weights_and_shares_by_hand(mean_over, weights, shares):
    settings = Objective(mean_over=mean_over, constant_tokens=100 if mean_over == "constant" else None)
    found = response_weights(settings, torch.tensor([4, 2, 9, 0]), torch.tensor([1, 1, 0, 1]).bool())
    assert [each.tolist() for each in found] == [weights, shares]


def update(settings: Objective, lengths_N=LENGTHS_N, counted_N=COUNTED_N, seed: int = 0) -> tuple[list[ResponseTokens], torch.Tensor]:
    """The tokens of each response of an update, and all shares of its denominator."""
    generator = torch.Generator().manual_seed(seed)
    weights_N, shares_N = response_weights(settings, lengths_N, counted_N)
    responses = []
    for length, weight in zip(lengths_N.tolist(), weights_N.tolist(), strict=True):
        old = -torch.rand(length, generator=generator, dtype=torch.float64) * 3
        near = [old + torch.randn(length, generator=generator, dtype=torch.float64) * 0.4 for _ in range(3)]
        advantage = torch.randn(1, generator=generator, dtype=torch.float64).expand(length)
        responses.append(ResponseTokens(near[0], old, advantage, torch.full((length,), weight, dtype=torch.float64), near[1], near[2]))
    return responses, shares_N


def joined(responses: list[ResponseTokens]) -> ResponseTokens:
    names = ResponseTokens.__dataclass_fields__
    return ResponseTokens(**{name: torch.cat([getattr(response, name) for response in responses]) for name in names})


def whole_loss(settings: Objective, responses: list[ResponseTokens], shares_N: torch.Tensor) -> tuple[float, torch.Tensor]:
    tokens = joined(responses)
    tokens.logprobs_T.requires_grad_()
    loss = policy_loss_sum(settings, tokens) / shares_N.sum()
    return loss.item(), torch.autograd.grad(loss, tokens.logprobs_T)[0]


def split_loss(settings, responses, shares_N, cuts) -> tuple[float, torch.Tensor]:
    losses, gradients = [], []
    for start, end in zip([0, *cuts], [*cuts, len(responses)], strict=True):
        tokens = joined(responses[start:end])
        tokens.logprobs_T.requires_grad_()
        part = policy_loss_sum(settings, tokens) / shares_N.sum()
        gradients.append(torch.autograd.grad(part, tokens.logprobs_T)[0])
        losses.append(part.item())
    return math.fsum(losses), torch.cat(gradients)


def each_by_its_own_denominator(settings, responses, shares_N, cuts) -> tuple[float, torch.Tensor]:
    """The fault: a mean of micro-batch means, in which a token of a short micro-batch weighs more."""
    bounds = list(zip([0, *cuts], [*cuts, len(responses)], strict=True))
    parts = [whole_loss(settings, responses[start:end], shares_N[start:end].clamp(min=1e-30)) for start, end in bounds]
    return sum(loss for loss, _ in parts) / len(parts), torch.cat([gradient for _, gradient in parts]) / len(parts)


def check_split(split, settings: Objective, cuts: list[int]) -> None:
    responses, shares_N = update(settings)
    loss, gradient = whole_loss(settings, responses, shares_N)
    found_loss, found_gradient = split(settings, responses, shares_N, cuts)
    assert found_loss == pytest.approx(loss, rel=0, abs=1e-12)
    assert torch.allclose(found_gradient, gradient, rtol=0, atol=1e-12)


MEANS = [EVERYTHING, replace(EVERYTHING, mean_over="responses"), replace(EVERYTHING, mean_over="constant", constant_tokens=16)]


@pytest.mark.parametrize("settings", MEANS, ids=lambda settings: settings.mean_over)
@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 2, 3, 4, 5], [5]])
def test_micro_batches_add_up_to_the_whole(settings, cuts):
    check_split(split_loss, settings, cuts)


@pytest.mark.parametrize("settings", MEANS[:2], ids=lambda settings: settings.mean_over)
def test_a_denominator_of_each_micro_batch_would_be_noticed(settings):
    with pytest.raises(AssertionError):
        check_split(each_by_its_own_denominator, settings, [1])


@pytest.mark.parametrize("settings", MEANS, ids=lambda settings: settings.mean_over)
def test_order_and_layout_do_not_matter(settings):
    responses, shares_N = update(settings)
    loss, _ = whole_loss(settings, responses, shares_N)
    assert whole_loss(settings, responses[::-1], shares_N)[0] == pytest.approx(loss, abs=1e-12)
    length = int(LENGTHS_N.max())
    for filling in (0.0, math.nan, math.inf, -math.inf):  # what a padded row may hold must not matter
        padded = [_padded(response, length, filling) for response in responses]
        rows = ResponseTokens(**{name: torch.stack([getattr(row, name) for row in padded]) for name in ResponseTokens.__dataclass_fields__})
        rows.logprobs_T.requires_grad_()
        value = policy_loss_sum(settings, rows) / shares_N.sum()
        (gradient,) = torch.autograd.grad(value, rows.logprobs_T)
        assert value.item() == pytest.approx(loss, abs=1e-12)
        assert gradient.isfinite().all()
        assert gradient[rows.weights_T == 0].abs().max() == 0
        packed, laid_out = statistic_sums(settings, joined(responses)), statistic_sums(settings, rows)
        assert statistic_means(laid_out) == pytest.approx(statistic_means(packed), abs=1e-12)


def test_a_bad_number_beside_good_log_probabilities_reaches_no_gradient():
    """Padding whose log-probabilities are in range while another field is not."""
    for name in ("old_logprobs_T", "advantages_T", "engine_logprobs_T", "reference_logprobs_T"):
        tokens = ResponseTokens(*[f64(-1, -1).requires_grad_(), f64(-1, -1), f64(1, 1), f64(1, 0), f64(-1, -1), f64(-1, -1)])
        spoilt = replace(tokens, **{name: getattr(tokens, name).index_fill(0, torch.tensor([1]), math.nan)})
        loss = policy_loss_sum(EVERYTHING, spoilt)
        assert loss.item() == -1.0
        assert torch.autograd.grad(loss, tokens.logprobs_T)[0].tolist() == [-1.0, 0.0]


def _padded(response: ResponseTokens, length: int, filling: float) -> ResponseTokens:
    def wide(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, length - len(tensor)), value=value)

    names = set(ResponseTokens.__dataclass_fields__) - {"weights_T"}
    return ResponseTokens(weights_T=wide(response.weights_T, 0.0), **{name: wide(getattr(response, name), filling) for name in names})


def test_an_update_by_hand_under_each_mean():
    """Two responses of 3 and 1 tokens, advantages 1 and -1, at the ratios' start: each token's loss is -A."""
    lengths, counted = torch.tensor([3, 1]), torch.tensor([True, True])
    for settings, expected in (
        (GRPO, -2 / 4),
        (Objective(mean_over="responses"), 0.0),
        (Objective(mean_over="constant", constant_tokens=8), -2 / 16),
    ):
        weights, shares = response_weights(settings, lengths, counted)
        logprobs = -torch.rand(4, dtype=torch.float64)
        tokens = ResponseTokens(logprobs, logprobs, f64(1, 1, 1, -1), weights.repeat_interleave(lengths))
        assert (policy_loss_sum(settings, tokens) / shares.sum()).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("rows", "columns"), [([0, 1], [0, 1, 2]), ([1, 0], [0, 1, 2]), ([1, 0], [2, 0, 1]), ([0, 1], [1, 2, 0])])
def test_from_rewards_to_the_loss_in_any_order(rows, columns):
    """The first prompt's third response is cut off and masked, the second prompt tells nothing but counts its 9 tokens."""
    settings = Objective(truncated="masked")
    rewards, truncated = f64([1, -1, 1], [1, 1, 1]), torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()
    lengths, caps = torch.tensor([[2, 4, 9], [3, 3, 3]]), torch.full((2, 3), 9)
    given = [each[rows][:, columns] for each in (rewards, truncated, lengths, caps)]
    shaped, counted = shaped_rewards(settings, *given, wrong_reward=-1.0)
    advantages = group_advantages(settings, shaped, counted)
    weights, shares = response_weights(settings, given[2].flatten(), counted.flatten())
    repeated = [each.flatten().repeat_interleave(given[2].flatten()) for each in (advantages, weights)]
    logprobs = torch.full_like(repeated[0], -0.5)
    loss = policy_loss_sum(settings, ResponseTokens(logprobs, logprobs, *repeated)) / shares.sum()
    assert loss.item() == pytest.approx(-(2 - 4) / (math.sqrt(2) + 1e-6) / (2 + 4 + 9), rel=1e-14)


# gradients


@pytest.mark.parametrize("settings", [GRPO, *MEANS], ids=["GRPO", *[settings.mean_over for settings in MEANS]])
def test_gradients_are_those_of_finite_differences(settings):
    responses, shares_N = update(settings, seed=5)
    tokens = joined(responses)

    def loss(logprobs_T: torch.Tensor) -> torch.Tensor:
        return policy_loss_sum(settings, replace(tokens, logprobs_T=logprobs_T)) / shares_N.sum()

    assert torch.autograd.gradcheck(loss, tokens.logprobs_T.clone().requires_grad_(), eps=1e-7, atol=1e-7)
    point = tokens.logprobs_T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    step = 1e-6
    for i in range(len(gradient)):
        move = torch.zeros_like(gradient)
        move[i] = step
        slope = (loss(point.detach() + move) - loss(point.detach() - move)).item() / (2 * step)
        assert gradient[i].item() == pytest.approx(slope, abs=1e-8)


def test_the_gradient_raises_what_earned_more():
    """Exactly: over all answers of a softmax policy, the objective's gradient is that of the expected reward."""
    scores, reward = f64(0.3, -0.2, 1.0).requires_grad_(), f64(1.0, -1.0, 0.5)
    logprobs = scores.log_softmax(-1)
    chances = logprobs.detach().exp()
    advantages = reward - (chances * reward).sum()
    loss = policy_loss_sum(GRPO, ResponseTokens(logprobs, logprobs.detach(), advantages, chances))
    (ours,) = torch.autograd.grad(loss, scores)
    (theirs,) = torch.autograd.grad(-(scores.softmax(-1) * reward).sum(), scores)
    assert torch.allclose(ours, theirs, atol=1e-15)


# statistics


def test_statistics_by_hand():
    new, old, engine = f64(0.5, 0.26, 0.1, 0.9), f64(0.5, 0.2, 0.2, 0.9), f64(0.25, 0.25, 0.2, 0.1)
    tokens = ResponseTokens(new.log(), old.log(), f64(1, 1, -1, 1), f64(1, 0.5, 1, 0), engine.log())
    sums = statistic_sums(Objective(importance_cap=1.5), tokens, entropies_T=f64(1, 2, 3, math.nan))
    assert statistic_means(sums) == pytest.approx(
        {
            "tokens": 3,  # weights weigh the loss, not these; the fourth token does not count
            "clip_fraction": 2 / 3,  # 1.3 upwards, 0.5 downwards
            "approx_kl": ((1.3 - 1 - math.log(1.3)) + (0.5 - 1 - math.log(0.5))) / 3,
            "entropy": 2,
            "token_mult_prob_error": (2 + 1.25 + 1) / 3,
            "sampling_importance_ratio": (2 + 0.8 + 1) / 3,
            "gen_kl_error": ((2 - 1 - math.log(2)) + (0.8 - 1 - math.log(0.8))) / 3,
            "importance_clip_fraction": 1 / 3,
        }
    )


def test_statistics_add_up_over_micro_batches():
    responses, _ = update(EVERYTHING)
    whole = statistic_sums(EVERYTHING, joined(responses))
    parts = [statistic_sums(EVERYTHING, joined(responses[start:end])) for start, end in ((0, 1), (1, 4), (4, 6))]
    added = {name: sum(part[name] for part in parts) for name in whole}
    assert statistic_means(added) == pytest.approx(statistic_means(whole), abs=1e-12)
    means_of_means = {name: sum(statistic_means(part)[name] for part in parts) / 3 for name in whole}
    assert abs(means_of_means["approx_kl"] - statistic_means(whole)["approx_kl"]) > 1e-6  # the fault that sums prevent


def test_statistics_without_engine_or_tokens():
    only = ResponseTokens(f64(-1.0), f64(-1.0), f64(1.0), f64(0.0))
    sums = statistic_sums(GRPO, only)
    assert set(sums) == {"tokens", "clip_fraction", "approx_kl"}
    means = statistic_means(sums)
    assert means["tokens"] == 0
    assert math.isnan(means["approx_kl"])
