"""vLLM as an `Engine`, in the process that asks for it: paged attention, continuous batching, weights by name.

vLLM starts with random weights and takes all of them from the running trainer. It shares the process only with a
trainer of one rank, whose random state, environment and process group it finds and leaves as they were.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import export_files
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.engine import EngineStats, FinishReason, Generation, Request
from megatron_ext.generation.read_back import EMBEDDING, HEAD, fingerprint
from megatron_ext.generation.running import check_requests
from megatron_ext.generation.vllm_start import VllmSettings, require_vllm, start
from megatron_ext.generation.vllm_surroundings import default_group_kept, undisturbed
from megatron_ext.generation.vllm_weights import held_tensor
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.weights import table
from megatron_ext.tasks.prompts import check_stop_strings
from megatron_ext.tokenizer import tokenizer_of_files


class VllmEngine:
    """One vLLM, driven step by step; a process has at most one at a time."""

    def __init__(self, assets: Mapping[str, bytes], model: ModelConfig, settings: VllmSettings) -> None:
        """Start it with random weights; `update_weights` before the first request.

        `assets` are the tokenizer's files, as `conversion.assets` reads them from a checkpoint or a folder. `ConfigError`
        where vLLM is missing, shares its process with one of several ranks, or refuses the model.
        """
        require_vllm()
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"plan.engine=vllm with {dist.get_world_size()} ranks: within a trainer's process vLLM can only be beside a single "
                f"rank; use plan.engine=vllm_process"
            )
        self._model, self._settings = model, settings
        self._tokenizer = tokenizer_of_files(assets)
        self._requests: dict[str, Request] = {}
        self._num_submitted = 0
        self._counts: Counter[str] = Counter()
        self._busy_seconds = 0.0
        self._version: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-ext-vllm-")  # vLLM reads the tokenizer when it likes to
        for name, data in export_files(assets, model, settings.dtype).items():
            (Path(self._folder.name) / name).write_bytes(data)
        self._owns_group = not dist.is_initialized()
        with undisturbed():
            self._engine = start(Path(self._folder.name), model, settings)

    @property
    def is_busy(self) -> bool:
        """Whether requests are not answered yet."""
        return bool(self._requests)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take on requests: all of them, or none and `ConfigError`."""
        self._require_weights()
        check_requests(requests, self._model)
        for request in requests:
            _check_length(request, self._settings.longest_tokens)
        for strings in {request.stop_strings for request in requests}:
            check_stop_strings(self._tokenizer, strings)
        with undisturbed():
            parameters = [self._parameters(request) for request in requests]
            for request, asked in zip(requests, parameters, strict=True):
                name = str(self._num_submitted)
                self._num_submitted += 1
                self._requests[name] = request
                self._engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, asked)

    def step(self) -> list[Generation]:
        """One forward pass; the generations that ended in it."""
        started = time.monotonic()
        with undisturbed():
            outputs = self._engine.step()
            running = len(self._engine.engine_core.engine_core.scheduler.running)
        ended = [self._generation(output) for output in outputs if output.finished]
        self._counts["decode_steps"] += 1
        self._counts["longest_batch"] = max(self._counts["longest_batch"], running + len(ended))
        self._busy_seconds += time.monotonic() - started
        return ended

    def poll(self) -> list[Generation]:
        """Those that ended since the last call, as `Engine.poll`."""
        while self._requests:
            if ended := self.step():
                return ended
        return []

    def update_weights(self, version: int, tensors: Iterable[Bucket] | None) -> None:
        """Take over all weights, bucket by bucket; running requests go on with them, their cached keys and values computed anew.

        `TrainingError` where one is missing: the engine then takes no requests until an update brings all.
        """
        if tensors is None:
            raise ConfigError("vLLM has weights of its own: an update must bring all of them (plan.engine=megatron shares the trainer's)")
        self._version = None
        expected = Counter(name for row in table(self._model) for name in row.names)
        with undisturbed():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._counted(tensors, expected)})
            if any(expected.values()):  # vLLM goes on with the old ones, without an error
                wrong = ", ".join(f"{name} ({'missing' if number > 0 else 'too often'})" for name, number in expected.items() if number)
                raise TrainingError(
                    f"weights version {version} did not come whole: {wrong}; hand over the model that the engine was made for"
                )
            self._forget_old_weights()
            self._engine.set_weight_version(str(version))
        self._version = version

    def held(self, names: Sequence[str]) -> dict[str, int]:
        """Fingerprints of what it samples with, by the names of Hugging Face tensors, read from vLLM's own model."""
        dtype: torch.dtype = getattr(torch, self._settings.dtype)

        def read(vllm_model: torch.nn.Module) -> dict[str, int]:
            return {name: fingerprint(held_tensor(vllm_model, self._model, name), dtype) for name in names}

        with undisturbed():
            found: dict[str, int] = self._engine.apply_model(read)[0]
        return found

    def stats(self) -> EngineStats:
        """Counts so far."""
        counts = {name: self._counts[name] for name in ("prompt_tokens", "response_tokens", "decode_steps", "longest_batch")}
        return EngineStats(busy_seconds=self._busy_seconds, weight_version=self._version or 0, **counts)

    def close(self) -> None:
        """Free what it holds; requests that run are lost. The trainer's process group stays."""
        with undisturbed(), nullcontext() if self._owns_group else default_group_kept():
            self._engine.engine_core.shutdown()  # now, not when Python forgets it: by then another engine may have its groups
        self._requests.clear()
        self._version = None
        self._folder.cleanup()

    def _counted(self, tensors: Iterable[Bucket], expected: Counter[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in tensors:
            for name, tensor in bucket.tensors:
                expected[name] -= 1
                yield name, tensor
                if name == EMBEDDING and self._model.tied_embeddings:
                    yield HEAD, tensor  # a CPU's head is a packed copy of the embedding, which nothing else renews

    def _forget_old_weights(self) -> None:
        """Drop keys and values of finished prefixes; those of running requests are computed anew."""
        self._engine.reset_prefix_cache(reset_running_requests=True)  # raises where something is kept

    def _require_weights(self) -> None:
        if self._version is None:
            raise TrainingError(
                "the engine has no weights, or a part of a version: update_weights must bring a whole one before it samples"
            )

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        try:
            found = SamplingParams(
                temperature=sampling.temperature,
                top_k=min(sampling.top_k or 0, self._model.vocab_size),
                top_p=sampling.top_p,
                seed=stream_seed(request.seed, request.id),
                max_tokens=request.cap_tokens,
                stop=list(request.stop_strings),
                stop_token_ids=[self._tokenizer.eod_id],
                ignore_eos=True,  # vLLM's own idea of it, from configs; ours is the line above
                logprobs=0,  # the drawn token's alone
                skip_special_tokens=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except (VLLMError, ValueError) as error:
            raise ConfigError(f"request {request.id}: vLLM refuses {sampling}: {error}; change it, or use plan.engine=megatron") from error
        if found.temperature != sampling.temperature:  # it raises small ones, and says so in its log alone
            raise ConfigError(
                f"request {request.id}: vLLM would sample at temperature {found.temperature}, not {sampling.temperature}; "
                f"use 0 (greedy), or plan.engine=megatron"
            )
        return found

    def _generation(self, output: Any) -> Generation:
        request, found = self._requests.pop(output.request_id), output.outputs[0]
        if found.finish_reason not in ("stop", "length"):
            raise TrainingError(f"vLLM gave up request {request.id}: {found.finish_reason}; its log says more")
        tokens = np.asarray(found.token_ids, dtype=np.int32)
        logprobs = [place[token].logprob for place, token in zip(found.logprobs, found.token_ids, strict=True)]
        versions = np.empty(len(tokens), dtype=np.int32)
        for span in found.weight_versions:
            versions[span.start : span.end] = int(span.version)
        self._counts["prompt_tokens"] += len(request.prompt) - (output.num_cached_tokens or 0)
        self._counts["response_tokens"] += len(tokens)
        finish = self._finish(found)
        return Generation(request.id, tokens, np.asarray(logprobs, dtype=np.float32), versions, finish, self._text(found, finish))

    def _finish(self, found: Any) -> FinishReason:
        if found.finish_reason == "length":
            return "length"
        return "end" if found.stop_reason == self._tokenizer.eod_id else "stop"

    def _text(self, found: Any, finish: FinishReason) -> str:
        """What every engine gives for these tokens: they are decoded together, without the prompt."""
        text = self._tokenizer.decode(found.token_ids[:-1] if finish == "end" else found.token_ids)
        if finish != "stop":
            return text
        place = text.find(found.stop_reason)  # not there: it begins with a space that only stands behind a prompt
        return text[:place] if place >= 0 else str(found.text)


def stream_seed(seed: int, request: int) -> int:
    """What vLLM seeds a request's generator with: 63 bits of a hash of the two, so that near seeds give unrelated streams."""
    return int.from_bytes(blake2b(f"{seed}/{request}".encode(), digest_size=8).digest(), "little") >> 1


def _check_length(request: Request, longest_tokens: int) -> None:
    length = len(request.prompt) + request.cap_tokens
    if length > longest_tokens:
        raise ConfigError(
            f"request {request.id}: {len(request.prompt):,} tokens of prompt + a cap of {request.cap_tokens:,} = {length:,}, "
            f"but vLLM was started for {longest_tokens:,}; lower the cap, or start it for more"
        )
