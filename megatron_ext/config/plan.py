"""How a stage runs: parallel sizes, micro-batches, intervals. May change from attempt to attempt.

`check_plan` holds every rule of Megatron-Core and Transformer Engine that a plan can break, the
silent ones first; each refusal shows its arithmetic and the way out.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron_ext.config.base import config
from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import ConfigError

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16", "fp8"]
Device = Literal["cpu", "gpu"]
LAYOUT_KEYS = ("tensor", "pipeline", "virtual_pipeline", "context")  # what a routine checkpoint is bound to


@config
class ParallelPlan:
    """What every stage that trains weights plans: its ranks, their layout, its intervals and its checkpoints."""

    device: Device = "gpu"
    nodes: int = 1
    ranks_per_node: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline rank; more than 1 interleaves
    overlap_p2p: bool = False  # separate, overlapped sends; needed for interleaving at pipeline=2
    context: int = 1
    distributed_optimizer: bool = True
    recompute: Recompute = "none"
    threads_per_rank: int = 1
    log_every_steps: int = 1
    save_every_steps: int = 1000
    validate_every_steps: int = 1000
    export_last: bool = False  # write the stage's last checkpoint as a Hugging Face folder too
    asynchronous_saves: bool = False  # write from a copy in memory while training goes on
    on_failed_save: Literal["stop", "go_on"] = "stop"  # a full disk, say; the last save of a stage must succeed
    on_damaged_checkpoint: Literal["fall_back", "stop"] = "fall_back"  # to the newest whole one of the run, recorded
    keep_checkpoints: int = 3  # newest, besides pinned ones and the last

    def __post_init__(self) -> None:
        check_layout(self)

    @property
    def num_ranks(self) -> int:
        """Processes of the stage."""
        return self.nodes * self.ranks_per_node

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.num_ranks // self.model_parallel


@config
class TrainPlan(ParallelPlan):
    """Parallelism, batching and intervals of one attempt of a training stage."""

    micro_batch: int = 1
    loader_workers: int = 0
    pin_every_tokens: int = 0  # also save at the step nearest to each multiple; 0: only the interval and the end
    pin_tokens: tuple[int, ...] = ()  # also save at these steps; a graph adds the points that its stages start from
    export_tokens: tuple[int, ...] = ()  # write Hugging Face folders of these points beside the training; each is pinned too
    validation_sequences: int = 64  # held-out sequences per source

    def __post_init__(self) -> None:
        check_layout(self)
        at_least(self, 1, "micro_batch")
        at_least(self, 0, "loader_workers", "pin_every_tokens", "validation_sequences")
        for key in ("pin_tokens", "export_tokens"):
            if any(tokens < 1 for tokens in getattr(self, key)):
                raise ConfigError(f"plan: {key} is {list(getattr(self, key))}, but nothing is saved before step 1; name tokens above 0")


def at_least(plan: Any, least: int, *keys: str) -> None:
    for key in keys:
        if getattr(plan, key) < least:
            raise ConfigError(f"plan: {key} is {getattr(plan, key)}, must {'not be negative' if least == 0 else f'be at least {least}'}")


def check_layout(plan: ParallelPlan) -> None:
    at_least(plan, 1, "nodes", "ranks_per_node", "tensor", "pipeline", "virtual_pipeline", "context", "threads_per_rank",
              "log_every_steps", "save_every_steps", "validate_every_steps", "keep_checkpoints")  # fmt: skip
    if plan.num_ranks % plan.model_parallel:
        raise ConfigError(
            f"plan: nodes {plan.nodes} x ranks_per_node {plan.ranks_per_node} = {plan.num_ranks} ranks is no multiple of "
            f"tensor {plan.tensor} x pipeline {plan.pipeline} x context {plan.context} = {plan.model_parallel}; "
            f"change one of them"
        )
    if plan.sequence_parallel and plan.tensor == 1:
        raise ConfigError("plan: sequence_parallel needs tensor > 1; switch it off or raise tensor")
    if plan.virtual_pipeline > 1 and plan.pipeline == 1:
        raise ConfigError(f"plan: virtual_pipeline {plan.virtual_pipeline} needs pipeline > 1")
    if plan.virtual_pipeline > 1 and plan.pipeline == 2 and not plan.overlap_p2p:
        raise ConfigError(
            "plan: interleaving (virtual_pipeline > 1) at pipeline=2 without overlap_p2p trains on wrong gradients: "
            "Megatron-Core matches the forward and backward messages of the two ranks by order. "
            "Set overlap_p2p=true, or pipeline=4, or virtual_pipeline=1"
        )


def micro_batches(plan: TrainPlan, budget: Budget) -> int:
    """Micro-batches per data-parallel rank and step."""
    return budget.sequences_per_batch // (plan.micro_batch * plan.data_parallel)


def check_plan(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan) -> None:
    """Raise `ConfigError` where the plan does not fit the model or the batch."""
    check_split(model, plan)
    _check_batch(budget, plan)
    if budget.sequence_length > model.max_positions:
        raise ConfigError(
            f"budget: sequence_length {budget.sequence_length} exceeds the {model.max_positions} positions of model "
            f"{model.name}; shorten the sequences or choose a model with more positions"
        )
    pieces = {"tensor": plan.tensor if plan.sequence_parallel else 1, "2 x context": 2 * plan.context if plan.context > 1 else 1}
    for key, size in pieces.items():
        if budget.sequence_length % size:
            raise ConfigError(f"plan: sequence_length {budget.sequence_length} is no multiple of {key} = {size}")
    if plan.device == "cpu":
        check_cpu(precision, plan)


def check_split(model: ModelConfig, plan: ParallelPlan) -> None:
    rows = (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.num_query_groups),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("padded vocabulary", model.padded_vocab_size),
    )
    for name, size in rows:
        if size % plan.tensor:
            fits = [t for t in range(1, plan.tensor) if all(s % t == 0 for _, s in rows)]
            raise ConfigError(
                f"plan: tensor {plan.tensor} does not divide {name} {size} of model {model.name} "
                f"({size} / {plan.tensor} = {size / plan.tensor:g}); the next smaller size that fits is {max(fits)}"
            )
    chunks = plan.pipeline * plan.virtual_pipeline
    if model.num_layers % chunks:
        raise ConfigError(
            f"plan: {model.num_layers} layers of model {model.name} do not divide into pipeline {plan.pipeline} x "
            f"virtual_pipeline {plan.virtual_pipeline} = {chunks} chunks"
        )


def _check_batch(budget: Budget, plan: TrainPlan) -> None:
    per_round = plan.micro_batch * plan.data_parallel
    if budget.sequences_per_batch % per_round:
        raise ConfigError(
            f"plan: a batch of {budget.sequences_per_batch} sequences is no multiple of micro_batch {plan.micro_batch} x "
            f"data-parallel {plan.data_parallel} (= {plan.num_ranks} ranks / {plan.model_parallel}) = {per_round}; "
            f"a batch of {budget.sequences_per_batch} feeds at most {budget.sequences_per_batch // plan.micro_batch} data-parallel ranks"
        )
    count = micro_batches(plan, budget)
    if plan.virtual_pipeline > 1 and count % plan.pipeline:
        raise ConfigError(f"plan: interleaving needs the micro-batches per step ({count}) to be a multiple of pipeline {plan.pipeline}")


def check_cpu(precision: Precision, plan: ParallelPlan) -> None:
    if precision != "fp32":
        why = (
            "FP8 needs Transformer Engine and a GPU of the Hopper generation or newer"
            if precision == "fp8"
            else "BF16 runs through Transformer Engine"
        )
        raise ConfigError(f"precision: {precision} is not available with plan.device=cpu ({why}); use fp32 or plan.device=gpu")
    if plan.context > 1:
        raise ConfigError(f"plan: context {plan.context} needs Transformer Engine and plan.device=gpu; use context=1")
