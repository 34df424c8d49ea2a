"""Logits of given tokens from a model under any layout: what a conversion, or an engine, is compared by.

All of them are kept, in FP32, on every rank: for prompts, not for training's batches.

Shapes: B sequences, S sequence, V vocabulary, P padded vocabulary, T this rank's part of P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.distributed import Groups


def logits_BSV(chunks: Sequence[GPTModel], tokens_BS: torch.Tensor, groups: Groups, vocab_size: int) -> torch.Tensor:
    """FP32 logits of int64 tokens, without the rows that pad the vocabulary; the same on every rank of a model's copy.

    Every rank of the copy calls it with the same tokens. Attention is causal, positions count from 0.
    Layouts that ask for a round length (sequence parallelism) or for several micro-batches (interleaving)
    get zeros behind the tokens and copies of the first sequence; neither changes what is returned. Under
    sequence parallelism Megatron wants its random states set (`distributed.seed_step`), though nothing is drawn.
    """
    plan = groups.plan
    assert plan.context == 1, "a context-parallel rank sees a part of each sequence"
    sequences, length = tokens_BS.shape
    rounds = plan.pipeline if plan.virtual_pipeline > 1 else 1  # Megatron interleaves multiples of the pipeline's size
    padded = _padded(tokens_BS.to(groups.device), rounds, plan.tensor if plan.sequence_parallel else 1)
    with evaluating(chunks), torch.no_grad():
        parts = _forward(chunks, padded.chunk(rounds))
    shape = (*padded.shape, vocab_size)
    found_BSV = torch.cat([_whole(part, groups)[..., :vocab_size] for part in parts]) if parts else _room(shape, groups)
    if plan.pipeline > 1:
        last = dist.get_process_group_ranks(groups.collection.pp)[-1]
        dist.broadcast(found_BSV, src=last, group=groups.collection.pp)
    return found_BSV[:sequences, :length]


def _padded(tokens_BS: torch.Tensor, rows_multiple: int, length_multiple: int) -> torch.Tensor:
    sequences, length = tokens_BS.shape
    filled_BS = torch.nn.functional.pad(tokens_BS, (0, -length % length_multiple))
    return torch.cat([filled_BS, filled_BS[:1].expand(-sequences % rows_multiple, -1)])


def _forward(chunks: Sequence[GPTModel], batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's BST part of each micro-batch's logits; nothing off the last stage."""
    micro_batch, length = batches[0].shape
    iterators = [iter(batches) for _ in chunks]
    found: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


def _forward_step(batches: Iterator[torch.Tensor], chunk: GPTModel) -> tuple[torch.Tensor, Any]:
    tokens_BS = next(batches)
    position_ids_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return chunk(tokens_BS, position_ids_BS, None), _as_it_is  # no mask: causal; no labels: logits


def _as_it_is(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:  # noqa: ARG001 - Megatron's call
    return output


def _whole(part_BST: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The tensor-parallel ranks' logits side by side, FP32."""
    own_BST = part_BST.float().contiguous()
    parts_BST = [torch.empty_like(own_BST) for _ in range(groups.plan.tensor)]
    dist.all_gather(parts_BST, own_BST, group=groups.collection.tp)
    return torch.cat(parts_BST, dim=-1)


def _room(shape: tuple[int, ...], groups: Groups) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=groups.device)


@contextmanager
def evaluating(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Without dropout; a model that was training goes on training."""
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
