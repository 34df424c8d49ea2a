"""Bytes of a training stage: of its fullest GPU, by what holds them, and of its checkpoints on disk.

Pure arithmetic for a plan, from the sizes of the model alone. Symbols: s tokens of a sequence on
this rank (divided by context), b sequences of a micro-batch, h hidden, q = heads x channels,
k = 2 x groups x channels (keys and values), f feed-forward width, V padded vocabulary, t tensor,
w bytes of an element (2 in BF16 and FP8, 4 in FP32).

Left out, for `HEADROOM` to cover: the CUDA context, NCCL's buffers, the allocator's fragments, and
what scales with s x b alone (ids, norms' scales).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.budget import Budget
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import ParallelPlan, Precision, TrainPlan, micro_batches

HEADROOM = 0.10  # share of a GPU kept free for what the formulas leave out
FILES_PER_RANK = 1  # torch's checkpoint writer puts all that a rank saves into one file
FILES_PER_CHECKPOINT = 4  # .metadata, common.pt, metadata.json, manifest.json


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a training stage, by what holds them."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts, which do coincide: at the end of a micro-batch's forward pass."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes + self.logits_bytes

    def fits(self, gpu_memory_bytes: int) -> bool:
        """Whether the parts and the headroom fit a GPU."""
        return self.total_bytes <= gpu_memory_bytes * (1 - HEADROOM)


def memory(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan) -> Memory:
    """Memory of the fullest GPU.

    That is one of the first pipeline stage (most micro-batches in flight) or of the last (logits).
    """
    stages = {0, plan.pipeline - 1}
    return max((memory_of_stage(model, budget, precision, plan, stage) for stage in sorted(stages)), key=lambda m: m.total_bytes)


def memory_of_stage(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan, stage: int) -> Memory:
    """Memory of a GPU of pipeline stage `stage`."""
    parameters = parameters_per_gpu(model, plan, stage)
    shards = plan.data_parallel * plan.context if plan.distributed_optimizer else 1
    matrices = (model.num_layer_parameters - model.num_layer_norm_parameters) * model.num_layers // (plan.tensor * plan.pipeline)
    return Memory(
        # FP8 keeps BF16 weights, and of each layer's matrices an FP8 copy and its transpose.
        weights_bytes=element_bytes(precision) * parameters + (2 * matrices if precision == "fp8" else 0),
        gradients_bytes=4 * parameters,  # main gradients are FP32 in every precision
        optimizer_bytes=-(-optimizer_bytes_per_parameter(precision) * parameters // shards),
        activations_bytes=activation_bytes(model, budget, precision, plan, stage),
        logits_bytes=logit_bytes(model, budget, precision, plan) if stage == plan.pipeline - 1 else 0,
    )


def element_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def optimizer_bytes_per_parameter(precision: Precision) -> int:
    """Two FP32 moments; and FP32 master weights where the model's own are BF16."""
    return 8 if precision == "fp32" else 12


def parameters_per_gpu(model: ModelConfig, plan: ParallelPlan, stage: int) -> int:
    """Parameters of a GPU in pipeline stage `stage`.

    layers / pipeline x (matrices / t + two norms), the embedding / t on the first stage, the head / t
    and the last norm on the last. Tied embeddings are one matrix on one stage, a copy each on two.
    """
    norms = model.num_layer_norm_parameters
    layers = model.num_layers // plan.pipeline * ((model.num_layer_parameters - norms) // plan.tensor + norms)
    embedding = model.num_embedding_parameters // plan.tensor
    first, last = stage == 0, stage == plan.pipeline - 1
    matrices = 1 if first and last and model.tied_embeddings else int(first) + int(last)
    return layers + matrices * embedding + (model.hidden_size if last else 0)


def layer_activation_bytes(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan) -> int:
    """What one layer keeps of one micro-batch for its backward pass, without full recomputation.

    Korthikanti et al. 2022 count s b h (34 + 5 a s / h) for GPT's layer. Ours has grouped queries,
    SwiGLU, no dropout mask where dropout is 0, and flash attention, which keeps no s x s matrix:

        inputs of two norms and of the two products after them   (2w + 2n) s b h, / t with sequence parallelism
        queries, keys, values, attention's output                w s b (2q + k) / t
        softmax statistics of flash attention, FP32              4 s b heads / t
        gate and up, and their product                           (2w + n) s b f / t

    n is the size in which the input of a matrix product is kept: w, or 1 byte in FP8, where the
    output projection keeps such a copy (s b q / t) besides attention's own output. FP32 on a GPU has
    no flash attention: its softmax keeps 4 s s b heads / t instead. Selective recomputation drops
    attention's statistics or matrix.
    """
    wide = element_bytes(precision)
    narrow = 1 if precision == "fp8" else wide
    tokens = plan.micro_batch * budget.sequence_length // plan.context
    residual = tokens * model.hidden_size // (plan.tensor if plan.sequence_parallel else 1)
    heads = model.num_attention_heads // plan.tensor
    queries = tokens * heads * model.channels_per_head
    keys_values = 2 * tokens * model.num_query_groups * model.channels_per_head // plan.tensor
    feed_forward = tokens * model.ffn_hidden_size // plan.tensor

    inputs = (2 * wide + 2 * narrow) * residual + (2 * residual if model.hidden_dropout else 0)
    attention = wide * (2 * queries + keys_values) + (queries if precision == "fp8" else 0)
    flash = not (precision == "fp32" and plan.device == "gpu")
    softmax = 4 * tokens * heads * (1 if flash else budget.sequence_length)
    return inputs + attention + (0 if plan.recompute == "selective" else softmax) + (2 * wide + narrow) * feed_forward


def layers_in_flight(model: ModelConfig, budget: Budget, plan: TrainPlan, stage: int) -> int:
    """Layers of stage `stage` times the micro-batches that each keeps activations of.

    One-forward-one-backward: min(pipeline - stage, micro-batches) each. Interleaved with v chunks:
    2 (pipeline - stage - 1) + (v - 1) pipeline + 1 chunks in all (Megatron-Core's warm-up, plus one).
    """
    count = micro_batches(plan, budget)
    chunks = plan.virtual_pipeline
    layers_per_chunk = model.num_layers // (plan.pipeline * chunks)
    if chunks == 1:
        return layers_per_chunk * min(plan.pipeline - stage, count)
    return layers_per_chunk * min(2 * (plan.pipeline - stage - 1) + (chunks - 1) * plan.pipeline + 1, count * chunks)


def activation_bytes(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan, stage: int) -> int:
    """Activations kept on a GPU of pipeline stage `stage` at its peak.

    Layers in flight x one layer's bytes. With full recomputation each keeps only its input, w s b h
    (/ t with sequence parallelism), and one layer at a time is whole. The last stage adds the inputs
    of the last norm and of the head.
    """
    layer = layer_activation_bytes(model, budget, precision, plan)
    tokens = plan.micro_batch * budget.sequence_length // plan.context
    residual = element_bytes(precision) * tokens * model.hidden_size // (plan.tensor if plan.sequence_parallel else 1)
    count = layers_in_flight(model, budget, plan, stage)
    kept = count * residual + layer if plan.recompute == "full" else count * layer
    return kept + (2 * residual if stage == plan.pipeline - 1 else 0)


def logit_bytes(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan) -> int:
    """Logits of one micro-batch: (w + 4) s b V / t; the cross-entropy works on an FP32 copy of BF16 logits, in place on FP32 ones."""
    tokens = plan.micro_batch * budget.sequence_length // plan.context
    per_logit = 4 if precision == "fp32" else 2 + 4
    return per_logit * tokens * model.padded_vocab_size // plan.tensor


def checkpoint_bytes(model: ModelConfig, precision: Precision, plan: ParallelPlan) -> int:
    """One checkpoint: weights, two FP32 moments and, in BF16 or with the distributed optimizer, FP32 master weights."""
    master = 4 if precision != "fp32" or plan.distributed_optimizer else 0
    return (element_bytes(precision) + 8 + master) * model.num_parameters


def files_per_checkpoint(plan: ParallelPlan) -> int:
    """Files of one checkpoint, at most: a rank with little to write leaves one out."""
    return FILES_PER_RANK * plan.num_ranks + FILES_PER_CHECKPOINT


def pinned_steps(budget: Budget, plan: TrainPlan) -> tuple[int, ...]:
    """Steps whose checkpoints are never removed: `pin_tokens`, nearest to each multiple of `pin_every_tokens`, exported ones, the last."""
    multiples = range(plan.pin_every_tokens, budget.tokens + 1, plan.pin_every_tokens) if plan.pin_every_tokens else ()
    named = {budget.step_at(tokens) for tokens in plan.pin_tokens} | set(export_steps(budget, plan))
    return tuple(sorted({budget.nearest_step(tokens) for tokens in multiples} - {0} | named | {budget.steps}))


def export_steps(budget: Budget, plan: TrainPlan) -> tuple[int, ...]:
    """Steps whose checkpoints are also written as Hugging Face folders."""
    named = {budget.step_at(tokens) for tokens in plan.export_tokens}
    return tuple(sorted(named | ({budget.steps} if plan.export_last else set())))


def kept_checkpoints(budget: Budget, plan: TrainPlan) -> int:
    """Checkpoints that a finished stage leaves: the pinned ones and the newest `keep_checkpoints` of the others."""
    pinned = pinned_steps(budget, plan)
    routine = set(range(plan.save_every_steps, budget.steps + 1, plan.save_every_steps)) - set(pinned)
    return len(pinned) + min(plan.keep_checkpoints, len(routine))


def disk_bytes(model: ModelConfig, budget: Budget, precision: Precision, plan: TrainPlan) -> int:
    """Disk for the checkpoints of a finished stage, and for its Hugging Face folders."""
    exports = len(export_steps(budget, plan)) * export_bytes(model, precision)
    return kept_checkpoints(budget, plan) * checkpoint_bytes(model, precision, plan) + exports


def export_bytes(model: ModelConfig, precision: Precision) -> int:
    """Disk for the weights of one Hugging Face folder."""
    return element_bytes(precision) * model.num_parameters


def save_host_bytes(model: ModelConfig, precision: Precision, plan: ParallelPlan) -> int:
    """Host memory that the ranks of one node need at most for a pinned checkpoint.

    Megatron-Core gathers the FP32 weights and moments of its part of the model, P parameters, on every
    rank: 12 P bytes, and while a bucket of B parameters is put together 8 B more. An asynchronous save
    copies what is written, (w + 12) P bytes on each rank that writes: one a tensor and pipeline place.
    Routine checkpoints, and all without the distributed optimizer, gather nothing.
    """
    parameters = max(parameters_per_gpu(model, plan, stage) for stage in {0, plan.pipeline - 1})
    writers = min(plan.ranks_per_node, plan.tensor * plan.pipeline)
    copies = writers * (element_bytes(precision) + 12) * parameters if plan.asynchronous_saves else 0
    if not plan.distributed_optimizer:
        return copies
    return plan.ranks_per_node * (12 * parameters + 8 * _largest_bucket(model, plan, parameters)) + copies


def _largest_bucket(model: ModelConfig, plan: ParallelPlan, parameters: int) -> int:
    """Parameters: Megatron-Core cuts buckets on the first of several pipeline stages only, at max(40M, 1M x data), after a whole tensor."""
    if plan.device == "cpu" or plan.pipeline > 1 or plan.virtual_pipeline > 1:
        return parameters
    return min(parameters, max(40_000_000, 1_000_000 * plan.data_parallel * plan.context) + model.num_embedding_parameters // plan.tensor)
