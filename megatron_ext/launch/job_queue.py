"""What a job asks of Slurm about itself and its children, with a limit on how long an answer may take.

Standard library alone (Python 3.9), as all of the supervisor.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass

ANSWER_SECONDS = 30  # a controller under load answers late; a command that hangs must not stop the watch for good
STOPPING = (signal.SIGUSR1, signal.SIGTERM)  # what Slurm and people ask a job to stop with
_ENVIRONMENT = {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}  # times and words as they are read below
_TIME = "%Y-%m-%dT%H:%M:%S"
_DEPENDENCY = re.compile(r"\w+:(\d+)")


class SlurmError(Exception):
    """Slurm refused a command, or did not answer; the text is its own."""


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it; times in unix seconds, None where it knows none."""

    state: str
    restart_count: int
    dependency: str
    comment: str
    excluded_nodes: str
    submitted_at: float | None
    eligible_at: float | None
    started_at: float | None
    ends_at: float | None
    preempted_at: float | None  # of a running job: Slurm lets it end for another's sake


def _ask(*words: str) -> str:
    """What a command of Slurm prints; `SlurmError` where it fails or stays silent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:  # the command inherits the block: Slurm's TERM goes to all that a batch process has started, and must not end it half-way
        asked = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **_ENVIRONMENT})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        output, errors = asked.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        raise SlurmError(f"{' '.join(words)}: no answer within {ANSWER_SECONDS} s") from None
    if asked.returncode:
        raise SlurmError(f"{' '.join(words)}: {(errors or output).strip() or f'exit code {asked.returncode}'}")
    return output


def job_state(job_id: int | str) -> JobState:
    """A job by its id, one of an array as 12_3; `SlurmError` where Slurm does not know it or does not answer."""
    text = _ask("scontrol", "show", "job", "--oneliner", str(job_id))
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobState(
        state=values["JobState"],
        restart_count=int(values.get("Restarts", 0)),
        dependency="" if values.get("Dependency") == "(null)" else values.get("Dependency", ""),
        comment=_comment(text),
        excluded_nodes="" if values.get("ExcNodeList") == "(null)" else values.get("ExcNodeList", ""),
        submitted_at=_seconds(values.get("SubmitTime", "")),
        eligible_at=_seconds(values.get("EligibleTime", "")),
        started_at=_seconds(values.get("StartTime", "")),
        ends_at=_seconds(values.get("EndTime", "")),
        preempted_at=_seconds(values.get("PreemptTime", "")),
    )


def _comment(text: str) -> str:
    """The only value with spaces in it that matters here: a run folder may have some."""
    found = re.search(r" Comment=(.*?)(?=\s+\w+=|\s*$)", text)
    return found[1] if found else ""


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, _TIME))
    except ValueError:
        return None  # Unknown, N/A, None


def node_names(node_list: str) -> list[str]:
    """`n[1-3]` as names, the first of the job first."""
    return _ask("scontrol", "show", "hostnames", node_list).split()


def requeue(job_id: int | str) -> None:
    """Put this job, or this one of an array (12_3), back into the queue under its own id; Slurm ends what is left of it."""
    _ask("scontrol", "requeue", str(job_id))


def step_ids(job_id: int, restart_count: int) -> list[str]:
    """Ids of the running srun steps of one start of a job, as 12.0; not the batch script's own.

    None where the job was started again since: then who asks was cut off, and the steps, of the same names, are the newer start's.
    """
    if job_state(job_id).restart_count != restart_count:
        return []
    listed = _ask("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()
    return [name for name in listed if name.rpartition(".")[2].isdigit()]


def kill_step(step_id: str) -> None:
    """KILL to every process of a step. Never of the job's own id: Slurm takes that as a cancellation."""
    _ask("scancel", "--signal=KILL", step_id)


def exclude(job_id: int, nodes: list[str]) -> None:
    """Keep a job that waits off these nodes, beside those that it is kept off already."""
    before = job_state(job_id).excluded_nodes
    _ask("scontrol", "update", f"JobId={job_id}", "ExcNodeList=" + ",".join([*([before] if before else []), *nodes]))


def without_parent(dependency: str, parent: int) -> str | None:
    """The rest of a dependency, as `afterok:12(unfulfilled),afterok:13(unfulfilled)`, without one parent; None where it is not in it."""
    terms = [term.split("(")[0] for term in dependency.split(",") if term]
    rest = [term for term in terms if not (match := _DEPENDENCY.fullmatch(term)) or int(match[1]) != parent]
    return None if len(rest) == len(terms) else ",".join(rest)


def release(child: JobState, child_id: int, parent: int) -> bool:
    """Take a parent out of what a child waits for; whether it was in it."""
    rest = without_parent(child.dependency, parent)
    if rest is None:
        return False
    _ask("scontrol", "update", f"JobId={child_id}", f"Dependency={rest}")
    return True
