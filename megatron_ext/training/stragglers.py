"""Ranks that are slower than the others: every step waits for the slowest, and no step's own time says which that was.

At each validation every rank times the same small matrix product, which waits for nobody, and rank 0 names those that took much longer
than the median. It says nothing of slow networks: that is the check of nodes before a job.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch.distributed as dist

from megatron_ext.node_check import matrix_seconds
from megatron_ext.training.hooks import Context, Hook, Record

SLOW = 1.5  # times the median; of two ranks, whose median lies between them, one must take three times as long as the other
SIDES = {"cpu": 256, "gpu": 4096}  # of the matrices: milliseconds, and little memory
Measured = tuple[str, float]  # host, seconds


class StragglerHook(Hook):
    """Says on rank 0 which ranks are slow, with their hosts."""

    def __init__(self, warn: Callable[[str], None], measure: Callable[[Literal["cpu", "gpu"], int], float] = matrix_seconds) -> None:
        self._warn, self._measure = warn, measure

    def validation(self, context: Context, records: list[Record]) -> None:  # noqa: ARG002
        """Every rank measures; where there is one rank there is nothing to compare."""
        plan = context.run.stage.plan
        if plan.num_ranks == 1:
            return
        found: list[Measured] = [("", 0.0)] * plan.num_ranks
        dist.all_gather_object(found, (os.uname().nodename, self._measure(plan.device, SIDES[plan.device])))
        words = straggler_words(found)
        if words and context.groups.rank == 0:
            self._warn(f"step {context.progress.step}: WARNING: {words}")


def straggler_words(measured: Sequence[Measured], slow: float = SLOW) -> str:
    """'rank 3 on n2 took 21.0 ms for what others do in 10.1 ms (2.1 x)' of each slow rank; '' where none is. The median is that of all."""
    median = statistics.median(seconds for _, seconds in measured)
    slower = [(rank, host, seconds) for rank, (host, seconds) in enumerate(measured) if seconds > slow * median > 0]
    named = [
        f"rank {rank} on {host} took {seconds * 1e3:.1f} ms for what others do in {median * 1e3:.1f} ms ({seconds / median:.1f} x)"
        for rank, host, seconds in sorted(slower, key=lambda one: -one[2])[:8]
    ]
    more = f"; and {len(slower) - 8} more ranks" if len(slower) > 8 else ""
    return "; ".join(named) + more
