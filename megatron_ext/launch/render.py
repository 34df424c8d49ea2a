"""A stage and a cluster as a batch job: its facts (`Job`, which the supervisor reads) and its script (from slurm/stage.sbatch).

Pure: nothing here asks the environment, the clock or Slurm, so equal inputs give equal text, and no secret can get in.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.base import config
from megatron_ext.config.cluster import UNPRINTABLE, Cluster, Slurm
from megatron_ext.config.memory import checkpoint_bytes
from megatron_ext.config.plan import ParallelPlan
from megatron_ext.config.rl_plan import RLPlan
from megatron_ext.config.stages import RLStage, TokenizeStage, TrainStage
from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.launch.containers import wrapping
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.job_events import COMMENT, PART_COMMENT
from megatron_ext.launch.joints import joint_step
from megatron_ext.launch.plan_rl import check_gpus
from megatron_ext.launch.plan_words import size
from megatron_ext.launch.ranks import thread_environment
from megatron_ext.runs import CHECKPOINTS
from megatron_ext.snapshot import PACKAGE, snapshot_environment
from megatron_ext.tracker import iteration_path

TEMPLATE = PACKAGE.parent / "slurm" / "stage.sbatch"
JOB_FOLDER, JOB = "job", "job.json"  # in a run folder
SCRIPT, LOG = "stage.sbatch", "slurm-%j.log"  # %j is Slurm's for the job's id
PARTS_SCRIPT, PART_LOG = "parts.sbatch", "part-%A_%a.log"  # of the array that works ahead of the stage; the array's id, the part
PASSED = ("HOME", "USER", "PATH", "LANG")  # from who submits, besides what the cluster names
SHARED_OUT = 0.9  # of a node's memory among jobs that share it; the rest is the system's
HOLE = re.compile(r"\{\{(\w+)\}\}")
PLAIN = re.compile(r"[\w./:,=@%+-]+", re.ASCII)  # a value of an #SBATCH line that needs no quotes


@config
class JobJoint:
    """A checkpoint in the middle of a run, and the run folder that waits for it."""

    checkpoint: str
    child: str


@config
class Job:
    """All that one batch job is made of; paths are absolute. Of secrets it holds the names alone."""

    run: str
    graph: str
    stage: str
    kind: str
    comment: str
    directory: str  # where it works: relative paths of the recipe start here
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int  # asked for; 0 on a CPU
    memory: str  # of a node, in sbatch's words; "": the cluster's default
    exclusive: bool
    time_limit_seconds: int
    signal_seconds: int
    partition: str
    account: str
    qos: str
    constraint: str
    gpus_option: str  # filled
    excluded_nodes: tuple[str, ...]
    exports: tuple[str, ...]
    secrets: tuple[str, ...]
    secrets_file: str
    setup: tuple[str, ...]
    environment: dict[str, str]  # of every rank
    command: tuple[str, ...]  # of a rank
    command_prefix: tuple[str, ...]  # what enters a container
    srun_options: tuple[str, ...]
    host_python: str
    supervisor: str  # the snapshot's package
    scratch: str
    hang_seconds: int
    max_idle_attempts: int
    node_check: str
    save_seconds: float  # that one checkpoint is taken to need; 0: the stage writes none
    joints: tuple[JobJoint, ...]
    parts: int  # jobs of an array that work ahead of this one; 1: none does
    part_command: tuple[str, ...]  # of one of them, but for the part's number at the end; empty where there are none

    @property
    def num_ranks(self) -> int:
        """Processes of the stage."""
        return self.nodes * self.tasks_per_node


def job_of(
    run_path: Path,
    graph: str,
    stage: Any,
    cluster: Cluster,
    snapshot: Path,
    joints: Sequence[JobJoint],
    directory: Path,
    words: Sequence[str] = (),
) -> Job:
    """The job of one stage, in `directory`; `words` are flags for its verb.

    `ConfigError` where the stage does not fit the cluster, its time limit, or a line of a script.
    """
    slurm = slurm_of(cluster)
    _check_paths(run_path, graph, stage, snapshot, directory)
    _check_fit(stage, cluster, slurm)
    has_ranks = isinstance(stage.plan, ParallelPlan)
    gpus = stage.plan.ranks_per_node if has_ranks and stage.plan.device == "gpu" else 0
    environment = _environment(stage, slurm, snapshot)
    needed = (directory, run_path.parent.parent, Path(slurm.scratch))
    wrapped = wrapping(slurm.container, needed, directory, environment, with_gpus=gpus > 0)
    whole_nodes = has_ranks and slurm.exclusive
    return Job(
        run=str(run_path),
        graph=graph,
        stage=stage.name,
        kind=stage.kind,
        comment=COMMENT + str(run_path),
        directory=str(directory),
        nodes=stage.plan.nodes if has_ranks else 1,
        tasks_per_node=stage.plan.ranks_per_node if has_ranks else 1,
        cpus_per_task=_cpus_per_task(stage, cluster, whole_nodes),
        gpus_per_node=gpus,
        memory=_memory(stage, cluster, slurm),
        exclusive=whole_nodes,
        time_limit_seconds=slurm.time_limit_seconds,
        signal_seconds=slurm.signal_seconds,
        partition=slurm.partition if gpus else slurm.cpu_partition or slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint if gpus else "",
        gpus_option=slurm.gpus_option.format(gpus=gpus) if gpus else "",
        excluded_nodes=slurm.excluded_nodes,
        exports=slurm.exports,
        secrets=slurm.secrets,
        secrets_file=slurm.secrets_file,
        setup=slurm.setup,
        environment=environment,
        command=(slurm.python, "-m", "megatron_ext", stage.kind, str(run_path), *words),
        command_prefix=wrapped.command_prefix,
        srun_options=wrapped.srun_options,
        host_python=slurm.host_python,
        supervisor=str(snapshot / PACKAGE.name),
        scratch=slurm.scratch,
        hang_seconds=slurm.hang_seconds,
        max_idle_attempts=slurm.max_idle_attempts,
        node_check=slurm.node_check if has_ranks else "never",
        save_seconds=save_seconds(stage, slurm),
        joints=tuple(joints),
        parts=num_parts(stage),
        part_command=(slurm.python, "-m", "megatron_ext", "tokenize-part", str(run_path), *words, "--of", str(num_parts(stage)), "--part")
        if num_parts(stage) > 1
        else (),
    )


def jobs_of(graph: Graph, folder: Path, cluster: Cluster, snapshot: Path, directory: Path, words: Sequence[str] = ()) -> list[Job]:
    """The job of every stage of a graph whose run folders stand in `folder`; raises as `job_of`."""
    return [
        job_of(folder / stage.name, graph.name, stage, cluster, snapshot, joints_of(graph, stage, folder), directory, words)
        for stage in graph.stages
    ]


def joints_of(graph: Graph, stage: Any, folder: Path) -> list[JobJoint]:
    """Which stages start from a checkpoint in the middle of `stage`, so that they need not wait for its end."""
    steps = {child.name: joint_step(child, stage) for child in graph.stages}
    checkpoints = folder / stage.name / CHECKPOINTS
    return [
        JobJoint(checkpoint=str(iteration_path(checkpoints, step)), child=str(folder / name))
        for name, step in steps.items()
        if step is not None
    ]


def slurm_of(cluster: Cluster) -> Slurm:
    """How a cluster's Slurm is asked; `ConfigError` where it does not say."""
    if cluster.slurm is None:
        raise ConfigError(
            f"cluster {cluster.name}: it says nothing of Slurm, so jobs cannot be written for it; give it slurm=Slurm(partition=...) "
            f"(docs/cluster.md explains the fields), or launch with --local"
        )
    return cluster.slurm


def save_seconds(stage: Any, slurm: Slurm) -> float:
    """What one checkpoint is taken to need, at least a second; 0 where the stage writes none."""
    if not isinstance(stage, TrainStage | RLStage):
        return 0.0
    return max(1.0, checkpoint_bytes(stage.model, stage.precision, stage.plan) / slurm.write_bytes_per_second)


def num_parts(stage: Any) -> int:
    """Jobs of an array that do a stage's work ahead of its own; 1: none does."""
    return int(stage.plan.parts) if isinstance(stage, TokenizeStage) else 1


def _check_paths(run_path: Path, graph: str, stage: Any, snapshot: Path, directory: Path) -> None:
    for what, text in {"run folder": run_path, "snapshot": snapshot, "work folder": directory, "graph": graph, "stage": stage.name}.items():
        if UNPRINTABLE.search(str(text)):
            raise ConfigError(f"{what} {str(text)!r}: a line break or another control character cannot stand in a batch script; rename it")
    if "\\" in str(run_path):
        raise ConfigError(f"run folder {run_path}: Slurm reads '\\' in the path of a log as a word of its own; use a folder without it")


def _check_fit(stage: Any, cluster: Cluster, slurm: Slurm) -> None:
    if not isinstance(stage, TrainStage | RLStage):
        return
    check_gpus(stage, cluster)
    plan = stage.plan
    if slurm.max_nodes and plan.nodes > slurm.max_nodes:
        raise ConfigError(
            f"stage {stage.name}: plan.nodes {plan.nodes} exceeds the {slurm.max_nodes} nodes that a job of {cluster.name} can get "
            f"(slurm.max_nodes); lower it"
        )
    if plan.ranks_per_node > cluster.cores_per_node:
        raise ConfigError(
            f"stage {stage.name}: plan.ranks_per_node {plan.ranks_per_node} exceeds the {cluster.cores_per_node} cores of a node of "
            f"{cluster.name}; lower it and raise plan.nodes"
        )
    _check_time(stage, slurm)


def _check_time(stage: TrainStage | RLStage, slurm: Slurm) -> None:
    """A job must have time for a save after it is told to stop, and for work before that."""
    need = math.ceil(save_seconds(stage, slurm))
    arithmetic = f"a checkpoint of {size(checkpoint_bytes(stage.model, stage.precision, stage.plan))} at "
    arithmetic += f"slurm.write_bytes_per_second {slurm.write_bytes_per_second:.3g} takes {need} s"
    if need > slurm.signal_seconds:
        raise ConfigError(
            f"stage {stage.name}: {arithmetic}, but Slurm warns only slurm.signal_seconds {slurm.signal_seconds} s before it ends the job; "
            f"raise that to {2 * need} or more"
        )
    if slurm.time_limit_seconds <= slurm.signal_seconds + need:
        raise ConfigError(
            f"stage {stage.name}: slurm.time_limit_seconds {slurm.time_limit_seconds} leaves no time to work: the warning comes "
            f"{slurm.signal_seconds} s before it, and {arithmetic}; raise the limit above {slurm.signal_seconds + need}"
        )


def _environment(stage: Any, slurm: Slurm, snapshot: Path) -> dict[str, str]:
    """What every rank gets beside what passes to the job: the cluster's variables, pinned threads, the snapshot's code."""
    ours = {**thread_environment(stage), **snapshot_environment(snapshot, {}), "TMPDIR": slurm.scratch}
    if slurm.container.runtime != "none":
        ours["PYTHONNOUSERSITE"] = "1"  # a home folder that is mounted too must not bring packages of its own
    return {**slurm.environment, **ours}


def _cpus_per_task(stage: Any, cluster: Cluster, whole_nodes: bool) -> int:
    """On a GPU node a rank's share of the cores, on others what a rank's processes use."""
    plan = stage.plan
    if not isinstance(plan, ParallelPlan):
        return int(plan.workers)
    if plan.device == "gpu":
        return max(1, cluster.cores_per_node // (plan.ranks_per_node if whole_nodes else cluster.gpus_per_node))
    return plan.threads_per_rank + (plan.grading_workers if isinstance(plan, RLPlan) else stage.plan.loader_workers)


def _memory(stage: Any, cluster: Cluster, slurm: Slurm) -> str:
    """Of a node, in sbatch's words: all of it, a GPU's share for each, or what one process is given."""
    if not isinstance(stage.plan, ParallelPlan):
        return _mebibytes(slurm.cpu_memory_bytes) if slurm.cpu_memory_bytes else ""
    if slurm.exclusive:
        return "0"  # sbatch's word for all that a node has
    if stage.plan.device == "cpu":
        return ""
    share = stage.plan.ranks_per_node / cluster.gpus_per_node
    return _mebibytes(cluster.memory_bytes_per_node * SHARED_OUT * share)


def _mebibytes(number_bytes: float) -> str:
    return f"{math.ceil(number_bytes / 2**20)}M"


def scripts_of(job: Job) -> dict[str, str]:
    """File name -> batch script, in the order in which they run: the array's where there is one, and the stage's own."""
    parts = {PARTS_SCRIPT: script_text(job, of_parts=True)} if job.parts > 1 else {}
    return {**parts, SCRIPT: script_text(job)}


def script_text(job: Job, of_parts: bool = False) -> str:
    """The batch script of a job, or of the array that works ahead of it."""
    in_file = () if job.secrets_file else job.secrets  # the supervisor reads those of a file itself
    passed = list(dict.fromkeys((*PASSED, *job.exports, *in_file)))
    run = Path(job.run)
    command = [*job.part_command, "I"] if of_parts else job.command
    who = "It" if job.num_ranks == 1 else f"Each of its {job.num_ranks:,} ranks"
    values = {
        "stage": job.stage,
        "graph": job.graph,
        "who": f"Part I of {job.parts:,}" if of_parts else who,
        "rank_command": shlex.join([*job.command_prefix, *command]),
        "job_name": directive_word(f"{job.graph}.{job.stage}" + (".part" if of_parts else "")),
        "comment": directive_word(PART_COMMENT + job.run if of_parts else job.comment),
        "directory": directive_word(job.directory),
        "log": directive_word(f"{job.run.replace('%', '%%')}/{JOB_FOLDER}/{PART_LOG if of_parts else LOG}"),
        "exported": ",".join(passed),
        "nodes": str(job.nodes),
        "tasks_per_node": str(job.tasks_per_node),
        "cpus_per_task": str(job.cpus_per_task),
        "time": time_words(job.time_limit_seconds),
        "signal_seconds": str(job.signal_seconds),
        "options": "\n".join([*([f"#SBATCH --array=0-{job.parts - 1}"] if of_parts else []), *_options(job)]),
        "kept": " | ".join(passed),
        "setup": "\n".join(job.setup),
        "host_python": shlex.quote(job.host_python),
        "module": "job_part" if of_parts else "supervisor",
        "snapshot": shlex.quote(str(Path(job.supervisor).parent)),
        "job_file": shlex.quote(str(run / JOB_FOLDER / JOB)),
    }
    return HOLE.sub(lambda hole: values[hole[1]], template_text())


def template_text() -> str:
    """The script with holes; `LaunchError` where this code does not stand in its checkout."""
    try:
        return TEMPLATE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LaunchError(f"{TEMPLATE}: no such file; launch from the project's checkout, which holds it (pip install -e)") from None


def _options(job: Job) -> list[str]:
    """The lines of what a cluster may leave out."""
    rows = {
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "exclude": ",".join(job.excluded_nodes),
        "mem": job.memory,
    }
    lines = [f"#SBATCH --{name}={directive_word(value)}" for name, value in rows.items() if value]
    whole = ["#SBATCH --exclusive"] if job.exclusive else []
    return [*lines, *whole, *([f"#SBATCH --{job.gpus_option}"] if job.gpus_option else [])]


def directive_word(value: str) -> str:
    """A value as sbatch reads it back from an #SBATCH line: it knows double quotes, and a backslash before any character."""
    if PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def time_words(seconds: int) -> str:
    """D-HH:MM:SS, as sbatch takes a time."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"
