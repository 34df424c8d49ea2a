"""Which length cap responses are sampled under, as a pure state machine: schedule and state in, cap and next state out.

    state = LengthState()
    cap = cap_tokens(schedule, state)                  # of the next rollout step, and of a validation before it
    state = after_rollout_step(schedule, state, seen)  # once that step's responses are there

The state is all that the schedule has seen: saved with a checkpoint, it gives the same caps after a resume.
Rollout step n, counted from 0, runs under the largest key <= n: with 2048 and 100: 4096, one hundred steps
run under 2,048 tokens, and a validation after the hundredth under 4,096.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.base import config, to_json
from megatron_ext.config.rl import ProgressLengths, TruncationLengths
from megatron_ext.errors import ConfigError

Lengths = ProgressLengths | TruncationLengths


@config
class LengthState:
    """What a schedule has seen of its run so far."""

    rollout_steps: int = 0  # finished
    response_tokens: int = 0  # sampled in them
    raises: int = 0  # of the cap, by truncation
    steps_above: int = 0  # in a row, at this cap, with more cut off than the schedule's share

    def __post_init__(self) -> None:
        for key, value in to_json(self).items():
            if value < 0:
                raise ConfigError(f"length state: {key} is {value}, must not be negative")


@config
class Seen:
    """What one rollout step sampled.

    `num_responses` are those sampled under the cap in force, `num_truncated` those of them that it cut off: responses that
    come late, from under an earlier cap, say nothing about this one. `response_tokens` are of all responses.
    """

    num_responses: int
    num_truncated: int
    response_tokens: int

    def __post_init__(self) -> None:
        if not (0 <= self.num_truncated <= self.num_responses and self.response_tokens >= 0):
            raise ConfigError(
                f"rollout step: {self.num_truncated} of {self.num_responses} responses cut off, {self.response_tokens} tokens; "
                f"counts must not be negative, and no more can be cut off than there are"
            )


def cap_tokens(schedule: Lengths, state: LengthState) -> int:
    """The cap in force for the rollout step that comes next."""
    if isinstance(schedule, TruncationLengths):
        return schedule.caps_tokens[state.raises]
    done = state.rollout_steps if schedule.unit == "rollout_steps" else state.response_tokens
    return next(row.cap_tokens for row in reversed(schedule.caps) if row.after <= done)


def after_rollout_step(schedule: Lengths, state: LengthState, seen: Seen) -> LengthState:
    """The state once a rollout step is finished."""
    moved = replace(state, rollout_steps=state.rollout_steps + 1, response_tokens=state.response_tokens + seen.response_tokens)
    if not isinstance(schedule, TruncationLengths) or state.raises == len(schedule.caps_tokens) - 1 or not seen.num_responses:
        return moved
    steps_above = state.steps_above + 1 if seen.num_truncated / seen.num_responses > schedule.share else 0
    if steps_above < schedule.steps:
        return replace(moved, steps_above=steps_above)
    return replace(moved, raises=state.raises + 1, steps_above=0)


def check_reachable(schedule: Lengths, state: LengthState, where: str = "") -> None:
    """`ConfigError`, opening with `where`, for a saved state that this schedule cannot reach."""
    raises, above = (len(schedule.caps_tokens) - 1, schedule.steps - 1) if isinstance(schedule, TruncationLengths) else (0, 0)
    if state.raises > raises or state.steps_above > above:
        opening = f"{where}: " if where else ""
        raise ConfigError(
            f"{opening}the length state has {state.raises} raises and {state.steps_above} steps above the share, but the schedule "
            f"allows at most {raises} and {above}: it is of another schedule; resume with the recipe that it was saved under"
        )
