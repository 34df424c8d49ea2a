"""How many processes a stage's verb becomes, and with how many threads each: by hand and under `launch --local`.

Threads are pinned because a sum over 2 threads differs in its last bits from a sum over 1.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_ext.config.plan import TrainPlan
from megatron_ext.errors import LaunchError
from megatron_ext.runs import Run

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_environment(stage: Any) -> dict[str, str]:
    """The variables that pin the threads of one rank; libraries read them once, when they are first imported."""
    threads = stage.plan.threads_per_rank if isinstance(stage.plan, TrainPlan) else 1
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def torchrun_command(run: Run) -> list[str]:
    """The command that starts every rank of a one-node plan on this machine."""
    plan = run.stage.plan
    if plan.nodes > 1:
        raise LaunchError(
            f"{run.path}: the plan has {plan.nodes} nodes x {plan.ranks_per_node} ranks, and this command starts the ranks of one machine; "
            f"start it on every node with torchrun or srun (RANK and WORLD_SIZE set), or launch with {run.name}.plan.nodes=1"
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(plan.num_ranks)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*torchrun, *rendezvous, "-m", "megatron_ext", run.stage.kind, str(run.path)]


def is_a_rank() -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    by_srun = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return "WORLD_SIZE" in os.environ or by_srun


def become_ranks(run: Run, num_ranks: int | None = None) -> None:
    """Pin the threads; where the work takes several ranks (default: the plan's) and this process is none, become torchrun.

    Does not return in the second case. Must run before torch or numpy is imported.
    """
    os.environ.update(thread_environment(run.stage))
    if num_ranks is None:
        num_ranks = run.stage.plan.num_ranks if isinstance(run.stage.plan, TrainPlan) else 1
    if num_ranks > 1 and not is_a_rank():
        command = torchrun_command(run)
        sys.stdout.flush()
        os.execv(command[0], command)
