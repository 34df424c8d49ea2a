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
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.config.faults import Faults
from megatron_ext.distributed import Groups, seed_step
from megatron_ext.errors import TrainingError
from megatron_ext.training.guard import Finding, GuardState
from megatron_ext.training.guard import judge as judge_step
from megatron_ext.training.state import TrainState, apply_hyperparameters

Batch = dict[str, torch.Tensor | None]
STOPPED = (
    "the step was stopped before the weights moved, so the last checkpoint is good. "
    "Look at the step's documents, or launch with other faults or a lower learning rate into another --runs"
)


Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # mask BS, losses BS: sum, count, report
Judge = Callable[[float, float], Finding | None]


@dataclass(frozen=True)
class Applied:
    """What became of a step's gradients: its mean loss, and their norm before clipping.

    With a `finding` the update was left out: weights and optimizer are as they were, and the numbers this rank's own.
    """

    loss: float
    grad_norm: float
    finding: Finding | None = None


@dataclass(frozen=True)
class StepResult:
    """What one step computed: mean loss over valid tokens, and the rest as in `Applied`."""

    loss: float
    grad_norm: float
    valid_tokens: int
    finding: Finding | None = None


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    learning_rate: float,
    seed: int,
    tokens_before: int,
    tamper: Callable[[], None] = lambda: None,
    judge: Judge | None = None,
) -> StepResult:
    """Forward, backward, judge, clip, update.

    `batches` are this data-parallel rank's micro-batches; `seed` and the lineage's `tokens_before`
    give the random state. The loss is the sum over valid tokens of all ranks and micro-batches over
    their global count, so accumulation equals one large batch.
    `judge` is given the loss and the norm, the same on every rank and nan where they are not finite on
    any; what it finds leaves the update out. Without one, such numbers raise `TrainingError` before the
    weights move.
    `tamper` runs between backward and norm; tests put faults there.
    """
    clear_gradients(state, seed, tokens_before)
    loss, valid_tokens = forward(state, batches, backward=True)
    tamper()
    applied = apply_gradients(state, loss, learning_rate, judge)
    result = StepResult(applied.loss, applied.grad_norm, valid_tokens, applied.finding)
    if applied.finding and judge is None:
        raise TrainingError(not_finite(result))
    return result


def clear_gradients(state: TrainState, seed: int, before: int) -> None:
    """Begin a step: the random state of (seed, what was done before it), training mode, gradients of zero."""
    seed_step(state.groups, seed, before)
    for chunk in state.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()


def apply_gradients(state: TrainState, loss: float, learning_rate: float, judge: Judge | None = None) -> Applied:
    """Finish a step whose backward is done: norm, agreement of the ranks, judgement, clip, update.

    `loss` is this rank's view of the step's mean loss. Without a `judge`, numbers that are not finite are found, and no others.
    """
    state.optimizer.prepare_grads()
    grad_norm = float(state.optimizer.get_grad_norm())
    agreed_loss, agreed_norm = _agreed(state.groups, loss, grad_norm)
    finding = (judge or _only_finite)(agreed_loss, agreed_norm)
    if finding is not None:
        return Applied(loss, grad_norm, finding)
    _clip(state, grad_norm)
    apply_hyperparameters(state, learning_rate)
    state.optimizer.step_with_ready_grads()
    return Applied(agreed_loss, agreed_norm)


def forward(state: TrainState, batches: Sequence[Batch], backward: bool) -> tuple[float, int]:
    """Mean loss over the valid tokens of all data-parallel ranks, and their count."""
    sums = forward_sums(state, batches, backward)
    total = state.groups.sum_over_data(sums)
    loss_sum, count = total.tolist()
    return loss_sum / count if count else math.nan, int(count)


def forward_sums(state: TrainState, batches: Sequence[Batch], backward: bool) -> torch.Tensor:
    """[sum of losses, valid tokens] of this rank's micro-batches in FP64; zeros off the last stage."""
    reports = forward_reports(state, batches, backward, _loss)
    if not reports:
        return torch.zeros(2, dtype=torch.float64, device=state.groups.device)
    return torch.stack(reports).sum(dim=0)


def forward_reports(state: TrainState, batches: Sequence[Batch], backward: bool, loss: Loss) -> list[torch.Tensor]:
    """What `loss` reports of each micro-batch of this rank; nothing off the last stage."""
    first_tokens = batches[0]["tokens"]
    assert first_tokens is not None
    micro_batch, sequence_length = first_tokens.shape
    iterators = [iter(batches) for _ in state.wrapped]
    found: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=state.wrapped if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=len(batches),
        seq_length=sequence_length * state.groups.plan.context,  # Megatron divides it again
        micro_batch_size=micro_batch,
        forward_only=not backward,
    )
    return found


def _forward_step(loss: Loss, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    losses_BS = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    mask_BS = batch["loss_mask"]
    assert mask_BS is not None
    return losses_BS, partial(loss, mask_BS)


def _loss(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's per-token form: sum, count, and what is reported."""
    total = (losses_BS.float() * mask_BS).sum()
    count = mask_BS.sum()
    return total, count.to(torch.int), torch.stack([total.detach().double(), count.double()])


def _agreed(groups: Groups, *values: float) -> list[float]:
    """Each value as every rank is to see it: nan where it is not finite on any, else the largest.

    The loss is the same everywhere, but without the distributed optimizer each data-parallel rank has a norm of its own.
    """
    finite = [math.isfinite(value) for value in values]
    known = [value if is_finite else -math.inf for value, is_finite in zip(values, finite, strict=True)]
    box = torch.tensor([*known, *(not one for one in finite)], dtype=torch.float64, device=groups.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    numbers: list[float] = box.tolist()
    return [math.nan if bad else value for value, bad in zip(numbers[: len(values)], numbers[len(values) :], strict=True)]


def _only_finite(loss: float, grad_norm: float) -> Finding | None:
    return judge_step(Faults(), GuardState(), loss, grad_norm)


def not_finite(result: StepResult | Applied, way_out: str = STOPPED) -> str:
    """What is not finite, in words: the number itself on the rank that has it."""
    assert result.finding is not None
    name, value = ("loss", result.loss) if result.finding.reason == "loss not finite" else ("gradient norm", result.grad_norm)
    found = f"not finite on another rank ({value} here)" if math.isfinite(value) else f"{value}"
    return f"{name} is {found}; {way_out}"


def _clip(state: TrainState, grad_norm: float) -> None:
    bound = state.optimizer_settings.clip_norm
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        parameters = optimizer.get_parameters()
        if bound > 0 and parameters and not optimizer.is_stub_optimizer:
            clip_grad_by_total_norm_fp32(parameters, max_norm=bound, total_norm=grad_norm)
