"""How the stages of a graph stand: their jobs, their progress and time left, and the last words of what failed.

Read from run folders, as `tree` is; the queue is asked where there is a Slurm.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import LaunchError
from megatron_ext.goodput import goodput, goodput_words, interval, interval_words, total
from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_events import EVENTS, Event
from megatron_ext.launch.logs import last_line, newest_log_or_none
from megatron_ext.launch.render import num_parts
from megatron_ext.launch.slurm import QueuedJob, has_slurm, queued_jobs, queued_parts
from megatron_ext.launch.tree import columns, depth, find_runs, in_order, progress, state
from megatron_ext.launch.tree_rl import step_words
from megatron_ext.metrics import read_metrics
from megatron_ext.runs import Run, attempt_numbers, brief

LOOK_SECONDS = 5.0
RECENT_STEPS = 20  # that the time left is reckoned from
CLEAR = "\033[2J\033[H"
SHOWN = 160  # characters of a last line


@dataclass(frozen=True)
class Queue:
    """What Slurm has of run folders."""

    jobs: Mapping[Path, QueuedJob] = field(default_factory=dict)
    parts: Mapping[Path, Sequence[QueuedJob]] = field(default_factory=dict)  # of arrays that work ahead of a stage's own job


def status_command(runs: Path, watch: bool = False) -> None:
    """Print how the run folders under `runs` stand; `watch`: again and again, until none of them can change by itself any more."""
    while True:
        queue, problem = _queue()
        text = status_text(runs, queue) + problem
        print(f"{CLEAR if watch and sys.stdout.isatty() else ''}{text}", flush=True)
        if not watch or not any(run.path in queue.jobs or _runs_here(run) for run in find_runs(runs)):
            return
        time.sleep(LOOK_SECONDS)


def _queue() -> tuple[Queue, str]:
    """The queue, and a line where there is a Slurm that does not answer: run folders tell enough without it."""
    try:
        return (Queue(queued_jobs(), queued_parts()) if has_slurm() else Queue()), ""
    except LaunchError as problem:
        return Queue(), f"\nwithout jobs: {str(problem).splitlines()[0]}"


def status_text(runs_dir: Path, queue: Queue) -> str:
    """A table for each graph's folder, and under it the last words of what failed."""
    folders: dict[Path, list[Run]] = {}
    for run in find_runs(runs_dir):
        folders.setdefault(run.path.parent, []).append(run)
    return "\n\n".join(_graph_text(folder, runs, queue) for folder, runs in folders.items())


def _graph_text(folder: Path, runs: list[Run], queue: Queue) -> str:
    by_path = {run.path: run for run in runs}
    ordered = sorted(in_order(runs), key=lambda run: depth(run, by_path))
    rows = [["stage", "state", "job", "attempts", "progress", "left"], *(_row(run, queue) for run in ordered)]
    ends = [line for run in ordered if run.path not in queue.jobs for line in _last_words(run)]
    times = _time_words([run for run in ordered if isinstance(run.stage, TrainStage | RLStage) and attempt_numbers(run.path)])
    return "\n".join([f"{runs[0].graph}  ({brief(folder)})", *(f"  {line}" for line in columns(rows)), *times, *ends])


def _time_words(runs: list[Run]) -> list[str]:
    """What stages that train made of their time, each and together, and how often they save."""
    found = [goodput(run) for run in runs]
    told = [(goodput_words(one), interval_words(interval(run, one))) for run, one in zip(runs, found, strict=True)]
    lines = [f"{run.name}: " + "; ".join(words for words in both if words) for run, both in zip(runs, told, strict=True)]
    together = goodput_words(total(found))
    return [*lines, *([f"all of these: {together}"] if together and len(runs) > 1 else [])]


def _row(run: Run, queue: Queue) -> list[str]:
    attempts, job = len(attempt_numbers(run.path)), queue.jobs.get(run.path)
    return [
        run.name,
        _state(run, job, queue.parts.get(run.path, ())),
        str(job.job_id) if job else "",
        str(attempts) if attempts else "",
        _progress(run),
        _left(run, job),
    ]


def _state(run: Run, job: QueuedJob | None, parts: Sequence[QueuedJob]) -> str:
    """In a word or two: DONE, what Slurm does with its job, or how it ended."""
    if job is None or run.is_done():
        end = _newest_end(run)
        given_up = end is not None and end["decision"] == "stop" and not run.is_done() and not _runs_here(run)
        return "stopped for good" if given_up else state(run)
    if job.state == "PENDING" and parts:
        running = sum(part.state == "RUNNING" for part in parts)
        return f"waits for {len(parts)} of its {num_parts(run.stage)} parts, {running} running"
    if job.state == "PENDING":
        why = {"Dependency": "waits for its parents", "BeginTime": "waits to start again"}
        return why.get(job.reason, f"queued ({job.reason})" if job.reason not in ("", "None") else "queued")
    return f"{job.state.lower()} on {job.nodes}" if job.nodes else job.state.lower()


def _progress(run: Run) -> str:
    if isinstance(run.stage, RLStage):
        return step_words(run)
    if isinstance(run.stage, TrainStage):
        return f"tokens {progress(run).tokens or 0:,} of {run.stage.budget.tokens:,}"
    return ""


def _left(run: Run, job: QueuedJob | None) -> str:
    """The time that the steps still to come take at the pace of the last ones; '' where no step was taken, or none is."""
    at_work = (job is not None and job.state == "RUNNING") or _runs_here(run)
    kind = {"train": "train", "rl": "rl"}.get(run.stage.kind)
    if not at_work or run.is_done() or kind is None:
        return ""
    records = read_metrics(run.metrics_path, kind)[-RECENT_STEPS:]
    if not records:
        return ""
    steps = run.stage.num_steps - records[-1]["step"]
    return _duration(steps * statistics.median(one["step_seconds"] for one in records))


def _duration(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    return (f"{days} d " if days else "") + f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _runs_here(run: Run) -> bool:
    """Whether an attempt without a job seems to be at work, as under `launch --local`."""
    return "running" in state(run)


def _newest_end(run: Run) -> Event | None:
    ends = [event for event in read_json_lines(run.path / EVENTS) if event["event"] == "end"]
    return ends[-1] if ends else None


def _last_words(run: Run) -> list[str]:
    """Of a stage that is not done and has no job: why its last job ended, and the last line of its newest log."""
    if run.is_done() or _runs_here(run):
        return []
    end = _newest_end(run)
    log = newest_log_or_none(run)
    lines = [f"{run.name}: {end['decision']}: {end['reason']}"] if end else []
    if log is not None and (words := last_line(log)):
        lines.append(f"{run.name}: {brief(log)} ends: {words[:SHOWN]}")
    return lines
