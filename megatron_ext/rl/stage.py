"""Reinforcement learning as a command: progress bar, provenance and marks around `learn`."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_ext import device
from megatron_ext.distributed import Groups
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import environment
from megatron_ext.rl.begin import Begun, begin_learning
from megatron_ext.rl.measures import UNINFORMATIVE_SHARE, steps_told_little, told_little
from megatron_ext.rl.trainer import learn
from megatron_ext.runs import PROVENANCE, Run, mark_done, write_json
from megatron_ext.tasks.grading import Verdict
from megatron_ext.tasks.workers import GradingPool
from megatron_ext.training.bar import TerminalBar
from megatron_ext.training.exports import ExportHook
from megatron_ext.training.hooks import Context, Hook, LogHook, MetricsHook, Record
from megatron_ext.training.session import attempt_session
from megatron_ext.training.stragglers import StragglerHook

KINDS = ("rl", "rl_validation")  # of the records in metrics.jsonl


def run_rl(run: Run) -> None:
    """Do the reinforcement learning of a run folder on the ranks of this environment, and mark it done."""
    started = time.perf_counter()
    with attempt_session(run) as (groups, attempt, terminal):
        begun = begin_learning(run, groups, attempt)
        if groups.rank == 0:
            _write_provenance(run, groups, begun)
        shown, summary = _ProgressHook(terminal), _Summary()
        hooks = [RLMetricsHook(begun.source.pool), RLLogHook(shown.warn), ExportHook(shown.warn), StragglerHook(shown.warn), shown, summary]
        learn(run, groups, attempt, begun, hooks)
        if groups.rank == 0:
            attempt.check_owner()
            seconds = round(time.perf_counter() - started, 2)
            mark_done(run, {**summary.values, "seconds": seconds, "peak_memory_bytes": device.peak_memory_bytes(run.stage.plan.device)})


class RLMetricsHook(MetricsHook):
    """Writes metrics.jsonl, with the grading processes that were lost since the `rl` record before. `pool` is rank 0's."""

    def __init__(self, pool: GradingPool[Verdict] | None) -> None:
        super().__init__(KINDS)
        self._pool, self._lost_before = pool, 0

    def _write(self, context: Context, kind: str, step: int, values: Record) -> None:
        if kind == KINDS[0] and self._pool is not None:
            lost = self._pool.counts.lost
            values = {**values, "graders_lost": lost - self._lost_before}
            self._lost_before = lost
        super()._write(context, kind, step, values)


class RLLogHook(LogHook):
    """Plain lines on rank 0's log: steps, scores, what was published; and what is amiss also to `warn`."""

    PATIENCE_STEPS = 10  # rollout steps in a row with hardly a group that differs, before a word about it

    def __init__(self, warn: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(warn)
        self._told_little_steps = 0

    def start(self, context: Context) -> None:
        """Say from where, and take up the count of steps that taught nothing where the attempt before left it."""
        super().start(context)
        if context.groups.rank == 0:
            self._told_little_steps = steps_told_little(read_metrics(context.run.metrics_path, KINDS[0]), context.progress.step)

    def step(self, context: Context, metrics: Record) -> None:
        """Say the step's numbers, and when the rewards have told next to nothing for a while."""
        self._say(
            context,
            f"reward {metrics['reward_mean']:.3f}, right {metrics['accuracy']:.3f}, "
            f"informative groups {metrics['informative_share']:.2f}, "
            f"{metrics['response_tokens_mean']:.1f} tokens a response, "
            f"{metrics['truncated_share']:.2f} cut off at {metrics['cap_tokens']:,}, "
            f"loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}, {metrics['step_seconds']:.2f} s",
        )
        self._told_little_steps = self._told_little_steps + 1 if told_little(metrics) else 0
        rounds, rest = divmod(self._told_little_steps, self.PATIENCE_STEPS)
        if rounds and not rest and rounds & (rounds - 1) == 0:  # at 10 steps, 20, 40, 80 ...: a log of nothing else helps nobody
            self._say(context, _told_little_words(self._told_little_steps, metrics, context.run.stage.rollouts.responses_per_prompt))
        troubled = {name: metrics[name] for name in ("timed_out", "crashed", "error") if metrics[name]}
        if troubled:
            counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in troubled.items())
            self._say(context, f"WARNING: of {metrics['num_responses']} responses {counts} in grading; they count as wrong")

    def validation(self, context: Context, records: list[Record]) -> None:
        """Say the scores."""
        for one in records:
            correct = "-" if one["correct_tokens_mean"] is None else f"{one['correct_tokens_mean']:.1f}"
            self._say(
                context,
                f"{one['set']}: {one['num_correct']} of {one['num_problems']} right ({one['accuracy']:.3f}), {correct} tokens a right "
                f"response, cut off {one['truncated_share']:.2f} at {one['cap_tokens']:,}, template {one['template']}",
            )


def _told_little_words(steps: int, metrics: Record, group: int) -> str:
    found = (
        f"WARNING: for {steps} rollout steps fewer than {UNINFORMATIVE_SHARE:.0%} of the groups earned different rewards "
        f"(now {metrics['informative_share']:.1%}; rewards {metrics['reward_min']:g} to {metrics['reward_max']:g}): "
    )
    if group == 1:
        return f"{found}each prompt has one response and nothing to compare it with; raise rollouts.responses_per_prompt"
    return f"{found}next to nothing is learnt. Look at the recorded rollouts; the cap, the template or the problems may not fit this model"


class _ProgressHook(TerminalBar):
    """Steps, rewards and time left, on rank 0's terminal."""

    def start(self, context: Context) -> None:
        """Open the bar at the steps that are done."""
        steps, title = context.run.stage.steps, f"RL {context.run.name}"
        self.open(context, title, total=steps, unit="rollout steps", done=context.progress.step)

    def step(self, context: Context, metrics: Record) -> None:  # noqa: ARG002
        """Move it by one step."""
        if self._bar:
            self._bar.update(1, right=metrics["accuracy"], tokens_a_response=metrics["response_tokens_mean"])

    def validation(self, context: Context, records: list[Record]) -> None:  # noqa: ARG002
        """Show the first set's score beside it."""
        if self._bar and records:
            self._bar.update(0, held_out=records[0]["accuracy"])


class _Summary(Hook):
    """What the completion mark says of the stage."""

    def __init__(self) -> None:
        self.values: Record = {}

    def start(self, context: Context) -> None:
        """Where the attempt begins: all there is to say where only the mark was missing."""
        progress = context.progress
        self.values = {"steps": progress.step, "tokens": progress.tokens, "lineage_tokens": progress.lineage_tokens}

    def step(self, context: Context, metrics: Record) -> None:
        """Remember the last step."""
        names = ("updates", "tokens", "lineage_tokens", "learning_rate", "reward_mean", "accuracy", "informative_share")
        self.values = {"steps": context.progress.step, **{name: metrics[name] for name in names}}

    def validation(self, context: Context, records: list[Record]) -> None:  # noqa: ARG002
        """Remember the last scores."""
        self.values |= {"held_out_accuracy": {one["set"]: one["accuracy"] for one in records}}


def _write_provenance(run: Run, groups: Groups, begun: Begun) -> None:
    write_json(
        run.path / PROVENANCE,
        {
            **environment(),
            "tokenizer_hash": begun.tokenizer_hash,
            "template": {"name": begun.template.name, "version": begun.template.version},
            "problems": {"used": len(begun.source.prompts.rows), "left_out": len(begun.source.prompts.left_out)},
            "validation": {one.name: {"used": len(one.prompts.rows), "left_out": len(one.prompts.left_out)} for one in begun.heldout},
            "ranks": groups.plan.num_ranks,
        },
    )
