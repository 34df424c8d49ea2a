"""Log-probabilities and entropies of chosen tokens from a model's last hidden states, its head split over tensor-parallel ranks.

Only the positions that are asked for go through the head, a chunk of them at a time. Forward keeps two numbers a position;
backward computes a chunk's logits anew. The products run in the model's precision, all else in FP32 (a model in FP64: in FP64).

Shapes: S sequence (under sequence parallelism this rank's part of it), R rows, H hidden, N positions asked for, C positions of a
chunk, V this rank's part of the padded vocabulary, W its part of the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from megatron_ext.distributed import Groups


@contextmanager
def without_head(chunk: GPTModel) -> Iterator[None]:
    """In here the last stage's forward returns its hidden states SRH behind the final norm, as the other stages do.

    For the forward alone: where Megatron looks for a tied output matrix, after the backward, it must see the head again.
    """
    has_head = chunk.post_process
    chunk.post_process = False
    try:
        yield
    finally:
        chunk.post_process = has_head


def head_weight(chunk: GPTModel) -> torch.Tensor:
    """The last stage's output matrix VH, tied or not."""
    weight: torch.Tensor = (
        chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else chunk.output_layer.weight
    )
    return weight


def token_logprobs(
    hidden_SRH: torch.Tensor,
    weight_VH: torch.Tensor,
    positions_N: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int,
    groups: Groups,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy, N each, in nats, of softmax(logits / temperature); the same on every tensor-parallel rank.

    `positions_N` are s x R + r of the whole sequence's states, `targets_N` token ids below `vocab_size`; rows of the padded
    vocabulary from `vocab_size` on have probability 0. At most `chunk_tokens` positions' logits are there at a time.
    Both results carry exact gradients. Every rank of the tensor-parallel group calls it, with the same positions.
    """
    assert temperature > 0, "greedy sampling draws from no distribution"
    group = groups.collection.tp
    if groups.plan.sequence_parallel:
        hidden_SRH = gather_from_sequence_parallel_region(hidden_SRH, tensor_parallel_output_grad=True, group=group)
    chosen_NH = hidden_SRH.flatten(0, 1).index_select(0, positions_N)
    if not groups.plan.sequence_parallel:
        chosen_NH = copy_to_tensor_model_parallel_region(chosen_NH, group=group)
    head = _Head(groups.tensor_rank * len(weight_VH), vocab_size, temperature, chunk_tokens, group)
    found: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(chosen_NH, weight_VH, targets_N, head)
    return found


class _Head:
    """This rank's part of the output matrix as a function of hidden states, forward and backward, a chunk at a time."""

    def __init__(self, first_id: int, vocab_size: int, temperature: float, chunk_tokens: int, group: Any) -> None:
        self.first_id, self.vocab_size = first_id, vocab_size
        self.temperature, self.chunk_tokens, self.group = temperature, chunk_tokens, group

    def real(self, weight_VH: torch.Tensor) -> torch.Tensor:
        """The rows WH that are tokens; the vocabulary's padding stands behind them, on the last ranks."""
        return weight_VH[: max(0, self.vocab_size - self.first_id)]

    def logits(self, hidden_CH: torch.Tensor, weight_WH: torch.Tensor) -> torch.Tensor:
        """CW over the temperature, FP32 or better."""
        logits_CW = hidden_CH @ weight_WH.t()
        return logits_CW.to(torch.promote_types(logits_CW.dtype, torch.float32)).div_(self.temperature)

    def own_targets(self, targets_C: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a chunk whose targets this rank holds, and their columns."""
        columns_C = targets_C - self.first_id
        rows = ((columns_C >= 0) & (columns_C < width)).nonzero().squeeze(1)
        return rows, columns_C[rows]

    def forward(self, hidden_CH: torch.Tensor, weight_WH: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """log p, entropy and the logarithm of the normaliser (with the temperature in it), C each."""
        logits_CW = self.logits(hidden_CH, weight_WH)
        largest_C = logits_CW.amax(dim=1) if logits_CW.shape[1] else logits_CW.new_full((len(logits_CW),), -torch.inf)
        dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=self.group)
        shifted_CW = logits_CW.sub_(largest_C[:, None])
        rows, columns = self.own_targets(targets_C, shifted_CW.shape[1])
        sums_3C = shifted_CW.new_zeros(3, len(shifted_CW))
        sums_3C[0, rows] = shifted_CW[rows, columns]
        weights_CW = shifted_CW.exp()
        sums_3C[1] = weights_CW.sum(dim=1)
        sums_3C[2] = weights_CW.mul_(shifted_CW).sum(dim=1)
        dist.all_reduce(sums_3C, group=self.group)
        logs_C = sums_3C[1].log()
        return sums_3C[0] - logs_C, logs_C - sums_3C[2] / sums_3C[1], largest_C + logs_C

    def logit_gradients(
        self,
        logits_CW: torch.Tensor,
        targets_C: torch.Tensor,
        norms_C: torch.Tensor,
        entropies_C: torch.Tensor,
        of_logprobs_C: torch.Tensor | None,
        of_entropies_C: torch.Tensor | None,
    ) -> torch.Tensor:
        """CW: d log p = onehot - p and d entropy = -p (log p + entropy), each times what comes from above, before the temperature."""
        logprobs_CW = logits_CW.sub_(norms_C[:, None])
        found_CW = logprobs_CW.exp()
        of_logprobs_C = torch.zeros_like(norms_C) if of_logprobs_C is None else of_logprobs_C
        factors_CW = of_logprobs_C[:, None]
        if of_entropies_C is not None:  # nothing takes it in today's objective, and it costs two passes over the logits
            factors_CW = logprobs_CW.add_(entropies_C[:, None]).mul_(of_entropies_C[:, None]).add_(factors_CW)
        found_CW.mul_(-factors_CW)
        rows, columns = self.own_targets(targets_C, found_CW.shape[1])
        found_CW[rows, columns] += of_logprobs_C[rows]
        return found_CW.div_(self.temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Gradients of the hidden states are this rank's part of a sum over the tensor-parallel group, which its caller takes."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, head: _Head) -> Any:
        weight_WH = head.real(weight_VH)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        found_3N = torch.empty(3, len(hidden_NH), dtype=dtype, device=hidden_NH.device)
        for start in range(0, len(hidden_NH), head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            found_3N[0, chunk], found_3N[1, chunk], found_3N[2, chunk] = head.forward(hidden_NH[chunk], weight_WH, targets_N[chunk])
        logprobs_N, entropies_N, norms_N = found_3N
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, entropies_N, norms_N)
        ctx.set_materialize_grads(False)
        ctx.head = head
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, of_logprobs_N: torch.Tensor | None, of_entropies_N: torch.Tensor | None) -> Any:
        hidden_NH, weight_VH, targets_N, entropies_N, norms_N = ctx.saved_tensors
        head: _Head = ctx.head
        if of_logprobs_N is None and of_entropies_N is None:
            return None, None, None, None
        weight_WH = head.real(weight_VH)
        of_hidden_NH = torch.empty_like(hidden_NH)
        of_weight_VH = torch.zeros_like(weight_VH, dtype=norms_N.dtype)  # many chunks add up in it
        for start in range(0, len(hidden_NH), head.chunk_tokens):
            chunk = slice(start, start + head.chunk_tokens)
            of_logits_CW = head.logit_gradients(
                head.logits(hidden_NH[chunk], weight_WH),
                targets_N[chunk],
                norms_N[chunk],
                entropies_N[chunk],
                None if of_logprobs_N is None else of_logprobs_N[chunk],
                None if of_entropies_N is None else of_entropies_N[chunk],
            ).to(hidden_NH.dtype)
            of_hidden_NH[chunk] = of_logits_CW @ weight_WH
            of_weight_VH[: len(weight_WH)] += of_logits_CW.t() @ hidden_NH[chunk]
        return of_hidden_NH, of_weight_VH.to(weight_VH.dtype), None, None
