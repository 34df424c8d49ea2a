"""The process that an `EngineProcess` starts: one engine, which samples on whether or not it is asked.

`python -m megatron_ext.generation.engine_server FD PID`: the channel to the caller, and the caller's process. What it prints
is its log. It speaks when it is asked: any number of `working` while it waits for a generation, then one answer.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from megatron_ext.errors import MegatronExtError
from megatron_ext.generation.engine import Generation
from megatron_ext.generation.read_back import ReadableEngine
from megatron_ext.interruption import leave_to_parent
from megatron_ext.model.bucket import Bucket

LOOK_SECONDS = 1.0  # how often an idle server looks whether its caller still lives
WORKING_SECONDS = 1.0  # at least between two signs of life


class SteppedEngine(ReadableEngine, Protocol):
    """An engine that can be stopped between two forward passes to listen."""

    @property
    def is_busy(self) -> bool:
        """Whether requests are not answered yet."""

    def step(self) -> list[Generation]:
        """One forward pass; the generations that ended in it."""


class _Server:
    def __init__(self, engine: SteppedEngine, channel: Connection) -> None:
        self._engine, self._channel = engine, channel
        self._ended: list[Generation] = []

    def run(self, caller: int) -> None:
        """Until the caller closes, or is gone."""
        while os.getppid() == caller:
            if self._channel.poll(0 if self._engine.is_busy else LOOK_SECONDS):
                order, value = self._channel.recv()
                if order == "close":
                    return
                self._answer(order, value)
            elif self._engine.is_busy:
                self._ended += self._engine.step()

    def _answer(self, order: str, value: Any) -> None:
        try:
            answer = "done", self._carry_out(order, value)
        except MegatronExtError as error:
            answer = "refused", error
        self._channel.send((*answer, self._engine.stats()))

    def _carry_out(self, order: str, value: Any) -> Any:
        if order == "submit":
            self._engine.submit(value)
        elif order == "poll":
            return self._poll()
        elif order == "held":
            return self._engine.held(value)
        else:
            assert order == "update", order
            buckets = received(self._channel)
            try:
                self._engine.update_weights(value, buckets)
            finally:
                for _ in buckets:  # a refusal leaves the rest on its way
                    pass
        return None

    def _poll(self) -> list[Generation]:
        said = time.monotonic()
        while not self._ended and self._engine.is_busy:
            self._ended += self._engine.step()
            if time.monotonic() - said >= WORKING_SECONDS:  # from here, between passes: a pass that hangs is silent
                said = time.monotonic()
                self._channel.send(("working", None, self._engine.stats()))
        ended, self._ended = self._ended, []
        return ended


def send_bucket(channel: Connection, bucket: Bucket) -> None:
    """Send a bucket's tensors, each as its name, dtype and shape, and its bytes."""
    for name, tensor in bucket.tensors:
        channel.send((name, tensor.dtype, tuple(tensor.shape)))
        channel.send_bytes(_bytes(tensor.detach().cpu().contiguous()))


def received(channel: Connection) -> Iterator[Bucket]:
    """Tensors as they arrive, a bucket each, until None arrives."""
    while (described := channel.recv()) is not None:
        name, dtype, shape = described
        tensor = torch.empty(shape, dtype=dtype)
        channel.recv_bytes_into(_bytes(tensor))
        yield Bucket(((name, tensor),))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def main() -> None:
    """Make the engine that standard input describes, and serve it."""
    leave_to_parent()
    channel, caller = Connection(int(sys.argv[1])), int(sys.argv[2])
    os.set_inheritable(channel.fileno(), False)
    make, arguments = pickle.load(sys.stdin.buffer)
    try:
        engine = make(*arguments)
    except MegatronExtError as error:
        channel.send(("refused", error, None))
        return
    channel.send(("done", None, engine.stats()))
    _Server(engine, channel).run(caller)
    engine.close()


if __name__ == "__main__":
    main()
