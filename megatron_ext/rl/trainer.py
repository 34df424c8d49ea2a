"""The loop of reinforcement learning reads as the algorithm: rollouts with their grades, advantages, updates, hand over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_ext.attempts import Attempt, pulse
from megatron_ext.checkpoint.hashing import Digests
from megatron_ext.config.base import content_hash, to_json
from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import Groups, from_rank_0
from megatron_ext.errors import MegatronExtError
from megatron_ext.provenance import Manifest
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.batch import Sample
from megatron_ext.rl.begin import Begun
from megatron_ext.rl.lengths import cap_tokens
from megatron_ext.rl.measures import Record, rollout_record
from megatron_ext.rl.progress import RLProgress, progress_to_json
from megatron_ext.rl.rollouts import Batch, Judged, Rollout, samples
from megatron_ext.rl.update import UpdateResult
from megatron_ext.rl.validation import Asked, ask, scores
from megatron_ext.runs import Run
from megatron_ext.training.hooks import Context, Hook, Hooks, say
from megatron_ext.training.saving import Saver, lineage
from megatron_ext.training.start import layout_of
from megatron_ext.training.state import Progress
from megatron_ext.training.stopping import asked_to_stop, begin_loop, stop


def learn(run: Run, groups: Groups, attempt: Attempt, begun: Begun, hooks: Iterable[Hook]) -> RLProgress:
    """Reinforcement learning of a stage from where it stands to its end; every rank calls this."""
    loop = _Loop(run, groups, attempt, begun, Hooks(hooks))
    try:
        return _learn(loop)
    finally:
        loop.close()


def _learn(loop: _Loop) -> RLProgress:
    stage, progress = loop.run.stage, loop.begun.progress
    loop.event("start", progress)
    loop.hand_over(progress)
    if progress.step == 0:
        loop.validate(progress)
    begin_loop(loop.groups)
    while progress.step < stage.steps:
        started = time.perf_counter()
        batch = loop.source.next(progress)
        progress = replace(progress.sampled(batch.order, batch.lengths), ahead_sha256="")  # what was ahead is this batch
        loop.source.look_ahead(progress)
        parts, judged = loop.advantages(batch)
        updating = time.perf_counter()
        results = [loop.update(part, progress, number) for number, part in enumerate(parts)]
        progress = progress.finished(len(results), sum(one.num_tokens for one in batch.rollouts))
        updated = time.perf_counter()
        loop.source.take_ahead()
        waited = time.perf_counter() - updated
        loop.hand_over(progress)
        update_seconds = time.perf_counter() - updating - waited
        batch = loop.source.recorded(batch)
        seconds = {"update": update_seconds, "step": time.perf_counter() - started}
        loop.event("step", progress, loop.metrics(batch, judged, results, progress, {**batch.seconds, **seconds}))
        loop.take_scores()
        if progress.step % stage.plan.validate_every_steps == 0 or progress.step == stage.steps:
            loop.validate(progress)
        stops = progress.step < stage.steps and asked_to_stop(loop.groups)
        if stops or progress.step % stage.plan.save_every_steps == 0 or progress.step == stage.steps:
            loop.save(progress)
        loop.settle(progress, wait=stops or not stage.plan.asynchronous_saves)
        if stops:
            stop(progress.step)
    loop.take_scores()
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
    begun: Begun
    hooks: Hooks

    def __post_init__(self) -> None:
        self.source, self.actor = self.begun.source, self.begun.actor
        self.source.may_write = self.attempt.check_owner
        self.canary_gap: float | None = None  # of the last hand-over
        self.asked: tuple[Asked, RLProgress] | None = None  # a validation under way
        self.saver = Saver(self.run, self.groups, self.attempt, self.actor.state, self.begun.files)

    def event(self, name: str, progress: RLProgress, *arguments: Any) -> None:
        pulse()
        self.hooks.call(name, self._context_at(progress.plain), *arguments)

    def advantages(self, batch: Batch) -> tuple[list[list[Sample]], Judged]:
        """The samples of each update of the step. Old log-probabilities are those before its first update, which needs none."""
        return updates_of(self.actor, batch.rollouts)

    def update(self, part: list[Sample], progress: RLProgress, number: int) -> UpdateResult:
        pulse()
        return self.actor.update(part, rate(self.run.stage, progress.step), progress.updates + number)

    def hand_over(self, progress: RLProgress) -> None:
        """From here on the engine samples with the weights as they are."""
        self.canary_gap = self.begun.hand_over(progress.updates)

    def metrics(self, batch: Batch, judged: Judged, results: list[UpdateResult], progress: RLProgress, seconds: dict[str, float]) -> Record:
        """The step's record: worked out by rank 0, the same on every rank."""
        return from_rank_0(self.groups, "measuring", partial(self._metrics, batch, judged, results, progress, seconds))

    def _metrics(
        self, batch: Batch, judged: Judged, results: list[UpdateResult], progress: RLProgress, seconds: dict[str, float]
    ) -> Record:
        stage: RLStage = self.run.stage
        return {
            **update_record(results),
            "learning_rate": rate(stage, progress.step - 1),
            "updates": progress.updates,
            "tokens": progress.tokens,
            "lineage_tokens": progress.lineage_tokens,
            "informative_share": judged.informative_share,
            **rollout_record(batch, stage.rollouts.responses_per_prompt),
            **{f"{name}_seconds": value for name, value in seconds.items()},
            "canary_gap": self.canary_gap,
            "responses_per_second": len(batch.rollouts) / seconds["step"],
        }

    def validate(self, progress: RLProgress) -> None:
        """Begin a validation; with an engine of its own it goes on beside the next step, else it is done when this returns."""
        stage, begun = self.run.stage, self.begun
        cap = stage.validation.cap_tokens or cap_tokens(stage.lengths, progress.lengths)
        self.take_scores()
        if begun.validator is not begun.actor:
            begun.validator_hand_over(progress.updates)
        self.asked = ask(begun.validator, begun.heldout, begun.template, cap), progress
        if begun.validator is begun.actor:
            self.take_scores()

    def take_scores(self) -> None:
        """Wait for the validation under way, if there is one."""
        if self.asked is None:
            return
        (asked, progress), self.asked = self.asked, None
        records = scores(self.begun.validator, asked, self.source.pool)
        seen = {"updates": progress.updates, "tokens": progress.tokens, "lineage_tokens": progress.lineage_tokens}
        self.event("validation", progress, [{**record, **seen} for record in records])

    def save(self, progress: RLProgress) -> None:
        self.take_scores()  # else a run that goes on from here would lack them
        self.settle(progress, wait=True)
        pinned = progress.step == self.run.stage.steps
        progress = replace(progress, ahead_sha256=self.source.ahead_sha256())  # a resume reads these: they are on the disk first
        manifest = partial(rl_manifest, self.run, self.attempt, self.begun, progress, pinned)
        self.saver.begin(progress.plain, layout_of(self.run, pinned), manifest)

    def settle(self, progress: RLProgress, wait: bool) -> None:
        saved = self.saver.settle(wait)
        if saved is not None:
            self.event("checkpoint", progress, saved)

    def close(self) -> None:
        """End engine and workers, and let save and record end that are under way; no failure of them hides what stopped the loop."""
        saved = self.saver.close()
        self.source.close()
        try:
            if saved is not None:
                self.hooks.call("checkpoint", self._context_at(saved.progress), saved)
        except MegatronExtError as error:
            say(f"step {saved.progress.step}: {error}" if saved else str(error))
        self.begun.close()

    def _context_at(self, progress: Progress) -> Context:
        return Context(self.run, self.attempt, self.groups, self.actor.state, progress, self.begun.began.how)


def updates_of(actor: Actor, rollouts: Sequence[Rollout]) -> tuple[list[list[Sample]], Judged]:
    """The samples of each update of a step, with the old and reference log-probabilities that they need; every rank calls it."""
    stage = actor.stage
    found, judged = samples(stage, rollouts)
    size = stage.rollouts.prompts_per_update * stage.rollouts.responses_per_prompt
    if len(found) > size:
        later = [replace(one, old_logprobs=old) for one, old in zip(found[size:], actor.score(found[size:]), strict=True)]
        found = [*found[:size], *later]
    if stage.objective.kl_coefficient:
        fixed = actor.score(found, reference=True)
        found = [replace(one, reference_logprobs=logprobs) for one, logprobs in zip(found, fixed, strict=True)]
    return [found[first : first + size] for first in range(0, len(found), size)], judged


def update_record(results: list[UpdateResult]) -> Record:
    """Means over a step's updates, of statistics over their tokens (None where no token had a gradient); the largest norm, too."""
    tokens = sum(one.statistics["tokens"] for one in results)
    names = [name for name in results[0].statistics if name != "tokens"]
    weighed = [one for one in results if one.statistics["tokens"]]
    means = {name: sum(one.statistics[name] * one.statistics["tokens"] for one in weighed) / tokens if tokens else None for name in names}
    means["approx_entropy"] = means.pop("entropy")
    return {
        "loss": sum(one.loss for one in results) / len(results),
        "grad_norm": sum(one.grad_norm for one in results) / len(results),
        "grad_norm_max": max(one.grad_norm for one in results),
        "trained_tokens": int(tokens),
        **means,
    }


def rate(stage: RLStage, step: int) -> float:
    """The learning rate of the rollout step after `step` finished ones: a linear rise, then constant."""
    warming = min(1.0, (step + 1) / stage.warmup_steps) if stage.warmup_steps else 1.0
    return stage.learning_rate * warming


def rl_manifest(run: Run, attempt: Attempt, begun: Begun, progress: RLProgress, pinned: bool, files: Digests) -> Manifest:
    """What a checkpoint of reinforcement learning says of itself."""
    stage = run.stage
    return Manifest(
        **lineage(run, attempt, begun.began, progress.plain, rate(stage, progress.step - 1), pinned),
        mixture_hash=content_hash(to_json(stage.problems)),
        tokenizer_hash=begun.tokenizer_hash,
        ledger=(),
        files=files,
        reinforcement=progress_to_json(progress),
    )
