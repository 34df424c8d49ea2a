"""What a run has recorded of one step, and from where that step can be computed again. Reads the run folder; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.folder import find
from megatron_ext.config.stages import Scratch
from megatron_ext.errors import CheckpointError, DamagedCheckpointError, RunError
from megatron_ext.metrics import Record, read_metrics
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import Run, open_run
from megatron_ext.tracker import iteration_path, published

OF_A_STEP = ("train", "skip", "stop")


@dataclass(frozen=True)
class Recorded:
    """One step of a stage: what was written down of it, and the way to it."""

    run: Run
    step: int
    record: Record | None  # the standing one of kind train, skip, stop or roll_back; None where the step was not logged
    checkpoint: Path | None  # the nearest own one before the step; None: the stage's start
    left_out: frozenset[int]  # steps of the stage that were not trained on


def training_run(folder: Path) -> Run:
    """Open a run folder that has steps; `RunError` where its stage does not train."""
    run = open_run(folder)
    if run.stage.kind != "train":
        raise RunError(
            f"{run.path}: stage '{run.name}' is of kind '{run.stage.kind}', and has no training steps; name the run of a train stage"
        )
    return run


def find_step(folder: Path, step: int) -> Recorded:
    """What stands of a step of the training stage in a run folder.

    `RunError` where the stage never came to it, or does not train; `CheckpointError` where nothing leads to it any more.
    On a run at work the answer changes from moment to moment: of several ranks one asks, for all.
    """
    run = training_run(folder)
    records = read_metrics(run.metrics_path)
    last = _last_step(run, records)
    if not 1 <= step <= last:
        way_out = f"choose one of 1 to {last}" if last else "train it first"
        raise RunError(f"{run.path}: stage '{run.name}' did not come to a step {step}; {way_out}")
    left_out = frozenset(one["step"] for one in records if one["kind"] == "skip")
    return Recorded(run, step, _record(records, step), _nearest(run, step), left_out)


def _last_step(run: Run, records: list[Record]) -> int:
    """The last step that was begun, as far as is known: between two logged steps there may be others."""
    if any(one["kind"] == "stop" for one in records):
        return max(one["step"] for one in records)
    trained = max((one["step"] for one in records), default=0)
    if not records:
        return 0
    return int(min(trained + run.stage.plan.log_every_steps, run.stage.budget.steps))


def _record(records: list[Record], step: int) -> Record | None:
    of_step = [one for one in records if (one["kind"] in OF_A_STEP and one["step"] == step) or _went_back_from(one, step)]
    first = [one for one in of_step if one["kind"] == "roll_back"]  # the skip after it was not computed again
    return (first or of_step)[-1] if of_step else None


def _went_back_from(record: Any, step: int) -> bool:
    return record["kind"] == "roll_back" and record["at_step"] == step


def _nearest(run: Run, step: int) -> Path | None:
    own, damaged = _with_optimizer(run.checkpoints_path)
    before = [iteration for iteration in own if iteration < step]
    if before:
        return iteration_path(run.checkpoints_path, before[-1])
    if not isinstance(run.stage.start, Scratch):
        parent = open_run(run.inputs["start"])
        try:
            find(parent.checkpoints_path, run.stage.start.tokens, parent.name)
        except CheckpointError as gone:
            nearest = f"the nearest that can is step {own[0] + 1}" if own else "nor any other"
            raise CheckpointError(
                f"{run.path}: step {step} cannot be computed again, {nearest}: no checkpoint of the stage before it is kept, "
                f"and where it starts, {gone}" + (f". Damaged are: {'; '.join(damaged)}" if damaged else "")
            ) from None
    return None


def _with_optimizer(folder: Path) -> tuple[list[int], list[str]]:
    """The checkpoints that training can go on from, ascending, and what is wrong with those whose manifests cannot be read."""
    found, damaged = [], []
    for iteration in published(folder):
        try:
            if read_manifest(iteration_path(folder, iteration)).optimizer_layout != "none":
                found.append(iteration)
        except DamagedCheckpointError as problem:
            damaged.append(str(problem))
    return found, damaged
