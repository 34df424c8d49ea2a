"""A rollout step computed again from its record: the same rollouts, the same updates, equal to the bit - or another clip, cap or grader.

Where the run saved a checkpoint after the step, the weights that come out are compared with it, parameter by parameter.

The weights come from the nearest checkpoint before the step; the steps between are done again from their own records. Nothing is
sampled, and nothing written. With changes, the step is computed twice: as it was, and as it would have been.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import device
from megatron_ext.checkpoint.folder import named_checkpoint
from megatron_ext.checkpoint.weights import load_chunks
from megatron_ext.config.base import Json
from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import Groups, from_rank_0, process_groups
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.metrics import read_metrics
from megatron_ext.progress import progress as showing
from megatron_ext.provenance import read_manifest
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.begin import carried_tokenizer, frozen_reference
from megatron_ext.rl.grading import grading_pool, regraded
from megatron_ext.rl.handout import handed_out_batch
from megatron_ext.rl.measures import responses_record
from megatron_ext.rl.record import read_record
from megatron_ext.rl.record_paths import recorded_steps
from megatron_ext.rl.replay_request import changed_stage, check_cap
from megatron_ext.rl.rollouts import Batch, Rollout
from megatron_ext.rl.trainer import rate, update_record, updates_of
from megatron_ext.runs import Run, open_run
from megatron_ext.tasks.problems import Problem, stage_problems
from megatron_ext.tracker import iteration_path, published
from megatron_ext.training.fallback import check_whole
from megatron_ext.training.start import Began, first_weights, resume

MEASURED = ("loss", "grad_norm", "clip_fraction", "approx_kl", "approx_entropy")  # of a step's updates
REWARDED = ("reward_mean", "accuracy", "informative_share", "truncated_share", "response_tokens_mean")
SAME = (*MEASURED, *REWARDED, "rollouts_sha256")  # what a record and its replay must agree in


@dataclass(frozen=True)
class Found:
    """A recorded step, and the way to it."""

    batch: Batch
    checkpoint: Path | None  # the nearest own one before the step; None: the stage's start
    after: Path | None  # the run's checkpoint of the step itself
    record: Json | None  # of metrics.jsonl


def run_replay(run: Run, step: int, changes: Sequence[str], as_json: bool) -> None:
    """Compute a step again on the ranks of this environment; rank 0 prints what came out."""
    changed = changed_stage(run.stage, changes)
    device.activate(run.stage.plan.device, run.stage.plan.threads_per_rank)
    with process_groups(run.stage.plan) as groups:
        found = replay(groups, run.path, step, changes, changed)
        if groups.rank == 0:
            print(json.dumps(found, indent=2) if as_json else replay_text(found))


def find_recorded(folder: Path, step: int) -> Found:
    """The record of a step and where its weights can be had; `DataError` or `CheckpointError` where they are not kept."""
    run = open_run(folder)
    batch = read_record(run.path, step)
    saved = published(run.checkpoints_path)
    usable = [one for one in saved if one < step and _has_optimizer(run, one)]
    first = usable[-1] if usable else 0
    kept = set(recorded_steps(run.path))
    if lost := [one for one in range(first + 1, step) if one not in kept]:
        raise DataError(
            f"{run.path}: step {step} starts from the checkpoint of step {first}, but the rollouts of step {lost[0]} between them are no "
            f"longer kept (plan.keep_rollouts_bytes); choose a step right behind a checkpoint"
        )
    records = [one for one in read_metrics(run.metrics_path, "rl") if one["step"] == step]
    return Found(
        batch,
        checkpoint=iteration_path(run.checkpoints_path, first) if usable else None,
        after=iteration_path(run.checkpoints_path, step) if step in saved else None,
        record=records[-1] if records else None,
    )


def replay(groups: Groups, folder: Path, step: int, changes: Sequence[str], changed: tuple[RLStage, int | None]) -> Json:
    """All that came out, as JSON values; every rank calls it."""
    found = from_rank_0(groups, "finding the step", lambda: find_recorded(folder, step))
    check_cap(changed[1], step, found.batch.cap_tokens)
    run = open_run(folder)
    actor, began = _came_to(run, groups, found, step)
    as_was = _computed(actor, found.batch.rollouts, step, began.updates)
    answer: Json = {
        "stage": run.name,
        "step": step,
        "replayed_from": {"start": began.how, "step": began.step},
        "rollouts": len(found.batch.rollouts),
        "as_it_was": {**as_was, "rollouts_sha256": found.batch.sha256},
        **_compared(found.record, {**as_was, "rollouts_sha256": found.batch.sha256}, _weights_compared(run, groups, actor, found.after)),
    }
    if changes:
        del actor  # its weights have moved: the step begins again from where it began
        answer["changes"] = list(changes)
        answer["as_it_would_be"] = _what_if(run, groups, found, step, changed)
    return answer


@dataclass(frozen=True)
class _Began:
    how: str
    step: int
    updates: int  # before the step that is replayed


def _came_to(run: Run, groups: Groups, found: Found, step: int) -> tuple[Actor, _Began]:
    """The actor as it was before the step."""
    began: Began
    if found.checkpoint is None:
        began = first_weights(run, groups, None)
    else:
        check_whole(found.checkpoint, groups)
        began = resume(run, groups, found.checkpoint)
    stage: RLStage = run.stage
    actor = Actor(stage, groups, began.state, None, frozen_reference(run, groups))
    first, size = began.progress.step, stage.rollouts.updates_per_step
    for between in _counted(groups, run, first, step):
        batch = handed_out_batch(groups, "reading rollouts", partial(read_record, run.path, between))
        _updated(actor, batch.rollouts, between, (between - 1) * size)
    return actor, _Began(began.how, first, (step - 1) * size)


def _counted(groups: Groups, run: Run, first: int, step: int) -> Iterator[int]:
    """The steps to be done again before `step`; rank 0 shows how far it is."""
    steps = range(first + 1, step)
    if groups.rank != 0 or not steps:
        yield from steps
        return
    with showing(f"Replay {run.name} from step {first}", total=len(steps), unit="rollout steps", stream=sys.stderr) as bar:
        for number in steps:
            yield number
            bar.update(1)


def _updated(actor: Actor, rollouts: Sequence[Rollout], step: int, updates_before: int) -> Json:
    """Do a step's updates."""
    parts, judged = updates_of(actor, rollouts)
    learning_rate = rate(actor.stage, step - 1)
    results = [actor.update(part, learning_rate, updates_before + number) for number, part in enumerate(parts)]
    return {**update_record(results), "informative_share": judged.informative_share}


def _computed(actor: Actor, rollouts: Sequence[Rollout], step: int, updates_before: int) -> Json:
    values = {**_updated(actor, rollouts, step, updates_before), **responses_record(rollouts)}
    values["reward_mean"] = sum(one.reward for one in rollouts) / len(rollouts)
    return {name: values[name] for name in (*MEASURED, *REWARDED)}


def _what_if(run: Run, groups: Groups, found: Found, step: int, changed: tuple[RLStage, int | None]) -> Json:
    """The step with other values, from the same weights: these are brought back first."""
    stage, cap = changed
    actor, began = _came_to(run, groups, found, step)
    actor = replace(actor, stage=stage)
    rollouts = from_rank_0(groups, "grading", lambda: _graded_anew(run, stage, cap, found))
    return _computed(actor, rollouts, step, began.updates)


def _graded_anew(run: Run, stage: RLStage, cap: int | None, found: Found) -> list[Rollout]:
    """The rollouts under another cap or reward: cut where the cap would have cut them, graded with the grader as it is now."""
    path = found.checkpoint or named_checkpoint(run.inputs["start"])
    _, tokenizer = carried_tokenizer(path, read_manifest(path))
    by_id: dict[str, Problem] = {one.id: one for one in stage_problems(stage.problems, run.inputs.get("text"))}
    with grading_pool(stage.plan) as pool:
        return regraded(pool, by_id, found.batch.rollouts, cap, tokenizer, stage.reward)


def _weights_compared(run: Run, groups: Groups, actor: Actor, path: Path | None) -> Json | None:
    """The actor's weights against a checkpoint's: how many parameters, and which of them differ in a bit; None without a checkpoint."""
    if path is None:
        return None
    check_whole(path, groups)
    saved = load_chunks(path, run.stage.model, run.stage.precision, groups)
    own: list[tuple[str, bool]] = []
    for chunk, other in zip(actor.state.chunks, saved, strict=True):
        pairs = zip(chunk.named_parameters(), other.parameters(), strict=True)
        own += [(f"{name} (rank {groups.rank})", _same_bits(one, two)) for (name, one), two in pairs]
    ranks: list[list[tuple[str, bool]]] = [[]] * groups.plan.num_ranks
    dist.all_gather_object(ranks, own)
    everywhere = [found for rank in ranks for found in rank]
    return {"checkpoint": path.name, "compared": len(everywhere), "unequal": [name for name, same in everywhere if not same]}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8))


def _compared(record: Json | None, measured: Json, weights: Json | None) -> Json:
    unequal = [name for name in SAME if record[name] != measured[name]] if record else []
    differences = [f"{name}: {record[name]} recorded, {measured[name]} replayed" for name in unequal] if record else []
    if weights and weights["unequal"]:
        differences.append(f"weights: {len(weights['unequal'])} of {weights['compared']} differ from {weights['checkpoint']}")
    return {
        "recorded": {name: record[name] for name in SAME} if record else None,
        "weights": weights,
        "equal": not differences if record or weights else None,
        "differences": differences,
    }


def replay_text(found: Json) -> str:
    """For a terminal."""
    start = found["replayed_from"]
    origin = f"its checkpoint of step {start['step']}" if start["start"] == "resume" else "the weights that the stage starts with"
    lines = [f"stage '{found['stage']}', rollout step {found['step']}, {found['rollouts']:,} rollouts, from {origin}"]
    columns = ["as_it_was", *(["as_it_would_be"] if "changes" in found else [])]
    heading = ["", "as it was", *([", ".join(found["changes"])] if "changes" in found else [])]
    rows = [heading, *([name, *(_shown(found[column][name]) for column in columns)] for name in (*MEASURED, *REWARDED))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not any(found[column]["informative_share"] or found[column]["grad_norm"] for column in columns):
        so = "; a change can show in rewards and lengths alone" if len(columns) > 1 else ""
        lines.append(f"no group's responses earned different rewards, so this step has no gradient{so}")
    if found["equal"] is None:
        lines.append("metrics.jsonl has no record of this step to compare with")
    elif found["equal"]:
        with_weights = f", and {found['weights']['compared']} weights to {found['weights']['checkpoint']}" if found["weights"] else ""
        lines.append(f"equal to the record, bit for bit{with_weights}")
    else:
        lines += ["differs from the record (other code, threads or plan?):", *(f"  {line}" for line in found["differences"])]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _has_optimizer(run: Run, iteration: int) -> bool:
    try:
        return read_manifest(iteration_path(run.checkpoints_path, iteration)).optimizer_layout != "none"
    except CheckpointError:
        return False
