"""The rows of the report's tables on reinforcement learning; summary.json holds the same fields, docs/metrics.md explains them.

Shares lie in [0, 1], steps are finished rollout steps; `low` and `high` are 95 % intervals. None means that nothing was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cap:
    """A length cap and the finished rollout steps after which it came into force."""

    after_step: int
    cap_tokens: int


@dataclass(frozen=True)
class RLRunRow:
    """One run of reinforcement learning: its settings, how far it is, how it went in its last recorded steps."""

    stage: str
    start: str  # the stage whose weights it starts from
    start_is: str  # untouched, mid-trained, branch or unknown
    template: str
    reward: str
    caps: tuple[Cap, ...]  # in force, as recorded
    steps: int
    steps_planned: int
    updates: int | None
    updates_per_step: int
    response_tokens: int | None
    num_prompts: int | None  # of a rollout step
    num_responses: int | None
    last_steps: int  # recorded steps that the following are means of
    reward_mean: float | None
    informative_share: float | None
    truncated_share: float | None
    loop_share: float | None
    box_first_share: float | None
    text_after_box_share: float | None
    approx_entropy: float | None
    token_mult_prob_error: float | None


@dataclass(frozen=True)
class RLPoint:
    """One validation on one set, or the mean of all sets at one step."""

    step: int
    updates: int | None
    accuracy: float
    low: float
    high: float
    num_correct: int
    num_problems: int
    num_left_out: int
    response_tokens_mean: float | None
    correct_tokens_mean: float | None
    truncated_share: float | None
    cap_tokens: int | None  # None where the sets of a mean had different ones


@dataclass(frozen=True)
class RLCurveRow:
    """A run's validations on one set, by step."""

    stage: str
    set: str
    points: tuple[RLPoint, ...]


@dataclass(frozen=True)
class RLScoreRow:
    """A run on one set: before the first update, at its last validation, and at its best."""

    stage: str
    set: str
    num_problems: int
    before: RLPoint | None
    after: RLPoint | None
    change: float | None
    change_low: float | None
    change_high: float | None
    best: float
    best_step: int
    correct_per_1000_tokens: float | None  # accuracy over mean response tokens, times 1,000, at the last validation


@dataclass(frozen=True)
class RLGradingRow:
    """Verdicts over all recorded steps of a run."""

    stage: str
    num_responses: int
    correct: int
    wrong: int
    unparseable: int
    error: int
    timed_out: int
    crashed: int


@dataclass(frozen=True)
class RLComparisonRow:
    """A run against the run of the same RL from a stage that its own start was made from, at the last step that both measured."""

    stage: str
    start: str
    against: str  # the other run
    against_start: str
    against_is: str  # untouched, mid-trained or branch
    set: str
    step: int
    updates: int | None
    before: float | None  # accuracy of the run at step 0
    accuracy: float
    against_before: float | None
    against_accuracy: float
    difference: float
    low: float
    high: float
    finding: str  # above, below or not told apart
    raised: bool  # whether RL raised the run from step 0 to this step beyond the interval of that difference
    cap_tokens: int | None
    against_cap_tokens: int | None
    differs_in: tuple[str, ...]  # settings, beside name and start


@dataclass(frozen=True)
class RLTimeRow:
    """Medians over the recorded rollout steps of a run."""

    stage: str
    steps: int
    rollout_seconds: float | None
    grading_seconds: float | None
    update_seconds: float | None
    step_seconds: float | None
    responses_per_second: float | None
    peak_memory_bytes: float | None
