"""An engine without a model, for tests of what carries engines: it writes numbers, and fails where a prompt says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.engine import EngineStats, Generation, Request
from megatron_ext.generation.read_back import EMBEDDING, HEAD, fingerprint

REFUSED, DIES, KILLED, HANGS = 1001, 1002, 1003, 1004  # a prompt's first token
LAST_WORDS = "the engine's last words"


class EngineOfNumbers:
    """A response is as long as its cap; its tokens are the sum of the weights, rounded."""

    def __init__(self, refuses: str = "", dies: str = "") -> None:
        print("an engine of numbers starts", flush=True)
        if dies:
            raise RuntimeError(dies)
        if refuses:
            raise ConfigError(refuses)
        self._running: list[list[Any]] = []
        self._total, self._version = 0, 0
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        if any(request.prompt[0] == REFUSED for request in requests):
            raise ConfigError("a request is refused")
        self._running += [[request, 0] for request in requests]

    def step(self) -> list[Generation]:
        ended = []
        for entry in list(self._running):
            request, length = entry
            if request.prompt[0] == DIES:
                raise RuntimeError(LAST_WORDS)
            if request.prompt[0] == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt[0] == HANGS:
                print("no way out", flush=True)
                time.sleep(3600)
            entry[1] = length + 1
            if entry[1] == request.cap_tokens:
                self._running.remove(entry)
                ended.append(self._generation(request))
        return ended

    def _generation(self, request: Request) -> Generation:
        tokens = np.full(request.cap_tokens, self._total, np.int32)
        versions = np.full(request.cap_tokens, self._version, np.int32)
        return Generation(request.id, tokens, np.zeros(request.cap_tokens, np.float32), versions, "length", "text")

    def poll(self) -> list[Generation]:
        while self._running:
            if ended := self.step():
                return ended
        return []

    def update_weights(self, version: int, tensors: Iterable[Any] | None) -> None:
        total = 0
        self._tensors = {}
        for bucket in tensors or ():
            for name, tensor in bucket.tensors:
                if name == "refused":
                    raise TrainingError("a tensor is refused")
                if name == "hangs":
                    time.sleep(3600)
                self._tensors[name] = tensor.clone()
                total += int(tensor.to(torch.float64).sum())
        self._total, self._version = total, version

    def held(self, names: Sequence[str]) -> dict[str, int]:
        held = {HEAD: self._tensors[EMBEDDING], **self._tensors}  # tied
        return {name: fingerprint(held[name], torch.float32) for name in names}

    def stats(self) -> EngineStats:
        return EngineStats(weight_version=self._version)

    def close(self) -> None:
        self._running.clear()
