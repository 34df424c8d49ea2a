"""Where the loop gets its rollouts from: sampled with the weights as they are, or ahead, before the last update changed them.

With `max_staleness` 0 a step's rollouts are sampled when they are asked for. With 1 they are sampled before the update of the step
before, so that an engine elsewhere may work while the trainer does; their record, written at once, is what a resume goes on from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import agreed_with_rank_0, broadcast_object
from megatron_ext.errors import DataError
from megatron_ext.generation.engine import Request
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.grading import graded
from megatron_ext.rl.lengths import Seen, after_rollout_step, cap_tokens
from megatron_ext.rl.order import OrderState, draw
from megatron_ext.rl.order import graded as order_graded
from megatron_ext.rl.progress import RLProgress
from megatron_ext.rl.record import prune_records, read_record, write_record
from megatron_ext.rl.rollouts import Batch, Rollout, judged
from megatron_ext.runs import Run
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.prompts import Prompts
from megatron_ext.tasks.workers import GradingPool


@dataclass
class RolloutSource:
    """Samples, grades and records rollout steps; every rank calls it, and gets the same batch. `pool` is rank 0's."""

    run: Run
    actor: Actor
    prompts: Prompts
    stop_strings: tuple[str, ...]
    pool: GradingPool[Verdict] | None
    _ahead: Batch | None = None
    _ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ids = [row.problem.id for row in self.prompts.rows]
        wanted = self.stage.rollouts.prompts_per_step
        if len(self._ids) < wanted:
            raise DataError(
                f"{self.stage.problems.path}: {len(self._ids):,} problems with prompts that fit, but a rollout step takes {wanted:,} "
                f"({len(self.prompts.left_out):,} prompts are longer than {self.stage.rollouts.max_prompt_tokens} tokens); "
                f"lower rollouts.prompts_per_step, or name more problems"
            )

    @property
    def stage(self) -> RLStage:
        """The stage's values."""
        stage: RLStage = self.run.stage
        return stage

    def next(self, progress: RLProgress) -> Batch:
        """The rollouts of the step that comes next."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        if progress.ahead_sha256:
            return self._recorded(progress)
        return self._sample(progress)

    def look_ahead(self, progress: RLProgress) -> str:
        """Where staleness allows, sample the step after the one under way; its record's digest, '' where nothing was sampled.

        `progress` is as of the batch of the step under way, before its updates.
        """
        if not self.stage.rollouts.max_staleness or progress.step + 1 >= self.stage.steps:
            return ""
        self._ahead = self._sample(replace(progress, step=progress.step + 1))
        return self._ahead.sha256

    def _recorded(self, progress: RLProgress) -> Batch:
        step = progress.step + 1
        batch = agreed_with_rank_0(self.actor.groups.rank, lambda: read_record(self.run.path, step))
        if batch.sha256 != progress.ahead_sha256:
            raise DataError(
                f"{self.run.path}: the recorded rollouts of step {step} are not those that were sampled ahead for it: "
                f"the file was changed; go back to an older checkpoint"
            )
        return batch

    def _sample(self, progress: RLProgress) -> Batch:
        """Draw prompts, sample, grade; where asked to, again in place of groups without a difference; record."""
        rollouts, group = self.stage.rollouts, self.stage.rollouts.responses_per_prompt
        cap, order = cap_tokens(self.stage.lengths, progress.lengths), progress.order
        seconds = {"rollout": 0.0, "grading": 0.0}
        used: list[Rollout] = []
        unused: list[Rollout] = []
        wanted = rollouts.prompts_per_step
        for last in [*[False] * rollouts.resample_uninformative, True]:
            found, order = self._round(order, wanted - len(used) // group, cap, seconds)
            if last:
                used += found
                break
            telling, silent = self._parted(found)
            used, unused = used + telling, unused + silent
            if len(used) == wanted * group:
                break
        batch = Batch(
            step=progress.step + 1,
            cap_tokens=cap,
            weight_version=progress.updates,
            seed=self.stage.seed,
            rollouts=tuple(used),
            order=order,
            lengths=after_rollout_step(self.stage.lengths, progress.lengths, _seen([*used, *unused])),
            unused=tuple(unused),
            num_left_out=len(self.prompts.left_out),
            seconds=seconds,
        )
        return self._written(batch)

    def _round(self, order: OrderState, count: int, cap: int, seconds: dict[str, float]) -> tuple[list[Rollout], OrderState]:
        """Responses to `count` more prompts, on every rank."""
        rollouts, first = self.stage.rollouts, order.draws
        drawn, order = draw(self._ids, order, self.stage.seed, count, rollouts.drop_easy_share)
        requests = self._requests(drawn, first, cap)
        began = time.perf_counter()
        answers = self.actor.generate(requests)
        sampled = time.perf_counter()
        found: list[Rollout] | None = None
        if self.pool is not None:
            problems = [self.prompts.rows[number].problem for number in drawn for _ in range(rollouts.responses_per_prompt)]
            found = graded(self.pool, problems, requests, answers, self.stage.reward)
        seconds["rollout"] += sampled - began
        seconds["grading"] += time.perf_counter() - sampled
        everywhere: list[Rollout] = broadcast_object(found)
        if rollouts.drop_easy_share is not None:
            order = order_graded(order, _right(everywhere))
        return everywhere, order

    def _requests(self, drawn: Sequence[int], first: int, cap: int) -> list[Request]:
        """One for each response; its id is the prompt's number in the stage times the group's size, plus its place in the group."""
        group = self.stage.rollouts.responses_per_prompt
        return [
            Request(
                id=(first + place) * group + member,
                prompt=self.prompts.rows[number].tokens,
                cap_tokens=cap,
                sampling=self.stage.rollouts.sampling,
                seed=self.stage.seed,
                stop_strings=self.stop_strings,
            )
            for place, number in enumerate(drawn)
            for member in range(group)
        ]

    def _parted(self, found: Sequence[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
        """Those of groups whose responses earned different rewards, and the others."""
        group = self.stage.rollouts.responses_per_prompt
        telling: list[Rollout] = []
        silent: list[Rollout] = []
        for first in range(0, len(found), group):
            responses = found[first : first + group]
            informs = judged(self.stage.objective, self.stage.reward, responses, group).informative_share > 0
            (telling if informs else silent).extend(responses)
        return telling, silent

    def _written(self, batch: Batch) -> Batch:
        digest = ""
        if self.actor.groups.rank == 0:
            digest = write_record(self.run.path, batch)
            prune_records(self.run.path, self.stage.plan.keep_rollouts_bytes)
        return replace(batch, sha256=broadcast_object(digest))


def _seen(rollouts: Sequence[Rollout]) -> Seen:
    return Seen(
        num_responses=len(rollouts),
        num_truncated=sum(one.is_truncated for one in rollouts),
        response_tokens=sum(one.num_tokens for one in rollouts),
    )


def _right(rollouts: Sequence[Rollout]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for one in rollouts:
        right, of = found.get(one.problem, (0, 0))
        found[one.problem] = (right + one.is_correct, of + 1)
    return found
