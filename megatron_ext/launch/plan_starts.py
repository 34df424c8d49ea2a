"""Where the first weights of each stage come from: the point, the learning rates on both sides of it, the tokens before it."""

from __future__ import annotations

from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.config.memory import pinned_steps
from megatron_ext.config.schedule import learning_rate
from megatron_ext.config.stages import ConvertStage, RLStage, Scratch, TrainStage
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph


def rate(stage: TrainStage, step: int) -> float:
    """The learning rate of a training step; the first is 0."""
    return learning_rate(stage.schedule, stage.budget.tokens_before(step), stage.budget.tokens)


def start_of(graph: Graph, stage: TrainStage | RLStage) -> Json:
    """Kind of start, the parent, and the point of it in tokens and steps, each null where there is none.

    `ConfigError` where that checkpoint may be removed before it is read.
    """
    if isinstance(stage.start, Scratch):
        return {"kind": "scratch", "stage": None, "tokens": None, "step": None}
    parent: Any = graph.stage(stage.start.stage)
    named = {"kind": stage.start.kind, "stage": parent.name}
    if isinstance(parent, ConvertStage):
        return {**named, "tokens": None, "step": None}
    if isinstance(parent, RLStage):
        return {**named, "tokens": None, "step": parent.steps}
    tokens = parent.budget.tokens if stage.start.tokens is None else stage.start.tokens
    return {**named, "tokens": tokens, "step": _pinned_step(stage, parent, tokens)}


def _pinned_step(stage: TrainStage | RLStage, parent: TrainStage, tokens: int) -> int:
    step = parent.budget.step_at(tokens)
    kept = pinned_steps(parent.budget, parent.plan)
    if step in kept:
        return step
    near = min(kept, key=lambda k: abs(k - step))
    raise ConfigError(
        f"stage {stage.name}: starts from '{parent.name}' at step {step:,} ({tokens:,} tokens), a checkpoint that may be removed "
        f"before it is read: pinned are the last and those nearest to multiples of plan.pin_every_tokens = "
        f"{parent.plan.pin_every_tokens:,}. Start at {parent.budget.tokens_before(near):,} tokens, or set "
        f"{parent.name}.plan.pin_every_tokens={tokens}"
    )


def joint_rates(graph: Graph, stage: TrainStage, start: Json) -> Json | None:
    """Learning rates on both sides of the joint; None where no training stage stands before it."""
    parent = graph.stage(start["stage"]) if start["stage"] else None
    if not isinstance(parent, TrainStage):
        return None
    step = start["step"]
    return {"parent_step": step, "before": rate(parent, step - 1), "after": rate(stage, 0), "peak": stage.schedule.peak}


def lineage_tokens(graph: Graph, stage: Any, tokens: int | None) -> int:
    """Tokens that were trained on since scratch or conversion, at `tokens` of `stage` (None: its end).

    What reinforcement learning samples is not in it: nobody knows that before.
    """
    if isinstance(stage, ConvertStage):
        return 0
    here = 0 if isinstance(stage, RLStage) else stage.budget.tokens if tokens is None else tokens
    if isinstance(stage.start, Scratch):
        return int(here)
    return int(here) + lineage_tokens(graph, graph.stage(stage.start.stage), stage.start.tokens)
