"""The training stage: prepare, begin, loop, publish. The loop reads as the algorithm."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_ext import device
from megatron_ext.attempts import Attempt, pulse
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.swap import show_hidden
from megatron_ext.config.memory import pinned_steps
from megatron_ext.config.schedule import learning_rate
from megatron_ext.data.loader import HeldOut, Loader, heldouts
from megatron_ext.data.prepare import Prepared, open_prepared, prepare
from megatron_ext.distributed import Groups
from megatron_ext.errors import MegatronExtError, TrainingError
from megatron_ext.runs import Run
from megatron_ext.training.hooks import Context, Hook, Hooks, say
from megatron_ext.training.recovery import Recovery, guard_of
from megatron_ext.training.saving import Saver, training_manifest, travelling_files
from megatron_ext.training.start import Began, begin, layout_of
from megatron_ext.training.state import Progress
from megatron_ext.training.step import StepResult, forward, train_step
from megatron_ext.training.stopping import asked_to_stop, begin_loop, stop


def train(run: Run, groups: Groups, attempt: Attempt, hooks: Iterable[Hook]) -> Progress:
    """Train a stage from where it stands to its end; every rank calls this.

    Raises `TrainingError` at a step that cannot be trained on and that the recipe's faults do not leave out, before the weights move.
    """
    prepared = _prepare_once(run, groups, attempt)
    began = begin(run, groups, attempt, prepared)
    loop = _Loop(run, groups, attempt, prepared, began, Hooks(hooks))
    try:
        return _train(loop)
    finally:
        loop.close()


def _train(loop: _Loop) -> Progress:
    stage, progress = loop.run.stage, loop.began.progress
    loop.event("start", progress)
    if progress.step == 0:
        loop.validate(progress)
    begin_loop(loop.groups)
    batches = iter(loop.loader(progress.step))
    while progress.step < stage.budget.steps:
        started = time.perf_counter()
        rate = learning_rate(stage.schedule, progress.tokens, stage.budget.tokens)
        result = loop.step(next(batches), rate, progress)
        if result.finding is not None and result.finding.action == "roll_back":
            progress = loop.roll_back(result, progress)
            batches = iter(loop.loader(progress.step))
            continue
        progress = progress.advanced(stage.budget.tokens_per_batch)
        if result.finding is None:
            loop.event("step", progress, loop.metrics(result, rate, progress, time.perf_counter() - started))
        else:
            loop.event("skip", progress, loop.found(result, progress))
        if progress.step % stage.plan.validate_every_steps == 0 or progress.step == stage.budget.steps:
            loop.validate(progress)
        stops = progress.step < stage.budget.steps and asked_to_stop(loop.groups)
        if stops or progress.step % stage.plan.save_every_steps == 0 or progress.step in loop.pinned:
            loop.save(progress, rate)
        loop.settle(progress, wait=stops or not stage.plan.asynchronous_saves)
        if stops:
            stop(progress.step)
    loop.settle(progress, wait=True)
    dist.barrier()  # rank 0 keeps the store from which the others hear that the last save was published
    loop.event("end", progress)
    return progress


@dataclass
class _Loop:
    """What the loop's verbs need and do not change."""

    run: Run
    groups: Groups
    attempt: Attempt
    prepared: Prepared
    began: Began
    hooks: Hooks

    def __post_init__(self) -> None:
        plan = self.run.stage.plan
        self.peak = device.peak(plan.device, self.run.stage.precision)
        self.heldouts: list[HeldOut] = heldouts(self.prepared)
        self.flops_per_token = self.run.stage.model.flops_per_token(self.run.stage.budget.sequence_length)
        self.pinned = set(pinned_steps(self.run.stage.budget, plan))
        self._loader = self.loader(0)
        files = travelling_files(self.run, self.prepared, self.began) if self.groups.rank == 0 else {}
        self.saver = Saver(self.run, self.groups, self.attempt, self.began.state, files)
        self.recovery = Recovery(self.run, self.groups, self.attempt, self.prepared, guard_of(self.began))

    def event(self, name: str, progress: Progress, *arguments: Any) -> None:
        pulse()
        context = Context(self.run, self.attempt, self.groups, self.began.state, progress, self.began.how)
        self.hooks.call(name, context, *arguments)

    def loader(self, start_step: int) -> Loader:
        plan = self.run.stage.plan
        return Loader(
            self.prepared,
            micro_batch=plan.micro_batch,
            data_parallel=plan.data_parallel,
            data_rank=self.groups.data_rank,
            start_step=start_step,
            workers=plan.loader_workers,
        )

    def step(self, batches: list[Any], rate: float, progress: Progress) -> StepResult:
        """Train on a step, or leave its batch out; `TrainingError` where it stops the stage."""
        number = progress.step + 1
        result = self.recovery.known(number)
        if result is None:
            placed = [place(batch, self.groups) for batch in batches]
            seed = self.run.stage.seed
            result = train_step(self.began.state, placed, rate, seed, progress.lineage_tokens, judge=self.recovery.judge)
        with self._stopping(result, progress):
            self.recovery.take(result, number)
        return result

    def roll_back(self, result: StepResult, progress: Progress) -> Progress:
        """Go back to the newest checkpoint; how far the stage is then."""
        self.settle(progress, wait=True)
        number, samples = progress.step + 1, self._loader.samples_sha256(progress.step)
        with self._stopping(result, progress):
            back = self.recovery.roll_back(result, number, self.began)
        self.event("roll_back", back, {"at_step": number, **self.recovery.record(result), "samples_sha256": samples})
        return back

    def found(self, result: StepResult, progress: Progress) -> dict[str, Any]:
        """What is recorded of a step that was not trained on; `progress` counts its batch."""
        return {
            **self.recovery.record(result),
            "tokens": progress.tokens,
            "lineage_tokens": progress.lineage_tokens,
            "skipped_tokens": self.recovery.skipped_tokens(),
            "samples_sha256": self._loader.samples_sha256(progress.step - 1),
        }

    @contextlib.contextmanager
    def _stopping(self, result: StepResult, progress: Progress) -> Iterator[None]:
        """Record the step that stops the stage, and name it, and where to look behind it."""
        try:
            yield
        except TrainingError as cause:
            step = progress.step + 1
            self.event("stop", progress, self.found(result, progress.advanced(self.run.stage.budget.tokens_per_batch)))
            look = f"megatron-ext why {self.run.path} --step {step}"
            raise TrainingError(f"stage '{self.run.name}', step {step}: {cause} ({look})") from None

    def metrics(self, result: StepResult, rate: float, progress: Progress, seconds: float) -> dict[str, Any]:
        tokens = self.run.stage.budget.tokens_per_batch
        flops = tokens * self.flops_per_token / seconds
        all_ranks = None if self.peak.flops_per_second is None else self.peak.flops_per_second * self.run.stage.plan.num_ranks
        return {
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": progress.tokens,
            "lineage_tokens": progress.lineage_tokens,
            "valid_tokens": result.valid_tokens,
            "skipped_tokens": self.recovery.skipped_tokens(),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": None if all_ranks is None else flops / all_ranks,
            "samples_sha256": self._loader.samples_sha256(progress.step - 1),
        }

    def validate(self, progress: Progress) -> None:
        state, plan = self.began.state, self.run.stage.plan
        for chunk in state.wrapped:
            chunk.eval()
        records = []
        for heldout in self.heldouts:
            pulse()
            batches = [place(b, self.groups) for b in heldout.batches(plan.micro_batch, plan.data_parallel, self.groups.data_rank)]
            loss, count = forward(state, batches, backward=False)
            seen = {"tokens": progress.tokens, "lineage_tokens": progress.lineage_tokens}
            records.append({"source": heldout.source, "loss": loss, "valid_tokens": count, **seen})
        self.event("validation", progress, records)

    def save(self, progress: Progress, rate: float) -> None:
        self.settle(progress, wait=True)
        pinned = progress.step in self.pinned
        of_step = (progress, rate, pinned, self.recovery.state)
        manifest = partial(training_manifest, self.run, self.attempt, self.prepared, self.began, *of_step)
        self.saver.begin(progress, layout_of(self.run, pinned), manifest)

    def settle(self, progress: Progress, wait: bool) -> None:
        saved = self.saver.settle(wait)
        if saved is not None:
            self.event("checkpoint", progress, saved)

    def close(self) -> None:
        """Let a save end that is under way, and say how; no failure of it hides what stopped the training."""
        saved = self.saver.close()
        try:
            if saved is not None:
                self.event("checkpoint", saved.progress, saved)
        except MegatronExtError as error:
            say(f"step {saved.progress.step}: {error}" if saved else str(error))


def _prepare_once(run: Run, groups: Groups, attempt: Attempt) -> Prepared:
    """Rank 0 builds what is missing, then every rank opens it."""
    if groups.rank == 0:
        attempt.check_owner()
        folders.revoke(run.checkpoints_path, attempt.number)
        show_hidden(run.checkpoints_path)
        prepare(run)
        pulse()
    dist.barrier()
    return open_prepared(run)


def place(batch: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A batch on this rank's device: its part under context parallelism, with the mask that the model expects (None: causal)."""
    placed = {name: value.to(groups.device, non_blocking=True) for name, value in batch.items()}
    placed.setdefault("attention_mask", None)
    if groups.plan.context > 1:
        placed = get_batch_on_this_cp_rank(placed, groups.collection.cp)
    return placed
