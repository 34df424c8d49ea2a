"""Slurm's commands, as `launch`, `status`, `cancel` and `logs` need them. Nothing here needs accounting (`sacct`).

A job is known by its comment, `megatron_ext:/path/of/the/run`: whoever submitted it, and whatever became of the note about it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.errors import LaunchError
from megatron_ext.launch.job_events import COMMENT, PART_COMMENT

LIMIT_SECONDS = 60  # for one command; a controller that is restarting answers within seconds
_FIELDS = {"job_id": "%F", "state": "%T", "reason": "%r", "began": "%S", "ends": "%e", "nodes": "%N", "comment": "%k"}
# What `sbatch` would take from the environment of who submits, before the script's own words.
_OWN_WORDS = ("SBATCH_", "SLURM_JOB", "SLURM_STEP", "SLURM_PROC", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODE", "SLURM_EXPORT")


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm has not finished with."""

    job_id: int  # of one of an array: the array's
    state: str  # as PENDING, RUNNING, COMPLETING
    reason: str  # why it waits, as Dependency, Priority, Resources
    began: str  # when it started, or is expected to; N/A
    ends: str  # when its time is over; N/A
    nodes: str


@dataclass(frozen=True)
class Queue:
    """What Slurm has of run folders, as it said at one moment."""

    jobs: Mapping[Path, QueuedJob] = field(default_factory=dict)  # of several for one folder the newest
    parts: Mapping[Path, Sequence[QueuedJob]] = field(default_factory=dict)  # of arrays that work ahead of a stage's own job
    is_known: bool = True  # False: nobody could be asked, so a run without a job here may have one


def ask_queue() -> Queue:
    """This user's jobs that wait or run, by the run folders that their comments name. `LaunchError` where no Slurm answers."""
    jobs: dict[Path, QueuedJob] = {}
    parts: dict[Path, list[QueuedJob]] = {}
    for line in _run(["squeue", "--noheader", "--me", "--array", "--format", "|".join(_FIELDS.values())]).splitlines():
        values = dict(zip(_FIELDS, line.strip().split("|", len(_FIELDS) - 1), strict=True))
        comment = values.pop("comment")
        job = QueuedJob(job_id=int(values.pop("job_id")), **values)
        if comment.startswith(PART_COMMENT):
            parts.setdefault(Path(comment.removeprefix(PART_COMMENT)), []).append(job)
        elif comment.startswith(COMMENT):
            path = Path(comment.removeprefix(COMMENT))
            if path not in jobs or jobs[path].job_id < job.job_id:
                jobs[path] = job
    return Queue(jobs, parts)


def has_slurm() -> bool:
    """Whether Slurm's commands are here."""
    return shutil.which("squeue") is not None


def submit(script: Path, after: Iterable[int] = (), after_any: Iterable[int] = ()) -> int:
    """Hand a script to Slurm, to run when the jobs `after` have ended well, and those `after_any` anyhow; its job id.

    A job that can never run, because one of them failed, is cancelled by Slurm.
    """
    terms = [_term("afterok", after), _term("afterany", after_any)]
    dependency = ",".join(term for term in terms if term)
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *([f"--dependency={dependency}"] if dependency else [])]
    answer = _run([*words, str(script)])
    number = re.match(r"\d+", answer)
    if number is None:
        raise LaunchError(f"sbatch {script}: answered {answer.strip()!r}, not the number of a job; see squeue --me before you launch again")
    return int(number[0])


def _term(kind: str, job_ids: Iterable[int]) -> str:
    ids = sorted(set(job_ids))
    return ":".join([kind, *map(str, ids)]) if ids else ""


def refusal(script: Path) -> str:
    """Why Slurm would not take a script, by `sbatch --test-only`; '' where it would. Uses up a job id, and runs nothing."""
    try:
        _run(["sbatch", "--test-only", str(script)])
    except LaunchError as problem:
        return str(problem)
    return ""


def cancel(job_ids: Sequence[int]) -> None:
    """Cancel jobs; those that are over already are left as they are."""
    if job_ids:
        _run(["scancel", *map(str, job_ids)])


def _run(words: list[str]) -> str:
    """The output of one of Slurm's commands; `LaunchError` with its own words where it fails."""
    try:
        done = subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{words[0]}: no such command: this machine has no Slurm; go to a login node of the cluster") from None
    except subprocess.TimeoutExpired as late:
        said = f" It said: {late.stderr.decode(errors='replace').strip()}." if late.stderr else ""
        raise LaunchError(
            f"{shlex.join(words)}: not done in {LIMIT_SECONDS} s.{said} Is Slurm's controller up (scontrol ping), and has its queue room?"
        ) from None
    if done.returncode:
        raise LaunchError(f"{shlex.join(words)}: Slurm refused it: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what would change a script's own directives, or say that this process is part of a job."""
    return {name: value for name, value in environment.items() if not name.startswith(_OWN_WORDS)}
