"""Records are written beside the updates: in a thread of rank 0, one step after the other.

A step's metrics, and a checkpoint that needs its record, wait for it (`digest`): what they name is on the disk. Compressing and
hashing, nearly all of the work, leave Python's lock to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_ext.rl.rollouts import Batch
from megatron_ext.training.hooks import say


class Recorder:
    """Calls `write`, which gives the digest of what it wrote, for one batch after the other; its thread begins with the first."""

    def __init__(self, write: Callable[[Batch], str]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._under_way: dict[int, Future[str]] = {}

    def begin(self, batch: Batch) -> None:
        """Write a step's batch as soon as those before it are written."""
        self._under_way[batch.step] = self._thread.submit(self._write, batch)

    def digest(self, step: int) -> str:
        """Wait until a step's batch is written; raises what `write` raised. Asked once for each batch."""
        return self._under_way.pop(step).result()

    def close(self) -> None:
        """Let what is under way end, and say what of it failed: something else has stopped the stage, and is told as its cause."""
        self._thread.shutdown(wait=True)
        for step, written in self._under_way.items():
            if failure := written.exception():
                say(f"step {step}: its rollouts are not recorded: {type(failure).__name__}: {failure}")
