"""Facts of one cluster that a plan needs: its nodes, its GPUs, what they reach."""

from __future__ import annotations

from megatron_ext.config.base import config


@config
class Cluster:
    """One kind of node; rates are dense (no sparsity), sizes in bytes."""

    name: str
    gpus_per_node: int
    gpu_memory_bytes: int
    bf16_flops_per_second: float
    fp8_flops_per_second: float
    assumed_mfu: float  # share of the peak that GPU-hours are planned with
    cores_per_node: int
    memory_bytes_per_node: int
