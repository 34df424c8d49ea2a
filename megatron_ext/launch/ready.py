"""What stands before a graph is run, here or by Slurm: its checks against the run folders, their making, which stages need no run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ext.config.base import Json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.stages import inputs
from megatron_ext.errors import LaunchError, RunError
from megatron_ext.launch.doctor_folders import obstacle, start_problem
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan import plan_rows
from megatron_ext.launch.plan_rl import rl_rows
from megatron_ext.launch.ranks import NO_PERMISSIONS, Permissions
from megatron_ext.launch.verbs import RUN_VERBS, check_code
from megatron_ext.runs import RECIPE, Run, open_run, read_done, refuse_other_science, write_run
from megatron_ext.snapshot import PACKAGE, files_hash, source_files, take_snapshot


def check_ready(graph: Graph, runs_dir: Path, cluster: Cluster | None, permissions: Permissions = NO_PERMISSIONS) -> None:
    """Refuse what could not run as planned; nothing is written.

    `LaunchError` where a stage cannot start from the checkpoint that it names, `ConfigError` or `DataError` where the plan cannot
    be carried out, `RunError` where a folder cannot be made, holds another recipe, or a begun stage of other code.
    """
    folder = runs_dir / graph.name
    plan_rows(graph, cluster)
    rl_rows(graph, cluster)
    _check_place(folder)
    _check_folders(graph, folder)
    if not permissions.other_code:
        _check_codes(graph, folder)
    _check_starts(graph, folder)


def make_ready(graph: Graph, runs_dir: Path, cluster: Cluster | None) -> tuple[list[Run], Path]:
    """The run folders of a graph, written, and the snapshot of this code that its stages run."""
    snapshot = take_snapshot(runs_dir)
    return [_write(graph, stage, runs_dir / graph.name, cluster) for stage in graph.stages], snapshot


def is_finished(run: Run) -> bool:
    """Whether a stage need not run: it is done, and where it may be repeated (a report), not older than what it reads."""
    if not run.is_done():
        return False
    mark = read_done(run)
    if not RUN_VERBS[run.stage.kind].repeats:
        return True
    parents = [open_run(path) for path in run.inputs.values()]
    return all(parent.is_done() and time_of(read_done(parent)) <= time_of(mark) for parent in parents)


def time_of(mark: Json) -> datetime:
    """When a completion mark was written."""
    return datetime.fromisoformat(mark["finished_at"])


def _check_place(folder: Path) -> None:
    problem = obstacle(folder)
    if problem:
        raise RunError(f"{folder}: run folders cannot be made here: {problem}; mend that, or name another --runs. Nothing was started")


def _check_starts(graph: Graph, folder: Path) -> None:
    problems = [problem for stage in graph.stages if (problem := start_problem(folder, stage))]
    if problems:
        raise LaunchError("\n".join([f"graph {graph.name}: nothing was started, because a start is not there:", *problems]))


def _check_folders(graph: Graph, folder: Path) -> None:
    hashes: dict[str, str] = {}
    for stage in graph.stages:
        hashes[stage.name] = refuse_other_science(folder / stage.name, stage, {r: hashes[p] for r, p in inputs(stage).items()})


def _check_codes(graph: Graph, folder: Path) -> None:
    here = files_hash(source_files(PACKAGE))  # what a snapshot would hold; this process may have been started before an edit
    begun = [open_run(folder / stage.name) for stage in graph.stages if (folder / stage.name / RECIPE).is_file()]
    for run in begun:
        if not run.is_done():
            check_code(run, here)


def _write(graph: Graph, stage: Any, folder: Path, cluster: Cluster | None) -> Run:
    parents = {role: folder / parent for role, parent in inputs(stage).items()}
    return write_run(folder / stage.name, graph.name, stage, parents, cluster)
