"""What was run: the one sentence that opens the page, and the one that tells of the stages. Pure."""

from __future__ import annotations

from megatron_ext.reports.format import listed, many, tokens
from megatron_ext.reports.read import Reading, StageData
from megatron_ext.reports.tables import parent_name, stage_rows

MOST_NAMES = 8  # of stages that start alike; the lineage figure below has them all


def lead(reading: Reading) -> str:
    """Model, tokens and number of stages; what is done of it."""
    stages = reading.training
    if not stages:
        return f"Graph {reading.graph}: {_rl(reading) or many(len(reading.stages), 'stage') + ', none of them training'}."
    rows = {row.stage: row for row in stage_rows(reading) if row.stage in {s.name for s in stages}}
    done = sum(row.tokens or 0 for row in rows.values())
    planned = sum(row.tokens_planned or 0 for row in rows.values())
    amount = tokens(done) if done == planned else f"{tokens(done)} of {tokens(planned)} planned"
    models = {s.config.model.name: s.config.model.num_parameters for s in stages}
    model = listed([f"{name} ({tokens(size)} parameters)" for name, size in models.items()])
    where = listed(sorted({f"{s.config.plan.device.upper()} in {s.config.precision.upper()}" for s in stages}))
    trained = f"{model} trained for {amount} tokens in {many(len(stages), 'stage')} on {where}"
    return f"Graph {reading.graph}: {trained}{', then ' if reading.rl else ''}{_rl(reading)}."


def descent(reading: Reading) -> str:
    """How the training stages hang together; '' where there is none."""
    parts = "; ".join(_part(group) for group in _families(reading.training))
    return f"Training: {parts}." if parts else ""


def _families(stages: tuple[StageData, ...]) -> list[list[StageData]]:
    """Stages in order; those that start in the same way from the same point, for as long, stand together."""
    groups: dict[object, list[StageData]] = {}
    for stage in stages:
        config = stage.config
        key = (config.start, config.budget.tokens) if parent_name(stage) else stage.name
        groups.setdefault(key, []).append(stage)
    return list(groups.values())


def _rl(reading: Reading) -> str:
    """What was done by reinforcement learning; '' where nothing was."""
    if not reading.rl:
        return ""
    starts = list(dict.fromkeys(str(parent_name(s)) for s in reading.rl))
    steps = sorted({s.config.steps for s in reading.rl})
    length = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    each = " each" if len(reading.rl) > 1 else ""
    checkpoints = starts[0] if len(starts) == 1 else f"{len(starts)} checkpoints"
    return f"reinforcement learning from {checkpoints} ({length} rollout steps{each})"


def _some(names: list[str]) -> str:
    return listed(names if len(names) <= MOST_NAMES else [*names[:2], f"{len(names) - 2} more"])


def _part(group: list[StageData]) -> str:
    config = group[0].config
    names = _some([s.name for s in group])
    each = " each" if len(group) > 1 else ""
    how = {"scratch": "from scratch", "weights": "from the weights of", "branch": "branching from"}[config.start.kind]
    parent = parent_name(group[0])
    at = f" at {tokens(config.start.tokens)} tokens" if parent and config.start.tokens is not None else ""
    return f"{names} ({how}{' ' + parent if parent else ''}{at}, {tokens(config.budget.tokens)} tokens{each})"
