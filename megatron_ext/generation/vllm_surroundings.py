"""What vLLM changes in the process it runs in, and what belongs to the trainer there: random states, environment, process group."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random states and number of threads afterwards as before: vLLM seeds and draws from the process's own generators."""
    states, threads, set_threads = (random.getstate(), np.random.get_state()), torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng(devices=[torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []):
        try:
            yield
        finally:
            torch.set_num_threads = set_threads  # on a CPU vLLM puts a function there that does nothing
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def default_group_kept() -> Iterator[None]:
    """vLLM ends the process's default group with its own ones; within this, the default one stays."""
    destroy = dist.destroy_process_group

    def destroy_given(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_given
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def environment_kept() -> Iterator[None]:
    """vLLM prepares the environment for processes of its own (LD_PRELOAD, LOCAL_WORLD_SIZE, ...), which ours must not get.

    What bears vLLM's name stays: it is read again later.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(before)
