"""GRPO's equations as pure functions: rewards -> advantages -> the loss of an update, and what is worth watching.

    rewards, counted = shaped_rewards(settings, graded, truncated, lengths, caps, wrong_reward)
    advantages = group_advantages(settings, rewards, counted)
    weights, shares = response_weights(settings, lengths, counted)
    loss = policy_loss_sum(settings, tokens) / shares.sum()

Sums and what divides them are apart: the shares are summed over the whole update, all ranks included, before its first
micro-batch, so that micro-batches and data-parallel ranks add up to the same loss however the update is split.
Log-probabilities are natural, FP32 or FP64, and of the distribution that was sampled from, temperature and all.

Shapes: P prompts, G responses of a prompt, N responses of an update, T tokens of a micro-batch's responses in any layout
(packed, or padded with weight 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ext.config.rl import Objective

DEVIATION_FLOOR = 1e-6  # verl's epsilon, added to the sample deviation of a group
LOG_RATIO_LIMIT = 20.0  # verl's; exp() of more overflows in FP32, and infinity times a zero gradient is not a number
KL_LIMIT = 10.0  # verl's bound on the k3 estimate of one token


def shaped_rewards(
    settings: Objective,
    rewards_PG: torch.Tensor,
    truncated_PG: torch.Tensor,
    lengths_PG: torch.Tensor,
    caps_tokens_PG: torch.Tensor,
    wrong_reward: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards after the rule for truncated responses, and which responses count at all.

    `truncated_PG` is true where the cap `caps_tokens_PG` cut a response of `lengths_PG` tokens off;
    `wrong_reward` is what the grader gives a wrong answer.
    """
    counted_PG = torch.ones_like(truncated_PG, dtype=torch.bool)
    if settings.truncated == "masked":
        return rewards_PG, ~truncated_PG
    if settings.truncated == "wrong":
        return torch.where(truncated_PG, rewards_PG.clamp(max=wrong_reward), rewards_PG), counted_PG
    if settings.truncated == "soft_penalty":
        penalty_PG = overlong_penalty(lengths_PG, caps_tokens_PG, settings.overlong_share)
        return rewards_PG - settings.overlong_penalty * penalty_PG.to(rewards_PG.dtype), counted_PG
    return rewards_PG, counted_PG


def overlong_penalty(lengths_PG: torch.Tensor, caps_tokens_PG: torch.Tensor, share: float) -> torch.Tensor:
    """DAPO's linear penalty, FP64: 0 up to (1 - share) of the cap, 1 at the cap, never more."""
    buffers_PG = share * caps_tokens_PG.double()
    return ((lengths_PG - caps_tokens_PG + buffers_PG) / buffers_PG).clamp(0.0, 1.0)


def informative_groups(rewards_PG: torch.Tensor, counted_PG: torch.Tensor) -> torch.Tensor:
    """bool P: whether a prompt's counted responses earned different rewards; the others move no weight, but for groups of one.

    A group of one is never informative: what moves weights there is no comparison, as `group_advantages` explains.
    """
    lowest_P = rewards_PG.masked_fill(~counted_PG, torch.inf).amin(dim=-1)
    highest_P = rewards_PG.masked_fill(~counted_PG, -torch.inf).amax(dim=-1)
    return highest_P > lowest_P


def group_advantages(settings: Objective, rewards_PG: torch.Tensor, counted_PG: torch.Tensor) -> torch.Tensor:
    """Each response's reward less its group's mean, over (sample deviation + 1e-6) where settings say so.

    Responses that do not count enter neither mean nor deviation, and get 0. Groups without a difference get exactly 0,
    whatever their mean rounds to; so does the one that is left of a larger group, having nothing to be compared with.
    Where every group has one response, its mean is 0 and its deviation 1, as in verl: the reward itself.
    """
    assert rewards_PG.isfinite().all(), "a reward that is not a number would pass for a group without a difference"
    if rewards_PG.shape[-1] == 1:
        scale = 1.0 + DEVIATION_FLOOR if settings.divide_by_deviation else 1.0
        return torch.where(counted_PG, rewards_PG / scale, 0.0)
    counts_P1 = counted_PG.sum(dim=-1, keepdim=True)
    means_P1 = torch.where(counted_PG, rewards_PG, 0.0).sum(dim=-1, keepdim=True) / counts_P1.clamp(min=1)
    differences_PG = torch.where(counted_PG, rewards_PG - means_P1, 0.0)
    if settings.divide_by_deviation:
        variances_P1 = differences_PG.square().sum(dim=-1, keepdim=True) / (counts_P1 - 1).clamp(min=1)
        differences_PG = differences_PG / (variances_P1.sqrt() + DEVIATION_FLOOR)
    return torch.where(informative_groups(rewards_PG, counted_PG).unsqueeze(-1), differences_PG, 0.0)


def response_weights(settings: Objective, lengths_N: torch.Tensor, counted_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 per response: the weight of each of its tokens in the summed loss, and its share of the denominator.

    The loss of an update is sum(weight x token loss) / sum(share), both over all ranks and micro-batches.
    Responses that do not count, or have no token, get 0 and 0.
    """
    present_N = counted_N & (lengths_N > 0)
    ones_N = present_N.double()
    if settings.mean_over == "responses":
        return ones_N / lengths_N.clamp(min=1), ones_N
    if settings.mean_over == "constant":
        assert settings.constant_tokens is not None
        return ones_N, ones_N * settings.constant_tokens
    return ones_N, ones_N * lengths_N


@dataclass(frozen=True)
class ResponseTokens:
    """What is known of each response token of a micro-batch; all of one shape, whatever stands at weight 0.

    logprobs: of the weights being trained, with their gradient.
    old_logprobs: of the weights that the rollout step's first update begins with, by the trainer.
    engine_logprobs: of the same token when it was sampled, by the engine.
    reference_logprobs: of the frozen reference, where there is a KL penalty.
    advantages: of the token's response. weights: of `response_weights`.
    """

    logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    engine_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None


def policy_loss_sum(settings: Objective, tokens: ResponseTokens) -> torch.Tensor:
    """The summed loss of a micro-batch, to be divided by the update's shares; its gradient descends the objective.

    Of each token: the clipped surrogate, times the truncated importance weight of trainer over engine, plus the KL penalty.
    """
    valid_T = tokens.weights_T > 0
    losses_T, _ = clipped_surrogate(settings, _log_ratios(tokens.logprobs_T, tokens.old_logprobs_T, valid_T), tokens.advantages_T)
    if settings.importance_cap is not None:
        assert tokens.engine_logprobs_T is not None, "the importance correction needs the engine's log-probabilities"
        losses_T = losses_T * importance_weights(tokens.old_logprobs_T, tokens.engine_logprobs_T, valid_T, settings.importance_cap)
    if settings.kl_coefficient:
        assert tokens.reference_logprobs_T is not None, "the KL penalty needs the reference's log-probabilities"
        penalty_T = k3(_log_ratios(tokens.reference_logprobs_T, tokens.logprobs_T, valid_T)).clamp(-KL_LIMIT, KL_LIMIT)
        losses_T = losses_T + settings.kl_coefficient * penalty_T
    return (torch.where(valid_T, losses_T, 0.0) * tokens.weights_T).sum()


def clipped_surrogate(settings: Objective, log_ratios_T: torch.Tensor, advantages_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) of each token, and whether the clip binds, which stops the gradient there.

    It binds above for a positive advantage and below for a negative one: where a token has moved its way far enough.
    """
    ratios_T = log_ratios_T.exp()
    free_T = -advantages_T * ratios_T
    clipped_T = -advantages_T * ratios_T.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    return torch.maximum(free_T, clipped_T), clipped_T > free_T


def importance_weights(old_logprobs_T: torch.Tensor, engine_logprobs_T: torch.Tensor, valid_T: torch.Tensor, cap: float) -> torch.Tensor:
    """min(trainer's probability / engine's, cap) of each token, without a gradient: what makes an engine's samples the trainer's."""
    return _log_ratios(old_logprobs_T, engine_logprobs_T, valid_T).exp().clamp(max=cap).detach()


def k3(log_ratios_T: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1: with d = log q(x) - log p(x) and x drawn from p, an unbiased estimate of KL(p || q) that is never negative."""
    return torch.expm1(log_ratios_T) - log_ratios_T


@torch.no_grad()
def statistic_sums(settings: Objective, tokens: ResponseTokens, entropies_T: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """FP64 sums over the counted tokens, to be added over micro-batches and ranks and then given to `statistic_means`.

    tokens: how many. clip_fraction: where the clip binds. approx_kl: KL(old || trained) by k3. entropy: of `entropies_T`.
    With the engine's log-probabilities, by NeMo-RL's definitions: token_mult_prob_error exp|trainer - engine|,
    sampling_importance_ratio trainer / engine, gen_kl_error KL(engine || trainer) by k3; the trainer's being the old ones.
    importance_clip_fraction: where the cap of the importance correction binds.
    """
    valid_T = tokens.weights_T > 0
    log_ratios_T = _log_ratios(tokens.logprobs_T, tokens.old_logprobs_T, valid_T).double()
    _, bound_T = clipped_surrogate(settings, log_ratios_T, tokens.advantages_T.double())
    found = {"tokens": torch.ones_like(log_ratios_T), "clip_fraction": bound_T.double(), "approx_kl": k3(log_ratios_T)}
    if entropies_T is not None:
        found["entropy"] = entropies_T.double()
    if tokens.engine_logprobs_T is not None:
        errors_T = _log_ratios(tokens.old_logprobs_T, tokens.engine_logprobs_T, valid_T).double()
        found |= {"token_mult_prob_error": errors_T.abs().exp(), "sampling_importance_ratio": errors_T.exp(), "gen_kl_error": k3(errors_T)}
        if settings.importance_cap is not None:
            found["importance_clip_fraction"] = (errors_T.exp() > settings.importance_cap).double()
    return {name: torch.where(valid_T, each_T, 0.0).sum() for name, each_T in found.items()}


def statistic_means(sums: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Means over tokens of summed statistics, and `tokens` itself; nan where no token counted."""
    tokens = float(sums["tokens"])
    return {name: tokens if name == "tokens" else float(value) / tokens if tokens else float("nan") for name, value in sums.items()}


def _log_ratios(one_T: torch.Tensor, other_T: torch.Tensor, valid_T: torch.Tensor) -> torch.Tensor:
    """one - other within +-20, and 0 at weight 0: what stands there, infinities included, must not reach a gradient."""
    return (torch.where(valid_T, one_T, 0.0) - torch.where(valid_T, other_T, 0.0)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
