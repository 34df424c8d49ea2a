"""A plan's parallel sizes as process groups; the only file that names Megatron's parallel_state."""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_ext import device
from megatron_ext.config.plan import TrainPlan
from megatron_ext.errors import ConfigError, LaunchError, MegatronExtError

TIMEOUT_SECONDS = 1800

T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """This rank's place in the plan, and Megatron's groups."""

    plan: TrainPlan
    collection: ProcessGroupCollection
    rank: int
    data_rank: int
    tensor_rank: int
    pipeline_rank: int
    rehearsed: bool = False  # tensors without storage, no other ranks, no Transformer Engine: see `rehearsed_groups`

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.plan.pipeline - 1

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        return torch.device("meta") if self.rehearsed else device.current(self.plan.device)

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, then hand the last pipeline stage's result to every stage."""
        dist.all_reduce(values, group=self.collection.dp_cp)
        if self.plan.pipeline > 1:
            last = dist.get_process_group_ranks(self.collection.pp)[-1]
            dist.broadcast(values, src=last, group=self.collection.pp)
        return values


def environment_ranks() -> tuple[int, int]:
    """(rank, world size) from torchrun's or Slurm's variables; (0, 1) without them."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if all(name in os.environ for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS")):  # a job's script has no step
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    return 0, 1


def _check_reachable(plan: TrainPlan) -> None:
    """`ConfigError` where gloo, which every plan needs, would listen where the ranks of other nodes cannot reach it.

    It listens at the address of this machine's own name, and many systems give that a loopback address.
    """
    name, master = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    if plan.nodes == 1 or "GLOO_SOCKET_IFNAME" in os.environ or _is_loopback(master) or not _is_loopback(name):
        return
    raise ConfigError(
        f"plan: nodes {plan.nodes}, but the name of this machine, {name}, has no address that other nodes could reach (it is a loopback "
        f"address, or none); set GLOO_SOCKET_IFNAME to the network interface between the nodes, as in environment of the cluster's slurm"
    )


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return True


@contextmanager
def process_groups(plan: TrainPlan) -> Iterator[Groups]:
    """Join the process group of the environment, lay the plan over it, and leave it at the end."""
    rank, size = environment_ranks()
    if size != plan.num_ranks:
        raise ConfigError(
            f"plan: {plan.nodes} node(s) x {plan.ranks_per_node} rank(s) = {plan.num_ranks} ranks, but {size} process(es) were started; "
            f"start as many as the plan says, or change plan.nodes or plan.ranks_per_node"
        )
    own = not dist.is_initialized()
    if own:
        if size > 1 and "MASTER_ADDR" not in os.environ:
            raise ConfigError(f"{size} processes were started without MASTER_ADDR and MASTER_PORT, so they cannot meet; set both")
        _check_reachable(plan)
        timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        alone = None if "MASTER_ADDR" in os.environ else dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timeout)
        dist.init_process_group(device.backend(plan.device), store=alone, rank=rank, world_size=size, timeout=timeout)
    try:
        yield lay_out(plan)
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            dist.destroy_process_group()


@contextmanager
def rehearsed_groups(plan: TrainPlan, rank: int) -> Iterator[Groups]:
    """The groups that `rank` of a plan of any size would have, on this machine, with none of the other ranks there.

    torch's fake backend stands for NCCL and gloo: a collective returns at once and leaves its output as it
    was; objects are gathered as if every rank had said what this one says. For a process of its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    create_group, gather_object = parallel_state.create_group, dist.all_gather_object

    def create_fake(*arguments: Any, **options: Any) -> Any:
        return create_group(*arguments, **{**options, "backend": None})  # Megatron names gloo, which would look for its peers

    def gather_own(object_list: Any, obj: Any, group: Any = None) -> Any:  # noqa: ARG001 - torch's call
        object_list[:] = [obj] * len(object_list)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.num_ranks)
    parallel_state.create_group, dist.all_gather_object = create_fake, gather_own
    try:
        yield replace(lay_out(plan), rehearsed=True)
    finally:
        parallel_state.create_group, dist.all_gather_object = create_group, gather_object
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def lay_out(plan: TrainPlan) -> Groups:
    """Make Megatron's groups for `plan` over the running process group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tensor,
        pipeline_model_parallel_size=plan.pipeline,
        virtual_pipeline_model_parallel_size=plan.virtual_pipeline if plan.virtual_pipeline > 1 else None,
        context_parallel_size=plan.context,
        create_gloo_process_groups=True,  # the optimizer state is gathered on the host when a checkpoint is made
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        plan=plan,
        collection=collection,
        rank=dist.get_rank(),
        data_rank=collection.dp.rank(),
        tensor_rank=collection.tp.rank(),
        pipeline_rank=collection.pp.rank(),
    )


def seed_step(groups: Groups, seed: int, tokens: int) -> None:
    """Set every random generator from (seed, tokens before the step, data rank).

    The state is derived, not stored: a resumed step draws what it would have drawn, under any number
    of earlier interruptions. Tensor-parallel ranks share one stream but inside the regions where
    Megatron's tracker gives each its own.
    """
    data_index = groups.data_rank * groups.plan.pipeline + groups.pipeline_rank
    digest = hashlib.sha256(f"{seed}/{tokens}/{data_index}".encode()).digest()
    value = int.from_bytes(digest[:4], "big") % (2**31 - 1)
    torch.manual_seed(value)
    model_parallel_cuda_manual_seed(value, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=groups.tensor_rank, force_reset_rng=True)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agreed(groups: Groups, what: str, work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it is done on all; every rank calls it.

    Where it fails on one, every rank raises that failure: none waits for a rank that has stopped. `LaunchError` for what is not of
    our family, with the traceback in that rank's log.
    """
    box: list[T] = []
    failure: MegatronExtError | None = None
    try:
        box.append(work())
    except MegatronExtError as refusal:
        failure = refusal
    except Exception as defect:  # noqa: BLE001 - whatever it is, the other ranks wait
        traceback.print_exc()
        failure = LaunchError(
            f"{what} failed on rank {groups.rank}: {type(defect).__name__}: {defect}; the traceback is in that rank's log. "
            f"Start the stage again once its cause is gone: it goes on from its last published checkpoint"
        )
    failures: list[MegatronExtError | None] = [None] * groups.plan.num_ranks
    dist.all_gather_object(failures, failure)
    for one in failures:
        if one is not None:
            raise one
    return box[0]


def from_rank_0(groups: Groups, what: str, work: Callable[[], T]) -> T:
    """What rank 0 alone works out, on every rank; its failure too, as `agreed`.

    On a run at work each rank would see another newest state, and they would wait for one another.
    """
    found: T = broadcast_object(agreed(groups, what, lambda: work() if groups.rank == 0 else None))
    return found


def any_rank(flag: bool, groups: Groups) -> bool:
    """Whether the flag is set on any rank of the stage."""
    if groups.plan.num_ranks == 1:
        return flag
    box = torch.tensor([int(flag)], dtype=torch.int32, device=groups.device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())
