"""What a reinforcement learning stage needs at most: bytes of its fullest GPU, tokens, FLOPs, bytes on disk.

Pure arithmetic for a plan. The update is a training step whose micro-batch is one packed sequence of `tokens_per_micro_batch`,
so `config.memory` counts it. The engine's cache, with every slot at its longest, takes turns with activations and logits: it is
given back before an update. vLLM keeps its share of the GPU throughout, and so does another one that validates.
How long responses are is not known before: whatever depends on it is counted as if every prompt were as long as allowed and
every response as long as its cap, and is an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_ext.config.budget import Budget
from megatron_ext.config.memory import Memory, checkpoint_bytes, element_bytes, export_bytes, memory_of_stage
from megatron_ext.config.plan import ParallelPlan, TrainPlan
from megatron_ext.config.rl import ProgressLengths
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.stages import RLStage

# Compressed, of a response's token: its id and its log-probability stand as 4 bytes each, which hardly compress, and 4 are enough
# for its text, its weight version and its share of the prompt. English text of 400-token responses took 7.6.
ROLLOUT_BYTES_PER_TOKEN = 12


@dataclass(frozen=True)
class RLMemory(Memory):
    """Bytes on one GPU of a reinforcement learning stage, by what holds them."""

    reference_bytes: int  # frozen weights that the KL penalty compares with
    cache_bytes: int  # of our own engine: keys and values of what it samples
    vllm_bytes: int | None  # the shares of the GPU of all vLLM engines, 0 where there is none; None: of an unknown GPU

    @property
    def total_bytes(self) -> int:
        """What stays, and the larger of what an update adds and what sampling adds."""
        stays = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reference_bytes + (self.vllm_bytes or 0)
        return stays + max(self.activations_bytes + self.logits_bytes, self.cache_bytes)


def rl_memory(stage: RLStage, gpu_memory_bytes: int | None) -> RLMemory:
    """Memory of the fullest GPU: one of the first pipeline stage or of the last. `gpu_memory_bytes` None: of an unknown GPU."""
    places = sorted({0, stage.plan.pipeline - 1})
    return max((_of_place(stage, place, gpu_memory_bytes) for place in places), key=lambda parts: parts.total_bytes)


def _of_place(stage: RLStage, place: int, gpu_memory_bytes: int | None) -> RLMemory:
    plan = stage.plan
    parts = memory_of_stage(stage.model, _one_update(plan), stage.precision, _as_training(plan), place)
    return RLMemory(
        weights_bytes=parts.weights_bytes,
        gradients_bytes=parts.gradients_bytes,
        optimizer_bytes=parts.optimizer_bytes,
        activations_bytes=parts.activations_bytes,
        logits_bytes=_logit_bytes(stage) if place == plan.pipeline - 1 else 0,
        reference_bytes=parts.weights_bytes if stage.objective.kl_coefficient else 0,
        cache_bytes=cache_bytes(stage) if plan.engine == "megatron" else 0,
        vllm_bytes=_vllm_bytes(plan, gpu_memory_bytes),
    )


def _vllm_bytes(plan: RLPlan, gpu_memory_bytes: int | None) -> int | None:
    if not plan.num_vllm_engines:
        return 0
    return None if gpu_memory_bytes is None else plan.num_vllm_engines * int(plan.engine_memory_share * gpu_memory_bytes)


def _as_training(plan: ParallelPlan) -> TrainPlan:
    """The layout as a training plan with one packed sequence a micro-batch."""
    return TrainPlan(**{field.name: getattr(plan, field.name) for field in fields(ParallelPlan)})


def _one_update(plan: RLPlan) -> Budget:
    """As many micro-batches as fill the pipeline, interleaved or not: more of them keep no more activations."""
    return Budget(steps=1, sequences_per_batch=2 * plan.pipeline * plan.data_parallel, sequence_length=plan.tokens_per_micro_batch)


def _logit_bytes(stage: RLStage) -> int:
    """Logits of one chunk, (w + 8) c V / t, and the gradient of the output matrix beside them, (4 + w) V h / t.

    Chunks of c positions follow one another; of each there are the logits as the model gives them, in FP32, and their gradient in
    FP32. The output matrix's gradient adds up in FP32, a chunk's share in w.
    """
    wide, chunk = element_bytes(stage.precision), min(stage.plan.logits_chunk_tokens, stage.plan.tokens_per_micro_batch)
    rows = stage.model.padded_vocab_size // stage.plan.tensor
    return (wide + 8) * chunk * rows + (4 + wide) * rows * stage.model.hidden_size


def cache_bytes(stage: RLStage) -> int:
    """Cached keys and values of `engine_slots` responses at their longest, on one GPU.

    2 x layers x groups x channels x w x tokens / (tensor x pipeline).
    """
    model, plan = stage.model, stage.plan
    per_token = 2 * model.num_layers * model.num_query_groups * model.channels_per_head * element_bytes(stage.precision)
    return per_token * plan.engine_slots * stage.longest_context_tokens // (plan.tensor * plan.pipeline)


def caps_by_step(stage: RLStage) -> list[tuple[int, int]]:
    """(rollout steps, cap in tokens) in order; where the steps of a rise are not known before, the largest cap for all."""
    lengths = stage.lengths
    if not isinstance(lengths, ProgressLengths) or lengths.unit != "rollout_steps":
        return [(stage.steps, lengths.largest_cap_tokens)]
    ends = [*(row.after for row in lengths.caps[1:]), stage.steps]
    spans = [(min(end, stage.steps) - row.after, row.cap_tokens) for row, end in zip(lengths.caps, ends, strict=True)]
    return [(steps, cap) for steps, cap in spans if steps > 0]


def response_tokens_at_most(stage: RLStage) -> int:
    """Tokens of all responses that are trained on."""
    return sum(steps * cap for steps, cap in caps_by_step(stage)) * stage.rollouts.responses_per_step


def update_flops_at_most(stage: RLStage) -> float:
    """Model FLOPs of all updates; sampling, and scoring by a reference, are not in it."""
    prompt = stage.rollouts.max_prompt_tokens
    each = ((steps, prompt + cap) for steps, cap in caps_by_step(stage))
    return stage.rollouts.responses_per_step * sum(steps * length * stage.model.flops_per_token(length) for steps, length in each)


def kept_rl_checkpoints(stage: RLStage) -> int:
    """Checkpoints that a finished stage leaves: the last, and the newest `keep_checkpoints` of the others."""
    routine = len(set(range(stage.plan.save_every_steps, stage.steps + 1, stage.plan.save_every_steps)) - {stage.steps})
    return 1 + min(stage.plan.keep_checkpoints, routine)


def rl_checkpoints_bytes(stage: RLStage) -> int:
    """Disk for the checkpoints of a finished stage, and for its Hugging Face folder."""
    export = export_bytes(stage.model, stage.precision) if stage.plan.export_last else 0
    return kept_rl_checkpoints(stage) * checkpoint_bytes(stage.model, stage.precision, stage.plan) + export


def rollouts_bytes_at_most(stage: RLStage) -> int:
    """Disk for the recorded rollouts, those that dynamic sampling puts aside included."""
    sampled = response_tokens_at_most(stage) * (1 + stage.rollouts.resample_uninformative)
    bound = stage.plan.keep_rollouts_bytes
    return sampled * ROLLOUT_BYTES_PER_TOKEN if bound is None else min(bound, sampled * ROLLOUT_BYTES_PER_TOKEN)
