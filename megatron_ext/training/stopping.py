"""Stopping a loop on request: all ranks at the end of the same step, when it is saved."""

from __future__ import annotations

from typing import NoReturn

import torch.distributed as dist

from megatron_ext import interruption
from megatron_ext.distributed import Groups, any_rank
from megatron_ext.errors import Interrupted

_has_begun = [False]


def begin_loop(groups: Groups) -> None:
    """From here on requests are answered at the end of a step; one that came before, to any rank, ends the stage here on all."""
    interruption.defer()
    if asked_to_stop(groups):
        raise Interrupted(f"asked to stop{_by()} before its first step, and ended with nothing new to save; the same command begins again")
    _has_begun[0] = True


def has_begun() -> bool:
    """Whether this process is past the start of its loop."""
    return _has_begun[0]


def asked_to_stop(groups: Groups) -> bool:
    """Whether any rank was; every rank calls it at the end of each step. A reduction of one number where there are several ranks."""
    return any_rank(bool(interruption.request()), groups)


def stop(step: int) -> NoReturn:
    """End the stage after a step whose save is settled; every rank calls it."""
    dist.barrier()  # rank 0 keeps the store from which the others hear that the save was published
    raise Interrupted(f"asked to stop{_by()}, and ended after step {step}, which is saved; the same command goes on from there")


def _by() -> str:
    return f" ({interruption.request()})" if interruption.request() else " (by way of another rank)"
