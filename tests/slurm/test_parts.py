"""Jobs of an array under a real Slurm: one that is asked to stop starts again, and no other does."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.sandbox import REPOSITORY, Sandbox, until

pytestmark = pytest.mark.slow


@pytest.fixture
def array(cluster: Sandbox, shared_path: Path) -> int:
    """Three parts of which two wait; the array's id."""
    run = shared_path / "run"
    (run / "job").mkdir(parents=True)
    job = {
        "run": str(run), "nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "secrets": [], "secrets_file": "", "environment": {},
        "part_command": [sys.executable, str(REPOSITORY / "tests/slurm/obedient_part.py"), str(run), "1,2"],
    }  # fmt: skip
    (run / "job/job.json").write_text(json.dumps(job))
    module = "runpy.run_module('megatron_ext.launch.job_part', run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", f"import sys, runpy; sys.path.insert(0, {str(REPOSITORY)!r}); {module}"]
    (run / "job/parts.sbatch").write_text(f"#!/bin/bash\nexec {shlex.join([*command, str(run / 'job/job.json')])}\n")
    options = ["--array=0-2", "--requeue", "--open-mode=append", f"--output={run}/job/part-%a.log", "--export=HOME,PATH"]
    job_id = cluster.submit([*options, str(run / "job/parts.sbatch")])
    until(lambda: {path.name for path in run.glob("part-*")} == {"part-0.0", "part-1.0", "part-2.0"}, "all parts have started")
    return job_id


def shown(cluster: Sandbox, name: str, key: str) -> str:
    """A field of one job of the array."""
    words = cluster.output(["scontrol", "show", "job", "--oneliner", name]).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


def ended(cluster: Sandbox, name: str) -> str:
    """The state in which one job of the array ends."""
    final = {"COMPLETED", "FAILED", "CANCELLED"}
    until(lambda: shown(cluster, name, "JobState") in final, lambda: cluster.output(["scontrol", "show", "job", name]))
    return shown(cluster, name, "JobState")


def test_a_part_that_is_warned_starts_again_alone(cluster: Sandbox, array: int, shared_path: Path) -> None:
    assert ended(cluster, f"{array}_0") == "COMPLETED"
    own_ids = {part: shown(cluster, f"{array}_{part}", "JobId") for part in (0, 1, 2)}
    assert str(array) in own_ids.values(), "the id of one of them is the array's"
    for part in (2, 1):  # as Slurm does before the time is over
        cluster.output(["scancel", "--batch", "--signal=USR1", f"{array}_{part}"])
        assert ended(cluster, f"{array}_{part}") == "COMPLETED"
    starts = sorted(path.name for path in (shared_path / "run").glob("part-*"))
    assert starts == ["part-0.0", "part-1.0", "part-1.1", "part-2.0", "part-2.1"]


def test_a_part_that_is_cancelled_stays_so(cluster: Sandbox, array: int, shared_path: Path) -> None:
    cluster.output(["scancel", f"{array}_2"])
    assert ended(cluster, f"{array}_2") == "CANCELLED"
    cluster.output(["scancel", "--batch", "--signal=TERM", f"{array}_1"])  # as before a preemption: the job itself goes on
    assert ended(cluster, f"{array}_1") == "COMPLETED"
    assert shown(cluster, f"{array}_2", "JobState") == "CANCELLED"
    starts = sorted(path.name for path in (shared_path / "run").glob("part-*"))
    assert starts == ["part-0.0", "part-1.0", "part-1.1", "part-2.0"]
