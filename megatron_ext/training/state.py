"""What training holds, and what of it a checkpoint keeps: model, optimizer, progress.

Random state is not kept: every step derives it (distributed.seed_step). The learning rate is not
kept either: it is a function of the tokens (config.schedule). So neither can be restored wrongly.
Nor are the layers' `_extra_state` entries: Transformer Engine unpickles them, so a checkpoint could
run code, and with FP8 scales taken from the current tensors (model.build) there is nothing in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

from megatron_ext.checkpoint.weights import fill, sharded_weights
from megatron_ext.config.optimizer import Optimizer
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.distributed import Groups, seed_step
from megatron_ext.model.build import build_model


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; `lineage_tokens` counts from scratch or conversion."""

    step: int = 0  # finished steps
    tokens: int = 0
    lineage_tokens: int = 0

    def advanced(self, tokens: int) -> Progress:
        """After one more step of `tokens` tokens."""
        return Progress(self.step + 1, self.tokens + tokens, self.lineage_tokens + tokens)


@dataclass
class TrainState:
    """A rank's part of the model and its optimizer."""

    groups: Groups
    chunks: list[GPTModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    optimizer_settings: Optimizer


def build_state(stage: TrainStage | RLStage, groups: Groups, seed: int | None) -> TrainState:
    """Model and optimizer under the stage's plan; weights from `seed`, or unset (None) for a load."""
    seed_step(groups, stage.seed, 0)  # a GPU's layers, and any validation before the first step, fork the random state
    chunks = build_model(stage.model, stage.precision, groups, seed)
    settings = chunks[0].config
    half = stage.precision != "fp32"
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=half,
        overlap_grad_reduce=stage.plan.device == "gpu",
        use_distributed_optimizer=stage.plan.distributed_optimizer,
        check_for_nan_in_grad=False,  # the step checks loss and norm on every rank, before the update
    )
    wrapped = [
        DistributedDataParallel(settings, ddp, chunk, disable_bucketing=i > 0, pg_collection=groups.collection)
        for i, chunk in enumerate(chunks)
    ]
    settings.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = _build_optimizer(stage, wrapped, half)
    return TrainState(groups, chunks, wrapped, optimizer, stage.optimizer)


def _build_optimizer(stage: TrainStage | RLStage, wrapped: list[DistributedDataParallel], half: bool) -> MegatronOptimizer:
    numbers = stage.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=stage.peak_learning_rate,
        min_lr=0.0,
        weight_decay=numbers.weight_decay,
        adam_beta1=numbers.beta1,
        adam_beta2=numbers.beta2,
        adam_eps=numbers.epsilon,
        clip_grad=numbers.clip_norm,
        bf16=half,
        params_dtype=wrapped[0].module.config.params_dtype,
        use_distributed_optimizer=stage.plan.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(settings, wrapped, config_overrides=get_standard_config_overrides(settings))
    if half:
        for chunk in wrapped:
            chunk.module.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def apply_hyperparameters(state: TrainState, learning_rate: float) -> None:
    """Put this step's rate and the recipe's numbers into every parameter group.

    Loading an optimizer brings the old run's numbers with it; a recipe that changes them would
    otherwise be ignored without a word.
    """
    numbers = state.optimizer_settings
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = numbers.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (numbers.beta1, numbers.beta2)
        group["eps"] = numbers.epsilon


def sharded_model(state: TrainState) -> dict[str, Any]:
    """The model's part of a checkpoint, under Megatron's names."""
    return sharded_weights(state.chunks)


def sharded_state(state: TrainState, layout: str, is_loading: bool = False) -> dict[str, Any]:
    """Model and optimizer as Megatron's sharded state dict.

    `layout` is the distributed optimizer's: 'fully_reshardable' (any plan can load it) or
    'dp_reshardable' (cheap; other data-parallel sizes can); 'replicated' without it.
    """
    model = sharded_model(state)
    metadata = {
        "distrib_optim_sharding_type": layout if layout != "replicated" else "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    whole = model.get("model", model)
    optimizer = state.optimizer.sharded_state_dict(whole, is_loading=is_loading, metadata=metadata)
    _clear_padding(optimizer)
    return {**model, "optimizer": optimizer}


def _clear_padding(part: Any) -> None:
    """Zero what Megatron puts between the parameters of a 'dp_reshardable' shard: memory as it was found, other bits in every save."""
    if isinstance(part, list):
        for one in part:
            _clear_padding(one)
    elif isinstance(part, dict):
        padding = part.get("padding")
        if isinstance(padding, LocalNonpersistentObject) and padding.unwrap():
            for one in part.values():
                if isinstance(one, ShardedTensor):
                    one.data.zero_()
            return
        for one in part.values():
            _clear_padding(one)


def load_model(state: TrainState, loaded: dict[str, Any]) -> None:
    """Put loaded weights into the model."""
    fill(state.chunks, loaded)


def load_optimizer(state: TrainState, loaded: dict[str, Any]) -> None:
    """Put loaded moments and step counts into the optimizer."""
    state.optimizer.load_state_dict(loaded["optimizer"])
