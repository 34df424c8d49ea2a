"""Train small real runs in which some steps go wrong, and see what is done about it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from megatron_ext.errors import TrainingError
from megatron_ext.runs import Run, open_run
from tests import ranks, training_runs

TOKENS = 128  # of a batch of training_runs.stage
Injected = dict[int, str]  # step of the lineage -> what happens to it: loss, gradients, one rank's gradients or nan


def trained(run: Run, injected: Injected, kill_after: int | None = None, fault: str = "") -> list[dict[str, Any]]:
    """Train a run with faults at some of its steps; what each rank saw. `kill_after` is the step of a checkpoint."""
    return ranks.run(train_with, run.stage.plan, str(run.path), injected, kill_after, fault)


def train_with(groups: Any, path: str, injected: Injected, kill_after: int | None, fault: str) -> dict[str, Any]:
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.distributed import broadcast_object
    from megatron_ext.training import trainer
    from megatron_ext.training.guard import GuardState
    from megatron_ext.training.hooks import Hook, MetricsHook

    run = open_run(Path(path))
    attempt = broadcast_object(begin_attempt(run) if groups.rank == 0 else None)
    seen: dict[str, Any] = {"steps": [], "skips": [], "back": [], "after": {}, "error": ""}

    class Watch(Hook):
        def step(self, context: Any, metrics: Any) -> None:
            seen["steps"].append((context.progress.step, metrics["loss"], metrics["grad_norm"]))
            seen["after"][context.progress.step] = training_runs.digests(context.state)

        def skip(self, context: Any, found: Any) -> None:
            seen["skips"].append((context.progress.step, found["reason"]))
            seen["after"][context.progress.step] = training_runs.digests(context.state)

        def roll_back(self, context: Any, found: Any) -> None:
            seen["back"].append((context.progress.step, found["at_step"]))
            seen["after"][context.progress.step] = training_runs.digests(context.state)

        def checkpoint(self, context: Any, saved: Any) -> None:
            if saved.progress.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.train_step = faulty(trainer.train_step, injected, groups)
    if fault == "window not restored":
        trainer.guard_of = lambda began: GuardState(skipped=began.manifest.skipped)
    try:
        trainer.train(run, groups, attempt, [MetricsHook(), Watch()])
    except TrainingError as error:
        seen["error"] = str(error)
    attempt.finish("test")
    return seen


def faulty(true_step: Any, injected: Injected, groups: Any) -> Any:
    """`train_step` with a fault at some steps: loss or gradients a hundred times as large, or a fault of the last rank alone."""
    from megatron_ext.training import step as steps

    true_forward = steps.forward

    def train_step(state: Any, batches: Any, rate: float, seed: int, tokens_before: int, **options: Any) -> Any:
        last = groups.rank == groups.plan.num_ranks - 1
        what = injected.get(tokens_before // TOKENS + 1, "")

        def tamper() -> None:
            for parameter in (p for chunk in state.chunks for p in chunk.parameters()):
                if what == "gradients" or (what == "one rank's gradients" and last):
                    parameter.main_grad.mul_(100)
                if what == "nan" and last:
                    parameter.main_grad.view(-1)[0] = float("nan")

        def forward(*arguments: Any, **values: Any) -> tuple[float, int]:
            loss, count = true_forward(*arguments, **values)
            return (100 * loss if what == "loss" else loss), count

        steps.forward = forward
        try:
            return true_step(state, batches, rate, seed, tokens_before, tamper=tamper, **options)
        finally:
            steps.forward = true_forward

    return train_step
