"""A canary for every hand-over of weights: fixed prompts, a few greedy tokens, their log-probabilities against the trainer's own.

An engine that computes otherwise than the trainer, or keeps keys and values that old weights computed, samples on without an error.
That it holds the new weights is for `read_back` to say: one update at a small learning rate is within this gap.
Most of the tokens are decoded one by one, because engines have been seen that were right in the first pass alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_ext.config.rl import Sampling
from megatron_ext.errors import TrainingError
from megatron_ext.generation.engine import Generation, Request
from megatron_ext.tokenizer import Tokenizer

TEXTS = (  # unlike one another, so that many rows of the embedding take part
    "Question: what is 17 + 25? Let us add the tens, then the ones: ",
    "The area of a circle with radius r is pi times the square of r, because ",
    "def greatest_common_divisor(a, b):\n    while b != 0:\n        ",
    "x^2 - 5x + 6 = 0, so (x - 2)(x - 3) = 0; hence x is one of ",
)
PROMPT_TOKENS = 72  # more than two blocks of any engine's cache (16, 32 tokens), so that a prefix kept too long is found
NEW_TOKENS = 8  # the first comes from the prompt's pass, the others are decoded


def canary_requests(tokenizer: Tokenizer, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS) -> list[Request]:
    """Four greedy requests with prompts of exactly `prompt_tokens`, the same for every version; their ids are -1 to -4."""
    assert prompt_tokens >= 1, "a prompt has a token"
    assert new_tokens >= 2, "the second token is the first that is decoded"
    prompts = []
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        repeated = tokens * (prompt_tokens // len(tokens) + 1)
        prompts.append(tuple(repeated[:prompt_tokens]))
    greedy = Sampling(temperature=0)
    return [Request(id=-1 - i, prompt=prompt, cap_tokens=new_tokens, sampling=greedy, seed=0) for i, prompt in enumerate(prompts)]


def decoded(generations: Sequence[Generation]) -> bool:
    """Whether any token was decoded: a sound model may end all of the texts at once."""
    return any(len(one.tokens) > 1 for one in generations)


def check_canary(generations: Sequence[Generation], trainer_logprobs: Sequence[npt.NDArray[np.float32]], largest_gap: float) -> float:
    """The largest difference between engine and trainer over all tokens, in nats.

    `trainer_logprobs` are the trainer's of the same tokens, a row each, at temperature 1. `TrainingError` above `largest_gap`, for
    numbers that are not finite, and for tokens of more than one version of the weights.
    """
    versions = sorted({int(version) for one in generations for version in one.weight_versions})
    if len(versions) != 1:
        raise TrainingError(f"the canary was sampled with weights of versions {versions}: it must run alone, between two hand-overs")
    gaps = [np.abs(one.logprobs - own).max() for one, own in zip(generations, trainer_logprobs, strict=True)]
    gap = float(np.max(gaps))  # NaN stays NaN
    if not gap <= largest_gap:
        raise TrainingError(
            f"weights version {versions[0]} is not what the engine samples with: log-probabilities of the canary differ by {gap:.3g}, "
            f"at most {largest_gap:g} is rounding. Start the stage again, which makes a new engine; if it comes back, use "
            f"plan.engine=megatron, and report it with the versions of vLLM and torch"
        )
    return gap
