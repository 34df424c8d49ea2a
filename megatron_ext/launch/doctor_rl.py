"""Reinforcement learning before it runs: memory with the engine's cache, graders against the machine, the engine's package. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import psutil

from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import HEADROOM
from megatron_ext.config.rl_memory import rl_memory
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import ConfigError
from megatron_ext.launch.doctor_problems import problem_findings
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan_rl import unreached_caps_tokens
from megatron_ext.launch.plan_words import size

GRADERS_SHARE = 0.5  # of a machine's memory that graders may fill at their limit: ranks, page cache and the system need the rest


def rl_findings(graph: Graph, stages: Sequence[Any], cluster: Cluster | None) -> list[Finding]:
    """Findings on each stage of reinforcement learning of these, and on the files of their problems."""
    learning = [stage for stage in stages if isinstance(stage, RLStage)]
    found = []
    for stage in learning:
        found += [*_memory(stage, cluster), *_graders(stage, cluster), *_engine(stage)]
        found += [*_groups(stage), *_bos(graph, stage), *_caps(stage)]
    return [*found, *problem_findings(learning)]


def _memory(stage: RLStage, cluster: Cluster | None) -> list[Finding]:
    what = "memory"
    if stage.plan.device == "cpu":
        return []
    if cluster is None:
        total = size(rl_memory(stage, None).total_bytes)
        return [warning(what, f"{total} a GPU; no cluster is named to compare it with", "add --cluster NAME", stage.name)]
    parts = rl_memory(stage, cluster.gpu_memory_bytes)
    text = f"{size(parts.total_bytes)} a GPU, of {size(cluster.gpu_memory_bytes)} (`megatron-ext plan` shows the parts)"
    if parts.fits(cluster.gpu_memory_bytes):
        return [ok(what, text, stage.name)]
    return [error(what, f"{text}; {HEADROOM:.0%} should stay free", _smaller(stage, cluster), stage.name)]


def _smaller(stage: RLStage, cluster: Cluster) -> str:
    """The mildest change of the plan that makes the stage fit."""
    for changes in _milder(stage.plan, stage.longest_tokens):
        try:
            fitting = replace(stage, plan=replace(stage.plan, **changes))
        except ConfigError:
            continue  # that plan breaks another rule
        if rl_memory(fitting, cluster.gpu_memory_bytes).fits(cluster.gpu_memory_bytes):
            return " ".join(f"{stage.name}.plan.{key}={str(value).lower()}" for key, value in changes.items())
    return "more nodes, with larger tensor and pipeline sizes; or a smaller model"


def _milder(plan: RLPlan, longest_tokens: int) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = []
    if plan.engine == "megatron":
        changes += [{"engine_slots": plan.engine_slots // share} for share in (2, 4, 8) if plan.engine_slots >= share]
    if plan.validation_engine != "same":
        changes.append({"validation_engine": "same"})
    full: dict[str, Any] = {} if plan.recompute == "full" else {"recompute": "full"}
    both = [{**full, **change} for change in changes if full]
    shorter = [{**full, "tokens_per_micro_batch": longest_tokens}] if plan.tokens_per_micro_batch > longest_tokens else []
    mild = [*changes, *([full] if full else []), *both, *shorter]
    wider = [{"tensor": tensor, "sequence_parallel": True, **full} for tensor in (2, 4, 8) if tensor > plan.tensor]
    return [*mild, *wider, *({**wide, **one} for wide in wider for one in mild)]


def _graders(stage: RLStage, cluster: Cluster | None) -> list[Finding]:
    """Grading workers run beside rank 0: its machine is a node of the cluster, or without one this machine."""
    plan = stage.plan
    if cluster is None and plan.device == "gpu":
        return []
    cores = cluster.cores_per_node if cluster and plan.device == "gpu" else os.cpu_count() or 1
    memory_bytes = cluster.memory_bytes_per_node if cluster and plan.device == "gpu" else psutil.virtual_memory().total
    found = []
    need = plan.ranks_per_node * plan.threads_per_rank + (plan.grading_workers if plan.device == "gpu" else 0)
    if need > cores:
        text = (
            f"{plan.ranks_per_node} ranks x {plan.threads_per_rank} threads and {plan.grading_workers} grading workers exceed {cores} cores"
        )
        found.append(warning("cores", text, f"lower {stage.name}.plan.grading_workers or threads_per_rank", stage.name))
    held = plan.grading_workers * plan.grading_memory_bytes
    text = f"{plan.grading_workers} grading workers may take {size(held)} of a machine's {size(memory_bytes)}"
    if held > GRADERS_SHARE * memory_bytes:
        way_out = f"lower {stage.name}.plan.grading_workers or grading_memory_bytes"
        return [*found, warning("graders", f"{text}, more than {GRADERS_SHARE:.0%}", way_out, stage.name)]
    return [*found, ok("graders", text, stage.name)]


def _engine(stage: RLStage) -> list[Finding]:
    plan, others = stage.plan, {"engine": "megatron", "validation_engine": "same"}  # those that need no package
    asked = {key: getattr(plan, key) for key, other in others.items() if getattr(plan, key) != other}
    if not asked:
        return [*_turns(stage)]
    text = " and ".join(f"{key}={value}" for key, value in asked.items())
    if find_spec("vllm") is not None:
        return [ok("engine", f"{text}; vLLM is installed here", stage.name), *_turns(stage)]
    way_out = " ".join(f"{stage.name}.plan.{key}={others[key]}" for key in asked)
    found = f"{text} asks for vLLM, which is not installed in {sys.prefix}"
    return [error("engine", found, f"install vLLM where stages run, or {way_out}", stage.name), *_turns(stage)]


def _turns(stage: RLStage) -> list[Finding]:
    plan = stage.plan
    if plan.engine != "megatron" or plan.pipeline == 1:
        return []
    text = f"generation under pipeline {plan.pipeline} takes turns stage by stage: 1/{plan.pipeline} of what its GPUs could sample"
    return [warning("engine", text, f"{stage.name}.plan.engine=vllm_process, or tensor in place of pipeline", stage.name)]


def _groups(stage: RLStage) -> list[Finding]:
    if stage.rollouts.responses_per_prompt > 1:
        return []
    text = "responses_per_prompt is 1: a group of one has no mean to be better than, and its advantage is its reward"
    return [warning("groups", text, f"{stage.name}.rollouts.responses_per_prompt=16, the paper's", stage.name)]


def _caps(stage: RLStage) -> list[Finding]:
    late = unreached_caps_tokens(stage)
    if not late:
        return []
    text = f"no step is sampled under {' or '.join(f'{cap:,}' for cap in late)} tokens, for step {stage.steps:,} is the last"
    return [warning("caps", text, f"more {stage.name}.steps, or an earlier rise in {stage.name}.lengths", stage.name)]


def _bos(graph: Graph, stage: RLStage) -> list[Finding]:
    parent = graph.stage(stage.start.stage)
    if not isinstance(parent, TrainStage) or parent.documents.bos == stage.bos:
        return []
    text = f"bos is {str(stage.bos).lower()}, but the documents that {parent.name} trained on say {str(parent.documents.bos).lower()}"
    return [warning("prompts", text, f"{stage.name}.bos={str(parent.documents.bos).lower()}", stage.name)]
