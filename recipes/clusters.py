"""Facts of the clusters that plans are made for, and how their Slurm is asked. Peaks are dense: data sheets print twice these.

A site changes what is marked SITE, here or in a file of its own:

    def ours() -> Cluster:
        base = clusters.h100()
        return replace(base, name="ours", slurm=replace(clusters.SLURM, partition="batch", account="project_42"))
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.cluster import Cluster, Slurm

SLURM = Slurm(
    partition="gpu",  # SITE: `sinfo -s` lists them
    cpu_partition="cpu",  # SITE: for text, shards, conversions and reports; "" puts these on `partition` too
    account="",  # SITE: where jobs are charged to a project
    qos="",  # SITE
    gpus_option="gpus-per-node={gpus}",  # SITE: where only typed GPUs are given out, gres=gpu:h100:{gpus}
    exclusive=True,  # SITE: False where jobs share nodes, and get a share of cores and memory for each GPU
    max_nodes=0,  # SITE: that one job can get, where there is such a limit
    time_limit_seconds=86_400,  # SITE: the partition's own limit, or less; the job goes on by itself in the next one
    environment={"NCCL_DEBUG": "WARN"},  # SITE: where NCCL's own choice of network is wrong, NCCL_SOCKET_IFNAME and NCCL_IB_HCA
    exports=("HF_HOME",),  # SITE: where Hugging Face's cache lies, if not at home
    secrets=(),  # SITE: as ("HF_TOKEN",), for models whose licence must be accepted; from secrets_file, or from who submits
    secrets_file="",  # SITE: as /home/me/.config/megatron_ext/secrets, mode 0600
    setup=(),  # SITE: as ("source /etc/profile.d/modules.sh", "module load cuda/13.0")
    python="python",  # SITE: the first on PATH of who submits; with a container, the one inside
    scratch="/tmp",  # SITE: node-local disk
)  # container: none. SITE: Container(runtime="pyxis", image="/shared/images/megatron_ext.sqsh", mounts=("/shared:/shared",))


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
        cores_per_node=112,  # two 56-core processors. SITE: as Slurm counts them (`sinfo -o %c`), with its hyperthreads if it does
        memory_bytes_per_node=2 * 10**12,  # SITE: `sinfo -o %m`, in MiB
        slurm=SLURM,
    )


def h200() -> Cluster:
    """Nodes of 8 H200 SXM with 141 GB: the H100's arithmetic, more and faster memory."""
    return replace(h100(), name="h200", gpu_memory_bytes=143_771 * 2**20)


def sandbox() -> Cluster:
    """The throw-away cluster of tools/slurm_sandbox.sh: nodes without GPUs, for stages with plan.device=cpu."""
    slurm = Slurm(
        partition="main",
        gpus_option="",
        exclusive=False,
        time_limit_seconds=3600,
        signal_seconds=60,
        write_bytes_per_second=1e8,
        hang_seconds=300,
        node_check="never",
    )
    return replace(h100(), name="sandbox", gpus_per_node=1, cores_per_node=8, memory_bytes_per_node=4 * 10**9, slurm=slurm)
