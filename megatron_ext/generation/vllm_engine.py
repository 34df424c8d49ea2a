"""vLLM as an `Engine`, in the process that asks for it: paged attention, continuous batching, weights by name.

vLLM starts with random weights and takes all of them from the running trainer. It shares the process only with a
trainer of one rank, whose random state, environment and process group it finds and leaves as they were.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.assets import export_files
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.engine import EngineStats, FinishReason, Generation, Request
from megatron_ext.generation.running import check_requests
from megatron_ext.generation.stopping import check_stop_strings
from megatron_ext.model.handover import Bucket
from megatron_ext.model.weights import table
from megatron_ext.tokenizer import tokenizer_of_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_TOKENS = 32  # of the cache on a CPU, where vLLM's own 128 would share no prefix of a usual prompt
MOST_CPU_CACHE_BYTES = 4 << 30  # of keys and values; responses that do not fit at a time wait
ENVIRONMENT = {  # read whenever vLLM looks: they stay
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process of vLLM's own: weights go in as they are
    "VLLM_NO_USAGE_STATS": "1",  # tells nobody
}
IMPORT_ENVIRONMENT = {  # read while it is imported and starts
    "TORCHDYNAMO_DISABLE": "1",  # on a CPU: the sampler is compiled even in eager mode, 15 s, and needs a C++ compiler
}


@dataclass(frozen=True)
class VllmSettings:
    """What an engine may use. `longest_tokens` bounds prompt and response together."""

    slots: int  # requests at a time
    longest_tokens: int
    dtype: Literal["float32", "bfloat16"]
    memory_share: float = 0.5  # of a GPU, with weights; of a CPU's memory the cache takes what all slots need, at most 4 GiB


def require_vllm() -> None:
    """`ConfigError` where vLLM is not installed. Asked before anything is built."""
    if find_spec("vllm") is None:
        raise ConfigError(
            f"plan.engine asks for vLLM, which is not installed in {sys.prefix}; use plan.engine=megatron, or install it: on GPUs "
            f"`pip install vllm==0.32.0` (for the same torch), without them `make .venv-vllm`, an environment of its own"
        )


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
        with _undisturbed():
            self._engine = _start(Path(self._folder.name), model, settings)

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
        with _undisturbed():
            for request in requests:
                name = str(self._num_submitted)
                self._num_submitted += 1
                self._requests[name] = request
                self._engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, self._parameters(request))

    def step(self) -> list[Generation]:
        """One forward pass; the generations that ended in it."""
        started = time.monotonic()
        with _undisturbed():
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
        with _undisturbed():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._counted(tensors, expected)})
            if any(expected.values()):  # vLLM goes on with the old ones, without an error
                wrong = ", ".join(f"{name} ({'missing' if number > 0 else 'too often'})" for name, number in expected.items() if number)
                raise TrainingError(
                    f"weights version {version} did not come whole: {wrong}; hand over the model that the engine was made for"
                )
            self._forget_old_weights()
            self._engine.set_weight_version(str(version))
        self._version = version

    def stats(self) -> EngineStats:
        """Counts so far."""
        counts = {name: self._counts[name] for name in ("prompt_tokens", "response_tokens", "decode_steps", "longest_batch")}
        return EngineStats(busy_seconds=self._busy_seconds, weight_version=self._version or 0, **counts)

    def close(self) -> None:
        """Free what it holds; requests that run are lost. The trainer's process group stays."""
        with _undisturbed(), nullcontext() if self._owns_group else _default_group_kept():
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
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
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


def visible_device() -> dict[str, str]:
    """What has another process use this one's GPU; nothing without GPUs."""
    if not torch.cuda.is_available():
        return {}
    index = torch.cuda.current_device()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


def cache_bytes(model: ModelConfig, settings: VllmSettings) -> int:
    """Bytes of keys and values on a CPU: of all slots at their longest, at most 4 GiB, but at least of one."""
    width = 4 if settings.dtype == "float32" else 2
    block = BLOCK_TOKENS * 2 * model.num_layers * model.num_query_groups * model.channels_per_head * width
    blocks_of_one = -(-settings.longest_tokens // BLOCK_TOKENS)
    most = max(MOST_CPU_CACHE_BYTES, (blocks_of_one + 1) * block)
    return min((settings.slots * blocks_of_one + 1) * block, most)  # one block is vLLM's own


def _check_length(request: Request, longest_tokens: int) -> None:
    length = len(request.prompt) + request.cap_tokens
    if length > longest_tokens:
        raise ConfigError(
            f"request {request.id}: {len(request.prompt):,} tokens of prompt + a cap of {request.cap_tokens:,} = {length:,}, "
            f"but vLLM was started for {longest_tokens:,}; lower the cap, or start it for more"
        )


def _start(folder: Path, model: ModelConfig, settings: VllmSettings) -> Any:
    """vLLM's engine with random weights."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    on_gpu = torch.cuda.is_available()
    before = dict(os.environ)
    if not on_gpu:
        os.environ.update(IMPORT_ENVIRONMENT)
    try:
        if not on_gpu:
            _check_head_size(model)
        from vllm.distributed.parallel_state import model_parallel_is_initialized
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        assert not model_parallel_is_initialized(), "vLLM's groups belong to the process: close the other engine first"
        place: dict[str, Any] = (
            {"gpu_memory_utilization": settings.memory_share}
            if on_gpu
            else {"enforce_eager": True, "block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": cache_bytes(model, settings)}
        )
        arguments = EngineArgs(
            model=str(folder),
            load_format="dummy",
            dtype=settings.dtype,
            max_model_len=settings.longest_tokens,
            max_num_seqs=settings.slots,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # no settings that no request names
            distributed_executor_backend="uni",
            async_scheduling=False,  # no pass is under way when weights change
            disable_log_stats=True,
            trust_remote_code=False,
            **place,
        )
        return LLMEngine.from_engine_args(arguments)
    except ValueError as error:
        raise ConfigError(
            f"vLLM refuses model {model.name} (head size {model.channels_per_head}) with {settings}: {error}; "
            f"use plan.engine=megatron, or change what it names"
        ) from error
    finally:
        _restore_environment(before)


def _check_head_size(model: ModelConfig) -> None:
    """Before vLLM finds out, which then cannot be started again in this process."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if model.channels_per_head not in sizes:
        raise ConfigError(
            f"model {model.name} has heads of {model.channels_per_head} channels, vLLM on a CPU takes {', '.join(map(str, sizes))}; "
            f"use plan.engine=megatron"
        )


def _restore_environment(before: Mapping[str, str]) -> None:
    """Undo what vLLM changes for processes of its own (LD_PRELOAD, LOCAL_WORLD_SIZE, ...), and would change for ours."""
    for name in set(os.environ) - set(before):
        if not name.startswith("VLLM_"):
            del os.environ[name]
    os.environ.update(before)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random states and number of threads afterwards as before: vLLM seeds and draws from the process's own generators."""
    states, threads, set_threads = (random.getstate(), np.random.get_state()), torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            torch.set_num_threads = set_threads  # on a CPU vLLM puts a function there that does nothing
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _default_group_kept() -> Iterator[None]:
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
