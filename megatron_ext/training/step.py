"""One optimizer step as a free function, and the forward pass that validation shares with it.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.distributed import Groups, any_rank, seed_step
from megatron_ext.errors import TrainingError
from megatron_ext.training.state import TrainState, apply_hyperparameters

Batch = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class StepResult:
    """What one step computed: mean loss over valid tokens, and the gradient norm before clipping."""

    loss: float
    grad_norm: float
    valid_tokens: int


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    learning_rate: float,
    seed: int,
    tokens_before: int,
    tamper: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward, check, clip, update.

    `batches` are this data-parallel rank's micro-batches; `seed` and the lineage's `tokens_before`
    give the random state. The loss is the sum over valid tokens of all ranks and micro-batches over
    their global count, so accumulation equals one large batch.
    A loss or norm that is not finite on any rank raises `TrainingError` before the weights move.
    `tamper` runs between backward and check; tests put faults there.
    """
    seed_step(state.groups, seed, tokens_before)
    for chunk in state.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    loss, valid_tokens = forward(state, batches, backward=True)
    tamper()
    state.optimizer.prepare_grads()
    grad_norm = float(state.optimizer.get_grad_norm())
    _check_finite(state.groups, loss, grad_norm)
    _clip(state, grad_norm)
    apply_hyperparameters(state, learning_rate)
    state.optimizer.step_with_ready_grads()
    return StepResult(loss, grad_norm, valid_tokens)


def forward(state: TrainState, batches: Sequence[Batch], backward: bool) -> tuple[float, int]:
    """Mean loss over the valid tokens of all data-parallel ranks, and their count."""
    sums = forward_sums(state, batches, backward)
    total = state.groups.sum_over_data(sums)
    loss_sum, count = total.tolist()
    return loss_sum / count if count else math.nan, int(count)


def forward_sums(state: TrainState, batches: Sequence[Batch], backward: bool) -> torch.Tensor:
    """[sum of losses, valid tokens] of this rank's micro-batches in FP64; zeros off the last stage."""
    first_tokens = batches[0]["tokens"]
    assert first_tokens is not None
    micro_batch, sequence_length = first_tokens.shape
    iterators = [iter(batches) for _ in state.wrapped]
    reports: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=state.wrapped if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=len(batches),
        seq_length=sequence_length * state.groups.plan.context,  # Megatron divides it again
        micro_batch_size=micro_batch,
        forward_only=not backward,
    )
    if not reports:
        return torch.zeros(2, dtype=torch.float64, device=state.groups.device)
    return torch.stack(reports).sum(dim=0)


def _forward_step(batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    mask_BS = batch["loss_mask"]
    assert mask_BS is not None
    return losses_BS, partial(_loss, mask_BS)


def _loss(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's per-token form: sum, count, and what is reported."""
    total = (losses_BS.float() * mask_BS).sum()
    count = mask_BS.sum()
    return total, count.to(torch.int), torch.stack([total.detach().double(), count.double()])


def _check_finite(groups: Groups, loss: float, grad_norm: float) -> None:
    """Stop all ranks where one is wrong: without the distributed optimizer each data-parallel rank has a norm of its own."""
    if not any_rank(not (math.isfinite(loss) and math.isfinite(grad_norm)), groups):
        return
    name, value = ("loss", loss) if any_rank(not math.isfinite(loss), groups) else ("gradient norm", grad_norm)
    found = f"not finite on another rank ({value} here)" if math.isfinite(value) else f"{value}"
    raise TrainingError(
        f"{name} is {found}; the step was stopped before the weights moved, so the last checkpoint is good. "
        f"Look at the step's documents, lower the learning rate, or start again from the last checkpoint"
    )


def _clip(state: TrainState, grad_norm: float) -> None:
    bound = state.optimizer_settings.clip_norm
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        parameters = optimizer.get_parameters()
        if bound > 0 and parameters and not optimizer.is_stub_optimizer:
            clip_grad_by_total_norm_fp32(parameters, max_norm=bound, total_norm=grad_norm)
