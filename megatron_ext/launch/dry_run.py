"""What `launch --dry-run` prints: the resolved recipe, its plan, and for a cluster with Slurm every stage's script. Writes nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from megatron_ext.config.cluster import Cluster
from megatron_ext.config.stages import inputs
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan import plan_text, resolved
from megatron_ext.launch.render import JOB_FOLDER, SCRIPT, jobs_of, scripts_of
from megatron_ext.snapshot import code_hash, snapshot_path


def print_dry_run(graph: Graph, cluster: Cluster | None, runs_dir: Path) -> None:
    """Print it, for a launch from the present folder."""
    print(dry_run_text(graph, cluster, runs_dir, Path.cwd()))


def dry_run_text(graph: Graph, cluster: Cluster | None, runs_dir: Path, directory: Path) -> str:
    """The whole of it, for jobs that work in `directory`; raises what a launch would refuse of the plan and its fit to the cluster."""
    parts = [json.dumps(resolved(graph), indent=2), plan_text(graph, cluster)]
    if cluster is not None and cluster.slurm is not None:
        parts += scripts(graph, cluster, runs_dir, directory)
    return "\n\n".join(parts)


def scripts(graph: Graph, cluster: Cluster, runs_dir: Path, directory: Path) -> list[str]:
    """Every stage's script under its path, in the graph's order, with the stages that its job waits for."""
    snapshot = snapshot_path(runs_dir, code_hash())
    jobs = jobs_of(graph, runs_dir.resolve() / graph.name, cluster, snapshot, directory)
    found = []
    for stage, job in zip(graph.stages, jobs, strict=True):
        parents = list(dict.fromkeys(inputs(stage).values()))
        for name, text in scripts_of(job).items():
            after = [*parents, *(["its parts"] if name == SCRIPT and job.parts > 1 else [])]
            waits = f", after {', '.join(after)}" if after else ""
            found.append(f"==> {shlex.quote(str(Path(job.run) / JOB_FOLDER / name))}{waits} <==\n{text}")
    return found
