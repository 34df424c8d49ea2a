"""What a rollout step hands to the update: responses with their prompts, grades and rewards, group by group.

Shapes: P prompts, G responses of a prompt, N responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_ext.config.rl import Objective
from megatron_ext.config.stages import RLStage
from megatron_ext.generation.engine import Generation
from megatron_ext.rl.batch import Sample
from megatron_ext.rl.full_grade import Behaviour
from megatron_ext.rl.lengths import LengthState
from megatron_ext.rl.objective import group_advantages, informative_groups, response_weights, shaped_rewards
from megatron_ext.rl.order import OrderState
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.reward import REWARDS, RewardName


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response, all that is known of it. `ending` says how its grading ended: graded, timed_out or crashed, then `cause`.

    In training, ranks other than 0 have it without its words: see `handout.without_words`.
    """

    problem: str  # id
    prompt: tuple[int, ...]
    cap_tokens: int
    generation: Generation
    ending: str
    verdict: Verdict | None
    cause: str
    reward: float
    behaviour: Behaviour

    @property
    def num_tokens(self) -> int:
        """Tokens of the response."""
        return len(self.generation.tokens)

    @property
    def is_truncated(self) -> bool:
        """Whether the cap cut it off."""
        return self.generation.finish == "length"

    @property
    def is_correct(self) -> bool:
        """Whether the grader found it right."""
        return self.verdict is not None and self.verdict.is_correct


@dataclass(frozen=True, eq=False)
class Batch:
    """The rollouts of one step, the responses of a prompt side by side, and the states after them."""

    step: int  # the rollout step that they are for, from 1
    cap_tokens: int
    weight_version: int  # updates behind the weights that sampled
    seed: int
    rollouts: tuple[Rollout, ...]
    order: OrderState
    lengths: LengthState
    unused: tuple[Rollout, ...] = ()  # of groups that others were drawn in place of
    num_left_out: int = 0  # problems whose prompts are too long
    seconds: dict[str, float] = field(default_factory=dict)  # of sampling and grading; not part of what is exact
    sha256: str = ""  # of their record, once it is written


@dataclass(frozen=True)
class Judged:
    """What the objective makes of a step's rewards."""

    advantages_PG: torch.Tensor
    counted_PG: torch.Tensor
    informative_P: torch.Tensor  # whether the responses earned different rewards

    @property
    def informative_share(self) -> float:
        """Share of the prompts whose responses earned different rewards."""
        return self.informative_P.double().mean().item()


def judged(objective: Objective, reward: RewardName, rollouts: Sequence[Rollout], group: int) -> Judged:
    """Advantages, and which responses count."""
    found_PG = torch.tensor([one.reward for one in rollouts], dtype=torch.float64).view(-1, group)
    truncated_PG = torch.tensor([one.is_truncated for one in rollouts]).view(-1, group)
    lengths_PG = torch.tensor([one.num_tokens for one in rollouts]).view(-1, group)
    caps_PG = torch.tensor([one.cap_tokens for one in rollouts]).view(-1, group)
    wrong = REWARDS[reward](None, "")
    shaped_PG, counted_PG = shaped_rewards(objective, found_PG, truncated_PG, lengths_PG, caps_PG, wrong)
    return Judged(group_advantages(objective, shaped_PG, counted_PG), counted_PG, informative_groups(shaped_PG, counted_PG))


def samples(stage: RLStage, rollouts: Sequence[Rollout]) -> tuple[list[Sample], Judged]:
    """What the update trains on, in the order of the rollouts."""
    found = judged(stage.objective, stage.reward, rollouts, stage.rollouts.responses_per_prompt)
    lengths_N = torch.tensor([one.num_tokens for one in rollouts])
    weights_N, shares_N = response_weights(stage.objective, lengths_N, found.counted_PG.flatten())
    rows = zip(rollouts, found.advantages_PG.flatten().tolist(), weights_N.tolist(), shares_N.tolist(), strict=True)
    return [
        Sample(
            prompt=one.prompt,
            response=one.generation.tokens,
            engine_logprobs=one.generation.logprobs,
            advantage=advantage,
            weight=weight,
            share=share,
            old_logprobs=None,
            reference_logprobs=None,
        )
        for one, advantage, weight, share in rows
    ], found
