"""One update of the policy from given samples, and the log-probabilities that it is measured by.

    old = score(state.chunks, samples, groups, ...)      # once a rollout step, where it has several updates
    result = policy_update(state, settings, samples, ...)

Every rank calls both with the same samples in the same order, and gets the same answer. The samples may have been recorded:
an update depends on nothing but them, the weights, the optimizer and the layout.

Shapes: S positions of a row (this rank's part under sequence parallelism), R rows, H hidden, N response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_ext.config.rl import Objective
from megatron_ext.distributed import Groups
from megatron_ext.errors import TrainingError
from megatron_ext.model.logits import evaluating
from megatron_ext.model.token_logprobs import head_weight, token_logprobs, without_head
from megatron_ext.rl.batch import MicroBatch, Sample, micro_batch, place
from megatron_ext.rl.objective import ResponseTokens, policy_loss_sum, statistic_means, statistic_sums
from megatron_ext.training.state import TrainState
from megatron_ext.training.step import apply_gradients, clear_gradients, not_finite

STOPPED = (
    "the update was stopped before the weights moved, so the last checkpoint is good. "
    "Look at the step's recorded rollouts, or launch with a lower learning rate into another --runs"
)


@dataclass(frozen=True)
class UpdateResult:
    """What one update computed, over all its samples: loss, gradient norm before clipping, means by `objective.statistic_means`."""

    loss: float
    grad_norm: float
    statistics: dict[str, float]


@dataclass(frozen=True)
class Scoring:
    """How the log-probabilities of a batch come from hidden states; the numbers as in `policy_update`."""

    head: GPTModel  # the chunk that has the output matrix, on the last stage
    groups: Groups
    temperature: float
    vocab_size: int
    logits_chunk_tokens: int

    def __call__(self, hidden_SRH: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the batch's response tokens and the entropies they were drawn at, N each."""
        return token_logprobs(
            hidden_SRH,
            head_weight(self.head),
            batch.positions_N,
            batch.targets_N,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            chunk_tokens=self.logits_chunk_tokens,
            groups=self.groups,
        )


def policy_update(
    state: TrainState,
    settings: Objective,
    samples: Sequence[Sample],
    *,
    temperature: float,
    tokens_per_micro_batch: int,
    logits_chunk_tokens: int,
    vocab_size: int,
    learning_rate: float,
    seed: int,
    updates_before: int,
    informative_only: bool = False,
) -> UpdateResult:
    """Forward, backward, clip, step: the loss is `policy_loss_sum` of all samples over the sum of all their shares.

    `temperature` is the one that the responses were sampled at; `vocab_size` counts the ids without the vocabulary's padding.
    `seed` and `updates_before` give the random state. Samples whose `old_logprobs` are None (all of them, or none) are an
    update's that comes first after sampling: the old weights are the current ones. With `informative_only`, samples of
    advantage 0 are left out where no KL penalty needs them: the gradient is the same but for the order of its sums, and the
    statistics are of the others. Where no sample counts nothing moves: loss and norm are 0, the statistics nan (`tokens`: 0).
    `TrainingError`, before the weights move, where loss or norm is not finite on any rank.
    """
    groups = state.groups
    counted = [one.weight > 0 and len(one.response) > 0 for one in samples]
    if not any(counted):
        return UpdateResult(0.0, 0.0, statistic_means(dict.fromkeys(_statistic_names(settings), 0.0)))
    assert all(float(one.share).is_integer() for one in samples), "Megatron counts what it divides by in whole numbers"
    trained = [count and not (informative_only and _moves_nothing(settings, one)) for one, count in zip(samples, counted, strict=True)]
    left_out = sum(one.share for one, count, train in zip(samples, counted, trained, strict=True) if count and not train)
    clear_gradients(state, seed, updates_before)
    if not any(trained):  # no gradient: an update by the moments alone
        return _applied(state, 0.0, learning_rate, dict.fromkeys(_statistic_names(settings), 0.0))
    scoring = Scoring(state.chunks[-1], groups, temperature, vocab_size, logits_chunk_tokens)
    batches = _Batches(samples, trained, groups, tokens_per_micro_batch, other_shares=int(left_out))
    reports = _run(state.wrapped, batches, partial(_loss, settings, samples, scoring), forward_only=False)
    names = ["loss", "shares", *_statistic_names(settings)]
    sums = torch.stack(reports).sum(dim=0) if reports else torch.zeros(len(names), dtype=torch.float64, device=groups.device)
    found = dict(zip(names, groups.sum_over_data(sums).tolist(), strict=True))
    return _applied(state, found.pop("loss") / found.pop("shares"), learning_rate, found)


def _applied(state: TrainState, loss: float, learning_rate: float, sums: dict[str, float]) -> UpdateResult:
    applied = apply_gradients(state, loss, learning_rate)
    if applied.finding:
        raise TrainingError(not_finite(applied, STOPPED))
    return UpdateResult(applied.loss, applied.grad_norm, statistic_means(sums))


def score(
    chunks: Sequence[GPTModel],
    samples: Sequence[Sample],
    groups: Groups,
    *,
    temperature: float,
    tokens_per_micro_batch: int,
    logits_chunk_tokens: int,
    vocab_size: int,
) -> list[np.ndarray]:
    """Each sample's response log-probabilities by the model's `chunks`, FP32, in the order given, on every rank.

    The numbers as in `policy_update`. Dropout is off. Under sequence parallelism Megatron wants its random states set
    (`distributed.seed_step`), though nothing is drawn.
    """
    lengths = [len(one.response) for one in samples]
    starts = np.cumsum([0, *lengths])
    scoring = Scoring(chunks[-1], groups, temperature, vocab_size, logits_chunk_tokens)
    batches = _Batches(samples, [length > 0 for length in lengths], groups, tokens_per_micro_batch)
    with evaluating(chunks), torch.no_grad():
        reports = _run(chunks, batches, partial(_scores, scoring), forward_only=True)
    whole_N = torch.zeros(int(starts[-1]), dtype=torch.float32, device=groups.device)
    for placed, logprobs_N in reports:
        for i, part in zip(placed, logprobs_N.split([lengths[i] for i in placed]), strict=True):
            whole_N[starts[i] : starts[i + 1]] = part
    found_N = groups.sum_over_data(whole_N).cpu().numpy()  # each of them is not zero on one data-parallel rank
    return [found_N[start:end].copy() for start, end in pairwise(starts)]


def _statistic_names(settings: Objective) -> list[str]:
    """Of what `_loss` reports, in its order; ranks that hold no loss must know them."""
    nothing = torch.empty(0)
    return list(statistic_sums(settings, ResponseTokens(nothing, nothing, nothing, nothing, nothing), nothing))


def _moves_nothing(settings: Objective, sample: Sample) -> bool:
    return sample.advantage == 0 and not settings.kl_coefficient


class _Batches:
    """This data-parallel rank's micro-batches of those samples that are `chosen`; each iteration makes them anew, one at a time."""

    def __init__(self, samples: Sequence[Sample], chosen: Sequence[bool], groups: Groups, tokens: int, other_shares: int = 0) -> None:
        lengths = [one.num_inputs if is_chosen else 0 for one, is_chosen in zip(samples, chosen, strict=True)]
        self.shape, by_rank = place(lengths, groups.plan, tokens)
        self.samples, self.groups, self.rows = samples, groups, by_rank[groups.data_rank]
        self.other_shares = other_shares if groups.data_rank == 0 else 0

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, rows in enumerate(self.rows):
            made = micro_batch(self.samples, rows, self.shape, self.groups.plan, self.groups.device)
            yield replace(made, shares=made.shares + self.other_shares) if number == 0 else made


def _run(model: Sequence[Any], batches: _Batches, finish: Callable[..., Any], *, forward_only: bool) -> list[Any]:
    """Put every micro-batch through the model; what `finish` reports of each on the last stage, nothing elsewhere."""
    iterators = [iter(batches) for _ in model]
    found: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, finish),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=batches.shape.num_micro_batches,
        seq_length=batches.shape.row_tokens,
        micro_batch_size=batches.shape.num_rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return found


def _forward_step(finish: Callable[..., Any], batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    with without_head(get_attr_wrapped_model(model, "post_process", return_model_obj=True)):
        hidden_SRH = model(batch.tokens_RS, batch.position_ids_RS, batch.mask_R1SS, packed_seq_params=batch.packed)
    return hidden_SRH, partial(finish, batch)


def _scores(scoring: Scoring, batch: MicroBatch, hidden_SRH: torch.Tensor, non_loss_data: bool) -> Any:  # noqa: ARG001 - Megatron's call
    return batch.samples, scoring(hidden_SRH, batch)[0]


def _loss(
    settings: Objective, samples: Sequence[Sample], scoring: Scoring, batch: MicroBatch, hidden_SRH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's per-token form: sum, what it is to be divided by, and what is reported."""
    logprobs_N, entropies_N = scoring(hidden_SRH, batch)
    tokens = _response_tokens(samples, batch, logprobs_N)
    loss = policy_loss_sum(settings, tokens)
    statistics = statistic_sums(settings, tokens, entropies_N)
    device = loss.device
    report = torch.stack([loss.detach().double(), torch.tensor(batch.shares, dtype=torch.float64, device=device), *statistics.values()])
    return loss, torch.tensor(batch.shares, dtype=torch.int, device=device), report


def _response_tokens(samples: Sequence[Sample], batch: MicroBatch, logprobs_N: torch.Tensor) -> ResponseTokens:
    own = [samples[i] for i in batch.samples]
    device = logprobs_N.device

    def of_responses(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), batch.lengths)).to(device)

    def of_tokens(arrays: list[np.ndarray | None]) -> torch.Tensor | None:
        given = [each for each in arrays if each is not None]
        assert len(given) in (0, len(arrays)), "some samples have these log-probabilities and some do not"
        if arrays and not given:
            return None
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *given])).to(device)

    old_N = of_tokens([one.old_logprobs for one in own])
    return ResponseTokens(
        logprobs_T=logprobs_N,
        old_logprobs_T=logprobs_N.detach() if old_N is None else old_N,
        advantages_T=of_responses([one.advantage for one in own]),
        weights_T=of_responses([one.weight for one in own]),
        engine_logprobs_T=of_tokens([one.engine_logprobs for one in own]),
        reference_logprobs_T=of_tokens([one.reference_logprobs for one in own]),
    )
