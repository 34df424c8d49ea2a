"""`megatron-ext doctor`: all that can be known to fail before a GPU is touched, every finding of it. No torch.

The recipe against its own arithmetic and the cluster's facts here; reinforcement learning in `doctor_rl`, its
problems in `doctor_problems`; text and tokenizers in `doctor_inputs`; models to convert in `doctor_convert`; run
folders in `doctor_folders`; this machine in `doctor_machine`; a cluster's Slurm in `doctor_cluster`; the real
objects, with --deep, in `doctor_deep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import HEADROOM, memory, save_host_bytes
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import ConfigError, LaunchError, MegatronExtError
from megatron_ext.launch.doctor_cluster import cluster_findings
from megatron_ext.launch.doctor_convert import convert_findings
from megatron_ext.launch.doctor_deep import rehearsed
from megatron_ext.launch.doctor_folders import folder_findings, unfinished
from megatron_ext.launch.doctor_inputs import input_findings
from megatron_ext.launch.doctor_machine import machine_findings
from megatron_ext.launch.doctor_rl import rl_findings
from megatron_ext.launch.findings import Finding, error, finding_lines, findings_text, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.load import load_graph
from megatron_ext.launch.plan import plan_row
from megatron_ext.launch.plan_rl import rl_row
from megatron_ext.launch.plan_words import size

HOLDERS = ("weights", "gradients", "optimizer", "activations", "logits")
HOST_SHARE = 0.8  # of a node's memory that a save may take: data loaders, page cache and the system need the rest


def doctor_command(
    recipe: str, overrides: list[str], cluster: str | None, runs: Path, deep: bool, rank: int | None, stage: str | None
) -> None:
    """Print every finding; `LaunchError` where one of them is an error, `ConfigError` where the recipe itself is one."""
    if not deep and (rank is not None or stage is not None):
        raise ConfigError("doctor: --rank and --stage say what --deep rehearses; add --deep")
    graph, facts = load_graph(recipe, overrides, cluster)
    found = [*examine(graph, facts, runs), *(rehearsed(graph, stage, rank) if deep else [])]
    print(findings_text(found), flush=True)
    if any(one.level == "error" for one in found):
        raise LaunchError(f"doctor: {graph.name} would fail, for the errors listed above")


def examine(graph: Graph, cluster: Cluster | None, runs: Path) -> list[Finding]:
    """Everything but --deep. What stages that are done would need is not looked at."""
    folder = runs / graph.name
    found = [*_plans(graph, cluster), *folder_findings(graph, folder), *_needs(graph, unfinished(graph, folder), cluster)]
    names = [stage.name for stage in unfinished(graph, folder)]
    return [*found, *machine_findings(graph, runs), *cluster_findings(graph, cluster, runs, names)]


def refuse_what_would_fail(graph: Graph, cluster: Cluster | None, runs: Path, by_jobs: bool = False) -> None:
    """Before a launch, whose own checks see to plans and run folders: print the warnings, `LaunchError` with all errors.

    Stages may come to what they lack after days of other stages. A graph that is done needs nothing. `by_jobs`: other machines
    do the work, so Slurm is asked whether it takes the jobs, and this machine is not looked at.
    """
    stages = unfinished(graph, runs / graph.name)
    if not stages:
        return
    names = [stage.name for stage in stages]
    where = cluster_findings(graph, cluster, runs, names) if by_jobs else machine_findings(graph, runs)
    found = [*_needs(graph, stages, cluster), *where]
    warnings, errors = ([one for one in found if one.level == level] for level in ("warning", "error"))
    if warnings:
        print("\n".join(finding_lines(warnings)), flush=True)
    if errors:
        lines = [f"graph {graph.name}: nothing was started, because it would fail:", *finding_lines(errors)]
        raise LaunchError("\n".join([*lines, "Mend that, or add --no-doctor to start all the same"]))


def _needs(graph: Graph, stages: Sequence[Any], cluster: Cluster | None) -> list[Finding]:
    """What these stages of the graph read, and take of a node."""
    found = []
    for stage in stages:
        if isinstance(stage, TrainStage):
            found += [*_memory(stage, cluster), *_cores(stage, cluster)]
        if isinstance(stage, TrainStage | RLStage):
            found += _host_memory(stage, cluster)
    return [*found, *rl_findings(graph, stages, cluster), *input_findings(graph, stages), *convert_findings(graph, stages)]


def _plans(graph: Graph, cluster: Cluster | None) -> list[Finding]:
    """Parallel sizes, batch, mixture and epochs, joints and pins: whatever the plan's arithmetic refuses."""
    found = []
    for stage in graph.stages:
        if not isinstance(stage, TrainStage | RLStage):
            continue
        try:
            if isinstance(stage, RLStage):
                rl_row(graph, stage, cluster)
                fits = "lengths, layout and start fit together"
            else:
                plan_row(graph, stage, cluster)
                fits = "batch, start and sources fit together"
        except MegatronExtError as refusal:
            found.append(error("plan", str(refusal), stage=stage.name))
        else:
            found.append(ok("plan", f"{stage.plan.num_ranks:,} ranks; {fits}", stage.name))
    return found


def _memory(stage: TrainStage, cluster: Cluster | None) -> list[Finding]:
    what = "memory"
    if stage.plan.device == "cpu":
        return []
    parts = memory(stage.model, stage.budget, stage.precision, stage.plan)
    holders = [f"{name} {size(getattr(parts, f'{name}_bytes'))}" for name in HOLDERS]
    text = f"{size(parts.total_bytes)} a GPU ({', '.join(holders)})"
    if cluster is None:
        return [warning(what, f"{text}; no cluster is named to compare it with", "add --cluster NAME", stage.name)]
    text += f", of {size(cluster.gpu_memory_bytes)}"
    if parts.fits(cluster.gpu_memory_bytes):
        return [ok(what, text, stage.name)]
    return [error(what, f"{text}, of which {HEADROOM:.0%} should stay free", _smaller(stage, cluster), stage.name)]


def _smaller(stage: TrainStage, cluster: Cluster) -> str:
    """The mildest change of the plan that makes the stage fit."""
    for changes in _milder(stage.plan):
        try:
            fitting = replace(stage, plan=replace(stage.plan, **changes))
        except ConfigError:
            continue  # that plan breaks another rule
        if memory(stage.model, stage.budget, stage.precision, fitting.plan).fits(cluster.gpu_memory_bytes):
            return " ".join(f"{stage.name}.plan.{key}={str(value).lower()}" for key, value in changes.items())
    return "more nodes, with larger tensor and pipeline sizes; or a smaller model"


def _milder(plan: TrainPlan) -> list[dict[str, Any]]:
    recompute = [{"recompute": word} for word in ("selective", "full") if plan.recompute == "none" or word == "full"]
    single = [{"micro_batch": 1}] if plan.micro_batch > 1 else []
    wider = [{"tensor": tensor, "sequence_parallel": True} for tensor in (2, 4, 8) if tensor > plan.tensor]
    deeper = [{"pipeline": stages} for stages in (2, 4, 8) if stages > plan.pipeline]
    full = [{**change, "recompute": "full"} for change in (*wider, *deeper)]
    both = [{**wide, **deep, "recompute": "full"} for wide in wider for deep in deeper]
    return [*single, *recompute, *wider, *deeper, *full, *both]


def _host_memory(stage: TrainStage | RLStage, cluster: Cluster | None) -> list[Finding]:
    """A pinned save gathers the optimizer's state on the host of every rank: a node's memory must hold that."""
    if cluster is None or stage.plan.device == "cpu":
        return []
    need = save_host_bytes(stage.model, stage.precision, stage.plan)
    text = f"saves take up to {size(need)} of a node's {size(cluster.memory_bytes_per_node)}"
    if need <= HOST_SHARE * cluster.memory_bytes_per_node:
        return [ok("host memory", text, stage.name)]
    way_out = f"raise {stage.name}.plan.tensor or pipeline, so that a rank holds less of the model"
    if stage.plan.asynchronous_saves:
        way_out += ", or set asynchronous_saves=false, which copies nothing"
    text += ": every rank gathers the optimizer state of its part of the model for a pinned checkpoint, and may be killed"
    return [error("host memory", text, way_out, stage.name)]


def _cores(stage: TrainStage, cluster: Cluster | None) -> list[Finding]:
    if cluster is None or stage.plan.device == "cpu":
        return []
    plan = stage.plan
    need = plan.ranks_per_node * (plan.threads_per_rank + plan.loader_workers)
    if need <= cluster.cores_per_node:
        return []
    found = (
        f"{plan.ranks_per_node} ranks x ({plan.threads_per_rank} threads + {plan.loader_workers} loader workers) = {need} "
        f"exceed the {cluster.cores_per_node} cores of a node"
    )
    return [warning("cores", found, "lower plan.loader_workers or plan.threads_per_rank", stage.name)]
