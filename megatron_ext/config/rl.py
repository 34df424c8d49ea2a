"""The knobs of reinforcement learning: the objective, the length schedule, how tokens are sampled.

Without a word they are the paper's GRPO: its trainer was verl, whose defaults stand where the paper is silent.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Union

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

LEAST_TEMPERATURE = 1e-5  # vLLM's: below it FP32 logits would overflow, and greedy is what is meant


@config
class Objective:
    """GRPO's numbers: how rewards become advantages, and these a loss.

    `mean_over` is what the summed loss of an update is divided by, over all ranks and micro-batches:
    tokens: the counted tokens; every token weighs the same (verl's token-mean).
    responses: first each response's own tokens, then the responses; GRPO as first published.
    constant: responses times `constant_tokens`; no length enters (Dr. GRPO, arXiv 2503.20783).

    `truncated` is what becomes of a response that the length cap cut off:
    graded: its text is graded as any other. The paper's runs did this: it mostly has no box, and is then wrong.
    wrong: never better than the wrong reward, also where a box stands before the cut.
    masked: left out of the loss and of its group's statistics.
    soft_penalty: graded, and every response, cut off or not, loses up to `overlong_penalty` on the last
    `overlong_share` of the cap, linearly (DAPO, arXiv 2503.14476, section 3.4).
    """

    divide_by_deviation: bool = True  # verl's norm_adv_by_std_in_grpo; Dr. GRPO leaves it out
    clip_low: float = 0.2  # the ratio's floor is 1 - clip_low; verl's clip_ratio
    clip_high: float = 0.2  # the ratio's ceiling is 1 + clip_high; DAPO takes 0.28
    kl_coefficient: float = 0.0  # of the k3 penalty against the reference; the paper's is 0
    mean_over: Literal["tokens", "responses", "constant"] = "tokens"  # verl's loss_agg_mode
    constant_tokens: int | None = None  # with mean_over 'constant' alone: Dr. GRPO takes the largest response length
    truncated: Literal["graded", "wrong", "masked", "soft_penalty"] = "graded"
    overlong_share: float = 0.2  # of the cap in force; DAPO's 4,096 of 20,480 tokens
    overlong_penalty: float = 1.0  # taken from the reward at the cap; DAPO's, for rewards of +1 and -1
    importance_cap: float | None = None  # C of truncated importance sampling between engine and trainer; None: no correction

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1:
            raise ConfigError(f"objective: clip_low is {self.clip_low}, must lie in [0, 1): the ratio's floor is 1 - clip_low")
        for key in ("clip_high", "kl_coefficient", "overlong_penalty"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(f"objective: {key} is {getattr(self, key)}, must be a number that is not negative")
        if not 0 < self.overlong_share <= 1:
            raise ConfigError(f"objective: overlong_share is {self.overlong_share}, must lie in (0, 1]: a share of the length cap")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ConfigError(f"objective: importance_cap is {self.importance_cap}, must be positive; 2 is usual, null is no correction")
        if (self.mean_over == "constant") != (self.constant_tokens is not None):
            raise ConfigError(
                f"objective: mean_over is '{self.mean_over}' and constant_tokens is {self.constant_tokens}; "
                f"'constant' needs a number of tokens, the others take none"
            )
        if self.constant_tokens is not None and self.constant_tokens < 1:
            raise ConfigError(f"objective: constant_tokens is {self.constant_tokens}, must be at least 1")


@config
class CapFrom:
    """The length cap of responses once `after` (of the schedule's unit) are finished."""

    after: int
    cap_tokens: int


@config
class ProgressLengths:
    """Caps by finished rollout steps, or by response tokens sampled: the largest `after` that is reached holds.

    The paper's Long branch: 2,048; 4,096 from rollout step 100; 8,192 from 160 (its plots count updates,
    two a rollout step: 200 and 320).
    """

    kind: Literal["progress"] = "progress"
    unit: Literal["rollout_steps", "response_tokens"] = "rollout_steps"
    caps: tuple[CapFrom, ...]
    may_fall: bool = False  # a falling cap is mostly a slip of the pen

    def __post_init__(self) -> None:
        _check_caps([row.cap_tokens for row in self.caps], self.may_fall)
        afters = [row.after for row in self.caps]
        if afters[0] != 0:
            raise ConfigError(f"lengths: the first cap begins after {afters[0]} {self.unit}, must begin after 0")
        for earlier, later in pairwise(afters):
            if later <= earlier:
                raise ConfigError(f"lengths: a cap after {later} {self.unit} stands behind one after {earlier}; write them in rising order")

    @property
    def largest_cap_tokens(self) -> int:
        """What the model's positions must hold beside the prompt."""
        return max(row.cap_tokens for row in self.caps)


@config
class TruncationLengths:
    """The next cap as soon as more than `share` of the responses were cut off in each of `steps` rollout steps in a row.

    Neither number has a default: nobody has published one.
    """

    kind: Literal["truncation"] = "truncation"
    caps_tokens: tuple[int, ...]
    share: float
    steps: int

    def __post_init__(self) -> None:
        _check_caps(list(self.caps_tokens), may_fall=False)
        if not 0 <= self.share < 1:
            raise ConfigError(f"lengths: share is {self.share}, must lie in [0, 1): more than all responses cannot be cut off")
        if self.steps < 1:
            raise ConfigError(f"lengths: steps is {self.steps}, must be at least 1")

    @property
    def largest_cap_tokens(self) -> int:
        """What the model's positions must hold beside the prompt."""
        return self.caps_tokens[-1]


Lengths = Annotated[Union[ProgressLengths, TruncationLengths], Field(discriminator="kind")]


def _check_caps(caps_tokens: list[int], may_fall: bool) -> None:
    if not caps_tokens:
        raise ConfigError("lengths: no caps; name at least one")
    for cap in caps_tokens:
        if cap < 1:
            raise ConfigError(f"lengths: a cap of {cap} tokens, must be at least 1")
    for earlier, later in pairwise(caps_tokens):
        if later == earlier or (later < earlier and not may_fall):
            raise ConfigError(
                f"lengths: {later:,} tokens follow {earlier:,}; caps must rise (by steps or tokens, may_fall=true lets them fall)"
            )


@config
class Sampling:
    """How the next token is drawn: temperature, then top-k, then top-p. The paper samples at 1.0 with neither."""

    temperature: float = 1.0  # 0: the likeliest token, always
    top_k: int | None = None  # the k likeliest, with all that tie with the last of them; None: all
    top_p: float = 1.0  # the fewest likeliest tokens that hold this much probability; 1: all

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(f"sampling: temperature is {self.temperature}, must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampling: top_k is {self.top_k}, must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p is {self.top_p}, must lie in (0, 1]")


@config
class Rollouts:
    """What a rollout step samples, and how it is split into updates. The paper: 128 prompts x 16, 64 prompts an update."""

    prompts_per_step: int = 128
    responses_per_prompt: int = 16
    prompts_per_update: int = 64
    max_prompt_tokens: int = 400  # longer prompts are left out, and counted
    sampling: Sampling = Sampling()
    max_staleness: Literal[0, 1] = 0  # rollout steps by which the sampling weights may lag; 0 is exact
    resample_uninformative: int = 0  # further draws of prompts in place of groups without a difference (DAPO's dynamic sampling)
    drop_easy_share: float | None = None  # after each pass over the prompts, those with at least this share right leave; None: none

    def __post_init__(self) -> None:
        for key in ("prompts_per_step", "responses_per_prompt", "prompts_per_update", "max_prompt_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"rollouts: {key} is {getattr(self, key)}, must be at least 1")
        if self.prompts_per_step % self.prompts_per_update:
            raise ConfigError(
                f"rollouts: {self.prompts_per_step} prompts a step are no multiple of {self.prompts_per_update} prompts an update; "
                f"change one of them"
            )
        if self.resample_uninformative < 0:
            raise ConfigError(f"rollouts: resample_uninformative is {self.resample_uninformative}, must not be negative")
        if self.resample_uninformative and self.responses_per_prompt == 1:
            raise ConfigError("rollouts: resample_uninformative needs responses_per_prompt above 1: no group of one has a difference")
        if self.resample_uninformative and self.max_staleness:
            raise ConfigError("rollouts: resample_uninformative needs max_staleness=0: what is informative is known after grading alone")
        if self.drop_easy_share is not None and not 0 < self.drop_easy_share <= 1:
            raise ConfigError(f"rollouts: drop_easy_share is {self.drop_easy_share}, must lie in (0, 1]")
        if self.sampling.temperature == 0:
            raise ConfigError("rollouts: sampling.temperature is 0, so that all responses to a prompt are one; the paper samples at 1.0")
        if self.sampling.top_k is not None or self.sampling.top_p != 1:
            raise ConfigError(
                "rollouts: top_k and top_p are for validation and generate; the update needs log-probabilities of every token "
                "that training could raise. Use temperature alone"
            )

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one rollout step; the paper's plots count these."""
        return self.prompts_per_step // self.prompts_per_update

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout step."""
        return self.prompts_per_step * self.responses_per_prompt


def check_staleness(rollouts: Rollouts, objective: Objective) -> None:
    """`ConfigError` for rollouts of older weights whose tokens nothing weighs by the weights that sampled them.

    The old log-probabilities of an update are the trainer's, so neither ratio nor clip sees the lag: the importance weight alone does.
    """
    if rollouts.max_staleness and objective.importance_cap is None:
        raise ConfigError(
            f"rollouts: max_staleness={rollouts.max_staleness} needs objective.importance_cap: without it nothing corrects for the older "
            f"weights that sampled; set it (2 is usual), or max_staleness=0"
        )
