"""The rows of the report's tables; summary.json holds the same fields, docs/metrics.md explains them.

Losses are nats a token, shares lie in [0, 1]; None means that nothing was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.base import Json


@dataclass(frozen=True)
class StageRow:
    """A stage and how far it is."""

    stage: str
    kind: str
    state: str
    attempts: int
    steps: int | None  # finished; training and RL stages only
    steps_planned: int | None
    tokens: int | None  # of RL: of the responses sampled
    tokens_planned: int | None  # training stages only
    seconds: float | None  # of all attempts that recorded their end
    science_hash: str


@dataclass(frozen=True)
class AttemptRow:
    """One attempt: how it ended, and how many of its recorded steps no later attempt did again."""

    stage: str
    attempt: int
    started_at: str
    ended_at: str
    reason: str
    error: str
    from_step: int | None
    standing_steps: int
    num_ranks: int | None


@dataclass(frozen=True)
class TrainingRow:
    """A training stage's first and last numbers; losses are of training batches."""

    stage: str
    start: str  # scratch, weights or branch
    parent: str | None
    num_parameters: int
    steps: int
    steps_planned: int
    tokens: int
    lineage_tokens: int | None
    first_loss: float | None
    last_loss: float | None
    last_loss_steps: int  # recorded steps that the last loss is the mean of
    first_learning_rate: float | None
    last_learning_rate: float | None


@dataclass(frozen=True)
class JointRow:
    """Where a stage took over from another, and the learning rate on both sides."""

    stage: str
    parent: str
    start: str
    parent_tokens: int | None  # of the parent stage
    lineage_tokens: int | None
    learning_rate_before: float | None
    learning_rate_after: float | None
    step_after: int | None  # the step that had it: the first that was recorded


@dataclass(frozen=True)
class TreeRow:
    """A training or RL stage's place in the tree of starts."""

    stage: str
    mark: str  # drawn before its name


@dataclass(frozen=True)
class Point:
    """One held-out measurement of a stage's mixture."""

    step: int
    tokens: int
    lineage_tokens: int
    loss: float


@dataclass(frozen=True)
class MixtureRow:
    """Held-out loss of a stage's own mixture: sum over sources of weight x loss."""

    stage: str
    is_branch: bool
    points: tuple[Point, ...]
    start: float | None  # at step 0: the checkpoint it starts from, on this mixture
    end: float | None
    end_step: int | None
    change: float | None  # end - start
    unmeasured_sources: tuple[str, ...]  # of the mixture, without any held-out record


@dataclass(frozen=True)
class SourceLossRow:
    """Held-out loss of one source at the end of one stage."""

    stage: str
    source: str
    loss: float
    step: int
    valid_tokens: int | None
    measured_by: str  # the stage itself, or a child whose step 0 is this stage's last checkpoint


@dataclass(frozen=True)
class SourceTokensRow:
    """What a stage drew from one source, by the ledger of its newest checkpoint."""

    stage: str
    source: str
    step: int  # of that checkpoint
    planned_weight: float
    measured_share: float
    stage_tokens: int
    lineage_tokens: int
    epochs: float
    max_epochs: float | None


@dataclass(frozen=True)
class ThroughputRow:
    """Medians over the recorded steps that stand; rates are of all ranks together."""

    stage: str
    device: str
    precision: str
    num_ranks: int
    steps: int
    step_seconds: float | None
    tokens_per_second: float | None
    model_flops_per_second: float | None
    mfu: float | None
    peak_flops_per_second: float | None  # that the MFU assumes: model FLOP/s / MFU
    peak_source: str  # where the peak is from, as the stage's provenance says
    peak_memory_bytes: float | None


@dataclass(frozen=True)
class CorpusRow:
    """One source of a tokenized corpus."""

    corpus: str
    source: str
    documents: int
    tokens: int
    heldout_documents: int
    heldout_tokens: int
    max_epochs: float
    licence: str
    provenance: str


@dataclass(frozen=True)
class CodeRow:
    """What a stage was made with; empty where it did not say."""

    stage: str
    kind: str
    science_hash: str
    code_hash: str
    packages: Json
