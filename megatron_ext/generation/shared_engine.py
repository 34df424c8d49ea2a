"""One rank's engine for all ranks of its model copy: vLLM is driven by the first of them, and all get its answers.

An error of the engine is raised on every rank of the copy, so none waits for one that has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_ext.config.model import ModelConfig
from megatron_ext.distributed import Groups
from megatron_ext.errors import MegatronExtError
from megatron_ext.generation.engine import EngineStats, Generation, Request
from megatron_ext.generation.read_back import ReadableEngine, check_held, drawn_names, watched
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.handover import hugging_face_buckets

Answer = TypeVar("Answer")


class SharedEngine:
    """See `generation.engine.Engine`. Every rank of the copy makes it, and makes the same calls."""

    def __init__(self, make: Callable[[], ReadableEngine], groups: Groups) -> None:
        """`make` is called on the copy's first rank alone."""
        self._group = groups.collection.mp
        self._leader = dist.get_process_group_ranks(self._group)[0]
        self._leads = groups.rank == self._leader
        self._engine: ReadableEngine | None = None
        self._stats = EngineStats()

        def make_own() -> None:
            self._engine = make()

        self._together(make_own)

    def submit(self, requests: Sequence[Request]) -> None:
        """See `Engine.submit`."""
        self._together(lambda: self._own.submit(requests))

    def poll(self) -> list[Generation]:
        """See `Engine.poll`."""
        return self._together(lambda: self._own.poll())

    def update_weights(self, version: int, tensors: Iterable[Bucket] | None) -> None:
        """Hand over buckets that all ranks of the copy put together, each iterating its own."""
        assert tensors is not None, "this engine has weights of its own"
        buckets = iter(tensors)

        def update() -> None:
            try:
                self._own.update_weights(version, buckets)
            finally:
                for _ in buckets:  # the other ranks go on to the end
                    pass

        if not self._leads:
            for _ in buckets:
                pass
        self._together(update)

    def held(self, names: Sequence[str]) -> dict[str, int]:
        """See `ReadableEngine.held`."""
        return self._together(lambda: self._own.held(names))

    def stats(self) -> EngineStats:
        """As of the last call that all ranks made."""
        return self._stats

    def close(self) -> None:
        """See `Engine.close`; no rank waits for another."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _own(self) -> ReadableEngine:
        assert self._engine is not None, "another rank's engine"
        return self._engine

    def _together(self, call: Callable[[], Answer]) -> Answer:
        """The leader's answer, or its error, on every rank."""
        box: list[tuple[Answer | None, MegatronExtError | None, EngineStats]] = [(None, None, self._stats)]
        if self._leads:
            try:
                box = [(call(), None, self._own.stats())]
            except MegatronExtError as error:
                box = [(None, error, self._stats)]
        dist.broadcast_object_list(box, src=self._leader, group=self._group)
        answer, refusal, self._stats = box[0]
        if refusal is not None:
            raise refusal
        return answer  # type: ignore[return-value]


def hand_over(
    engine: ReadableEngine,
    chunks: Sequence[GPTModel],
    model: ModelConfig,
    groups: Groups,
    version: int,
    bucket_bytes: int,
    dtype: torch.dtype,
) -> None:
    """Give an engine of `dtype` the running model's weights; every rank of the copy calls it.

    Where there are several, `engine` is their `SharedEngine`. `TrainingError` where what is read back of them is not what was sent.
    """
    names, sent = drawn_names(model, version), dict[str, int]()
    engine.update_weights(version, watched(hugging_face_buckets(chunks, model, groups, bucket_bytes), names, dtype, sent))
    check_held(engine.held(names), sent, version)
