"""The norm of the gradient, layer by layer, under any layout."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_ext.training.state import TrainState

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
OTHERS = {"embedding": "embedding", "decoder.final_layernorm": "final norm", "output_layer": "output"}


def layer_norms(state: TrainState) -> dict[str, float]:
    """L2 norm of each layer's gradient over all ranks; every rank calls this between backward and update.

    Their squares add up to that of the optimizer's norm, which leaves out the same copies: a weight that
    tensor-parallel ranks share counts on the first of them, a tied output matrix with the embedding, and with the
    distributed optimizer each data-parallel rank has the sum over ranks for its own part alone.
    """
    layers = [f"layer {number}" for number in range(1, state.chunks[0].config.num_layers + 1)]
    names = ["embedding", *layers, "final norm", "output"]
    squares = dict.fromkeys(names, torch.zeros((), dtype=torch.float64, device=state.groups.device))
    for chunk in state.chunks:
        for name, parameter in chunk.named_parameters():
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, state.groups.collection.tp):
                own = torch.linalg.vector_norm(_own_part(state, parameter), dtype=torch.float64)
                squares[_layer(chunk, name)] = squares[_layer(chunk, name)] + own**2
    total = torch.stack(list(squares.values()))
    dist.all_reduce(total, group=state.optimizer.get_grad_stats_parallel_group())
    norms = dict(zip(names, total.sqrt().tolist(), strict=True))
    return {name: norm for name, norm in norms.items() if name != "output" or norm != 0}  # tied: there is none


def _layer(chunk: Any, name: str) -> str:
    """The layer a parameter belongs to, by its number in the whole model."""
    match = _LAYER.match(name)
    if match:
        return f"layer {chunk.decoder.layers[int(match[1])].layer_number}"
    return next(layer for prefix, layer in OTHERS.items() if name.startswith(prefix))


def _own_part(state: TrainState, parameter: Any) -> torch.Tensor:
    """The part of a parameter's gradient that this rank has the sum over data-parallel ranks of."""
    whole: torch.Tensor = parameter.main_grad.view(-1)
    if not state.groups.plan.distributed_optimizer:
        return whole
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if parameter in optimizer.model_param_gbuf_map:
            part = optimizer._get_model_param_range_map(parameter)["param"]
            return whole[part.start : part.end]
    return whole[:0]
