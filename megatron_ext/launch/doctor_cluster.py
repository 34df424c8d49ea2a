"""What can be known of a cluster before a job waits: scripts that Slurm takes, the image, secrets, packages that look alike."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.cluster import Cluster, Slurm
from megatron_ext.errors import ConfigError, LaunchError
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.job_ranks import read_secrets
from megatron_ext.launch.render import PARTS_SCRIPT, Job, jobs_of, scripts_of
from megatron_ext.launch.slurm import ask_queue, refusal
from megatron_ext.snapshot import code_hash, snapshot_path

HAS_PACKAGES = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('torch', 'megatron', 'pydantic'))))"
NVIDIA_APEX = ("optimizers", "normalization", "multi_tensor_apply")  # what Megatron-Core imports of it


def cluster_findings(graph: Graph, cluster: Cluster | None, runs: Path, stages: Sequence[str]) -> list[Finding]:
    """Findings for the jobs of these stages; none where no cluster is named, or it has no Slurm."""
    if cluster is None or cluster.slurm is None:
        return []
    slurm = cluster.slurm
    try:
        jobs = jobs_of(graph, runs.resolve() / graph.name, cluster, snapshot_path(runs, code_hash()), Path.cwd())
    except (ConfigError, LaunchError) as refused:
        return [error("job", str(refused))]
    wanted = [job for job in jobs if job.stage in stages]
    return [*_accepted(wanted), *_pythons(slurm), *_image(slurm), *_secrets(slurm, wanted), *_apex(slurm)]


def _accepted(jobs: Sequence[Job]) -> list[Finding]:
    """What Slurm says to the scripts, one of each kind: partition, account, nodes, GPUs, time. Its answer uses up a job id."""
    what = "Slurm"
    way_out = "run doctor on a login node of the cluster"
    try:
        ask_queue()
    except LaunchError as silence:
        return [warning(what, f"whether it takes the jobs is not known: {str(silence).splitlines()[0]}", way_out)]
    answers: dict[tuple[Any, ...], str] = {}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for job, name, text in [(one, *script) for one in jobs for script in scripts_of(one).items()]:
            times = job.parts if name == PARTS_SCRIPT else 1
            kind = (job.partition, job.nodes, job.tasks_per_node, job.gpus_option, job.memory, job.constraint, times)
            if kind not in answers:
                script = Path(folder) / name
                script.write_text(text, encoding="utf-8")
                answers[kind] = refusal(script)
            shape = f"{job.nodes} node(s) of {job.partition or 'the default partition'}, {job.tasks_per_node} task(s) on each"
            shape += f", {times} times in an array" if times > 1 else ""
            if answers[kind]:
                found.append(error(what, f"{shape}: {answers[kind]}", "mend slurm of the cluster, or the plan", job.stage))
            else:
                found.append(ok(what, f"takes {shape}", job.stage))
    return found


def _pythons(slurm: Slurm) -> list[Finding]:
    """Whether the interpreters that jobs start are any good, as far as this machine can tell: nodes may have others."""
    if slurm.setup:
        return []  # which may bring them
    wanted = [("host_python", slurm.host_python, "import sys; sys.exit(sys.version_info < (3, 9))", "is older than Python 3.9")]
    if slurm.container.runtime == "none":
        wanted.append(("python", slurm.python, HAS_PACKAGES, "lacks torch, megatron-core or pydantic"))
    found = []
    for key, python, code, problem in wanted:
        path = shutil.which(python)
        if path is None:
            text = f"slurm.{key} is {python}, which is not on this machine"
        elif subprocess.run([path, "-c", code], capture_output=True, check=False).returncode:
            text = f"slurm.{key} is {path} here, and {problem}"
        else:
            found.append(ok("Python", f"slurm.{key} is {path}"))
            continue
        found.append(warning("Python", text, f"name one that the nodes have as slurm.{key}, or activate the environment before you launch"))
    return found


def _image(slurm: Slurm) -> list[Finding]:
    """A container's image that is a file must be there."""
    image = slurm.container.image
    if not image.startswith("/"):
        return []
    if not os.path.exists(image):
        return [error("container", f"{image}: no such file", "build it (slurm/README.md), or mend slurm.container.image of the cluster")]
    return [ok("container", f"{image} is there")]


def _secrets(slurm: Slurm, jobs: Sequence[Job]) -> list[Finding]:
    """Secrets are there, and nobody else can read their file, nor the folders on the way for writing."""
    if not slurm.secrets or not jobs:
        return []
    try:
        read_secrets({"secrets": list(slurm.secrets), "secrets_file": slurm.secrets_file})
    except LaunchError as problem:
        return [error("secrets", str(problem))]
    if not slurm.secrets_file:
        text = f"{', '.join(slurm.secrets)} pass by name, and Slurm's controller keeps the environment of a job that waits on its disk"
        return [warning("secrets", text, "slurm.secrets_file, which only the job itself reads")]
    folder = Path(slurm.secrets_file).parent
    if folder.stat().st_mode & stat.S_IWOTH and not folder.stat().st_mode & stat.S_ISVTX:
        return [error("secrets", f"{folder}: anybody may put another file in the place of {slurm.secrets_file}", f"chmod o-w {folder}")]
    return [ok("secrets", f"{', '.join(slurm.secrets)} from {slurm.secrets_file}")]


def _apex(slurm: Slurm) -> list[Finding]:
    """The package index has an `apex` that is a toolkit for web sites; Megatron-Core tries to import NVIDIA's by that name."""
    if slurm.container.runtime != "none":
        return []  # what is installed here is not what ranks see
    spec = importlib.util.find_spec("apex")
    folders = [Path(one) for one in (spec.submodule_search_locations or [])] if spec else []
    if spec is None or any((folder / name).is_dir() for folder in folders for name in NVIDIA_APEX):
        return []
    where = ", ".join(map(str, folders)) or spec.origin or "apex"
    return [error("packages", f"{where}: the package `apex` here is not NVIDIA's, and Megatron-Core would import it", "pip uninstall apex")]
