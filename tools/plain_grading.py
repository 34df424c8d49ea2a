"""What tools/bench_grading.py compares with: math-verify as its README shows it, in processes with a memory limit.

A file of its own, because the processes of a pool import what they call by its module's name.
"""

from __future__ import annotations

import logging
import resource

from math_verify import parse, verify

MEMORY_BYTES = 2**30


def as_its_readme(gold: str, response: str) -> bool:
    """math-verify with its own time-outs, which are alarms."""
    return verify(parse(f"${gold}$"), parse(response))


def without_alarms(gold: str, response: str) -> bool:
    """The same; the pool keeps the time."""
    logging.disable()  # math-verify warns of every answer without a time-out
    return verify(parse(f"${gold}$", parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None)


def limit_memory() -> None:
    """What a process of the plain pool does first."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
