"""How the stages of a graph stand: their jobs, their progress and time left, and the last words of what failed.

Read from run folders, as `tree` is; the queue is asked where there is a Slurm.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import LaunchError
from megatron_ext.goodput import goodput, goodput_words, interval, interval_words, total
from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_events import CANCELLED, EVENTS, LOST, Event
from megatron_ext.launch.logs import clock, fault_start, last_line, log_without_attempt, newest_end, newest_fault, newest_log_or_none
from megatron_ext.launch.render import JOB_FOLDER, num_parts
from megatron_ext.launch.slurm import Queue, QueuedJob, ask_queue, has_slurm
from megatron_ext.launch.submit import SUBMITTED
from megatron_ext.launch.tree import columns, depth, find_runs, in_order, progress, state
from megatron_ext.launch.tree_rl import step_words
from megatron_ext.metrics import read_metrics
from megatron_ext.runs import Run, attempt_numbers, brief

LOOK_SECONDS = 5.0
RECENT_STEPS = 20  # that the time left is reckoned from
CLEAR = "\033[2J\033[H"
SHOWN = 160  # characters of a last line


def status_command(runs: Path, watch: bool = False) -> None:
    """Print how the run folders under `runs` stand; `watch`: again and again, until none of them can change by itself any more."""
    while True:
        queue, problem = _queue(runs)
        text = status_text(runs, queue) + problem
        print(f"{CLEAR if watch and sys.stdout.isatty() else ''}{text}", flush=True)
        if not watch or not any(run.path in queue.jobs or _runs_here(run) for run in find_runs(runs)):
            return
        time.sleep(LOOK_SECONDS)


def _queue(runs: Path) -> tuple[Queue, str]:
    """The queue, and a line where jobs are not shown because no Slurm is here or it does not answer: run folders tell enough without."""
    if not has_slurm():
        has_jobs = any((run.path / JOB_FOLDER / SUBMITTED).is_file() for run in find_runs(runs) if not run.is_done())
        return Queue(is_known=False), "\nwithout jobs: squeue is not found on this machine" if has_jobs else ""
    try:
        return ask_queue(), ""
    except LaunchError as problem:
        return Queue(is_known=False), f"\nwithout jobs: {str(problem).splitlines()[0]}"


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
    ends = [line for run in ordered for line in _last_words(run, queue.jobs.get(run.path))]
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
        _state(run, job, queue.parts.get(run.path, ())) if job and not run.is_done() else _state_without_job(run, queue.is_known),
        str(job.job_id) if job else "",
        str(attempts) if attempts else "",
        _progress(run),
        _left(run, job),
    ]


def _state_without_job(run: Run, queue_is_known: bool) -> str:
    """In a word or two: DONE, or how it ended."""
    if run.is_done() or _runs_here(run):
        return state(run)
    events = _events(run)
    end = newest_end(events)
    if queue_is_known and _failed_at_once(run, events):
        return "failed before it began"
    if end is None or end["decision"] != "stop":
        return state(run)
    return CANCELLED if end["reason"] == CANCELLED else "stopped for good"


def _failed_at_once(run: Run, events: Sequence[Event]) -> bool:
    """Whether the newest job, which is over, ended before any attempt: in its set-up, or where its ranks could not start.

    Of another user's jobs the queue tells nothing: such a job may still be at it.
    """
    log = log_without_attempt(run, events)
    if log is None or log.stat().st_uid != os.getuid():
        return False
    own = [e for e in events if log.name == f"slurm-{e['job_id']}.log"]
    end = newest_end(own)
    return not own or (not attempt_numbers(run.path) and (end is None or _fault_behind(own) is not None))


def _fault_behind(events: Sequence[Event]) -> Event | None:
    """The fault for which the newest start that is over ended; None where it was done, stopped, preempted or out of time."""
    over = [e for e in events if e["event"] == "end" or e.get("cause") == LOST]
    fault = newest_fault(events)
    if not over or fault is None or fault_start(over[-1]) != fault_start(fault):
        return None
    return fault if over[-1].get("decision", "requeue") == "requeue" else None


def _state(run: Run, job: QueuedJob, parts: Sequence[QueuedJob]) -> str:
    """In a word or two what Slurm does with a job."""
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


def _events(run: Run) -> list[Event]:
    return read_json_lines(run.path / EVENTS)


def _last_words(run: Run, job: QueuedJob | None) -> list[str]:
    """Of a job that was started again after a fault: which; of a stage without a job: why its last one ended, and its newest log's end."""
    if run.is_done():
        return []
    events = _events(run)
    if job is not None:
        fault = _fault_behind([e for e in events if e["job_id"] == job.job_id])
        return [f"{run.name}: requeue at {clock(fault)}: {fault['words']}"] if fault else []
    return [] if _runs_here(run) else _words_of_end(run, events)


def _words_of_end(run: Run, events: Sequence[Event]) -> list[str]:
    end, log = newest_end(events), log_without_attempt(run, events)
    if log and not any(log.name == f"slurm-{e['job_id']}.log" for e in events):
        end = None  # a newer job than the ledger knows of has ended
    reason = end["reason"] if end else ""
    told = f"{CANCELLED}; a launch goes on from there" if reason == CANCELLED else reason
    lines = [f"{run.name}: {end['decision']} at {clock(end)}: {told}"] if end else []
    log = log or newest_log_or_none(run)
    if log is not None and (words := last_line(log, reason)):
        lines.append(f"{run.name}: {brief(log)} ends: {words[:SHOWN]}")
    return lines
