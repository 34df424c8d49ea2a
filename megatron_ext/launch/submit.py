"""Hands a graph to Slurm: one job a stage, each after the jobs of the stages that it reads. What is DONE or queued is left alone.

Jobs requeue themselves and keep their id, so a child never loses its parent. A child of a checkpoint in the middle of a run waits for
the whole parent at first; the parent's supervisor takes that away once the checkpoint is published. A child whose parent
failed for good is cancelled by Slurm.

A stage that is cut into parts has an array of jobs ahead of its own, which comes after them however they ended: it does what they
left undone, and tells what is wrong.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_ext.config.base import Json, to_json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.stages import TrainStage
from megatron_ext.errors import LaunchError
from megatron_ext.launch.doctor import refuse_what_would_fail
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.joints import joint_step, readable_manifest
from megatron_ext.launch.ranks import NO_PERMISSIONS, Permissions
from megatron_ext.launch.ready import check_ready, is_finished, make_ready
from megatron_ext.launch.render import JOB, JOB_FOLDER, PARTS_SCRIPT, SCRIPT, Job, jobs_of, num_parts, scripts_of
from megatron_ext.launch.slurm import Queue, QueuedJob, ask_queue, submit
from megatron_ext.runs import Run, atomic_write, brief, differences, open_run, read_json, write_json
from megatron_ext.snapshot import code_hash, snapshot_path

SUBMITTED = "submitted.json"
ENDING_SECONDS, LOOK_SECONDS = 120.0, 2.0  # for jobs that are being ended, as after a cancel
LOCK = ".launching"  # in a graph's folder, while one launch submits


@dataclass(frozen=True)
class Submission:
    """What `launch` did about one stage."""

    run: Run
    job_id: int | None  # None: nothing to run
    after: tuple[int, ...] = ()
    is_new: bool = False
    parts: int | None = None  # the array that works ahead


def launch_cluster(
    graph: Graph,
    runs_dir: Path,
    cluster: Cluster,
    permissions: Permissions = NO_PERMISSIONS,
    first: str | None = None,
    doctor: bool = True,
) -> None:
    """Submit every stage of `graph` that is neither DONE nor queued, or of these `first` and what comes of it; print the jobs.

    `doctor`: ask its quick checks first, and Slurm whether it takes the jobs. Raises before anything is submitted: as `launch --local`
    does, and `LaunchError` where a stage reads one neither done nor queued.
    """
    folder = (runs_dir / graph.name).resolve()
    jobs_of(graph, folder, cluster, snapshot_path(runs_dir, code_hash()), Path.cwd())  # what no job can be made of is refused first
    wanted = descendants(graph, first) if first else {stage.name for stage in graph.stages}
    jobs = ask_queue().jobs  # where Slurm does not answer, nothing is written
    check_queued(graph, runs_dir, jobs)
    late = late_points(graph, runs_dir, jobs)
    check_ready(graph, runs_dir, cluster, permissions)
    if doctor:
        refuse_what_would_fail(graph, cluster, runs_dir, by_jobs=True)
    runs, snapshot = make_ready(graph, runs_dir, cluster)
    with _alone(folder):
        chosen = [run for run in runs if run.name in wanted]
        queue = settled(chosen)
        check_parents(chosen, queue.jobs)
        for run, job in zip(runs, jobs_of(graph, folder, cluster, snapshot, Path.cwd(), permissions.words), strict=True):
            if run.path in queue.jobs:
                add_joints(run, job)
            elif run in chosen and not is_finished(run):
                write_job(run, job)
        number = 0
        try:
            for number, line in enumerate(submit_all(chosen, queue), start=1):
                print(f"[{number}/{len(chosen)}] {_words(line)}", flush=True)
        except LaunchError as problem:
            raise LaunchError(f"{problem}\n{number} of {len(chosen)} stages are done or queued; the same launch submits the rest") from None
    for warning in late:
        print(warning)
    print(f"megatron-ext status {brief(folder)}")


def settled(runs: Sequence[Run]) -> Queue:
    """The queue, once no job of these runs is ending: it may be gone in a moment, or requeued.

    `LaunchError` where one takes longer than ENDING_SECONDS.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        queue = ask_queue()
        jobs = [job for run in runs for job in (queue.jobs.get(run.path), *queue.parts.get(run.path, ())) if job is not None]
        ending = sorted({job.job_id for job in jobs if job.state == "COMPLETING"})
        if not ending:
            return queue
        if time.monotonic() > deadline:
            raise LaunchError(
                f"job {', '.join(map(str, ending))} is ending since more than {ENDING_SECONDS:.0f} s, so whether its stage must be "
                f"submitted is not known; see scontrol show job {ending[0]}, and launch again. Nothing was submitted"
            )
        time.sleep(LOOK_SECONDS)


def descendants(graph: Graph, first: str) -> set[str]:
    """A stage and all that is made of it; `ConfigError` names the nearest stage."""
    found = {graph.stage(first).name}
    for parent, child, _ in graph.edges():  # in the graph's order: a parent's parents come first
        if parent in found:
            found.add(child)
    return found


def check_queued(graph: Graph, runs_dir: Path, queue: Mapping[Path, QueuedJob]) -> None:
    """`LaunchError` where a queued stage is asked for with another recipe or plan: its job would run what nobody submitted.

    Points that more stages start from may come; the stage's next attempt saves them.
    """
    for stage in graph.stages:
        path = (runs_dir / graph.name / stage.name).resolve()
        if path not in queue:
            continue
        lines = differences(_without_points(to_json(open_run(path).stage)), _without_points(to_json(stage)))
        if lines:
            raise LaunchError(
                "\n  ".join([f"{path}: stage '{stage.name}' is queued as job {queue[path].job_id} with another recipe or plan:", *lines])
                + f"\nLaunch it as it was, or cancel it first: megatron-ext cancel {brief(path)}. Nothing was submitted"
            )


def late_points(graph: Graph, runs_dir: Path, queue: Mapping[Path, QueuedJob]) -> list[str]:
    """A line for each stage at work that came to have points to start from: it saves them from its next start on, not before."""
    lines = []
    for stage in graph.stages:
        path = (runs_dir / graph.name / stage.name).resolve()
        if path in queue and queue[path].state != "PENDING" and isinstance(stage, TrainStage):
            new = sorted(set(stage.plan.pin_tokens) - set(open_run(path).stage.plan.pin_tokens))
            job_id = queue[path].job_id
            lines += [
                f"warning: {stage.name} is at work and learns at its next start that it must keep its checkpoint at {tokens:,} tokens; "
                f"if it would pass that before: scontrol requeue {job_id} (it saves, and goes on)"
                for tokens in new
            ]
    return lines


def _without_points(values: Json) -> Json:
    plan = {key: value for key, value in (values.get("plan") or {}).items() if key not in ("pin_tokens", "export_tokens")}
    return {**values, "plan": plan}


def write_job(run: Run, job: Job) -> None:
    """Write a stage's script, and what its supervisor reads."""
    folder = run.path / JOB_FOLDER
    folder.mkdir(exist_ok=True)
    write_json(folder / JOB, to_json(job))
    for name, text in scripts_of(job).items():
        atomic_write(folder / name, text)


def add_joints(run: Run, job: Job) -> None:
    """Let the supervisor of a queued job know of stages that came to start from the middle of it; nothing else of the job changes."""
    path = run.path / JOB_FOLDER / JOB
    written = read_json(path, "the job of a queued stage")
    write_json(path, {**written, "joints": to_json(job)["joints"]})


def check_parents(runs: Sequence[Run], queue: Mapping[Path, QueuedJob]) -> None:
    """`LaunchError` where a stage reads one that is not done, not queued, and not about to be submitted."""
    coming = {run.path for run in runs} | set(queue)
    for run in runs:
        missing = [] if is_finished(run) or run.path in queue else [path.name for path in awaited(run) if path not in coming]
        if missing:
            raise LaunchError(
                f"stage '{run.name}' reads {', '.join(missing)}, neither done nor queued, so it could never run; "
                f"launch without --from, or with --from {missing[0]}. Nothing was submitted"
            )


def awaited(run: Run) -> list[Path]:
    """The run folders whose end a stage must wait for."""
    return [path for role, path in run.inputs.items() if not _is_ready(run, role, open_run(path))]


def _is_ready(run: Run, role: str, parent: Run) -> bool:
    step = joint_step(run.stage, parent.stage) if role == "start" else None
    return is_finished(parent) or (step is not None and readable_manifest(parent, step) is not None)


def submit_all(runs: Sequence[Run], queue: Queue) -> Iterator[Submission]:
    """Submit, in the graph's order, what is neither finished nor queued; each job is noted before the next is submitted."""
    ids = {path: job.job_id for path, job in queue.jobs.items()}
    for run in runs:
        if run.path in queue.jobs:
            _note(run, ids[run.path])
            yield Submission(run, ids[run.path])
        elif is_finished(run):
            yield Submission(run, None)
        else:
            after = tuple(sorted({ids[path] for path in awaited(run)}))
            arrays = sorted({job.job_id for job in queue.parts.get(run.path, ())})  # left by a job of the stage's own that is gone
            if num_parts(run.stage) > 1 and not arrays:
                arrays = [submit(run.path / JOB_FOLDER / PARTS_SCRIPT, after)]
            ids[run.path] = submit(run.path / JOB_FOLDER / SCRIPT, after, arrays)
            _note(run, ids[run.path])
            yield Submission(run, ids[run.path], after, is_new=True, parts=arrays[-1] if arrays else None)


def _note(run: Run, job_id: int) -> None:
    """Note a run's newest job, by which its parent finds it; a launch that was killed may have left that undone."""
    path = run.path / JOB_FOLDER / SUBMITTED
    if not path.is_file() or read_json(path, "the newest job of a stage").get("job_id") != job_id:
        write_json(path, {"job_id": job_id, "submitted_at": time.time()})


def _words(line: Submission) -> str:
    if line.job_id is None:
        return f"{line.run.name}: done before"
    if not line.is_new:
        return f"{line.run.name}: job {line.job_id}, queued before"
    array = [f"its {num_parts(line.run.stage)} parts in array {line.parts}"] if line.parts else []
    after = [*map(str, line.after), *array]
    return f"{line.run.name}: job {line.job_id}" + (f", after {', '.join(after)}" if after else "")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second launch of the same graph from submitting at the same moment."""
    path = folder / LOCK
    me = psutil.Process()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        _refuse_beside(path)
        path.unlink(missing_ok=True)  # whoever left it is dead
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(descriptor)
    write_json(path, {"host": os.uname().nodename, "pid": me.pid, "process_start": me.create_time()})
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _refuse_beside(path: Path) -> None:
    try:
        other: dict[str, Any] = read_json(path, "who submits this graph")
        here = other["host"] == os.uname().nodename
        dead = here and not (psutil.pid_exists(other["pid"]) and psutil.Process(other["pid"]).create_time() == other["process_start"])
    except (LaunchError, KeyError, psutil.Error):
        other, dead = {}, False
    if not dead:
        who = f"process {other['pid']} on {other['host']}" if other else "another process"
        raise LaunchError(f"{path}: {who} submits this graph at this moment; wait for it. Where it is known to be dead, remove that file")
