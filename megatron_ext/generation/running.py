"""One request that runs: its tokens so far, whether the next ends it, and what is handed back then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.generation.engine import FinishReason, Generation, Request
from megatron_ext.generation.stopping import StopStrings, response_text
from megatron_ext.tokenizer import Tokenizer


@dataclass(eq=False)
class Running:
    """A request between its admission and its end. The cache holds all its tokens but the last, which the next step computes."""

    request: Request
    stop: StopStrings | None
    prefix_age: int  # the number of weight updates before its prompt's keys and values were computed
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the token of the next step stands."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def last(self) -> int:
        """The token of the next step."""
        return self.tokens[-1] if self.tokens else self.request.prompt[-1]

    def take(self, token: int, logprob: float, version: int, tokenizer: Tokenizer) -> Generation | None:
        """Append a sampled token; the response, if it ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token == tokenizer.eod_id:
            return self._ended("end", response_text(tokenizer, self.tokens[:-1]))
        text = self.stop.cut(self.tokens) if self.stop else None
        if text is not None:
            return self._ended("stop", text)
        if len(self.tokens) == self.request.cap_tokens:
            return self._ended("length", response_text(tokenizer, self.tokens))
        return None

    def _ended(self, finish: FinishReason, text: str) -> Generation:
        return Generation(
            id=self.request.id,
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            weight_versions=np.array(self.versions, dtype=np.int32),
            finish=finish,
            text=text,
        )


def check_requests(requests: Sequence[Request], model: ModelConfig) -> None:
    """`ConfigError` for a request that the model cannot answer."""
    for request in requests:
        prompt_tokens = len(request.prompt)
        if not prompt_tokens:
            raise ConfigError(f"request {request.id}: its prompt is empty; begin with the tokenizer's first token, or with some text")
        if request.cap_tokens < 1:
            raise ConfigError(f"request {request.id}: its cap is {request.cap_tokens} tokens, must be at least 1")
        if prompt_tokens + request.cap_tokens > model.max_positions:
            raise ConfigError(
                f"request {request.id}: {prompt_tokens:,} tokens of prompt + a cap of {request.cap_tokens:,} = "
                f"{prompt_tokens + request.cap_tokens:,}, but model {model.name} has {model.max_positions:,} positions; "
                f"lower the cap or leave out long prompts"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < model.vocab_size:
            raise ConfigError(
                f"request {request.id}: its prompt holds a token outside the {model.vocab_size:,} of model {model.name}; "
                f"encode it with the tokenizer that the checkpoint carries"
            )
