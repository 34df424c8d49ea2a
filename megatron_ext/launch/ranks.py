"""How many processes a stage's verb becomes, and with how many threads each: by hand and under `launch --local`.

Threads are pinned because a sum over 2 threads differs in its last bits from a sum over 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext import interruption
from megatron_ext.attempts import TAKE_OVER
from megatron_ext.config.plan import ParallelPlan
from megatron_ext.errors import LaunchError
from megatron_ext.runs import Run

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Permissions:
    """What a user allows a stage beyond the usual, each by the flag of its name."""

    other_code: bool = False  # go on with what other code began
    take_over: bool = False  # begin although another attempt seems to be at work

    @property
    def words(self) -> list[str]:
        """The flags, for a command that starts the same stage."""
        return [*(["--other-code"] if self.other_code else []), *(["--take-over"] if self.take_over else [])]


NO_PERMISSIONS = Permissions()


def ranks_of(stage: Any) -> int:
    """Processes that a stage's verb becomes."""
    return stage.plan.num_ranks if isinstance(stage.plan, ParallelPlan) else 1


def thread_environment(stage: Any) -> dict[str, str]:
    """The variables that pin the threads of one rank; libraries read them once, when they are first imported."""
    threads = stage.plan.threads_per_rank if isinstance(stage.plan, ParallelPlan) else 1
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def torchrun_command(run: Run, permissions: Permissions = NO_PERMISSIONS, words: Sequence[str] = ()) -> list[str]:
    """The command that starts every rank of a one-node plan on this machine; each does `words` (none: the run's own verb)."""
    plan = run.stage.plan
    if plan.nodes > 1:
        raise LaunchError(
            f"{run.path}: the plan has {plan.nodes} nodes x {plan.ranks_per_node} ranks, and this command starts the ranks of one machine; "
            f"start it on every node with srun, or with torchrun (RANK and WORLD_SIZE set), or launch with {run.name}.plan.nodes=1"
        )
    torchrun = [sys.executable, "-m", "megatron_ext.training.torchrun", "--nnodes", "1", "--nproc-per-node", str(plan.num_ranks)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*torchrun, *rendezvous, "-m", "megatron_ext", *(words or [run.stage.kind, str(run.path), *permissions.words])]


def is_a_rank() -> bool:
    """Whether torchrun or srun started this process as one of several ranks.

    One task of srun alone is none: a shell, say, in which the ranks of a plan are still to be started. Nor is a job's script, which
    has Slurm's variables too, but for the step.
    """
    by_srun = "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return "WORLD_SIZE" in os.environ or by_srun


def become_ranks(run: Run, num_ranks: int | None = None, permissions: Permissions = NO_PERMISSIONS, words: Sequence[str] = ()) -> None:
    """Pin the threads; where the work takes several ranks (default: the plan's) and this process is none, become torchrun.

    Does not return in the second case. Must run before torch or numpy is imported. From here on a stage can be asked to stop.
    """
    os.environ.update(thread_environment(run.stage))
    if permissions.take_over:
        os.environ[TAKE_OVER] = "1"
    if num_ranks is None:
        num_ranks = ranks_of(run.stage)
    if num_ranks > 1 and not is_a_rank():
        command = torchrun_command(run, permissions, words)
        sys.stdout.flush()
        os.execv(command[0], command)
    if not words:
        interruption.listen()
