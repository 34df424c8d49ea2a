"""Facts of the clusters that plans are made for. Peaks are dense: the sparse ones on data sheets are twice these."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.cluster import Cluster


def h100() -> Cluster:
    """Nodes of 8 H100 SXM with 80 GB, as in a DGX H100."""
    return Cluster(
        name="h100",
        gpus_per_node=8,
        gpu_memory_bytes=81_559 * 2**20,  # what nvidia-smi reports of an "80 GB" card
        bf16_flops_per_second=989e12,  # NVIDIA H100 data sheet: 1,979 TFLOP/s with sparsity, half of it dense
        fp8_flops_per_second=1979e12,  # 3,958 with sparsity
        # Published BF16 runs on H100: Megatron-LM 41-48 % (its README), torchtitan Llama 3.1 8B 33-39 %.
        assumed_mfu=0.40,
        cores_per_node=112,  # two 56-core processors
        memory_bytes_per_node=2 * 10**12,
    )


def h200() -> Cluster:
    """Nodes of 8 H200 SXM with 141 GB: the H100's arithmetic, more and faster memory."""
    return replace(h100(), name="h200", gpu_memory_bytes=143_771 * 2**20)
