"""Runs a graph on this machine: one stage after another, each a process of its own, finished ones skipped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from megatron_ext.attempts import Attempt
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import export_steps
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import LaunchError, RunError
from megatron_ext.launch.doctor import refuse_what_would_fail
from megatron_ext.launch.doctor_folders import changed_parent
from megatron_ext.launch.failures import failure_text
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.ranks import NO_PERMISSIONS, Permissions, thread_environment
from megatron_ext.launch.ready import check_ready, is_finished, make_ready, time_of
from megatron_ext.launch.slurm import ask_queue, has_slurm
from megatron_ext.launch.tree import columns, progress
from megatron_ext.launch.tree_rl import accuracy_words
from megatron_ext.runs import (
    ATTEMPTS,
    CHECKPOINTS,
    EXPORTS,
    Run,
    attempt_numbers,
    brief,
    read_done,
    read_json,
)
from megatron_ext.snapshot import snapshot_environment
from megatron_ext.tracker import iteration_path

LOOK_SECONDS = 0.5  # between looks for the attempt of a stage; a rank lives longer than that before it begins one
GRACE_SECONDS = 40.0  # torchrun gives its ranks 30 s to stop before it kills them


def launch_local(
    graph: Graph, runs_dir: Path, cluster: Cluster | None, permissions: Permissions = NO_PERMISSIONS, doctor: bool = True
) -> None:
    """Run every stage of `graph` that is not done, into `runs_dir/<graph>/<stage>`, and print what came of it.

    Stages run a snapshot of this code as it is now: editing it while they run changes nothing.
    Before anything is written or run: `LaunchError` where a stage cannot start from the checkpoint that it names, or
    (unless `doctor` is false) would lack files, packages or room that can be looked for now,
    `ConfigError` or `DataError` where the plan cannot be carried out, `RunError` where a folder cannot be made,
    holds another recipe, or a begun stage of other code.
    Later: `LaunchError` where a stage fails.
    """
    check_ready(graph, runs_dir, cluster, permissions)
    _refuse_beside_jobs(graph, runs_dir)
    if doctor:
        refuse_what_would_fail(graph, cluster, runs_dir)
    runs, snapshot = make_ready(graph, runs_dir, cluster)
    for number, run in enumerate(runs, start=1):
        line = f"[{number}/{len(runs)}] {run.name}: {run.stage.kind}"
        if is_finished(run):
            change = changed_parent(run)
            print(f"{line}, done before, skipped" + (f", although {change}: {_anew(run)}" if change else ""), flush=True)
            for name in _missing_exports(run, graph.stages[number - 1]):
                print(f"  its export {name}, which the plan asks for by now, is not there; write it with\n  {_export(run, name)}")
            continue
        print(line, flush=True)
        run_stage(run, snapshot, permissions)
    print(summary_text(runs), flush=True)


def _refuse_beside_jobs(graph: Graph, runs_dir: Path) -> None:
    """`LaunchError` where Slurm has jobs for these run folders: both would do the same stages. Without a Slurm there are none."""
    try:
        queue = ask_queue().jobs if has_slurm() else {}
    except LaunchError:
        return  # a Slurm that does not answer starts nothing either; whoever is at work owns its folder
    paths = [(runs_dir / graph.name / stage.name).resolve() for stage in graph.stages]
    jobs = [f"{path.name} (job {queue[path].job_id})" for path in paths if path in queue]
    if jobs:
        raise LaunchError(
            f"{brief(runs_dir / graph.name)}: Slurm has jobs for {', '.join(jobs)}; let them do it, or cancel them first: "
            f"megatron-ext cancel {brief(runs_dir / graph.name)}. Nothing was started"
        )


def _anew(run: Run) -> str:
    return f"remove {brief(run.path)} and launch again to train it from what its parent holds now"


def _missing_exports(run: Run, stage: Any) -> list[str]:
    """Names of the exports that a done stage's plan asks for and that its folder lacks."""
    names = [iteration_path(run.path / EXPORTS, step).name for step in _exported_steps(stage)]
    return [name for name in names if not (run.path / EXPORTS / name).exists()]


def _exported_steps(stage: Any) -> tuple[int, ...]:
    if isinstance(stage, RLStage):
        return (stage.steps,) if stage.plan.export_last else ()
    return export_steps(stage.budget, stage.plan) if isinstance(stage, TrainStage) else ()


def _export(run: Run, name: str) -> str:
    folder = brief(run.path)
    return f"megatron-ext convert megatron-to-hf {folder}/{CHECKPOINTS}/{name} {folder}/{EXPORTS}/{name}"


def run_stage(run: Run, snapshot: Path, permissions: Permissions = NO_PERMISSIONS) -> None:
    """Run one stage's verb in a process of its own, from a snapshot; `LaunchError` with the end of its log where it fails.

    The child has its own process group: a Ctrl-C reaches this process alone, which then stops the
    child and all its ranks before it goes.
    """
    before = attempt_numbers(run.path)
    command = [sys.executable, "-m", "megatron_ext", run.stage.kind, str(run.path), *permissions.words]
    caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:  # what is ignored, as under nohup, stays ignored
        signal.signal(number, _terminated)
    try:
        child = subprocess.Popen(command, env=_environment(run, snapshot), stdin=subprocess.DEVNULL, process_group=0)
        try:
            code, attempt = _wait(run, child, before)
        except BaseException:
            print(f"stopping stage '{run.name}' ...", file=sys.stderr, flush=True)
            stop(child)
            print(f"stage '{run.name}' was stopped; the same command goes on from here", file=sys.stderr, flush=True)
            raise
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
    if code != 0:
        raise LaunchError(failure_text(run, code, attempt))
    if not run.is_done():
        raise LaunchError(f"stage '{run.name}' exited with 0 but left no DONE in {run.path}; this is a defect of its verb")


def _wait(run: Run, child: subprocess.Popen[bytes], before: list[int]) -> tuple[int, int | None]:
    """The exit code of a stage's process, and the attempt that it, or a rank below it, began (None: none)."""
    family, own = {child.pid}, None
    while True:
        try:
            code = child.wait(None if own else LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.Error, OSError, RunError):  # a look that fails must not end the stage; others follow
                family |= {process.pid for process in psutil.Process(child.pid).children(recursive=True)}
                own = _own_attempt(run, family, before)
        else:
            return code, own or _own_attempt(run, family, before)


def _own_attempt(run: Run, family: set[int], before: list[int]) -> int | None:
    """The attempt that one of these processes of this machine began; another launch may begin one beside ours."""
    new = [Attempt(number, run.path / ATTEMPTS / str(number)) for number in attempt_numbers(run.path) if number not in before]
    host = os.uname().nodename
    return next((one.number for one in new if one.record["host"] == host and one.record["pid"] in family), None)


def _environment(run: Run, snapshot: Path) -> dict[str, str]:
    """This process's environment with pinned threads and the snapshot's code, and without another job's ranks."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    kept = {k: v for k, v in os.environ.items() if k not in ranks}
    return {**kept, **thread_environment(run.stage), **snapshot_environment(snapshot)}


def _terminated(signal_number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal_number)


def stop(child: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """End a child and all its descendants: SIGTERM, then SIGKILL for what is left after the grace.

    torchrun puts its ranks into sessions of their own, so the group alone would miss them.
    """
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)] if child.poll() is None else []
    if family:
        os.killpg(child.pid, signal.SIGTERM)
    try:
        _, alive = psutil.wait_procs(family, timeout=grace_seconds)
    except KeyboardInterrupt:  # asked twice: no more grace
        alive = [process for process in family if process.is_running()]
    for process in alive:
        process.kill()
    child.wait()


def summary_text(runs: list[Run]) -> str:
    """A table of the finished stages, and where the report is."""
    rows = [["stage", "kind", "state", "seconds", "tokens", "final loss", "accuracy"]]
    for run in runs:
        come = progress(run)
        loss = "" if come.loss is None or run.stage.kind == "rl" else f"{come.loss:.4f}"  # that of GRPO says nothing
        tokens = "" if come.tokens is None else f"{come.tokens:,}"
        learnt = accuracy_words(run) if run.stage.kind == "rl" else ""
        rows.append([run.name, run.stage.kind, come.state, f"{_seconds(run):.0f}", tokens, loss, learnt])
    pages = [page for run in runs if run.stage.kind == "report" and (page := run.path / "index.html").is_file()]
    return "\n".join(["", *columns(rows), *(f"report: {brief(page)}" for page in pages)])


def _seconds(run: Run) -> float:
    """What the completion mark says, or else the time from the start of the last attempt to the mark."""
    done = read_done(run)
    if "seconds" in done:
        return float(done["seconds"])
    began = read_json(run.path / ATTEMPTS / str(attempt_numbers(run.path)[-1]) / "plan.json", "how an attempt began")["started_at"]
    return (time_of(done) - datetime.fromisoformat(began)).total_seconds()
