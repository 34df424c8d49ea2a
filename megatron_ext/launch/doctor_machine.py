"""This machine: packages, disk, the runs folder, limits, shared memory. No torch; compute nodes may differ, and it says where.

Slurm hands this shell's limits on to a job's processes, so they are worth looking at on a login node.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from megatron_ext.config.memory import checkpoint_bytes, disk_bytes, files_per_checkpoint, kept_checkpoints
from megatron_ext.config.rl_memory import kept_rl_checkpoints, rl_checkpoints_bytes, rollouts_bytes_at_most
from megatron_ext.config.stages import ConvertStage, RLStage, TokenizeStage, TrainStage
from megatron_ext.launch.doctor_folders import obstacle
from megatron_ext.launch.doctor_inputs import known_shard_bytes
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan import converted_bytes
from megatron_ext.launch.plan_words import size
from megatron_ext.runs import CHECKPOINTS, DONE

PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^;\s]+)\s*(?:;\s*(.*))?$")
DISTRIBUTION = "megatron_ext"
NEEDED = ("torch", "megatron-core", "numpy", "pydantic", "psutil", "huggingface_hub")
PROBE_BYTES = 1 << 22  # more than a file system keeps inside a file's own record
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"}
FILES_OF_A_RANK = 1024  # shards, libraries, logs, loader pipes
CONNECTIONS_PER_RANK = 2  # rank 0 serves the key-value store of torch, and that of torchrun
LOADER_PREFETCH = 4  # micro-batches that each loader worker holds ready (data.loader)
BATCH_BYTES_PER_TOKEN = 8 + 8 + 4 + 8  # ids, labels, loss mask, positions
LOCK_BYTES = 1 << 30  # what an InfiniBand adapter may want to register
MEND = "free space or quota, mend its permissions, or name another --runs"


def machine_findings(graph: Graph, runs: Path) -> list[Finding]:
    """Findings on this machine for a graph whose run folders go to `runs`."""
    trained = [stage for stage in graph.stages if isinstance(stage, TrainStage)]
    with_ranks: list[TrainStage | RLStage] = [stage for stage in graph.stages if isinstance(stage, TrainStage | RLStage)]
    home = _existing(runs / graph.name)
    blocked = obstacle(runs / graph.name)
    nodes = max((stage.plan.nodes for stage in with_ranks), default=1)
    return [
        *_packages(any(stage.plan.device == "gpu" for stage in with_ranks)),
        *([error(f"writing to {runs}", f"not possible: {blocked}", MEND)] if blocked else _writing(runs, home, nodes)),
        *_disk(graph, with_ranks, runs, home),
        *_limits(with_ranks),
        *_shared_memory(trained),
    ]


def _existing(path: Path) -> Path:
    """The nearest folder on the way up that is there."""
    path = Path(os.path.realpath(path))
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))


def _packages(gpu: bool) -> list[Finding]:
    """Installed versions against those that this version is pinned to."""
    what = "packages"
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [warning(what, f"{DISTRIBUTION} is not installed into {sys.prefix}, so its pinned versions are unknown", "pip install -e .")]
    pins = {match[1]: (match[2], match[3] or "") for line in required if (match := PIN.match(line))}
    wanted = {name: version for name, (version, marker) in pins.items() if name in NEEDED or (gpu and '"te"' in marker.replace("'", '"'))}
    found, fine = [], []
    for name, version in wanted.items():
        here = _version(name)
        if here is None:
            install = f'pip install "{DISTRIBUTION}[te]"' if name not in NEEDED else f"pip install {name}=={version}"
            found.append(error(what, f"{name} {version} is not installed in {sys.prefix}, where stages run", install))
        elif gpu and name == "torch" and here.endswith("+cpu"):
            found.append(error(what, f"torch {here} in {sys.prefix} was built without CUDA", f"pip install torch=={version} for CUDA"))
        elif here.split("+")[0] != version:
            found.append(warning(what, f"{name} is {here}; this version was tested with {version}", f"pip install {name}=={version}"))
        else:
            fine.append(f"{name} {here}")
    return [*found, *([ok(what, ", ".join(fine))] if fine else [])]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _writing(runs: Path, folder: Path, nodes: int) -> list[Finding]:
    """Do what a save does, in the folder that is there of `runs`: make a folder, write and sync a file, rename the folder.

    A full quota shows here, not in the free space.
    """
    what = f"writing to {runs}"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as made:
            aside, target = Path(made) / "aside", Path(made) / "published"
            aside.mkdir()
            with (aside / "probe").open("wb") as file:
                file.write(os.urandom(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, target)
    except OSError as refusal:
        return [error(what, f"not possible: {refusal.strerror or refusal}", MEND)]
    kind = _file_system(folder)
    if nodes > 1 and kind in LOCAL_FILE_SYSTEMS:
        text = f"it is {kind} here, which other machines do not see, and the plan has {nodes} nodes"
        return [warning(what, text, "name a --runs on a file system that all nodes share")]
    return [ok(what, f"{size(PROBE_BYTES)} written, synced and renamed" + (f" ({kind})" if kind else ""))]


def _file_system(folder: Path) -> str | None:
    """The type of the file system that holds a folder, where the kernel lists it."""
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return None
    rows = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    holding = [(row[1].replace("\\040", " "), row[2]) for row in rows if len(row) > 2]
    fitting = [(point, kind) for point, kind in holding if folder.is_relative_to(point)]
    return max(fitting, key=lambda one: len(one[0]))[1] if fitting else None


def _disk(graph: Graph, with_ranks: list[TrainStage | RLStage], runs: Path, home: Path) -> list[Finding]:
    """Checkpoints and shards that unfinished stages will add, and one checkpoint aside, against the free space and inodes."""
    open_stages = [stage for stage in with_ranks if not (runs / graph.name / stage.name / DONE).is_file()]
    each = [checkpoint_bytes(stage.model, stage.precision, stage.plan) for stage in open_stages]
    kept = sum(_kept(stage)[1] for stage in open_stages)
    there = sum(_held_bytes(runs / graph.name / stage.name / CHECKPOINTS) for stage in open_stages)
    rollouts = sum(rollouts_bytes_at_most(stage) for stage in open_stages if isinstance(stage, RLStage))
    shards = _shard_bytes(graph, [stage for stage in with_ranks if isinstance(stage, TrainStage)], runs)
    need = max(0, kept + max(each, default=0) - there) + rollouts + shards + _converted_bytes(graph, runs)
    files = sum(_kept(stage)[0] * files_per_checkpoint(stage.plan) for stage in open_stages)
    free = shutil.disk_usage(home).free
    what = f"disk of {home}"
    parts = "checkpoints that are kept, one aside, converted models, shards of known size" + (", rollouts at most" if rollouts else "")
    text = f"{size(need)} still to be written ({parts}), {size(free)} free"
    way_out = "make room, name another --runs, lower plan.keep_checkpoints or raise plan.pin_every_tokens"
    way_out += ", or bound the rollouts with plan.keep_rollouts_bytes" if rollouts else ""
    found = [error(what, text, way_out)] if need > free else [ok(what, f"{text}; a quota may be smaller")]
    inodes = os.statvfs(home)
    if inodes.f_files and files > inodes.f_favail:
        found.append(error(what, f"checkpoints are {files:,} files, {inodes.f_favail:,} inodes are free", way_out))
    return found


def _kept(stage: TrainStage | RLStage) -> tuple[int, int]:
    """Checkpoints that a finished stage leaves, and bytes of them and of its exports."""
    if isinstance(stage, RLStage):
        return kept_rl_checkpoints(stage), rl_checkpoints_bytes(stage)
    return kept_checkpoints(stage.budget, stage.plan), disk_bytes(stage.model, stage.budget, stage.precision, stage.plan)


def _held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _shard_bytes(graph: Graph, trained: list[TrainStage], runs: Path) -> int:
    corpora = [s for s in graph.stages if isinstance(s, TokenizeStage) and not (runs / graph.name / s.name / DONE).is_file()]
    return sum(
        known_shard_bytes(source, max((stage.model.vocab_size for stage in trained if stage.corpus == corpus.name), default=0))
        for corpus in corpora
        for source in corpus.sources
    )


def _converted_bytes(graph: Graph, runs: Path) -> int:
    stages = [s for s in graph.stages if isinstance(s, ConvertStage) and not (runs / graph.name / s.name / DONE).is_file()]
    return sum(converted_bytes(stage.model) for stage in stages)


def _limits(with_ranks: list[TrainStage | RLStage]) -> list[Finding]:
    """Open files, and memory that may be locked, of this shell."""
    ranks = max((stage.plan.num_ranks for stage in with_ranks), default=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = FILES_OF_A_RANK + CONNECTIONS_PER_RANK * ranks
    what, text = "open files", f"this shell allows {_limit(soft)} a process; rank 0 of {ranks} may need {need:,}"
    if soft != resource.RLIM_INFINITY and soft < need:
        found = [warning(what, text, f"ulimit -n {need} before you submit (the hard limit is {_limit(hard)})")]
    else:
        found = [ok(what, text)]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if any(stage.plan.nodes > 1 for stage in with_ranks) and locked != resource.RLIM_INFINITY and locked < LOCK_BYTES:
        text = f"this shell allows {size(locked)} a process, and InfiniBand between nodes registers more"
        found.append(
            warning("locked memory", text, "ulimit -l unlimited before you submit, or PropagateResourceLimitsExcept=MEMLOCK in Slurm")
        )
    return found


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else f"{number:,}"


def _shared_memory(trained: list[TrainStage]) -> list[Finding]:
    """Loader workers hand their batches over through /dev/shm; in a container that is often 64 MB."""
    need = max((_loader_bytes(stage) for stage in trained), default=0)
    folder = Path("/dev/shm")
    if not need or not folder.is_dir():
        return []
    free = shutil.disk_usage(folder).free
    text = f"loader workers of a node may hold {size(need)} in {folder}, {size(free)} are free here"
    if need > free:
        return [warning("shared memory", text, "a larger one (docker: --shm-size, --ipc=host), or plan.loader_workers=0")]
    return [ok("shared memory", text)]


def _loader_bytes(stage: TrainStage) -> int:
    plan, length = stage.plan, stage.budget.sequence_length
    mask = length * length if stage.documents.attention == "within" else 0
    batch = plan.micro_batch * (length * BATCH_BYTES_PER_TOKEN + mask)
    return plan.ranks_per_node * plan.loader_workers * LOADER_PREFETCH * batch
