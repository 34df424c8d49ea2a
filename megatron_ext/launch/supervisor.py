"""The batch process of a stage's job: starts the ranks, watches them, and says what becomes of the job.

    python3 -m megatron_ext.launch.supervisor RUN/job/job.json

It ends with 0 where the stage is done or the job is requeued (under its own id, so that its children keep their parent), and with 1
where the stage must not be started again; then Slurm ends what waits for it. All it does stands in RUN/job/events.jsonl.

It runs on the batch host, outside any container, with whatever Python is there: standard library alone, Python 3.9.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.errors import EXIT_AGAIN, LaunchError
from megatron_ext.launch import job_events, job_queue
from megatron_ext.launch.job_events import say
from megatron_ext.launch.job_ranks import rank_environment, read_secrets
from megatron_ext.launch.job_step import srun_command, start_step
from megatron_ext.launch.job_watch import LOST_NODE, UNREADY, Clock, Fault, Inbox, Joints, Pulse, Watch
from megatron_ext.redaction import without_secrets

EXIT_UNREACHED = 76  # of a rank of the node check that did not reach the first node
CHECK_SECONDS = 600  # for the check of the nodes, torch's import on a cold file system included
REQUEUE_SECONDS = 900  # a controller that is being restarted answers again within minutes
RETRY_SECONDS = 5.0
STEPS_SECONDS = 90.0  # Slurm's daemons try again at most a minute later to reach a controller
END_SECONDS = 10.0  # before a job's time is over: what must still be done is done by then
FOR_GOOD = re.compile("disabled|denied|invalid job id", re.IGNORECASE)  # in a refusal of Slurm's that asking again does not change


@dataclass(frozen=True)
class Ending:
    """What becomes of the job, and why."""

    decision: str  # "done", "requeue", "stop"
    reason: str
    exit_code: int
    excluded: list[str] = field(default_factory=list)  # nodes that the next start must not get


@dataclass
class Batch:
    """One start of a job: what it is to run, where, and what watches over it."""

    job: dict[str, Any]
    nodes: list[str]
    ledger: job_events.Ledger
    inbox: Inbox
    clock: Clock
    joints: Joints
    attempts_before: int
    secrets: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.job["run"])

    @property
    def start(self) -> job_events.Start:
        """Which start of which job."""
        return self.ledger.start

    def idle_starts(self) -> int:
        """How many starts in a row have not advanced the stage, up to now."""
        return job_events.idle_starts(self.ledger.events(), self.start.job_id, job_events.progress_mark(self.run))

    def state(self) -> job_queue.JobState | None:
        """This job as Slurm sees it; None while no controller answers."""
        try:
            return job_queue.job_state(self.start.job_id)
        except job_queue.SlurmError as problem:
            say(str(problem))
            return None


def main(words: list[str]) -> int:
    """Supervise the job that a job.json describes; the exit code of the batch script."""
    inbox = Inbox()  # first of all: a signal before it would end this process
    batch = open_batch(Path(words[0]), inbox)
    try:
        ending = supervise(batch)
    except LaunchError as refusal:  # a person must mend it: another start would meet it again
        ending = Ending("stop", str(refusal), 1)
    except (OSError, ValueError) as problem:  # a shared file system that stumbles must not end the chain
        say(without_secrets(traceback.format_exc(), batch.secrets))
        ending = judge(batch, 1, Fault("supervisor", f"the job's own process failed: {type(problem).__name__}: {problem}"), "")
    return carry_out(batch, ending)


def open_batch(job_path: Path, inbox: Inbox) -> Batch:
    """What this start of the job is, from its job.json and Slurm's variables."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    start = job_events.Start(int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    nodes, run = job_queue.node_names(os.environ["SLURM_JOB_NODELIST"]), Path(job["run"])
    return Batch(
        job,
        nodes,
        job_events.Ledger(run, start, nodes),
        inbox,
        Clock(start.job_id, run, float(job["save_seconds"])),
        Joints(start.job_id, job_path),
        job_events.newest_attempt(run),
    )


def supervise(batch: Batch) -> Ending:
    """From the start of a job to what shall become of it."""
    idle = note_lost_starts(batch)
    note_start(batch)
    if idle >= batch.job["max_idle_attempts"]:
        return Ending("stop", idle_words(batch, idle), 1)
    batch.secrets = read_secrets(batch.job)
    found = check_nodes(batch)
    if found:
        return found
    environment = rank_environment(batch.job, batch.nodes, 2 * batch.start.restart_count + 1, batch.secrets)
    watch = Watch(
        batch.job, batch.nodes, batch.inbox, batch.clock, Pulse(batch.run, batch.attempts_before), batch.joints, batch.ledger
    )  # fmt: skip
    batch.ledger.append("ranks")
    step = start_step(srun_command(batch.job, batch.job["command"]), environment, frozenset((0, EXIT_AGAIN)))
    try:
        fault = watch.until_end(step)
    except (OSError, ValueError):
        step.kill(batch.start.job_id, batch.start.restart_count)
        raise
    if fault and fault.cause == LOST_NODE:
        return judge(batch, 1, fault, watch.asked)
    code = step.exit_code()
    batch.joints.release(batch.ledger, at_once=True)
    return judge(batch, code, fault, watch.asked)


def note_lost_starts(batch: Batch) -> int:
    """Write down earlier starts that left no word of their end; how many starts in a row were idle."""
    for lost in job_events.lost_starts(batch.ledger.events(), batch.start):
        where = f"start {lost['restart_count']} of the job, on {', '.join(lost['nodes'])},"
        words = f"{where} ended without a word: a node was lost, or all was killed"
        batch.ledger.append("fault", cause=job_events.LOST, words=words, lost_restart_count=lost["restart_count"])
        say(words)
    return batch.idle_starts()


def note_start(batch: Batch) -> None:
    """The first event of a start."""
    state = batch.state()
    times = {name: getattr(state, name, None) for name in ("submitted_at", "eligible_at", "started_at", "ends_at")}
    batch.clock.ends_at = times["ends_at"]
    batch.ledger.append("start", iteration=job_events.progress_mark(batch.run), **times)
    where = f"job {batch.start.job_id}, start {batch.start.restart_count}, on {', '.join(batch.nodes)}"
    say(f"{batch.job['graph']}/{batch.job['stage']}: {where}")


def check_nodes(batch: Batch) -> Ending | None:
    """Whether the nodes are fit, where the cluster asks for it; an ending where the ranks must not be started on them."""
    wanted = batch.job["node_check"]
    if wanted == "never" or (wanted == "first" and not job_events.must_check(batch.ledger.events(), batch.start)):
        return None
    result_path = batch.run / job_events.CHECK
    result_path.unlink(missing_ok=True)
    environment = rank_environment(batch.job, batch.nodes, 2 * batch.start.restart_count, secrets={})
    step = start_step(srun_command(batch.job, check_command(batch)), environment, frozenset((0, EXIT_UNREACHED)))
    deadline = time.monotonic() + CHECK_SECONDS
    while step.running() and not batch.inbox.asked() and time.monotonic() < deadline:
        step.wait(1.0)
    bad_node = step.bad_end.node if step.bad_end else ""  # before the kill, which makes all nodes look bad
    step.kill(batch.start.job_id, batch.start.restart_count)
    if batch.inbox.asked():
        return judge(batch, EXIT_AGAIN, None, signal.Signals(batch.inbox.signals[0]).name)
    return judge_nodes(batch, step.exit_code(), result_path, bad_node)


def check_command(batch: Batch) -> list[str]:
    """The command that checks the nodes, by the Python that the ranks run under; megatron_ext/node_check.py explains it."""
    job = batch.job
    before = job["command"][: job["command"].index("megatron_ext")]
    where = ["--nodes", ",".join(batch.nodes), "--device", "gpu" if job["gpus_per_node"] else "cpu", "--scratch", job["scratch"]]
    return [*before, "megatron_ext.node_check", str(batch.run / job_events.CHECK), *where]


def judge_nodes(batch: Batch, code: int, result_path: Path, bad_node: str) -> Ending | None:
    """What the check of the nodes says: slow ones are named, broken ones are left out of the next start."""
    try:
        result = json.loads(result_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unreached = {batch.nodes[0]: "no other node reached it"} if code == EXIT_UNREACHED else {}
        broken = {bad_node: "its check came to no end"} if bad_node in batch.nodes else unreached
        result = {"slow": {}, "broken": broken, "words": f"the check of the nodes came to no end (exit code {code})"}
    say(result["words"])
    for name, why in result["slow"].items():
        batch.ledger.append("fault", cause=job_events.SLOW_NODE, words=f"{name}: {why}", node=name)
    if not result["broken"] and not code:
        batch.ledger.append(job_events.CHECKED)
        return None
    words = "; ".join(f"{name}: {why}" for name, why in result["broken"].items()) or result["words"]
    ending = judge(batch, code or 1, Fault("node", words), "")
    return Ending(ending.decision, ending.reason, ending.exit_code, to_exclude(batch.nodes, sorted(result["broken"])))


def to_exclude(nodes: list[str], broken: list[str]) -> list[str]:
    """The broken nodes, but for what is amiss on most: a cause that they share, as a missing folder, would meet the next nodes too."""
    return broken if len(nodes) == 1 or len(broken) <= len(nodes) / 2 else []


def judge(batch: Batch, code: int, fault: Fault | None, asked: str) -> Ending:
    """What becomes of the job whose ranks ended with this exit code, having been asked to stop (for this reason) or not."""
    if code == 0 and fault is None and (batch.run / "DONE").is_file():
        return Ending("done", "DONE", 0)
    state = batch.state()
    if state and state.restart_count != batch.start.restart_count:
        if fault and fault.cause == LOST_NODE:
            note_fault(batch, fault)
            return Ending("requeue", fault.words, code)
        return Ending("requeue", job_events.PREEMPTED, code)
    if state and is_cancelled(state, batch.clock):
        return Ending("stop", job_events.CANCELLED, code or 1)
    if (code == EXIT_AGAIN and fault is None) or (fault and fault.cause == UNREADY):
        time_is_up = batch.clock.left_seconds() < batch.job["signal_seconds"] + 120  # Slurm's signal may come up to a minute early
        by_slurm = (batch.inbox.asked() and not time_is_up) or bool(state and state.preempted_at)
        idle, reason = batch.idle_starts(), job_events.PREEMPTED if by_slurm else asked or "the ranks asked for another start"
        if by_slurm or idle < batch.job["max_idle_attempts"]:
            return Ending("requeue", reason, code)
        return Ending("stop", idle_words(batch, idle), code)
    fault = fault or Fault("rank", f"srun ended with exit code {code}" + ("" if code else ", and the stage is not DONE"))
    note_fault(batch, fault)
    idle = batch.idle_starts()
    if idle >= batch.job["max_idle_attempts"]:
        return Ending("stop", idle_words(batch, idle), code or 1)
    return Ending("requeue", fault.words, code)


def is_cancelled(state: job_queue.JobState, clock: Clock) -> bool:
    """Whether somebody ended the job for good: it runs no more, was neither requeued nor preempted, and its time was not over."""
    ended = state.state not in ("RUNNING", "SUSPENDED", "TIMEOUT", "PREEMPTED")
    return ended and not state.preempted_at and clock.left_seconds() > 1


def note_fault(batch: Batch, fault: Fault) -> None:
    """Ledger and log: what happened, with the traceback of the rank that failed first."""
    words = fault.words
    failed = job_events.first_failure(batch.run, batch.attempts_before)
    if failed:
        rank, traceback = failed
        words += f"; the first traceback is of rank {rank}: {traceback.strip().splitlines()[-1]}"
        say(without_secrets(f"the first traceback is of rank {rank}:\n{traceback}", batch.secrets))
    words = without_secrets(words, batch.secrets)
    batch.ledger.append("fault", cause=fault.cause, words=words)
    say(f"fault: {words}")


def idle_words(batch: Batch, idle: int) -> str:
    """The one message of a stage that is given up."""
    mark = job_events.progress_mark(batch.run)
    held = "without a first checkpoint" if mark is None else f"without a checkpoint newer than iteration {mark:,}"
    if batch.job["kind"] == "tokenize":
        held = f"without more finished slices than {mark or 0:,}"
    faults = [e for e in batch.ledger.events() if e["event"] == "fault" and e["job_id"] == batch.start.job_id]
    last = f" The last fault: {faults[-1]['words']}." if faults else ""
    return (
        f"{batch.run}: stage '{batch.job['stage']}' was started {idle} times in a row {held} "
        f"(slurm.max_idle_attempts={batch.job['max_idle_attempts']}), and is not started again.{last} "
        f"Mend the cause ({batch.ledger.path} and the job's log tell of every start), then launch again: "
        f"it goes on from its last checkpoint"
    )


def carry_out(batch: Batch, ending: Ending) -> int:
    """Write the end down and do it; the exit code of the batch script."""
    note_end(batch, ending)
    if ending.decision == "requeue":
        refusal = put_back(batch)
        if refusal:
            ending = Ending("stop", refusal, ending.exit_code)
            note_end(batch, ending)
        elif ending.excluded:
            leave_out(batch, ending.excluded)
    return 1 if ending.decision == "stop" else 0


def note_end(batch: Batch, ending: Ending) -> None:
    """Ledger and log: what becomes of the job."""
    reason = without_secrets(ending.reason, batch.secrets)
    iteration = job_events.progress_mark(batch.run)
    batch.ledger.append("end", exit_code=ending.exit_code, decision=ending.decision, reason=reason, iteration=iteration)
    say(f"{ending.decision}: {reason}")


def put_back(batch: Batch) -> str:
    """Requeue this job, unless Slurm has done so; what to tell where Slurm will not ('': it did)."""
    deadline, why = time.monotonic() + REQUEUE_SECONDS, "no controller answers"
    while time.monotonic() < deadline:
        state = batch.state()
        if state and state.restart_count != batch.start.restart_count:  # this process may be the one that was cut off
            return ""
        try:
            if state:  # without an answer, a requeue could hit the start that has taken this one's place
                await_steps(batch)
                if is_cancelled(job_queue.job_state(batch.start.job_id), batch.clock):
                    return job_events.CANCELLED  # Slurm would take the requeue all the same
                job_queue.requeue(batch.start.job_id)
                return ""
        except job_queue.SlurmError as refusal:
            why = str(refusal)
            if FOR_GOOD.search(why):
                break
        time.sleep(RETRY_SECONDS)
    return (
        f"{batch.run}: job {batch.start.job_id} cannot requeue itself ({why}); see whether the cluster allows it "
        f"(JobRequeue, scontrol requeue), and launch again: the stage goes on from its last checkpoint"
    )


def await_steps(batch: Batch) -> None:
    """Until Slurm has heard that the ranks ended, for a while; `SlurmError` as long as no controller answers.

    What ends while the controller is away tells it late, and a node that is asked meanwhile to kill it is drained as unable to.
    """
    deadline = time.monotonic() + min(STEPS_SECONDS, batch.clock.left_seconds() - END_SECONDS)
    while job_queue.step_ids(batch.start.job_id, batch.start.restart_count) and time.monotonic() < deadline:
        time.sleep(1.0)


def leave_out(batch: Batch, nodes: list[str]) -> None:
    """Keep the job off broken nodes. Slurm takes this only of a job that waits, so it comes after the requeue."""
    try:
        job_queue.exclude(batch.start.job_id, nodes)
        batch.ledger.append("fault", cause="node", words=f"{job_events.LEFT_OUT}: {', '.join(nodes)}")
    except job_queue.SlurmError as problem:
        say(f"{', '.join(nodes)} could not be left out of the next start: {problem}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
