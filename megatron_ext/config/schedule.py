"""Learning rate as a pure function of the tokens consumed before a batch.

The first batch of a stage has consumed nothing: it is at the peak (or at the foot of a warm-up).
"""

from __future__ import annotations

import math
from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

Shape = Literal["constant", "cosine", "linear", "minus_sqrt"]


@config
class Schedule:
    """`peak`, and the way from it down to `peak * floor_fraction` at the last token."""

    shape: Shape
    peak: float
    floor_fraction: float = 0.1  # the paper decays to 10 % of the stable rate (Table 4)
    warmup_tokens: int = 0  # the paper warms up in no stage (section 3.1)

    def __post_init__(self) -> None:
        if not self.peak > 0 or not math.isfinite(self.peak):
            raise ConfigError(f"schedule: peak is {self.peak}, must be a positive number")
        if not 0 <= self.floor_fraction <= 1:
            raise ConfigError(f"schedule: floor_fraction is {self.floor_fraction}, must lie in [0, 1]")
        if self.warmup_tokens < 0:
            raise ConfigError(f"schedule: warmup_tokens is {self.warmup_tokens}, must not be negative")

    @property
    def floor(self) -> float:
        """The rate at the last token of a decaying shape."""
        return self.peak * self.floor_fraction


def learning_rate(schedule: Schedule, tokens_before: int, total_tokens: int) -> float:
    """The rate for the batch that starts after `tokens_before` of `total_tokens` tokens.

    With x the share of the decay that lies behind, and f the floor:
    cosine peak - (peak - f)(1 - cos(pi x)) / 2 (written so that it starts at the peak to the bit), linear peak - (peak - f) x,
    minus_sqrt peak - (peak - f) sqrt(x) (the 1-sqrt cooldown of Haegele et al. 2024).
    """
    if not 0 <= tokens_before <= total_tokens:
        raise ConfigError(f"schedule: {tokens_before:,} tokens lie outside the stage's {total_tokens:,}")
    if tokens_before < schedule.warmup_tokens:
        return schedule.peak * tokens_before / schedule.warmup_tokens
    if schedule.shape == "constant":
        return schedule.peak
    decay_tokens = total_tokens - schedule.warmup_tokens
    share = (tokens_before - schedule.warmup_tokens) / decay_tokens if decay_tokens else 1.0
    drop = schedule.peak - schedule.floor
    if schedule.shape == "cosine":
        return schedule.peak - drop * (1.0 - math.cos(math.pi * share)) / 2.0
    if schedule.shape == "linear":
        return schedule.peak - drop * share
    return schedule.peak - drop * math.sqrt(share)
