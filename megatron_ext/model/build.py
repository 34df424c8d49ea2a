"""A `ModelConfig` under a plan as Megatron-Core GPTModel chunks of this rank.

On a GPU the layers are Transformer Engine's, BF16 or FP8; on a CPU Megatron's local layers with
our norm and attention, FP32. First weights depend on the seed and each tensor's name alone, so they
are the same under every parallel layout.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext import device
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import Precision, TrainPlan
from megatron_ext.distributed import Groups
from megatron_ext.errors import ConfigError

FP8_CAPABILITY = (8, 9)  # the first compute capability with FP8 matrix products


def build_model(model: ModelConfig, precision: Precision, groups: Groups, seed: int | None) -> list[GPTModel]:
    """This rank's model chunks (one per virtual stage), on its device.

    `seed` None leaves weights unset for a load. `ConfigError` where precision and machine disagree.
    """
    plan = groups.plan
    if not groups.rehearsed:
        check_precision(precision, plan)
    settings = transformer_config(model, precision, plan)
    chunks = []
    for virtual_stage in range(plan.virtual_pipeline):
        stage = virtual_stage if plan.virtual_pipeline > 1 else None
        first, last = virtual_stage == 0, virtual_stage == plan.virtual_pipeline - 1
        chunk = GPTModel(
            config=settings,
            transformer_layer_spec=_layer_spec(settings, plan, stage, groups),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_positions,
            pre_process=groups.is_first_stage and first,
            post_process=groups.is_last_stage and last,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            rope_scaling=model.rope_scaling_factor != 1.0,
            rope_scaling_factor=model.rope_scaling_factor,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        chunks.append(chunk.to(device=groups.device, dtype=settings.params_dtype))
    if seed is not None:
        for chunk in chunks:
            initialize(chunk, model, seed)
    return chunks


def check_precision(precision: Precision, plan: TrainPlan) -> None:
    """Refuse BF16 and FP8 where they cannot run; Megatron-Core itself would train on in silence."""
    if plan.device == "cpu":
        return  # check_plan allows FP32 alone
    if not _has_transformer_engine():
        raise ConfigError(
            f"precision: {precision} on a GPU runs through Transformer Engine, which is not installed; "
            f'install it (pip install "megatron_ext[te]") or use plan.device=cpu with precision=fp32'
        )
    if precision == "fp8":
        capability = device.compute_capability()
        if capability < FP8_CAPABILITY:
            raise ConfigError(f"precision: fp8 needs compute capability {FP8_CAPABILITY} or newer, this GPU has {capability}; use bf16")


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_config(model: ModelConfig, precision: Precision, plan: TrainPlan) -> TransformerConfig:
    """Megatron's settings for a model under a plan."""
    gpu = plan.device == "gpu"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.channels_per_head,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        perform_initialization=True,  # without it Megatron does not mark weights as split; `initialize` then fills them anew
        use_cpu_initialization=not gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision != "fp32",
        tensor_model_parallel_size=plan.tensor,
        sequence_parallel=plan.sequence_parallel,
        pipeline_model_parallel_size=plan.pipeline,
        virtual_pipeline_model_parallel_size=plan.virtual_pipeline if plan.virtual_pipeline > 1 else None,
        context_parallel_size=plan.context,
        overlap_p2p_comm=plan.overlap_p2p,
        batch_p2p_comm=not plan.overlap_p2p,
        batch_p2p_sync=gpu,
        calculate_per_token_loss=True,  # the loss is a sum over valid tokens over their global count
        deterministic_mode=not gpu,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        masked_softmax_fusion=gpu,
        persist_layer_norm=gpu,
        apply_rope_fusion=gpu and _has_transformer_engine(),  # its kernel; so a GPU's settings can be made on any machine
        gradient_accumulation_fusion=False,  # needs apex's extension
        cross_entropy_loss_fusion=gpu and precision != "fp32",  # its gradients are BF16
        **_fp8(precision),
        **_recompute(plan),
    )


def _fp8(precision: Precision) -> dict[str, Any]:
    """E4M3 forward, E5M2 backward, each tensor scaled by its own largest value: no history that a checkpoint would have to keep."""
    return {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if precision == "fp8" else {}


def _recompute(plan: TrainPlan) -> dict[str, Any]:
    if plan.recompute == "none":
        return {}
    if plan.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _layer_spec(settings: TransformerConfig, plan: TrainPlan, stage: int | None, groups: Groups) -> Any:
    if plan.device == "gpu" and not groups.rehearsed:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_layernorm)
    from megatron_ext.model.layers import CoreAttention, RMSNorm

    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=settings.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if settings.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(settings, vp_stage=stage, pp_rank=groups.pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


@torch.no_grad()
def initialize(chunk: GPTModel, model: ModelConfig, seed: int) -> None:
    """Fill a chunk's weights: each tensor from (seed, its name, its layer), cut to this rank's part.

    Normal with `init_std`; projections into the residual stream with `init_std / sqrt(2 layers)`
    (GPT-2's rule, which Megatron follows); norms one; biases zero. The whole tensor is drawn and
    then cut, so the values do not depend on tensor or pipeline parallelism.
    """
    for entry in nested_values(chunk.sharded_state_dict()):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for part in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(part, ShardedTensor):
                _fill(part, model, seed)


def _fill(part: ShardedTensor, model: ModelConfig, seed: int) -> None:
    axes = part.prepend_axis_num  # leading axes that stack layers in the checkpoint; the tensor lacks them
    layer = part.global_offset[:axes]
    if part.key.endswith(("layernorm.weight", "layer_norm_weight")):
        part.data.fill_(1.0)
        return
    if part.key.endswith("bias"):
        part.data.zero_()
        return
    std = model.init_std
    if part.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)
    digest = hashlib.sha256(f"{seed}/{part.key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    whole = torch.randn(part.global_shape[axes:], generator=generator) * std
    window = tuple(slice(start, start + size) for start, size in zip(part.global_offset[axes:], part.local_shape, strict=True))
    part.data.copy_(whole[window])
