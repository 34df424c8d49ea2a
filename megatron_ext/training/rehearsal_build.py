"""One rank's real objects without its peers and without storage: model, optimizer, part of a checkpoint.

The model, DistributedDataParallel, the optimizer and the sharded state dict are those that training
builds, by the same calls. Their tensors have shapes but no memory (torch's meta device), and torch's
fake process group stands for the other ranks, so a rank of a thousand fits a laptop.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import SavePlan
from torch.overrides import TorchFunctionMode

from megatron_ext.config.stages import TrainStage
from megatron_ext.distributed import rehearsed_groups
from megatron_ext.errors import CheckpointError
from megatron_ext.training.state import TrainState, build_state

META = torch.device("meta")


class _WithoutStorage(TorchFunctionMode):
    """Whatever asks for a device gets the meta device; numbers that ask for none, such as step counts, stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.Tensor.cpu:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not options:
            return torch.empty(0, dtype=args[0].dtype).type()  # Megatron compares it with a GPU's or a CPU's, never with meta's
        if options.get("device") is not None:
            options["device"] = META
        return func(*args, **options)


@contextlib.contextmanager
def built(stage: TrainStage, rank: int) -> Iterator[TrainState]:
    """The training state of `rank`, as it is before the first step, with its optimizer's moments in place."""
    with rehearsed_groups(stage.plan, rank) as groups, _WithoutStorage():
        state = build_state(stage, groups, None)
        for optimizer in optimizers(state):
            if not isinstance(optimizer, DistributedOptimizer):  # that one makes its moments when they are asked for
                optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        yield state


def optimizers(state: TrainState) -> list[Any]:
    """Megatron's optimizers of a rank, out of the chain that holds them."""
    return list(getattr(state.optimizer, "chained_optimizers", [state.optimizer]))


@dataclass(frozen=True)
class Part:
    """What one rank would write of a checkpoint."""

    plan: SavePlan
    tensor_bytes: int
    object_bytes: int  # serialized Python objects, such as parameter groups

    @property
    def size_bytes(self) -> int:
        """Bytes of the rank's file, but for the container's own."""
        return self.tensor_bytes + self.object_bytes


def part_of(sharded_state: dict[str, Any]) -> Part:
    """A rank's part of a checkpoint, by torch's save planner from Megatron's sharded state dict."""
    sharded, _ = save_preprocess(sharded_state, False)
    named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    values = mcore_to_pyt_state_dict(named, False)
    planner = _planner()
    planner.set_up_planner(values, None, is_coordinator=False)
    plan = planner.create_local_plan()
    tensors = sum(
        item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in plan.items if item.tensor_data
    )
    objects = sum(values[item.index.fqn].getbuffer().nbytes for item in plan.items if item.tensor_data is None)
    return Part(plan, tensors, objects)


def check_together(parts: list[Part], what: str) -> None:
    """Plan a checkpoint from the parts of all ranks that write one; `CheckpointError` where they overlap or leave gaps.

    torch's planner does the same on rank 0 of a job; it would pass over a piece that two ranks write.
    """
    pieces = Counter((item.index.fqn, item.index.offset) for part in parts for item in part.plan.items if item.tensor_data)
    twice = [name for (name, _), number in pieces.items() if number > 1]
    if twice:
        raise CheckpointError(f"{what}: {len(twice)} piece(s) are written by more than one rank, the first of {twice[0]}")
    try:
        _planner().create_global_plan([part.plan for part in parts])
    except ValueError as cause:
        raise CheckpointError(f"{what}: the ranks' parts do not make a whole: {cause}") from cause


def _planner() -> MCoreSavePlanner:
    return MCoreSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=False)


@dataclass(frozen=True)
class _Peers:
    """A data-parallel group as another of its ranks sees it."""

    own: int
    number: int

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.number


def peer_parts(optimizer: DistributedOptimizer) -> list[Part]:
    """The optimizer's part of a routine checkpoint of every data-parallel rank beside this one, by Megatron's own arithmetic."""
    number = optimizer.data_parallel_group.size()
    return [part_of({"optimizer": _seen_by(optimizer, _Peers(rank, number))}) for rank in range(number)]


def _seen_by(optimizer: DistributedOptimizer, group: _Peers) -> dict[str, Any]:
    """The sharded optimizer state that the data-parallel rank of `group` would hold."""
    peer: Any = copy.copy(optimizer)
    peer.data_parallel_group = group
    peer.gbuf_ranges = [peer._build_gbuf_range_map(_owned(buffer, group)) for buffer in optimizer.buffers]
    lengths = {
        parameter: len(ranges["param"])
        for buckets in (part for ranges in peer.gbuf_ranges for part in ranges.values())
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    }

    def tensors(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {name: torch.empty(lengths[parameter], device=META) for name in ("param", "exp_avg", "exp_avg_sq")}

    peer._get_main_param_and_optimizer_states = tensors
    sharded: dict[str, Any] = peer.sharded_param_state_dp_reshardable({}, False, {})
    return sharded


def _owned(buffer: Any, group: _Peers) -> Any:
    seen = copy.copy(buffer)
    seen.data_parallel_group = group
    return seen
