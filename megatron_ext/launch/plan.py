"""What a graph will do, before anything runs: tokens, rates at every joint, epochs, memory, GPU-hours, disk.

`plan_rows` computes, `plan_text` prints; both refuse what cannot run as planned. No torch.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_ext.config.base import Json, to_json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import (
    checkpoint_bytes,
    disk_bytes,
    export_bytes,
    export_steps,
    files_per_checkpoint,
    kept_checkpoints,
    memory,
    pinned_steps,
)
from megatron_ext.config.mixture import Draw, draws
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import micro_batches
from megatron_ext.config.stages import Branch, ConvertStage, RLStage, Scratch, TokenizeStage, TrainStage, Weights, inputs
from megatron_ext.errors import DataError
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.load import load_graph
from megatron_ext.launch.plan_rl import check_gpus, rl_rows
from megatron_ext.launch.plan_rl_words import rl_lines
from megatron_ext.launch.plan_starts import joint_rates, lineage_tokens, rate, start_of
from megatron_ext.launch.plan_words import cluster_words, convert_lines, count, size, stage_lines

UNKNOWN_TOKENS = 2**62  # stands in for a source whose size nobody has stated: no mixture uses it up
MOST_NAMED = 8  # edges that a line of the tree names one by one


def resolved(graph: Graph) -> Json:
    """The graph as plain JSON, every default filled in."""
    values: Json = to_json(graph)
    return values


def plan_rows(graph: Graph, cluster: Cluster | None = None) -> list[Json]:
    """One JSON-able row per training stage; `ConfigError` or `DataError` where the plan cannot be carried out."""
    return [plan_row(graph, stage, cluster) for stage in graph.stages if isinstance(stage, TrainStage)]


def convert_rows(graph: Graph) -> list[Json]:
    """One JSON-able row per Convert stage. How long it takes is the disk's and the network's to say."""
    return [_convert_row(stage) for stage in graph.stages if isinstance(stage, ConvertStage)]


def _convert_row(stage: ConvertStage) -> Json:
    model = stage.model
    return {
        "stage": stage.name,
        "source": stage.model_id,
        "revision": stage.revision,
        "parameters": model.num_parameters,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "disk_bytes": converted_bytes(model),
    }


def converted_bytes(model: ModelConfig) -> int:
    """Disk for a converted model's weights, in BF16; a source in FP32 has twice that."""
    return 2 * model.num_parameters


def plan_row(graph: Graph, stage: TrainStage, cluster: Cluster | None) -> Json:
    """The row of one training stage; raises as `plan_rows` does."""
    budget, plan = stage.budget, stage.plan
    check_gpus(stage, cluster)
    start = start_of(graph, stage)
    return {
        "stage": stage.name,
        "start": start,
        "tokens": budget.tokens,
        "steps": budget.steps,
        "tokens_per_step": budget.tokens_per_batch,
        "sequences_per_step": budget.sequences_per_batch,
        "sequence_length": budget.sequence_length,
        "lineage_tokens": lineage_tokens(graph, stage, None),
        "shape": stage.schedule.shape,
        "warmup_tokens": stage.schedule.warmup_tokens,
        "first_learning_rate": rate(stage, 0),
        "last_learning_rate": rate(stage, budget.steps - 1),
        "joint": joint_rates(graph, stage, start),
        "sources": _sources(graph, stage),
        "precision": stage.precision,
        "parameters": stage.model.num_parameters,
        "parallel": _parallel(stage),
        "memory": _memory(stage, cluster),
        "compute": _compute(stage, cluster),
        "checkpoints": {
            "kept": kept_checkpoints(budget, plan),
            "pinned_steps": list(pinned_steps(budget, plan)),
            "bytes_each": checkpoint_bytes(stage.model, stage.precision, plan),
            "files_each_at_most": files_per_checkpoint(plan),
            "export_steps": list(export_steps(budget, plan)),
            "bytes_each_export": export_bytes(stage.model, stage.precision),
            "disk_bytes": disk_bytes(stage.model, budget, stage.precision, plan),
            "files_at_most": kept_checkpoints(budget, plan) * files_per_checkpoint(plan),
        },
    }


def _drawn(graph: Graph, stage: TrainStage, tokens: int | None) -> dict[str, int]:
    """Tokens drawn per source at `tokens` of `stage` (None: its end), back along `branch` starts; `weights` begins anew."""
    total = _drawn_before(graph, stage)
    for row in stage.mixture.rows:
        total[row.source] = total.get(row.source, 0) + round(row.weight * (stage.budget.tokens if tokens is None else tokens))
    return total


def _drawn_before(graph: Graph, stage: TrainStage) -> dict[str, int]:
    return _drawn(graph, graph.stage(stage.start.stage), stage.start.tokens) if isinstance(stage.start, Branch) else {}


def _sources(graph: Graph, stage: TrainStage) -> list[Json]:
    corpus: TokenizeStage = graph.stage(stage.corpus)
    training = {s.name: int(s.tokens * (1 - s.heldout_fraction)) for s in corpus.sources}
    known = {name: tokens or UNKNOWN_TOKENS for name, tokens in training.items()}
    most = {s.name: s.max_epochs for s in corpus.sources}
    try:
        table = draws(stage.mixture, stage.budget.tokens, known, most, _drawn_before(graph, stage))
    except DataError as error:
        raise DataError(f"stage {stage.name}: {error}") from None
    return [_source_row(draw, training[draw.source]) for draw in table]


def _source_row(draw: Draw, available: int) -> Json:
    return {
        "source": draw.source,
        "weight": draw.weight,
        "tokens": draw.tokens,
        "already_tokens": draw.already_tokens,
        "available_tokens": available or None,
        "epochs": draw.epochs if available else None,
        "max_epochs": draw.max_epochs,
    }


def _parallel(stage: TrainStage) -> Json:
    plan, budget = stage.plan, stage.budget
    return {
        "device": plan.device,
        "nodes": plan.nodes,
        "ranks": plan.num_ranks,
        "tensor": plan.tensor,
        "pipeline": plan.pipeline,
        "context": plan.context,
        "data": plan.data_parallel,
        "micro_batch": plan.micro_batch,
        "micro_batches": micro_batches(plan, budget),
        "largest_data": budget.sequences_per_batch // plan.micro_batch,
    }


def _memory(stage: TrainStage, cluster: Cluster | None) -> Json:
    parts = memory(stage.model, stage.budget, stage.precision, stage.plan)
    on_gpu = cluster is not None and stage.plan.device == "gpu"
    return {
        "weights_bytes": parts.weights_bytes,
        "gradients_bytes": parts.gradients_bytes,
        "optimizer_bytes": parts.optimizer_bytes,
        "activations_bytes": parts.activations_bytes,
        "logits_bytes": parts.logits_bytes,
        "total_bytes": parts.total_bytes,
        "gpu_memory_bytes": cluster.gpu_memory_bytes if cluster and on_gpu else None,
        "fits": parts.fits(cluster.gpu_memory_bytes) if cluster and on_gpu else None,
    }


def _compute(stage: TrainStage, cluster: Cluster | None) -> Json:
    """FLOPs; GPU-hours = FLOPs / (peak of the precision x assumed MFU) / 3600, where cluster and precision give a peak."""
    flops = stage.budget.tokens * stage.model.flops_per_token(stage.budget.sequence_length)
    values: Json = {"flops": flops, "peak_flops_per_second": None, "gpu_hours": None, "wall_seconds": None}
    if cluster is None or stage.plan.device == "cpu" or stage.precision == "fp32":
        return values
    peak = cluster.fp8_flops_per_second if stage.precision == "fp8" else cluster.bf16_flops_per_second
    seconds = flops / (peak * cluster.assumed_mfu)
    return {**values, "peak_flops_per_second": peak, "gpu_hours": seconds / 3600, "wall_seconds": seconds / stage.plan.num_ranks}


def graph_lines(graph: Graph) -> list[str]:
    """The graph as an indented tree: a stage stands under the one it starts from, other edges are named."""
    kinds = max(len(stage.kind) for stage in graph.stages)
    depth: dict[str, int] = {}
    children: dict[str | None, list[Any]] = {}
    for stage in graph.stages:
        start = inputs(stage).get("start")
        depth[stage.name] = depth[start] + 1 if start else 0
        children.setdefault(start, []).append(stage)
    width = max(2 * depth[stage.name] + len(stage.name) for stage in graph.stages)
    lines: list[str] = []

    def add(stage: Any) -> None:
        label = "  " * depth[stage.name] + stage.name
        lines.append(f"{label:<{width}}  {stage.kind:<{kinds}}  {_edges(stage)}".rstrip())
        for child in children.get(stage.name, []):
            add(child)

    for root in children[None]:
        add(root)
    return lines


def _edges(stage: Any) -> str:
    reads = [parent for role, parent in inputs(stage).items() if role != "start"]
    named = ", ".join(reads) if len(reads) <= MOST_NAMED else f"{len(reads)} stages, {reads[0]} to {reads[-1]}"
    words = [f"reads {named}"] if reads else []
    match stage:
        case TrainStage(start=Scratch()):
            words.insert(0, "from random weights")
        case TrainStage(start=Weights() | Branch() as start) | RLStage(start=start):
            at = "" if start.tokens is None else f" at {count(start.tokens)} tokens"
            words.insert(0, f"{start.kind} of {start.stage}{at}")
        case ConvertStage():
            words.insert(0, stage.model_id)
        case TokenizeStage():
            words.insert(0, f"{len(stage.sources)} sources")
    return "; ".join(words)


def plan_json(graph: Graph, cluster: Cluster | None = None) -> str:
    """The plan for programs: JSON text of `convert_rows`, `plan_rows` and `rl_rows` under the names of graph and cluster."""
    named = {"graph": graph.name, "cluster": cluster.name if cluster else None}
    values = {**named, "conversions": convert_rows(graph), "stages": plan_rows(graph, cluster), "rl": rl_rows(graph, cluster)}
    return json.dumps(values, indent=2)


def plan_text(graph: Graph, cluster: Cluster | None = None) -> str:
    """The plan for people: the graph as a tree, then one block per stage that converts, trains or learns by reward, then the sums."""
    converted, trained, learnt = convert_rows(graph), plan_rows(graph, cluster), rl_rows(graph, cluster)
    lines = [f"{graph.name}, {cluster_words(cluster)}", "", *graph_lines(graph), ""]
    blocks = [*(convert_lines(row) for row in converted), *(stage_lines(row) for row in trained), *(rl_lines(row) for row in learnt)]
    for block in blocks:
        lines += [*block, ""]
    return "\n".join([*lines, _sums(converted, trained, learnt)]) + "\n"


def _sums(converted: list[Json], trained: list[Json], learnt: list[Json]) -> str:
    disk = sum(row["checkpoints"]["disk_bytes"] for row in [*trained, *learnt]) + sum(row["disk_bytes"] for row in converted)
    words = [f"{count(sum(row['tokens'] for row in trained))} tokens"] if trained else []
    words.append(f"{size(disk)} of checkpoints")
    hours = [row["compute"]["gpu_hours"] for row in trained]
    if hours and None not in hours:
        words.append(f"{sum(hours):,.0f} GPU-hours" + (" of training" if learnt else ""))
    if learnt:
        words.append(_learning_sum(learnt))
    return "in all: " + ", ".join(words)


def _learning_sum(learnt: list[Json]) -> str:
    updates, rollouts = sum(row["updates"] for row in learnt), sum(row["rollouts_bytes_at_most"] for row in learnt)
    hours = [row["compute"]["update_gpu_hours_at_most"] for row in learnt]
    at_most = "" if None in hours else f" ({sum(hours):,.0f} GPU-hours at most; sampling is not in them)"
    return f"{updates:,} updates of reinforcement learning{at_most}, whose records take {size(rollouts)} at most"


def plan_command(recipe: str, overrides: list[str], cluster: str | None, as_json: bool) -> None:
    """Print what a recipe costs."""
    graph, facts = load_graph(recipe, overrides, cluster)
    print(plan_json(graph, facts) if as_json else plan_text(graph, facts))
