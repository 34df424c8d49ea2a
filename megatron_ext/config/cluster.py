"""Facts of one cluster: its nodes and GPUs, which a plan needs, and how its Slurm and its containers are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import field
from typing import Literal

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WORD = re.compile(r"[^\s\x00-\x1f\x7f\ud800-\udfff]+")  # of Slurm's, as a partition: no spaces, no control characters
UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")  # but for tabs; they would end a line, or are no text
MOUNT = re.compile(r"(/[^:,]*):(/[^:,]*)(:ro|:rw)?")
LOOKS_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?)$", re.IGNORECASE)
# Variables that a job sets itself: from its plan, its snapshot of the code, its place among the ranks.
OURS = re.compile(
    r"SLURM_.*|SBATCH_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONPATH|PYTHONSAFEPATH|PYTHONNOUSERSITE|"
    r"OMP_NUM_THREADS|MKL_NUM_THREADS|OPENBLAS_NUM_THREADS|TMPDIR"
)
LONGEST_SIGNAL_SECONDS = 65_535  # sbatch takes no more
SHORTEST_LIMIT_SECONDS = 60  # Slurm counts time limits in minutes


def _check_text(key: str, values: Iterable[str]) -> None:
    """`ConfigError` where a value could not stand on one line of a script."""
    for value in values:
        if UNPRINTABLE.search(value):
            raise ConfigError(f"{key}: {value!r} has a line break or another control character in it; write it as one line of text")


@config
class Container:
    """What the ranks run in; `none` runs `Slurm.python` of the nodes themselves."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    image: str = ""  # a squashfs or SIF file, or what the runtime takes
    mounts: tuple[str, ...] = ()  # /host:/inside or /host:/inside:ro; runs, work folder and scratch are mounted by themselves

    def __post_init__(self) -> None:
        if self.runtime == "none" and (self.image or self.mounts):
            raise ConfigError(
                "container: image and mounts are set, but runtime is none; set runtime to pyxis or apptainer, or leave them out"
            )
        if self.runtime != "none" and not self.image:
            raise ConfigError(
                f"container: runtime is {self.runtime}, but image is empty; name the file, for {self.runtime} as {self._example()}"
            )
        _check_text("container.image", [self.image])
        _check_text("container.mounts", self.mounts)
        for mount in self.mounts:
            if not MOUNT.fullmatch(mount):
                raise ConfigError(f"container: mount '{mount}': write /host:/inside or /host:/inside:ro, absolute, without commas")

    def _example(self) -> str:
        return "/shared/images/megatron_ext.sqsh" if self.runtime == "pyxis" else "/shared/images/megatron_ext.sif"


@config
class Slurm:
    """How jobs are asked for. Names of partitions and the like are the site's; docs/cluster.md explains every field."""

    partition: str = ""  # "": the cluster's default
    cpu_partition: str = ""  # for stages that need no GPU; "": `partition`
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gpus_option: str = "gpus-per-node={gpus}"  # or "gres=gpu:h100:{gpus}"; "" where GPUs are not counted
    exclusive: bool = True  # whole nodes with all of their memory, for stages of ranks
    cpu_memory_bytes: int = 0  # of a stage that is one process; 0: the cluster's default
    max_nodes: int = 0  # that one job can get; 0: not known here
    time_limit_seconds: int = 86_400
    signal_seconds: int = 300  # so long before the limit Slurm sends USR1; it may come up to 60 s earlier
    write_bytes_per_second: float = 2e9  # of a checkpoint, by all nodes together, until a run has measured its own saves
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_... and others, set for every rank
    exports: tuple[str, ...] = ()  # names of variables that pass from who submits to the job; nothing else does
    secrets: tuple[str, ...] = ()  # names; values from secrets_file, or passed on by name from who submits
    secrets_file: str = ""  # KEY=value lines, readable by its owner alone
    setup: tuple[str, ...] = ()  # shell lines first of all, as "module load cuda"
    python: str = "python"  # with the project's packages; inside the container where there is one
    host_python: str = "python3"  # of the batch host, 3.9 or newer; needs no packages
    scratch: str = "/tmp"  # node-local; logs of most ranks
    excluded_nodes: tuple[str, ...] = ()
    max_idle_attempts: int = 3  # attempts in a row that did not advance, before the stage stops for good
    hang_seconds: int = 1800  # without a pulse, before a job is taken to hang
    node_check: Literal["first", "always", "never"] = "first"
    container: Container = Container()

    def __post_init__(self) -> None:
        self._check_words()
        self._check_times()
        self._check_variables()
        self._check_secrets()
        for key in ("scratch", "secrets_file"):
            if (path := getattr(self, key)) and not path.startswith("/"):
                raise ConfigError(f"slurm: {key} is '{path}', relative to nobody knows what in a job; write it from / on")
        if not self.scratch:
            raise ConfigError("slurm: scratch is empty; name a folder of the nodes themselves, as /tmp")

    def _check_words(self) -> None:
        _check_text("slurm.python, host_python", [self.python, self.host_python])
        _check_text("slurm.scratch, secrets_file", [self.scratch, self.secrets_file])
        _check_text("slurm.setup", self.setup)
        rows = {key: getattr(self, key) for key in ("partition", "cpu_partition", "account", "qos", "constraint", "gpus_option")}
        for key, value in [*rows.items(), *(("excluded_nodes", node) for node in self.excluded_nodes)]:
            if value and not WORD.fullmatch(value):
                raise ConfigError(f"slurm: {key} is {value!r}; Slurm takes one word, without spaces")
        for key in ("python", "host_python"):
            if not getattr(self, key):
                raise ConfigError(f"slurm: {key} is empty; name an interpreter, as python3 or /opt/venv/bin/python")
        if self.gpus_option and (self.gpus_option.startswith("-") or self.gpus_option.count("{gpus}") != 1):
            raise ConfigError(
                f"slurm: gpus_option is '{self.gpus_option}'; write an option of sbatch without dashes, with {{gpus}} for the number "
                f"on a node, as gpus-per-node={{gpus}} or gres=gpu:h100:{{gpus}}"
            )
        for line in self.setup:
            if line.lstrip().startswith("#SBATCH"):
                raise ConfigError(f"slurm: setup line '{line}' would be ignored: options of sbatch have fields of their own here")

    def _check_times(self) -> None:
        for key, least in {"max_nodes": 0, "cpu_memory_bytes": 0, "signal_seconds": 1, "max_idle_attempts": 1, "hang_seconds": 1}.items():
            if getattr(self, key) < least:
                raise ConfigError(f"slurm: {key} is {getattr(self, key)}, must be at least {least}")
        if not self.write_bytes_per_second > 0:
            raise ConfigError(f"slurm: write_bytes_per_second is {self.write_bytes_per_second}, must be positive")
        if self.time_limit_seconds < SHORTEST_LIMIT_SECONDS:
            raise ConfigError(
                f"slurm: time_limit_seconds is {self.time_limit_seconds}; Slurm counts minutes: at least {SHORTEST_LIMIT_SECONDS}"
            )
        if self.signal_seconds > LONGEST_SIGNAL_SECONDS:
            raise ConfigError(f"slurm: signal_seconds is {self.signal_seconds}, and sbatch takes at most {LONGEST_SIGNAL_SECONDS}")
        if self.signal_seconds >= self.time_limit_seconds:
            raise ConfigError(
                f"slurm: signal_seconds {self.signal_seconds} before a limit of time_limit_seconds {self.time_limit_seconds} is before the "
                f"start; raise the limit, or lower signal_seconds to what a step and a save need"
            )

    def _check_variables(self) -> None:
        for key, names in (("environment", list(self.environment)), ("exports", self.exports), ("secrets", self.secrets)):
            for name in names:
                if not VARIABLE.fullmatch(name):
                    raise ConfigError(f"slurm: {key}: {name!r} is no name of a variable: letters, digits and _ only, and names alone")
                if OURS.fullmatch(name):
                    raise ConfigError(
                        f"slurm: {key}: {name} is set by the job itself (from the plan, the snapshot, the node); leave it out"
                    )
                if list(names).count(name) > 1:
                    raise ConfigError(f"slurm: {key}: {name} stands there twice; once is enough")
        _check_text("slurm.environment", self.environment.values())

    def _check_secrets(self) -> None:
        for name in self.secrets:
            for key in ("environment", "exports"):
                if name in getattr(self, key):
                    raise ConfigError(f"slurm: {name} is one of secrets and stands in {key} too; a secret stands in secrets alone")
        for name in self.environment:
            if LOOKS_SECRET.search(name):
                raise ConfigError(
                    f"slurm: environment sets {name}, which looks like a secret, and its value would be written into run folders; "
                    f"put the name into secrets, and the value into secrets_file or your own environment"
                )
        if self.secrets_file and not self.secrets:
            raise ConfigError(
                f"slurm: secrets_file {self.secrets_file} is named, but secrets is empty; list the names that jobs need from it"
            )


@config
class Cluster:
    """One kind of node; rates are dense (no sparsity), sizes in bytes. Without `slurm` it can be planned for, and not launched on."""

    name: str
    gpus_per_node: int
    gpu_memory_bytes: int
    bf16_flops_per_second: float
    fp8_flops_per_second: float
    assumed_mfu: float  # share of the peak that GPU-hours are planned with
    cores_per_node: int  # CPUs as Slurm counts them (sinfo -o %c)
    memory_bytes_per_node: int
    slurm: Slurm | None = None
