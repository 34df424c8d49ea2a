"""What is watched while a job's ranks run: their pulse, the time that is left, signals, and checkpoints that children wait for.

Standard library alone (Python 3.9), as all of the supervisor.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.launch import job_events, job_queue
from megatron_ext.launch.job_events import COMMENT, say
from megatron_ext.launch.job_step import Step

LOOK_SECONDS = 1.0
CHILD_SECONDS = 10.0  # between looks at a child's dependency: each asks the controller
CLOCK_SECONDS = 60.0  # between looks at the job's own end, which a person may have moved
UNKNOWN_SECONDS = 10.0  # the same, as long as Slurm has not said when that is: just after a start it may not know
ASLEEP_SECONDS = 60.0  # that a wait of one second lasted: this process did not run
LAST_SECONDS = 30.0  # before the end: what has not stopped by then is killed and requeued, as Slurm would end the job for good
SPARE_SECONDS = 15.0  # for ranks to hear of it and agree, beyond the time of the step and the save
LOST_NODE = "lost node"  # cause
UNREADY = "unready"  # cause: a rank that was asked to stop before it listened died of the question; nothing was there to save
_ENDED_BY_QUESTION = ("User defined signal 1", "Terminated")


class Inbox:
    """The signals that asked this process to stop. They are noted here and change nothing by themselves."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        for number in job_queue.STOPPING:
            signal.signal(number, lambda number, _: self.signals.append(number))

    def asked(self) -> bool:
        """Whether any has come."""
        return bool(self.signals)


@dataclass
class Clock:
    """When this job's time is over, and how long before it the ranks must be asked to stop."""

    job_id: int
    run: Path
    save_seconds: float  # by the plan
    ends_at: float | None = None  # unix seconds; None: never, or not known
    looked: float = float("-inf")  # monotonic seconds
    longest_seconds: tuple[float, float] = (0.0, 0.0)  # of a save, of a step, as measured

    def look(self) -> None:
        """Ask Slurm again, now and then; without an answer the old one stands."""
        if time.monotonic() - self.looked < (UNKNOWN_SECONDS if self.ends_at is None else CLOCK_SECONDS):
            return
        self.looked = time.monotonic()
        self.longest_seconds = job_events.longest_seconds(self.run)
        try:
            state = job_queue.job_state(self.job_id)
        except job_queue.SlurmError:
            return
        if state.state == "RUNNING":  # afterwards its end is when it was ended
            self.ends_at = state.ends_at

    def forget(self) -> None:
        """Have the next look ask Slurm; until it has answered, no end is known."""
        self.ends_at, self.looked = None, float("-inf")

    def left_seconds(self) -> float:
        """Until Slurm ends the job."""
        return float("inf") if self.ends_at is None else self.ends_at - time.time()

    def must_stop(self) -> bool:
        """Whether no more is left than it takes to finish a step and to save, with a save's time to spare."""
        save, step = self.longest_seconds
        return self.left_seconds() < 2 * max(save, self.save_seconds) + step + SPARE_SECONDS + LAST_SECONDS


@dataclass
class Pulse:
    """How long the newest attempt's training thread has been silent, by this host's clock alone: hosts' clocks differ."""

    run: Path
    attempts_before: int
    seen: tuple[int, int | None] = (0, None)
    since: float = field(default_factory=time.monotonic)

    def silent_seconds(self) -> float:
        """0 as long as this start's attempt has not shown a first pulse, which it does before it loads anything."""
        try:
            attempt = job_events.newest_attempt(self.run)
            mark = job_events.pulse_mark(self.run, attempt) if attempt > self.attempts_before else None
        except OSError:  # a shared file system that stumbles: nothing new is known
            attempt, mark = self.seen
        if (attempt, mark) != self.seen or mark is None:
            self.seen, self.since = (attempt, mark), time.monotonic()
        return time.monotonic() - self.since

    def forgive(self) -> None:
        """Count the silence from now on."""
        self.since = time.monotonic()


@dataclass
class Joints:
    """Children that wait for a checkpoint in the middle of this run, as job.json names them: a launch may add some at any time."""

    job_id: int
    job_path: Path
    looked: float = float("-inf")
    told: set[str] = field(default_factory=set)  # children of whom a failure to release stands in the log

    def release(self, ledger: job_events.Ledger, at_once: bool = False) -> None:
        """Take this job out of what a child waits for whose checkpoint is published.

        Every look repeats it as long as the child waits for us: two parents that change one child at the same moment can each
        undo the other's change.
        """
        if time.monotonic() - self.looked < CHILD_SECONDS and not at_once:
            return
        self.looked = time.monotonic()
        joints = json.loads(self.job_path.read_text(encoding="utf-8"))["joints"]
        for joint in joints:
            if not job_events.is_published(Path(joint["checkpoint"])):
                continue
            try:
                self._release(joint, ledger)
            except job_queue.SlurmError as problem:  # no answer, or forgotten long after its end: the next look tries again
                if joint["child"] not in self.told:
                    say(f"{joint['child']}: not released yet: {problem}")
                self.told.add(joint["child"])

    def _release(self, joint: dict[str, str], ledger: job_events.Ledger) -> None:
        child = _submitted(Path(joint["child"]))
        state = job_queue.job_state(child) if child else None
        # An id in a file may be another cluster's, or years old: only a job with the run's own comment is the child's.
        if state is None or state.comment != f"{COMMENT}{joint['child']}" or not job_queue.release(state, child, self.job_id):
            return
        ledger.append("released", child=joint["child"], child_job_id=child, checkpoint=joint["checkpoint"])
        say(f"checkpoint {joint['checkpoint']} is published: job {child} of {joint['child']} waits for it no longer")


def _submitted(child: Path) -> int:
    """The id of a child's job, 0 while it has none."""
    try:
        return int(json.loads((child / "job" / "submitted.json").read_text(encoding="utf-8"))["job_id"])
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Fault:
    """Why ranks were brought down, or came down."""

    cause: str  # "hang", "rank", "time", "node", ...
    words: str


@dataclass
class Watch:
    """All that is watched of one step of ranks."""

    job: dict[str, Any]
    nodes: list[str]
    inbox: Inbox
    clock: Clock
    pulse: Pulse
    joints: Joints
    ledger: job_events.Ledger
    asked: str = ""  # why the ranks were asked to stop
    told: set[str] = field(default_factory=set)  # problems that stand in the log

    def until_end(self, step: Step) -> Fault | None:
        """Watch until srun ends; the fault for which the ranks were brought down, if they were."""
        while step.running():
            before = time.monotonic()
            step.wait(LOOK_SECONDS)
            if time.monotonic() - before > ASLEEP_SECONDS:  # the job was suspended, its ranks too, and its end has moved
                self.pulse.forgive()
                self.clock.forget()
            self.clock.look()
            fault = self._fault(step)
            if fault and fault.cause == LOST_NODE:
                return fault  # Slurm brings everything down, this process too, and leaves little time to write down why
            if fault:
                return self._bring_down(step, fault)
            self._release()
            self._ask_to_stop(step)
        step.exit_code()  # all that srun said is read
        return self._bad_end(step)

    def _release(self) -> None:
        """Release children; a shared file system that stumbles is asked again at the next look."""
        try:
            self.joints.release(self.ledger)
        except (OSError, ValueError) as problem:
            if str(problem) not in self.told:
                say(f"children could not be looked after, and will be: {problem}")
            self.told.add(str(problem))

    def _fault(self, step: Step) -> Fault | None:
        if step.bad_end or step.lost_node or not step.running():
            return self._bad_end(step)
        if (silent := self.pulse.silent_seconds()) > self.job["hang_seconds"]:
            return Fault(
                "hang", f"no step, save or validation was finished for {silent:.0f} s (slurm.hang_seconds={self.job['hang_seconds']})"
            )
        if self.clock.left_seconds() < LAST_SECONDS:
            return Fault(
                "time", f"the ranks had not stopped {LAST_SECONDS:.0f} s before the job's end; save more often, or ask for more time"
            )
        return None

    def _bad_end(self, step: Step) -> Fault | None:
        if step.lost_node:
            return Fault(LOST_NODE, f"node {step.lost_node} was lost")
        bad = step.bad_end
        if bad is None:
            return None
        asked = self.asked or self.inbox.asked()
        return Fault(UNREADY if asked and bad.words in _ENDED_BY_QUESTION else "rank", f"rank {bad.ranks} on {bad.node}: {bad.words}")

    def _ask_to_stop(self, step: Step) -> None:
        """Once; a second signal changes nothing, as the ranks may be in their last save."""
        if self.asked:
            return
        if self.inbox.asked():
            self.asked = signal.Signals(self.inbox.signals[0]).name
        elif self.clock.must_stop():
            self.asked = f"{self.clock.left_seconds():.0f} s left"
        if self.asked:
            say(f"{self.asked}: the ranks finish their step, save and stop")
            step.send(signal.SIGUSR1)

    def _bring_down(self, step: Step, fault: Fault) -> Fault:
        """Stacks of all ranks into the log, then the end of all. Where Slurm is ending the job there is no time for stacks."""
        if fault.cause != UNREADY and signal.SIGTERM not in self.inbox.signals and step.running():
            say(f"fault: {fault.words}; stacks of all ranks follow")
            missing = step.ask_for_stacks(self.job["nodes"] * self.job["tasks_per_node"])
            if missing:
                fault = Fault(fault.cause, f"{fault.words}; no stack came from {self._places(missing)}: stopped, dead, or cut off")
        step.kill(self.ledger.start.job_id, self.ledger.start.restart_count)
        return fault

    def _places(self, ranks: list[int]) -> str:
        """As `rank 5 (n1)`; of many only the first eight."""
        named = [f"rank {rank} ({self.nodes[rank // self.job['tasks_per_node']]})" for rank in ranks[:8]]
        return ", ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
