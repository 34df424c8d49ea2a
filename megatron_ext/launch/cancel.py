"""Cancels the jobs of run folders: those that wait first, so that none starts because the one before it is gone."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.launch.slurm import ask_queue, cancel
from megatron_ext.launch.tree import find_runs
from megatron_ext.runs import brief

RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


def cancel_command(runs: Path) -> None:
    """Cancel the job of a run folder, or of every run folder under one. What is published stays; `launch` goes on from it."""
    queue = ask_queue()
    paths = [run.path for run in find_runs(runs)]
    found = [(path, queue.jobs[path]) for path in paths if path in queue.jobs]
    arrays = {job.job_id: path for path in paths for job in queue.parts.get(path, ())}
    if not found and not arrays:
        print(f"{runs}: no job of it is queued or running; see megatron-ext status {runs}")
        return
    in_order = sorted(found, key=lambda item: (item[1].state in RUNNING, -item[1].job_id))
    cancel([*(job.job_id for _, job in in_order), *arrays])
    for job_id, path in arrays.items():
        print(f"{brief(path)}: its parts in array {job_id} cancelled")
    for path, job in reversed(in_order):
        print(f"{brief(path)}: job {job.job_id} ({job.state.lower()}) cancelled")
    print("Jobs that waited for these, and for nothing else, are cancelled by Slurm; the same launch submits what is missing again")
