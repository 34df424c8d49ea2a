"""How vLLM is started: with random weights, for a model and the slots that are wanted, on a GPU or on a CPU."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.generation.vllm_surroundings import environment_kept

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


def start(folder: Path, model: ModelConfig, settings: VllmSettings) -> Any:
    """vLLM's engine with random weights; `ConfigError` where it does not take the model or the settings."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with environment_kept():
        if not torch.accelerator.is_available():
            os.environ.update(IMPORT_ENVIRONMENT)
            _check_head_size(model)
        from vllm.distributed import model_parallel_is_initialized
        from vllm.exceptions import VLLMError
        from vllm.v1.engine.llm_engine import LLMEngine

        assert not model_parallel_is_initialized(), "vLLM's groups belong to the process: close the other engine first"
        try:
            return LLMEngine.from_engine_args(_arguments(folder, model, settings))
        except (VLLMError, ValueError) as error:
            raise ConfigError(
                f"vLLM refuses model {model.name} (heads of {model.channels_per_head} channels) with {settings}: {error}; "
                f"change what it names, or use plan.engine=megatron"
            ) from error


def _arguments(folder: Path, model: ModelConfig, settings: VllmSettings) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    place: dict[str, Any] = {"gpu_memory_utilization": settings.memory_share}
    if not torch.accelerator.is_available():
        place = {"enforce_eager": True, "block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": cache_bytes(model, settings)}
    return EngineArgs(
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


def cache_bytes(model: ModelConfig, settings: VllmSettings) -> int:
    """Bytes of keys and values on a CPU: of all slots at their longest, at most 4 GiB, but at least of one."""
    width = 4 if settings.dtype == "float32" else 2
    block = BLOCK_TOKENS * 2 * model.num_layers * model.num_query_groups * model.channels_per_head * width
    blocks_of_one = -(-settings.longest_tokens // BLOCK_TOKENS)
    most = max(MOST_CPU_CACHE_BYTES, (blocks_of_one + 1) * block)
    return min((settings.slots * blocks_of_one + 1) * block, most)  # one block is vLLM's own


def _check_head_size(model: ModelConfig) -> None:
    """Before vLLM finds out, which then cannot be started again in this process."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if model.channels_per_head not in sizes:
        raise ConfigError(
            f"model {model.name} has heads of {model.channels_per_head} channels, vLLM on a CPU takes {', '.join(map(str, sizes))}; "
            f"use plan.engine=megatron"
        )


def visible_device() -> dict[str, str]:
    """What has another process use this one's GPU; nothing without GPUs."""
    if not torch.accelerator.is_available():
        return {}
    index = torch.accelerator.current_device_index()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
