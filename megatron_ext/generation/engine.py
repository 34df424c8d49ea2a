"""What samples responses: requests in, generations out, one by one as they end. Transports differ, the interface does not.

No caller assumes that engine and trainer share a process or a layout, or that a batch ends together. An engine never touches
the global random state: the draw at position t of a request depends on (seed, id, t) and the request's own logits alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ext.attempts import pulse
from megatron_ext.config.rl import Sampling
from megatron_ext.model.bucket import Bucket

FinishReason = Literal["end", "stop", "length"]  # the end-of-document token, a stop string, the cap


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    `id` and `seed` name its random stream: two requests with both the same get the same draws. `cap_tokens` bounds the response;
    prompt and cap must fit the model's positions. A response ends with the tokenizer's end-of-document token, or as soon as
    its text holds one of `stop_strings`, across tokens or within one.
    """

    id: int
    prompt: tuple[int, ...]
    cap_tokens: int
    sampling: Sampling
    seed: int
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Generation:
    """A response.

    `tokens`, int32: all that were sampled, the end token or those of the stop string included; what is trained on.
    `logprobs`, FP32, of each under the processed distribution that it was drawn from. `weight_versions`, int32, of each.
    `text`: what is graded: without end token, cut before the stop string.
    """

    id: int
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    weight_versions: npt.NDArray[np.int32]
    finish: FinishReason
    text: str


@dataclass(frozen=True)
class EngineStats:
    """Since the engine was made."""

    prompt_tokens: int = 0  # computed
    response_tokens: int = 0  # sampled
    decode_steps: int = 0  # forward passes that sampled a token for each running request
    busy_seconds: float = 0.0  # with at least one request
    weight_version: int = 0
    longest_batch: int = 0  # requests at a time, at most


class Engine(Protocol):
    """An engine of one model copy. Where the copy spans several ranks, all of them make the same calls, and all get the same answers."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Take on requests. `ConfigError` where one cannot be answered: too long for the positions, or an empty prompt."""

    def poll(self) -> list[Generation]:
        """Those that ended since the last call; waits for one where there is none yet, and is empty where nothing is left to do."""

    def update_weights(self, version: int, tensors: Iterable[Bucket] | None) -> None:
        """From here on sample with these weights, by Hugging Face names; None: the trainer's own tensors have changed in place.

        What was computed with older weights (cached keys and values of running requests, prefixes) is not used for new requests.
        """

    def stats(self) -> EngineStats:
        """Counts so far."""

    def close(self) -> None:
        """Free what it holds; requests that run are lost."""


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Answer all requests; the generations in the order of the requests."""
    engine.submit(requests)
    return collect(engine, requests)


def collect(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Wait for the answers to requests that were submitted, and no others with them; in the order of the requests."""
    found: dict[int, Generation] = {}
    while len(found) < len(requests):
        pulse()
        ended = engine.poll()
        assert ended, "the engine has nothing left to do, but answers are missing"
        found.update((one.id, one) for one in ended)
    return [found[request.id] for request in requests]
