"""What an engine is asked in tests, how its answers are compared with full forward passes, and faults that must show.

Engine and full passes add up in different orders, so a draw may differ where the two likeliest tokens, or a random number and the
edge between two tokens, are closer than rounding. Such draws are counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.rl import Sampling
from megatron_ext.generation.engine import Generation, Request, generate_all
from megatron_ext.tokenizer import load_tokenizer
from tests.family_models import Case
from tests.small_models import VOCAB_SIZE

LOGPROB_BOUND = 1e-4
ROUNDING = 1e-4  # two logits that are closer may change places; a random number this close to an edge may fall on either side
CAP, SEED = 40, 3
GREEDY = Sampling(temperature=0.0)
SAMPLINGS = (GREEDY, Sampling(), Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=1.3, top_k=20))


@dataclass(frozen=True)
class Answers:
    """What an engine said, by request."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finishes: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Compared:
    """Answers against full forward passes over the same tokens."""

    num_draws: int
    worst_logprob: float
    ties: int  # draws that a full pass would make otherwise, within rounding
    wrong: list[str]  # beyond it

    @property
    def fails(self) -> bool:
        """Whether the comparison says that the engine is wrong."""
        return bool(self.wrong) or self.worst_logprob > LOGPROB_BOUND


def requests(count: int = 12) -> list[Request]:
    """Ragged prompts, some of them shared by several; ragged caps; all kinds of sampling side by side."""
    draw, found, prompts = random.Random(0), [], []
    for number in range(count):
        if number % 3 != 1:
            prompts.append(tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(draw.choice((1, 2, 5, 9, 17, 30)))))
        found.append(Request(number, prompts[-1], draw.randint(3, CAP), SAMPLINGS[number % len(SAMPLINGS)], SEED))
    return found


def engine(chunks: Any, model: Any, groups: Any, case: Case, slots: int) -> Any:
    """An engine with the tokenizer of a case's checkpoint."""
    from megatron_ext.generation.megatron_engine import MegatronEngine

    return MegatronEngine(chunks, model, groups, load_tokenizer(Path(case.checkpoint)), slots)


def say(chunks: Any, model: Any, groups: Any, case: Case, slots: int, asked: Sequence[Request]) -> Answers:
    """What a new engine answers."""
    return answers(generate_all(engine(chunks, model, groups, case, slots), asked))


def answers(found: Sequence[Generation]) -> Answers:
    """Generations as plain values."""
    return Answers(
        [one.tokens.tolist() for one in found], [one.logprobs.tolist() for one in found],
        [one.finish for one in found], [one.text for one in found],
    )  # fmt: skip


def apart(one: Answers, other: Answers) -> tuple[int, float]:
    """How many answers differ, and how far the log-probabilities are apart before they do."""
    differing, worst = 0, 0.0
    for a, b, x, y in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
        differing += a != b
        same = next((i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), min(len(a), len(b)))
        worst = max([worst, *(abs(p - q) for p, q in zip(x[:same], y[:same], strict=True))])
    return differing, worst


def compare(chunks: Any, model: Any, groups: Any, asked: Sequence[Request], said: Answers) -> Compared:
    """Draw every token again, from the logits of a full pass over prompt and response."""
    from megatron_ext.generation.sampling import processed_logprobs, sample, uniform
    from megatron_ext.model.logits import logits_BSV

    worst, ties, wrong, draws = 0.0, 0, [], 0
    for request, tokens, logprobs in zip(asked, said.tokens, said.logprobs, strict=True):
        if max(tokens) >= model.vocab_size:
            wrong.append(f"request {request.id}: a token that is none")
            continue
        whole = torch.tensor([[*request.prompt, *tokens]])
        logits = logits_BSV(chunks, whole, groups, model.vocab_size)[0, len(request.prompt) - 1 : -1]
        samplings, given = [request.sampling] * len(tokens), torch.tensor(tokens).unsqueeze(-1)
        uniforms = [uniform(request.seed, request.id, position) for position in range(len(tokens))]
        processed, drawn = processed_logprobs(logits, samplings), sample(logits, samplings, uniforms)
        worst = max(worst, float((processed.gather(-1, given).squeeze(-1) - torch.tensor(logprobs)).abs().max()))
        draws += len(tokens)
        for place in (drawn.tokens_B != given.squeeze(-1)).nonzero().flatten().tolist():
            gap = _gap(processed[place], tokens[place], request.sampling, uniforms[place])
            ties += gap < ROUNDING
            wrong += [] if gap < ROUNDING else [f"request {request.id}, place {place}: {gap:.1e} from token {tokens[place]}"]
    return Compared(draws, worst, ties, wrong)


def _gap(logprobs: torch.Tensor, token: int, sampling: Sampling, number: float) -> float:
    """How far the logits, or the random number, are from where the token would have been drawn."""
    if sampling.temperature == 0:
        return float(logprobs.max() - logprobs[token])
    cumulative = logprobs.double().exp().cumsum(-1)
    before = float(cumulative[token - 1]) if token else 0.0
    return max(before - number, number - float(cumulative[token]), 0.0)


def change_weights(chunks: Sequence[Any]) -> None:
    """Other weights in the same tensors, as an optimizer's step leaves them."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))


# ---- faults


def shift_positions(patch: pytest.MonkeyPatch) -> None:
    """RoPE of the next position while decoding."""
    from megatron_ext.generation.kv_cache import KVCache

    true = KVCache.decode

    def decode(self: Any, positions: Any) -> Any:
        places = true(self, positions)
        return replace(places, positions_T=places.positions_T + 1, num_positions=places.num_positions + 1)

    patch.setattr(KVCache, "decode", decode)


def copy_another_row(patch: pytest.MonkeyPatch) -> None:
    """A row that takes over keys and values takes another's."""
    from megatron_ext.generation.kv_cache import KVCache

    true = KVCache.copy_row
    patch.setattr(KVCache, "copy_row", lambda self, source, targets, count: true(self, max(source - 1, 0), targets, count))


def write_one_early(patch: pytest.MonkeyPatch) -> None:
    """Keys and values over those of the token before, and a mask to match."""
    from megatron_ext.generation.kv_cache import KVCache

    true = KVCache.decode

    def decode(self: Any, positions: Any) -> Any:
        return replace(true(self, positions), attend=true(self, [max(one - 1, 0) for one in positions]).attend)

    patch.setattr(KVCache, "decode", decode)


def keep_padding(patch: pytest.MonkeyPatch) -> None:
    """Rows that pad the vocabulary may be sampled."""
    from megatron_ext.generation.lean_model import LeanModel

    true = LeanModel.__init__

    def init(self: Any, chunks: Any, model: Any, groups: Any) -> None:
        true(self, chunks, replace(model, vocab_size=model.padded_vocab_size), groups)

    patch.setattr(LeanModel, "__init__", init)


def draw_alike(patch: pytest.MonkeyPatch) -> None:
    """Every request draws the numbers of the first."""
    from megatron_ext.generation import megatron_engine

    true = megatron_engine.uniform
    patch.setattr(megatron_engine, "uniform", lambda seed, _, position: true(seed, 0, position))


def keep_the_own_part(patch: pytest.MonkeyPatch) -> None:
    """Tensor-parallel ranks use their own part of the embedding, without the others'."""
    from megatron_ext.generation.lean_model import LeanModel

    def embed(self: Any, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens % weight.shape[0], weight)

    patch.setattr(LeanModel, "_embed", embed)


def take_another_stage(patch: pytest.MonkeyPatch) -> None:
    """What a pipeline stage hands on is not what it computed."""
    from megatron_ext.generation.lean_model import LeanModel

    true = LeanModel._send
    patch.setattr(LeanModel, "_send", lambda self, hidden: true(self, hidden.roll(1, 0)))


def keep_old_prompts(patch: pytest.MonkeyPatch) -> None:
    """Prompts that older weights computed are taken for new requests."""
    from megatron_ext.generation.megatron_engine import MegatronEngine

    true = MegatronEngine.update_weights

    def update_weights(self: Any, version: int, tensors: Any) -> None:
        true(self, version, tensors)
        self._num_updates = 0

    patch.setattr(MegatronEngine, "update_weights", update_weights)


FAULTS = (shift_positions, copy_another_row, write_one_early, keep_padding, draw_alike)
