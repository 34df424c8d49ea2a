"""vLLM in a process of its own: beside a trainer of any layout, on the GPU of the rank that starts it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.generation.engine_process import SILENCE_SECONDS, EngineProcess
from megatron_ext.generation.vllm_engine import VllmEngine
from megatron_ext.generation.vllm_start import VllmSettings, require_vllm, visible_device


def vllm_process(
    assets: Mapping[str, bytes], model: ModelConfig, settings: VllmSettings, log: Path, silence_seconds: float = SILENCE_SECONDS
) -> EngineProcess:
    """`VllmEngine(assets, model, settings)` in another process, which writes to `log`; errors of `VllmEngine` and of `EngineProcess`."""
    require_vllm()
    environment = {**visible_device(), "OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as the trainer, which waits meanwhile
    return EngineProcess(VllmEngine, (dict(assets), model, settings), log, environment, silence_seconds=silence_seconds)
