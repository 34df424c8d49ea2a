"""Train small real runs on gloo ranks and read back everything that must be equal bit for bit."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import TrainStage
from megatron_ext.runs import Run, open_run
from tests import ranks
from tests.small_corpus import LENGTH, STAGE, VOCAB_SIZE

MODEL = ModelConfig(
    name="toy", num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
    vocab_size=VOCAB_SIZE, max_positions=64, tied_embeddings=True,
)  # fmt: skip

DEAD = r"exit codes|rank \d failed first"  # what ranks.run says when ranks were killed; one may still have seen another die


def stage(steps: int = 8, save_every_steps: int = 4, plan: TrainPlan | None = None, **changes: Any) -> TrainStage:
    """A stage of a few steps of 8 sequences on the small corpus."""
    plan = replace(plan or TrainPlan(device="cpu"), save_every_steps=save_every_steps, validation_sequences=0)
    values: dict[str, Any] = {
        "model": MODEL,
        "budget": Budget(steps=steps, sequences_per_batch=8, sequence_length=LENGTH),
        "schedule": Schedule(shape="cosine", peak=1e-2),
        "plan": plan,
    }
    return replace(STAGE, **{**values, **changes})


def trace(run: Run, kill_after: int | None = None, fault: str = "") -> dict[str, Any]:
    """Train a run on its plan's ranks; rank 0's steps and the digests of all ranks' weights and moments.

    `kill_after` sends SIGKILL to every rank once the checkpoint of that step is published.
    """
    results = ranks.run(_train, run.stage.plan, str(run.path), kill_after, fault)
    return {**results[0], "digests": [r["digests"] for r in results]}


def _train(groups: Any, path: str, kill_after: int | None, fault: str) -> dict[str, Any]:
    import torch

    from megatron_ext import cpu_megatron
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.distributed import broadcast_object
    from megatron_ext.training import trainer
    from megatron_ext.training.hooks import Hook, MetricsHook

    run = open_run(Path(path))
    attempt = broadcast_object(begin_attempt(run) if groups.rank == 0 else None)
    seen: dict[str, Any] = {"steps": [], "rng": [], "start": None}

    class Watch(Hook):
        def start(self, context: Any) -> None:
            seen["start"] = {"digests": digests(context.state), "progress": context.progress, "rate": None}

        def step(self, context: Any, metrics: Any) -> None:
            names = ("loss", "grad_norm", "learning_rate", "tokens", "lineage_tokens", "samples_sha256")
            seen["steps"].append(tuple(metrics[name] for name in names))
            seen["rng"].append(_digest(torch.get_rng_state()))
            seen["state"] = context.state

        def checkpoint(self, context: Any, saved: Any) -> None:
            if saved.progress.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    with cpu_megatron.shared_steps() if fault == "aliased optimizer step" else _nothing():
        if fault == "shifted learning rate":
            true_rate = trainer.learning_rate
            trainer.learning_rate = lambda schedule, before, total: true_rate(schedule, max(0, before - 128), total)
        if fault == "swapped sample":
            _swap_samples(trainer)
        progress = trainer.train(run, groups, attempt, [MetricsHook(), Watch()])
    state = seen.pop("state", None)
    return {**seen, "progress": progress, "digests": digests(state) if state else None}


def _swap_samples(trainer: Any) -> None:
    """Exchange the first two sequences' order in what the loader reads (not in what it reports)."""
    true = trainer.Loader.micro_batch_indices

    def swapped(self: Any, step: int) -> Any:
        indices = true(self, step)
        if step == self.prepared.stage.budget.steps - 1:
            indices[0], indices[-1] = indices[0], indices[0]
        return indices

    trainer.Loader.micro_batch_indices = swapped


def digests(state: Any) -> dict[str, str]:
    """SHA-256 of each weight and each of its moments on this rank."""
    found = {}
    for i, chunk in enumerate(state.chunks):
        for name, parameter in chunk.named_parameters():
            found[f"{i}.{name}"] = _digest(parameter)
    for optimizer in state.optimizer.chained_optimizers:
        groups = optimizer.optimizer.param_groups
        for g, group in enumerate(groups):
            for p, parameter in enumerate(group["params"]):
                for key, value in sorted(optimizer.optimizer.state.get(parameter, {}).items()):
                    found[f"{key}.{g}.{p}"] = _digest(value)
    return found


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().numpy().tobytes()).hexdigest()


class _nothing:
    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(self, *error: object) -> None:
        """Undo nothing."""
