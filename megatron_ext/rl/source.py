"""Where the loop gets its rollouts from: sampled with the weights as they are, or ahead, before the last update changed them.

With `max_staleness` 0 a step's rollouts are sampled when they are asked for. With 1 they are asked for before the updates of the step
before: an engine with weights of its own samples while the trainer updates, and is waited for after it; the one that samples with the
trainer's tensors is waited for at once. Their record, written before the next checkpoint, is what a resume goes on from.

Rank 0 grades and records. Others have of a response what an update needs (`handout`); the record is written while they update
(`recording`), and waited for before anything names it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_ext.config.stages import RLStage
from megatron_ext.distributed import agreed, from_rank_0
from megatron_ext.errors import DataError
from megatron_ext.generation.engine import Request
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.grading import graded
from megatron_ext.rl.handout import handed_out, handed_out_batch
from megatron_ext.rl.lengths import Seen, after_rollout_step, cap_tokens
from megatron_ext.rl.order import OrderState, draw, draw_more
from megatron_ext.rl.order import graded as order_graded
from megatron_ext.rl.progress import RLProgress
from megatron_ext.rl.record import clear_unfinished, prune_records, read_record, write_record
from megatron_ext.rl.recording import Recorder
from megatron_ext.rl.rollouts import Batch, Rollout, judged
from megatron_ext.runs import Run
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.prompts import Prompts
from megatron_ext.tasks.workers import GradingPool
from megatron_ext.tracker import published


@dataclass(frozen=True)
class _Asked:
    """Prompts that the engine has."""

    drawn: list[int]  # positions among the prompts
    requests: list[Request]
    order: OrderState  # with them drawn
    cap_tokens: int
    seconds: float  # that asking took


@dataclass
class RolloutSource:
    """Samples, grades and records rollout steps; every rank calls it, and gets the same batch, which on rank 0 has its texts, too.

    `pool` is rank 0's. A batch has no digest before it is `recorded`.

    `may_write` is asked before a record is written or removed, and raises where another attempt owns the run folder.
    """

    run: Run
    actor: Actor
    prompts: Prompts
    stop_strings: tuple[str, ...]
    pool: GradingPool[Verdict] | None
    may_write: Callable[[], None] = lambda: None
    _ahead: Batch | None = None
    _under_way: tuple[RLProgress, _Asked] | None = None  # asked ahead, and not waited for yet; as of which progress
    _ids: list[str] = field(default_factory=list)
    _recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self._recorder = Recorder(self._written)
        if self.actor.groups.rank == 0:
            clear_unfinished(self.run.path)
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
        return self._batch(progress, self._ask(progress))

    def look_ahead(self, progress: RLProgress) -> None:
        """Where staleness allows, ask for the rollouts of the step after the one under way.

        `progress` is as of the batch of the step under way, before its updates.
        """
        if not self.stage.rollouts.max_staleness or progress.step + 1 >= self.stage.steps:
            return
        coming = replace(progress, step=progress.step + 1)
        asked = self._ask(coming)
        if self.actor.samples_in_place:
            self._ahead = self._batch(coming, asked)
        else:
            self._under_way = coming, asked

    def take_ahead(self) -> None:
        """Wait for what was asked ahead, before the engine gets other weights."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._ahead = self._batch(*under_way)

    def recorded(self, batch: Batch) -> Batch:
        """The batch with its record's digest, once the record is on the disk.

        Every rank calls it, and raises what the writing failed with: `RunError` where the disk refuses, or another owns the folder.
        """
        if batch.sha256:
            return batch
        return replace(batch, sha256=from_rank_0(self.actor.groups, "recording rollouts", lambda: self._recorder.digest(batch.step)))

    def ahead_sha256(self) -> str:
        """The digest of the record of what was sampled ahead, once it is on the disk; '' where nothing was. As `recorded`."""
        if self._ahead is None:
            return ""
        self._ahead = self.recorded(self._ahead)
        return self._ahead.sha256

    def close(self) -> None:
        """Let a record end that is being written."""
        self._recorder.close()

    def _recorded(self, progress: RLProgress) -> Batch:
        step = progress.step + 1
        batch = handed_out_batch(self.actor.groups, "reading rollouts", lambda: read_record(self.run.path, step))
        if batch.sha256 != progress.ahead_sha256:
            raise DataError(
                f"{self.run.path}: the recorded rollouts of step {step} are not those that were sampled ahead for it: "
                f"the file was changed; go back to an older checkpoint"
            )
        return replace(batch, seconds={"rollout": 0.0, "grading": 0.0})  # an attempt before this one spent them

    def _ask(self, progress: RLProgress) -> _Asked:
        """Begin a step: draw its prompts, and put them to the engine."""
        began, rollouts = time.perf_counter(), self.stage.rollouts
        drawn, order = draw(self._ids, progress.order, self.stage.seed, rollouts.prompts_per_step, rollouts.drop_easy_share)
        return self._asked(drawn, order, cap_tokens(self.stage.lengths, progress.lengths), began)

    def _asked(self, drawn: list[int], order: OrderState, cap: int, began: float) -> _Asked:
        requests = self._requests(drawn, order.draws - len(drawn), cap)
        self.actor.ask(requests)
        return _Asked(drawn, requests, order, cap, time.perf_counter() - began)

    def _batch(self, progress: RLProgress, asked: _Asked) -> Batch:
        """Wait for the answers and grade them; where wanted, draw again in place of groups without a difference; begin the record."""
        rollouts, group, cap = self.stage.rollouts, self.stage.rollouts.responses_per_prompt, asked.cap_tokens
        seconds = {"rollout": 0.0, "grading": 0.0}
        used: list[Rollout] = []
        unused: list[Rollout] = []
        for draws_left in range(rollouts.resample_uninformative, -1, -1):
            found, order = self._answered(asked, seconds)
            telling, silent = self._parted(found)
            used, unused = used + telling, unused + silent
            missing = rollouts.prompts_per_step - len(used) // group
            drawn, order = draw_more(self._ids, order, self.stage.seed, missing if draws_left else 0)
            if not drawn:
                break
            asked = self._asked(drawn, order, cap, time.perf_counter())
        split = len(unused) - missing * group  # what no draw has replaced is used as it is
        used, unused = sorted([*used, *unused[split:]], key=_number), unused[:split]
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
        agreed(self.actor.groups, "recording rollouts", lambda: self._recorder.begin(batch) if self.actor.groups.rank == 0 else None)
        return batch

    def _answered(self, asked: _Asked, seconds: dict[str, float]) -> tuple[list[Rollout], OrderState]:
        """The graded responses to what was asked, on every rank, and the order's state with them; adds to `seconds`."""
        began = time.perf_counter()
        answers = self.actor.answers(asked.requests)
        sampled = time.perf_counter()
        problems = [self.prompts.rows[number].problem for number in asked.drawn for _ in range(self.stage.rollouts.responses_per_prompt)]

        def grade() -> list[Rollout]:
            assert self.pool is not None, "rank 0 grades"
            return graded(self.pool, problems, asked.requests, answers, self.stage.reward)

        found = handed_out(self.actor.groups, "grading", grade)
        seconds["rollout"] += asked.seconds + sampled - began
        seconds["grading"] += time.perf_counter() - sampled
        easy_leave = self.stage.rollouts.drop_easy_share is not None
        return found, order_graded(asked.order, _right(found)) if easy_leave else asked.order

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
        informs = judged(self.stage.objective, self.stage.reward, found, group).informative_P.tolist()
        for number, tells in enumerate(informs):
            (telling if tells else silent).extend(found[number * group : (number + 1) * group])
        return telling, silent

    def _written(self, batch: Batch) -> str:
        """Record a batch, and remove records that are not needed; its digest."""
        digest = write_record(self.run.path, batch, self.may_write)
        every = self.stage.plan.save_every_steps
        due = {(batch.step - behind) // every * every for behind in (1, 2)}  # saves that may be under way
        checkpoints = due | set(published(self.run.checkpoints_path))
        prune_records(self.run.path, self.stage.plan.keep_rollouts_bytes, checkpoints, self.may_write)
        return digest


def _number(rollout: Rollout) -> int:
    return rollout.generation.id


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
