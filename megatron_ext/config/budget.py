"""Tokens, steps and batches: the only place that divides tokens by a batch."""

from __future__ import annotations

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError


@config
class Budget:
    """How long a stage trains: `steps` batches of `sequences_per_batch` x `sequence_length` tokens."""

    steps: int
    sequences_per_batch: int
    sequence_length: int

    def __post_init__(self) -> None:
        for key in ("steps", "sequences_per_batch", "sequence_length"):
            if getattr(self, key) < 1:
                raise ConfigError(f"budget: {key} is {getattr(self, key)}, must be at least 1")

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one optimizer step."""
        return self.sequences_per_batch * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.steps * self.tokens_per_batch

    @property
    def samples(self) -> int:
        """Sequences of the whole stage."""
        return self.steps * self.sequences_per_batch

    def tokens_before(self, step: int) -> int:
        """Tokens consumed before step `step` (the first step is 0)."""
        return step * self.tokens_per_batch

    def step_at(self, tokens: int) -> int:
        """The number of steps after which exactly `tokens` are consumed; `ConfigError` if there is none."""
        if tokens % self.tokens_per_batch or not 0 <= tokens <= self.tokens:
            down = tokens // self.tokens_per_batch * self.tokens_per_batch
            raise ConfigError(
                f"{tokens:,} tokens is no step of this stage: steps are {self.tokens_per_batch:,} tokens, "
                f"up to {self.tokens:,}; the nearest below is {min(down, self.tokens):,}"
            )
        return tokens // self.tokens_per_batch

    def nearest_step(self, tokens: int) -> int:
        """The step whose consumed tokens lie nearest to a nominal number such as 130B."""
        return min(self.steps, max(0, round(tokens / self.tokens_per_batch)))


def nearest_budget(tokens: int, sequences_per_batch: int, sequence_length: int) -> Budget:
    """The budget nearest to a nominal number of tokens: 20B at 4,194,304 a batch is 4,768 steps."""
    steps = max(1, round(tokens / (sequences_per_batch * sequence_length)))
    return Budget(steps=steps, sequences_per_batch=sequences_per_batch, sequence_length=sequence_length)
