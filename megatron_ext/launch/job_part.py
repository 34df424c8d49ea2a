"""The batch process of one job of an array, which does a part of a stage's work ahead of the stage's own job.

    python3 -m megatron_ext.launch.job_part RUN/job/job.json

What it leaves undone, the stage's own job does: so it only starts its part, passes on a request to stop, and asks for another start
after one. Standard library alone (Python 3.9), as the supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from megatron_ext.errors import EXIT_AGAIN, LaunchError
from megatron_ext.launch import job_queue
from megatron_ext.launch.job_events import say
from megatron_ext.launch.job_ranks import rank_environment, read_secrets
from megatron_ext.launch.job_step import Step, srun_command, start_step
from megatron_ext.launch.job_watch import LOOK_SECONDS, Inbox


def main(words: list[str]) -> int:
    """Do the part that Slurm's variables name; the exit code of the batch script."""
    inbox = Inbox()  # first of all: a signal before it would end this process
    job = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    nodes = job_queue.node_names(os.environ["SLURM_JOB_NODELIST"])
    try:
        environment = rank_environment(job, nodes, int(os.environ.get("SLURM_RESTART_COUNT") or 0), read_secrets(job))
    except LaunchError as refusal:
        say(str(refusal))
        return 1
    step = start_step(srun_command(job, [*job["part_command"], os.environ["SLURM_ARRAY_TASK_ID"]]), environment, frozenset((0, EXIT_AGAIN)))
    code = until_end(step, inbox)
    return start_again(code) if code == EXIT_AGAIN else code


def until_end(step: Step, inbox: Inbox) -> int:
    """The exit code of the part, which is asked to stop when this process is."""
    asked = False
    while step.running():
        step.wait(LOOK_SECONDS)
        if inbox.asked() and not asked:
            asked = True
            step.send(signal.SIGUSR1)
    return step.exit_code()


def start_again(code: int) -> int:
    """Requeue this part, which was asked to stop, unless somebody ended it for good; the exit code of the batch script.

    By its place in the array: the id of its own may be that of the whole array, and all parts would be requeued.
    """
    name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        if job_queue.job_state(name).state != "RUNNING":
            return code
        job_queue.requeue(name)
    except job_queue.SlurmError as refusal:
        say(f"this part is not started again ({refusal}); the stage's own job does what is left of it")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
