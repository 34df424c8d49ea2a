"""What a stage of reinforcement learning will do, before anything runs: steps, updates, responses, caps, memory, disk. No torch."""

from __future__ import annotations

from megatron_ext.config.base import Json, to_json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import checkpoint_bytes, export_bytes, files_per_checkpoint
from megatron_ext.config.rl import TruncationLengths
from megatron_ext.config.rl_memory import (
    kept_rl_checkpoints,
    response_tokens_at_most,
    rl_checkpoints_bytes,
    rl_memory,
    rollouts_bytes_at_most,
    update_flops_at_most,
)
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import ConfigError
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan_starts import lineage_tokens, start_of


def rl_rows(graph: Graph, cluster: Cluster | None = None) -> list[Json]:
    """One JSON-able row per stage of reinforcement learning; `ConfigError` where the plan cannot be carried out."""
    return [rl_row(graph, stage, cluster) for stage in graph.stages if isinstance(stage, RLStage)]


def rl_row(graph: Graph, stage: RLStage, cluster: Cluster | None) -> Json:
    """The row of one stage; raises as `rl_rows` does."""
    check_gpus(stage, cluster)
    rollouts = stage.rollouts
    return {
        "stage": stage.name,
        "start": start_of(graph, stage),
        "lineage_tokens": lineage_tokens(graph, stage, None),
        "steps": stage.steps,
        "updates_per_step": rollouts.updates_per_step,
        "updates": stage.steps * rollouts.updates_per_step,
        "prompts_per_step": rollouts.prompts_per_step,
        "prompts_per_update": rollouts.prompts_per_update,
        "responses_per_prompt": rollouts.responses_per_prompt,
        "responses_per_step": rollouts.responses_per_step,
        "prompts": stage.steps * rollouts.prompts_per_step,
        "responses": stage.steps * rollouts.responses_per_step,
        "draws_at_most": 1 + rollouts.resample_uninformative,
        "response_tokens_at_most": response_tokens_at_most(stage),
        "max_prompt_tokens": rollouts.max_prompt_tokens,
        "longest_tokens": stage.longest_tokens,
        "lengths": to_json(stage.lengths),
        "unreached_caps_tokens": unreached_caps_tokens(stage),
        "temperature": rollouts.sampling.temperature,
        "template": stage.template,
        "reward": stage.reward,
        "problems": {"name": stage.problems.name, "path": stage.problems.path, "left_out": len(stage.problems.leave_out)},
        "validation": _validation(stage),
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "precision": stage.precision,
        "parameters": stage.model.num_parameters,
        "parallel": _parallel(stage),
        "memory": _memory(stage, cluster),
        "compute": _compute(stage, cluster),
        "checkpoints": {
            "kept": kept_rl_checkpoints(stage),
            "bytes_each": checkpoint_bytes(stage.model, stage.precision, stage.plan),
            "files_each_at_most": files_per_checkpoint(stage.plan),
            "export_steps": [stage.steps] if stage.plan.export_last else [],
            "bytes_each_export": export_bytes(stage.model, stage.precision),
            "disk_bytes": rl_checkpoints_bytes(stage),
            "files_at_most": kept_rl_checkpoints(stage) * files_per_checkpoint(stage.plan),
        },
        "rollouts_bytes_at_most": rollouts_bytes_at_most(stage),
    }


def unreached_caps_tokens(stage: RLStage) -> list[int]:
    """Caps that no rollout step is sampled under, because they can begin behind the last one alone."""
    lengths, before_last = stage.lengths, stage.steps - 1  # the progress that the last step begins at, at most
    if isinstance(lengths, TruncationLengths):
        return [cap for number, cap in enumerate(lengths.caps_tokens) if number * lengths.steps > before_last]
    if lengths.unit == "response_tokens":
        draws = 1 + stage.rollouts.resample_uninformative
        before_last *= stage.rollouts.responses_per_step * draws * lengths.largest_cap_tokens
    return [row.cap_tokens for row in lengths.caps if row.after > before_last]


def check_gpus(stage: TrainStage | RLStage, cluster: Cluster | None) -> None:
    """`ConfigError` where a node would hold more ranks than it has GPUs."""
    plan = stage.plan
    if cluster and plan.device == "gpu" and plan.ranks_per_node > cluster.gpus_per_node:
        raise ConfigError(
            f"stage {stage.name}: plan.ranks_per_node {plan.ranks_per_node} exceeds the {cluster.gpus_per_node} GPUs of a node of "
            f"{cluster.name}; lower it and raise plan.nodes"
        )


def _validation(stage: RLStage) -> Json:
    every, held_out = stage.plan.validate_every_steps, stage.validation
    times = 1 + -(-stage.steps // every)  # before any update, every so many steps, and after the last
    return {
        "sets": [one.name for one in held_out.sets],
        "every_steps": every,
        "times": times if held_out.sets else 0,
        "cap_tokens": held_out.cap_tokens,
    }


def _parallel(stage: RLStage) -> Json:
    plan = stage.plan
    return {
        "device": plan.device,
        "nodes": plan.nodes,
        "ranks": plan.num_ranks,
        "tensor": plan.tensor,
        "pipeline": plan.pipeline,
        "data": plan.data_parallel,
        "tokens_per_micro_batch": plan.tokens_per_micro_batch,
        "engine": plan.engine,
        "validation_engine": plan.validation_engine,
        "engine_slots": plan.engine_slots,
        "grading_workers": plan.grading_workers,
    }


def _memory(stage: RLStage, cluster: Cluster | None) -> Json:
    gpu_memory_bytes = cluster.gpu_memory_bytes if cluster is not None and stage.plan.device == "gpu" else None
    parts = rl_memory(stage, gpu_memory_bytes)
    return {
        "weights_bytes": parts.weights_bytes,
        "gradients_bytes": parts.gradients_bytes,
        "optimizer_bytes": parts.optimizer_bytes,
        "activations_bytes": parts.activations_bytes,
        "logits_bytes": parts.logits_bytes,
        "reference_bytes": parts.reference_bytes,
        "cache_bytes": parts.cache_bytes,
        "vllm_bytes": parts.vllm_bytes,
        "total_bytes": parts.total_bytes,
        "gpu_memory_bytes": gpu_memory_bytes,
        "fits": None if gpu_memory_bytes is None else parts.fits(gpu_memory_bytes),
    }


def _compute(stage: RLStage, cluster: Cluster | None) -> Json:
    """Of the updates alone, at most. Sampling reads the weights for every token of a batch: what it takes, lengths and engine decide."""
    flops = update_flops_at_most(stage)
    if cluster is None or stage.plan.device == "cpu" or stage.precision == "fp32":
        return {"update_flops_at_most": flops, "update_gpu_hours_at_most": None}
    peak = cluster.fp8_flops_per_second if stage.precision == "fp8" else cluster.bf16_flops_per_second
    return {"update_flops_at_most": flops, "update_gpu_hours_at_most": flops / (peak * cluster.assumed_mfu) / 3600}
