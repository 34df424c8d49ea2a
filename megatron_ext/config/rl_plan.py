"""How a reinforcement learning stage runs: the layout of its trainer, its engine, its grading; and what the plan must fit."""

from __future__ import annotations

from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import ParallelPlan, Precision, at_least, check_cpu, check_layout, check_split
from megatron_ext.errors import ConfigError

EngineName = Literal["megatron", "vllm", "vllm_process"]


@config
class RLPlan(ParallelPlan):
    """Parallelism, engine, grading and records of one attempt.

    engine: `megatron` generates with the trainer's own weights, in its processes and under its layout; `vllm` in the process of
    rank 0 of each model copy; `vllm_process` in a process beside it.
    validation_engine: `vllm_process` is a second engine, which validates beside the next step; a save waits for its scores.
    """

    tokens_per_micro_batch: int = 16_384  # prompts and responses, packed; the released scripts' 16,384 a GPU
    logits_chunk_tokens: int = 1024  # positions whose logits are there at a time; 1,024 x 128,256 in FP32 are 525 MB
    skip_uninformative: bool = (
        True  # groups without a difference have no gradient: leave them out of the pass (statistics then are of the others)
    )
    engine: EngineName = "megatron"
    validation_engine: Literal["same", "vllm_process"] = "same"
    engine_slots: int = 256  # responses that one model copy samples at a time
    engine_memory_share: float = 0.5  # of a GPU, for each vLLM
    grading_workers: int = 2
    grading_seconds: float = 2.0  # of processor time, for one answer; the slowest of 3,495 honest ones took 0.16 s
    grading_memory_bytes: int = 2 * 2**30  # of one worker
    keep_rollouts_bytes: int | None = None  # of recorded rollouts; the oldest go first, but for those behind checkpoints; None: all

    def __post_init__(self) -> None:
        check_layout(self)
        at_least(self, 1, "tokens_per_micro_batch", "logits_chunk_tokens", "engine_slots", "grading_workers", "grading_memory_bytes")
        if not self.grading_seconds > 0:
            raise ConfigError(f"plan: grading_seconds is {self.grading_seconds}, must be positive")
        if not 0 < self.engine_memory_share < 1:
            raise ConfigError(f"plan: engine_memory_share is {self.engine_memory_share}, must lie in (0, 1)")
        if self.device == "gpu" and self.num_vllm_engines * self.engine_memory_share >= 1:
            raise ConfigError(
                f"plan: engine={self.engine} and validation_engine={self.validation_engine} take engine_memory_share "
                f"{self.engine_memory_share} of a GPU each, which leaves nothing to train with; lower it, or use validation_engine=same"
            )
        if self.keep_rollouts_bytes is not None and self.keep_rollouts_bytes < 0:
            raise ConfigError(f"plan: keep_rollouts_bytes is {self.keep_rollouts_bytes}, must not be negative")
        if self.engine == "vllm" and self.num_ranks > 1:
            raise ConfigError(
                f"plan: engine=vllm samples within the trainer's process, beside a single rank, but nodes {self.nodes} x ranks_per_node "
                f"{self.ranks_per_node} = {self.num_ranks} ranks; use engine=vllm_process, or engine=megatron"
            )
        if self.context > 1:
            raise ConfigError(f"plan: context {self.context} in reinforcement learning; responses are packed, not split: use context=1")

    @property
    def num_vllm_engines(self) -> int:
        """Of each model copy."""
        return (self.engine != "megatron") + (self.validation_engine != "same")


def check_rl_plan(model: ModelConfig, longest_tokens: int, precision: Precision, plan: RLPlan) -> None:
    """Raise `ConfigError` where the plan does not fit the model or the longest sequence (prompt and response)."""
    check_split(model, plan)
    if plan.tokens_per_micro_batch < longest_tokens:
        raise ConfigError(
            f"plan: tokens_per_micro_batch {plan.tokens_per_micro_batch:,} is less than the longest prompt and response, "
            f"{longest_tokens:,} tokens; a sequence is not split: raise it, or lower the caps"
        )
    if plan.device == "cpu":
        check_cpu(precision, plan)
