"""Where a run starts from another, as run folders say it: by its checkpoints' records, or before there are any by its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.schedule import learning_rate
from megatron_ext.config.stages import Branch, RLStage, TrainStage, Weights
from megatron_ext.errors import CheckpointError, DamagedCheckpointError, RunError
from megatron_ext.provenance import MANIFEST, Manifest, file_sha256, read_manifest
from megatron_ext.runs import CHECKPOINTS, RECIPE, Run, brief, open_run
from megatron_ext.tracker import iteration_path, read_tracker


@dataclass(frozen=True)
class Joint:
    """Where a run starts from another: as its checkpoints recorded it, or before there are any as its recipe asks for it."""

    start: str  # weights or branch
    stage: str  # the parent
    folder: Path  # the parent's run folder
    is_last: bool  # asked for as the parent's last, and not recorded yet
    tokens: int | None  # of the parent stage, sampled ones of reinforcement learning; None where its folder does not say
    rate_before: float | None  # of the parent's last step before the joint
    rate_after: float  # of the first step after it
    iteration: int | None = None  # of the parent's checkpoint, where recorded
    manifest_sha256: str = ""  # of that checkpoint, where recorded

    @property
    def checkpoint(self) -> Path | None:
        """The parent's checkpoint, where recorded."""
        return None if self.iteration is None else checkpoint_path(self.folder, self.iteration)


def joint_of(run: Run, manifest: Manifest | None) -> Joint | None:
    """The joint at which a run begins; None where it begins from nothing."""
    start = getattr(run.stage, "start", None)
    if not isinstance(start, Weights | Branch):
        return None
    folder = run.inputs["start"]
    after = first_rate(run.stage)
    if manifest is not None and manifest.parent is not None:
        old = manifest.parent
        rate = old.learning_rate if old.iteration else None  # a converted model was not trained here
        return Joint(start.kind, start.stage, folder, False, old.tokens, rate, after, old.iteration, old.manifest_sha256)
    tokens, before = start.tokens, None
    parent = open_run(folder).stage if (folder / RECIPE).is_file() else None
    if isinstance(parent, TrainStage):
        tokens = parent.budget.tokens if tokens is None else tokens
        before = learning_rate(parent.schedule, tokens - parent.budget.tokens_per_batch, parent.budget.tokens)
    elif isinstance(parent, RLStage):
        before = parent.learning_rate
    return Joint(start.kind, start.stage, folder, start.tokens is None, tokens, before, after)


def joint_step(child: Any, parent: Any) -> int | None:
    """The step of a training stage, short of its last, that another stage of its graph starts from; None where there is none such."""
    start = getattr(child, "start", None)
    if not isinstance(start, Weights | Branch) or start.stage != parent.name or start.tokens is None or not isinstance(parent, TrainStage):
        return None
    step = parent.budget.step_at(start.tokens)
    return step if step < parent.budget.steps else None


def first_rate(stage: TrainStage | RLStage) -> float:
    """The learning rate of a stage's first step, or where that rises from 0 step by step, the rate that it rises to."""
    if isinstance(stage, RLStage):
        return stage.learning_rate
    return learning_rate(stage.schedule, 0, stage.budget.tokens)


def rate_words(joint: Joint) -> str:
    """', LR 0.003', with both sides where the rate steps at the joint."""
    if joint.rate_before is None:
        return ""
    step = "" if f"{joint.rate_before:.4g}" == f"{joint.rate_after:.4g}" else f" -> {joint.rate_after:.4g}"
    return f", LR {joint.rate_before:.4g}{step}"


def parent_change(joint: Joint) -> str:
    """What became of the checkpoint that a run started from; '' where it is the same, or lost its optimizer state only."""
    if joint.checkpoint is None:
        return ""
    path = joint.checkpoint / MANIFEST
    name = brief(joint.checkpoint)
    if not path.is_file():
        return f"its parent checkpoint {name} is gone"
    found = file_sha256(path)
    if found == joint.manifest_sha256:
        return ""
    try:
        if read_manifest(joint.checkpoint).thinned_from == joint.manifest_sha256:
            return ""
    except CheckpointError:
        pass  # damaged: so it is not the same
    return (
        f"its parent checkpoint {name} is not the one that it started from: the manifest hashes to {found[:12]}, "
        f"recorded is {joint.manifest_sha256[:12]}"
    )


def checkpoint_path(run_path: Path, iteration: int) -> Path:
    """The folder of a run's checkpoint."""
    return iteration_path(run_path / CHECKPOINTS, iteration)


def latest_iteration(run: Run) -> int | None:
    """The checkpoint that a run's tracker names; None before the first, `RunError` where the tracker is broken."""
    try:
        return read_tracker(run.checkpoints_path)
    except DamagedCheckpointError as problem:
        raise RunError(str(problem)) from None


def readable_manifest(run: Run, iteration: int) -> Manifest | None:
    """A checkpoint's manifest, or None where it is missing or damaged."""
    try:
        return read_manifest(checkpoint_path(run.path, iteration))
    except CheckpointError:
        return None  # who looks says so, and goes on to the other runs
