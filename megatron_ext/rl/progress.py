"""How far reinforcement learning has come: one small value, saved and restored whole.

Everything that decides the next rollout step beside weights and optimizer stands here; random draws are functions of the stage's
seed and of the prompts' numbers, so there is no random state to keep.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ext.config.base import config, from_json, to_json
from megatron_ext.config.rl import ProgressLengths, TruncationLengths
from megatron_ext.rl.lengths import LengthState, check_reachable
from megatron_ext.rl.order import OrderState
from megatron_ext.training.state import Progress


@config
class RLProgress:
    """After `step` rollout steps."""

    step: int = 0
    updates: int = 0  # optimizer steps; the weights' version
    tokens: int = 0  # of the responses that were trained on, in this stage
    lineage_tokens: int = 0  # with those of all stages before it
    order: OrderState = OrderState()
    lengths: LengthState = LengthState()
    ahead_sha256: str = ""  # of the recorded rollouts of the next step, where they were sampled ahead

    def sampled(self, order: OrderState, lengths: LengthState) -> RLProgress:
        """Once a step's rollouts are there."""
        return replace(self, order=order, lengths=lengths)

    def finished(self, updates: int, tokens: int) -> RLProgress:
        """Once a step's updates are done."""
        return replace(
            self,
            step=self.step + 1,
            updates=self.updates + updates,
            tokens=self.tokens + tokens,
            lineage_tokens=self.lineage_tokens + tokens,
        )

    @property
    def plain(self) -> Progress:
        """As the hooks of training know it."""
        return Progress(self.step, self.tokens, self.lineage_tokens)


def progress_to_json(progress: RLProgress) -> dict[str, Any]:
    """For a checkpoint's manifest."""
    values: dict[str, Any] = to_json(progress)
    return values


def progress_from_json(lengths: ProgressLengths | TruncationLengths, values: Any, where: str) -> RLProgress:
    """From a checkpoint's manifest; `ConfigError` opens with `where` if it is none, or not of this schedule of lengths."""
    progress: RLProgress = from_json(RLProgress, values, where)
    check_reachable(lengths, progress.lengths, where)
    return progress
