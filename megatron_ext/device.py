"""The one place that knows CPU from GPU: activation, seeds, synchronisation, peaks."""

from __future__ import annotations

import functools
import os
import resource
import time
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ext.errors import ConfigError

Kind = Literal["cpu", "gpu"]
# Dense peaks in FLOP/s by a part of the device's name, the first that fits (vendor data sheets; no sparsity).
GPU_PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12},
    "H100 NVL": {"bf16": 835e12, "fp8": 1671e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12},
    "A100": {"bf16": 312e12},
}


@dataclass(frozen=True)
class Peak:
    """The FLOP/s that MFU is measured against, and where the number comes from."""

    flops_per_second: float | None
    source: str


def activate(kind: Kind, threads: int) -> None:
    """Prepare this process for `kind`; on a CPU, teach Megatron-Core to do without CUDA."""
    if kind == "cpu":
        from megatron_ext import cpu_megatron

        torch.set_num_threads(threads)  # sums differ between thread counts, so the plan pins it
        cpu_megatron.activate()
        return
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlaps rely on it; read when the GPU is first used
    require_gpu()
    torch.set_num_threads(threads)
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)  # torchrun's, or srun's
    torch.cuda.set_device(local % torch.cuda.device_count())  # srun may show each process a single GPU


def require_gpu() -> None:
    """`ConfigError` where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("plan.device=gpu, but torch sees no GPU here; use plan.device=cpu with precision=fp32, or run on a GPU node")


def current(kind: Kind) -> torch.device:
    """The device of this rank's tensors."""
    return torch.device("cpu") if kind == "cpu" else torch.device("cuda", torch.cuda.current_device())


def synchronize(kind: Kind) -> None:
    """Wait for queued work, so that a clock read after it means something."""
    if kind == "gpu":
        torch.cuda.synchronize()


def backend(kind: Kind) -> str:
    """The collective library of a kind of device."""
    return "gloo" if kind == "cpu" else "nccl"


def compute_capability() -> tuple[int, int]:
    """The GPU's compute capability; 9.0 is Hopper."""
    return torch.cuda.get_device_capability()


def peak_memory_bytes(kind: Kind) -> int:
    """Most memory this process has used: resident on a CPU, allocated on a GPU."""
    if kind == "gpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache  # measured once: what provenance.json records is what every step's MFU assumes
def peak(kind: Kind, precision: str) -> Peak:
    """The assumed peak: a GPU's data sheet, or on a CPU the matrix product this process reaches now."""
    if kind == "gpu":
        name = torch.cuda.get_device_name()
        for part, peaks in GPU_PEAKS.items():
            if part in name and precision in peaks:
                return Peak(peaks[precision], f"{name}, dense {precision}, data sheet")
        return Peak(None, f"{name}: no known peak for {precision}")
    return Peak(_measured_matmul_flops(), f"FP32 matrix product measured here, {torch.get_num_threads()} thread(s)")


def _measured_matmul_flops(size: int = 768, seconds: float = 0.15) -> float:
    left, right = torch.ones(size, size), torch.ones(size, size)
    torch.mm(left, right)
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
