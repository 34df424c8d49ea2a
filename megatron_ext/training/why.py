"""Why a step came out as it did: the step computed again, with its documents, the loss of each sequence, the gradient of each layer.

The run's own code path from the nearest checkpoint before the step, on the ranks of its plan; without an
attempt, and without writing anything. Under the plan and code of the record, loss and gradient norm must
come out equal to the bit; where they do not, what differs is said.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext import device
from megatron_ext.config.base import Json
from megatron_ext.config.faults import Faults
from megatron_ext.config.schedule import learning_rate
from megatron_ext.data.ledger import documents
from megatron_ext.data.loader import Loader
from megatron_ext.data.prepare import Prepared, open_prepared
from megatron_ext.distributed import Groups, from_rank_0, process_groups, seed_step
from megatron_ext.progress import progress as showing
from megatron_ext.runs import Run
from megatron_ext.training.fallback import check_whole
from megatron_ext.training.gradients import layer_norms
from megatron_ext.training.guard import Finding, GuardState, judge, known
from megatron_ext.training.recorded import Recorded, find_step
from megatron_ext.training.start import Began, first_weights, resume
from megatron_ext.training.state import Progress
from megatron_ext.training.step import StepResult, forward_reports, train_step
from megatron_ext.training.trainer import place
from megatron_ext.training.why_text import causes, why_text

SAME = ("loss", "grad_norm", "samples_sha256")  # what a record and its replay must agree in


def run_why(run: Run, step: int, as_json: bool) -> None:
    """Compute a step again on the ranks of this environment; rank 0 prints what was in it."""
    plan = run.stage.plan
    device.activate(plan.device, plan.threads_per_rank)
    with process_groups(plan) as groups:
        found = replay(groups, run.path, step)
        if groups.rank == 0:
            print(json.dumps(found, indent=2) if as_json else why_text(found))


def replay(groups: Groups, folder: Path, step: int) -> Json:
    """All that is known of a step of the run in `folder`, as JSON values; every rank calls this, and writes nothing.

    Raises, on every rank, what `find_step` does, and `DamagedCheckpointError`.
    """
    recorded = from_rank_0(groups, "finding the step", lambda: find_step(folder, step))
    run = recorded.run
    prepared = open_prepared(run)
    if recorded.checkpoint is None:
        began = first_weights(run, groups, prepared)
    else:
        check_whole(recorded.checkpoint, groups)
        began = resume(run, groups, recorded.checkpoint)
    again = _Replay(run, groups, prepared, began)
    batches, progress = again.come_to(recorded)
    sequences = again.sequences(batches, progress)
    result, layers = again.compute(batches, progress)
    samples = again.loader.samples_sha256(progress.step)
    measured = {"loss": known(result.loss), "grad_norm": known(result.grad_norm), "samples_sha256": samples}
    return {
        "stage": run.name,
        "step": recorded.step,
        "replayed_from": {"start": began.how, "step": began.progress.step},
        "learning_rate": again.rate(progress),
        "tokens": run.stage.budget.tokens_per_batch,
        "valid_tokens": result.valid_tokens,
        **measured,
        **_compared(recorded, began.progress.step, measured),
        "log_every_steps": run.stage.plan.log_every_steps,
        "sources": _sources(sequences),
        "layers": {name: known(norm) for name, norm in layers.items()},
        "sequences": sequences,
    }


@dataclass
class _Replay:
    """A run's training from a start on, without its hooks, saves and marks."""

    run: Run
    groups: Groups
    prepared: Prepared
    began: Began

    def __post_init__(self) -> None:
        plan = self.run.stage.plan
        self.loader = Loader(
            self.prepared, micro_batch=plan.micro_batch, data_parallel=plan.data_parallel, data_rank=self.groups.data_rank,
            start_step=self.began.progress.step, workers=plan.loader_workers,
        )  # fmt: skip

    def rate(self, progress: Progress) -> float:
        """The learning rate of the step after `progress`."""
        return learning_rate(self.run.stage.schedule, progress.tokens, self.run.stage.budget.tokens)

    def come_to(self, recorded: Recorded) -> tuple[list[Any], Progress]:
        """Train up to the step; its batches on this rank, and how far the stage is before it."""
        progress, batches = self.began.progress, iter(self.loader)
        for _ in self._counted(recorded.step - 1 - progress.step):
            placed = self._next(batches)
            if progress.step + 1 not in recorded.left_out:
                train_step(self.began.state, placed, self.rate(progress), self.run.stage.seed, progress.lineage_tokens)
            progress = progress.advanced(self.run.stage.budget.tokens_per_batch)
        return self._next(batches), progress

    def compute(self, batches: list[Any], progress: Progress) -> tuple[StepResult, dict[str, float]]:
        """The step itself; what it computed, and the gradient norm of each layer."""
        norms: dict[str, float] = {}

        def only_finite(loss: float, grad_norm: float) -> Finding | None:
            return judge(Faults(non_finite="skip"), GuardState(), loss, grad_norm)

        def take_norms() -> None:
            norms.update(layer_norms(self.began.state))

        rate, seed = self.rate(progress), self.run.stage.seed
        result = train_step(self.began.state, batches, rate, seed, progress.lineage_tokens, tamper=take_norms, judge=only_finite)
        return result, norms

    def sequences(self, batches: list[Any], progress: Progress) -> list[Json]:
        """Each sequence of the step in its order: source, position, documents, valid tokens, mean loss; before the weights move."""
        seed_step(self.groups, self.run.stage.seed, progress.lineage_tokens)  # dropout as in the step
        for chunk in self.began.state.wrapped:
            chunk.train()
        reports = forward_reports(self.began.state, batches, backward=False, loss=_by_sequence)
        size, share = self.run.stage.budget.sequences_per_batch, self.loader.micro_batches * self.loader.micro_batch
        sums = torch.zeros(2, size, dtype=torch.float64, device=self.groups.device)
        if reports:
            sums[:, self.groups.data_rank * share : (self.groups.data_rank + 1) * share] = torch.cat(reports, dim=1)
        losses, counts = self.groups.sum_over_data(sums).tolist()
        streams = {stream.source: stream for stream in self.prepared.blend.streams}
        found = []
        for number, one in enumerate(self.loader.sequence_ids(progress.step)):
            spans = documents(streams[one.source], one.position, one.position + 1)
            named = [{"id": s.document_id, "first_token": s.first_token, "end_token": s.end_token} for s in spans]
            mean = known(losses[number] / counts[number]) if counts[number] else None
            place_of = {"source": one.source, "position": one.position, "epoch": one.epoch}
            found.append({**place_of, "valid_tokens": int(counts[number]), "loss": mean, "documents": named})
        return found

    def _next(self, batches: Iterator[list[Any]]) -> list[Any]:
        return [place(batch, self.groups) for batch in next(batches)]

    def _counted(self, steps: int) -> Iterator[int]:
        """Count the steps that are done again; rank 0 shows how far it is."""
        if self.groups.rank != 0 or not steps:
            yield from range(steps)
            return
        title = f"Replay {self.run.name} from step {self.began.progress.step}"
        with showing(title, total=steps, unit="steps", stream=sys.stderr) as bar:
            for number in range(steps):
                yield number
                bar.update(1)


def _by_sequence(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the step's own loss, but reports the sum and the count of each sequence."""
    report = torch.stack([(losses_BS.double() * mask_BS).sum(dim=1), mask_BS.sum(dim=1).double()])
    return (losses_BS.float() * mask_BS).sum(), mask_BS.sum().to(torch.int), report.detach()


def _sources(sequences: list[Json]) -> list[Json]:
    """Mean loss over the valid tokens of each source of the step."""
    rows = []
    for source in sorted({one["source"] for one in sequences}):
        own = [one for one in sequences if one["source"] == source]
        count = sum(one["valid_tokens"] for one in own)
        total = sum((math.nan if one["loss"] is None else one["loss"]) * one["valid_tokens"] for one in own if one["valid_tokens"])
        loss = known(total / count) if count else None
        rows.append({"source": source, "sequences": len(own), "valid_tokens": count, "loss": loss})
    return rows


def _compared(recorded: Recorded, start_step: int, measured: Json) -> Json:
    """Whether the replay is what was recorded; if not, what differs, and which steps since the start were computed under what else."""
    record = recorded.record
    if record is None:
        return {"recorded": None, "equal": None, "differences": [], "causes": []}
    unequal = [name for name in SAME if record[name] != measured[name]]
    lines = [f"{name}: {_shown(record[name])} recorded, {_shown(measured[name])} replayed" for name in unequal]
    why = causes(recorded.run, record, start_step, recorded.step) if unequal else []
    return {"recorded": record, "equal": not unequal, "differences": lines, "causes": why}


def _shown(value: Any) -> str:
    return "not finite" if value is None else str(value)
