"""What a run has recorded of one step, and from where that step can be computed again. Reads the run folder; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.attempts import RECORD
from megatron_ext.checkpoint import folder as folders
from megatron_ext.config.base import Json, to_json
from megatron_ext.config.stages import Scratch
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.metrics import Record, read_metrics
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import ATTEMPTS, Run, differences, open_run, read_json
from megatron_ext.snapshot import code_hash

OF_A_STEP = ("train", "skip", "stop")


@dataclass(frozen=True)
class Recorded:
    """One step of a stage: what was written down of it, and the way to it."""

    run: Run
    step: int
    record: Record | None  # the standing one of kind train, skip, stop or roll_back; None where the step was not logged
    checkpoint: Path | None  # the nearest own one before the step; None: the stage's start
    left_out: frozenset[int]  # steps of the stage that were not trained on

    def words(self, as_json: bool) -> list[str]:
        """The command line that shows the step, without the program's name."""
        return ["why", str(self.run.path), "--step", str(self.step), *(["--json"] if as_json else [])]


def find_step(folder: Path, step: int) -> Recorded:
    """What stands of a step of the training stage in a run folder.

    `RunError` where the stage never came to it, or does not train; `CheckpointError` where nothing leads to it any more.
    """
    run = open_run(folder)
    if run.stage.kind != "train":
        raise RunError(
            f"{run.path}: stage '{run.name}' is of kind '{run.stage.kind}', and has no training steps; name the run of a train stage"
        )
    records = read_metrics(run.metrics_path)
    last = _last_step(run, records)
    if not 1 <= step <= last:
        way_out = f"choose one of 1 to {last}" if last else "train it first"
        raise RunError(f"{run.path}: stage '{run.name}' did not come to a step {step}; {way_out}")
    left_out = frozenset(one["step"] for one in records if one["kind"] == "skip")
    return Recorded(run, step, _record(records, step), _nearest(run, step), left_out)


def causes(run: Run, record: Record) -> list[str]:
    """What the record was made with that is different here: plan, code."""
    path = run.path / ATTEMPTS / str(record["attempt"]) / RECORD
    then: Json = read_json(path, "how an attempt began")
    found = differences(then["plan"], to_json(run.stage.plan), "plan")
    if then.get("code_hash") not in (None, code_hash()):
        found.append(f"code: {then['code_hash'][:12]} -> {code_hash()[:12]}")
    return found


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
    own = [i for i in folders.published(run.checkpoints_path) if _has_optimizer(folders.iteration_path(run.checkpoints_path, i))]
    before = [iteration for iteration in own if iteration < step]
    if before:
        return folders.iteration_path(run.checkpoints_path, before[-1])
    if not isinstance(run.stage.start, Scratch):
        parent = open_run(run.inputs["start"])
        try:
            folders.find(parent.checkpoints_path, run.stage.start.tokens, parent.name)
        except CheckpointError as gone:
            nearest = f"the nearest that can is step {own[0] + 1}" if own else "nor any other"
            raise CheckpointError(
                f"{run.path}: step {step} cannot be computed again, {nearest}: no checkpoint of the stage before it is kept, "
                f"and where it starts, {gone}"
            ) from None
    return None


def _has_optimizer(path: Path) -> bool:
    return read_manifest(path).optimizer_layout != "none"
