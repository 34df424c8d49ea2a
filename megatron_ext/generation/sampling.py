"""Tokens drawn from logits, as pure functions: what an engine draws depends on no other request and on no random state.

The draw at position t of request r is a function of (seed, r, t) and of that request's logits. It is the same alone or in
any batch, after a resume, and on every rank that holds the logits. Log-probabilities are those of the processed
distribution, the one that is drawn from: after temperature, top-k and top-p, in that order.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from megatron_ext.config.rl import Sampling
from megatron_ext.errors import TrainingError


@dataclass(frozen=True)
class Drawn:
    """int64 tokens, and the FP32 log-probability of each under its request's processed distribution."""

    tokens_B: torch.Tensor
    logprobs_B: torch.Tensor


def uniform(seed: int, request: int, position: int) -> float:
    """The random number in [0, 1) of one draw: a hash of the three, each from -2^63 to 2^63 - 1.

    52 bits, so that the product with a total probability always rounds below that total.
    """
    digest = blake2b(struct.pack("<qqq", seed, request, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def sample(logits_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Drawn:
    """Draw the next token of each request, with its settings and its `uniform`.

    A greedy request (temperature 0) takes the likeliest token, of equals the first.
    """
    logprobs_BV = processed_logprobs(logits_BV, samplings)
    tokens_B = draw(logprobs_BV, uniforms)
    greedy = [row for row, sampling in enumerate(samplings) if sampling.temperature == 0]
    if greedy:
        tokens_B[greedy] = logprobs_BV[greedy].argmax(dim=-1)
    return Drawn(tokens_B, logprobs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1))


def processed_logprobs(logits_BV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """FP32 log-probabilities after temperature, top-k and top-p; minus infinity for what these leave out.

    Logits of minus infinity (a padded vocabulary) stay impossible. Of a greedy request they are the model's own, at
    temperature 1 and with every token: those of a point would say nothing. Logits that are not numbers raise `TrainingError`.
    """
    assert len(samplings) == logits_BV.shape[0], "one setting a request"
    if len(set(samplings)) <= 1:
        found_BV = _processed(logits_BV, samplings[0]) if samplings else logits_BV.float()
    else:
        found_BV = torch.empty_like(logits_BV, dtype=torch.float32)
        for sampling in dict.fromkeys(samplings):
            rows = [row for row, each in enumerate(samplings) if each == sampling]
            found_BV[rows] = _processed(logits_BV[rows], sampling)
    if bool(found_BV.isnan().any()):
        rows = found_BV.isnan().any(dim=-1).nonzero().flatten().tolist()
        raise TrainingError(
            f"logits of requests {rows} of the batch are not finite: the weights that made them are damaged; load a checkpoint"
        )
    return found_BV


def draw(logprobs_BV: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """int64 B: in each row the first token whose cumulative probability, FP64, exceeds `uniform` times the row's total."""
    cumulative_BV = logprobs_BV.exp().double().cumsum(dim=-1)
    shares_B = torch.tensor(uniforms, dtype=torch.float64, device=logprobs_BV.device)
    targets_B = shares_B * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, targets_B.unsqueeze(-1), right=True).squeeze(-1)


def _processed(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    scores_BV = logits_BV.float()
    if sampling.temperature == 0:
        return scores_BV.log_softmax(dim=-1)
    if sampling.temperature != 1:
        scores_BV = scores_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores_BV.shape[-1]:
        scores_BV = _top_k(scores_BV, sampling.top_k)
    if sampling.top_p < 1:
        scores_BV = _top_p(scores_BV, sampling.top_p)
    return scores_BV.log_softmax(dim=-1)


def _top_k(scores_BV: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest, and all that equal the last of them: a cut between equals would be the sort's choice."""
    last_B = scores_BV.topk(k, dim=-1).values[:, -1]
    return scores_BV.masked_fill(scores_BV < last_B.unsqueeze(-1), -torch.inf)


def _top_p(scores_BV: torch.Tensor, p: float) -> torch.Tensor:
    """The fewest largest whose probability reaches p, the one that crosses it included; of equals the first come first."""
    ordered = scores_BV.sort(dim=-1, descending=True, stable=True)
    cumulative_BV = ordered.values.double().softmax(dim=-1).cumsum(dim=-1)
    left_out_BV = torch.zeros_like(cumulative_BV, dtype=torch.bool)
    left_out_BV[:, 1:] = cumulative_BV[:, :-1] >= p
    return scores_BV.masked_fill(torch.zeros_like(left_out_BV).scatter(-1, ordered.indices, left_out_BV), -torch.inf)
