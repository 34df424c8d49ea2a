"""One `srun` step of a job: its start, what srun tells of its ranks, signals to them, and its certain end.

srun's own messages and the ranks' error output pass through here into the job's log. They tell which rank ended badly, and which
ranks answered when all were asked for their stacks; a rank that is stopped does not answer.

Not left to srun: `--kill-on-bad-exit` would kill, at the first rank that exits with 75 after a save, those that are about to.

Standard library alone (Python 3.9), as all of the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.launch import job_queue
from megatron_ext.redaction import own_secrets, without_secrets

STACK = b"most recent call first"  # in what Python's faulthandler writes of a thread
STACK_SECONDS = 5.0  # for all ranks' stacks to reach the log
KILL_SECONDS = 15.0  # from Slurm's KILL of a step until srun is taken for dead too
_LABEL = re.compile(rb"^\s*(\d+): ")
_BAD_END = re.compile(rb"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$")
_LOST_NODE = re.compile(rb"^srun: error: Node failure on (\S+)")
_EXIT_CODE = re.compile(rb"Exited with exit code (\d+)")


@dataclass
class BadEnd:
    """What srun says of the first ranks that ended badly."""

    node: str
    ranks: str
    words: str  # as "Killed", "Exited with exit code 1"


@dataclass
class Step:
    """A running srun; make it with `start_step`."""

    process: Any
    good_codes: frozenset[int]
    secrets: Mapping[str, str] = field(default_factory=dict)  # of the ranks; not passed on
    bad_end: BadEnd | None = None  # the first
    lost_node: str = ""  # the first; Slurm ends the job and starts it elsewhere
    answered: set[int] = field(default_factory=set)  # ranks whose stacks have come since `ask_for_stacks`
    ended: set[int] = field(default_factory=set)  # ranks that ended with a failure or a stop
    pump: threading.Thread | None = None

    def running(self) -> bool:
        """Whether srun lives."""
        return self.process.poll() is None

    def wait(self, seconds: float) -> None:
        """Until srun ends, at most so long. A signal to this process is handled meanwhile."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def exit_code(self) -> int:
        """srun's exit code, once all that it wrote has been passed on: the highest of its ranks', or minus the signal that ended it."""
        code = int(self.process.wait())
        if self.pump is not None:
            self.pump.join(STACK_SECONDS)
        return code

    def send(self, number: signal.Signals) -> None:
        """A signal to every rank: srun passes it on itself, without the controller."""
        if self.running():
            self.process.send_signal(number)

    def ask_for_stacks(self, num_ranks: int) -> list[int]:
        """Have every rank that lives write its threads' stacks into the log; the ranks that did not, though they have not ended."""
        self.answered.clear()
        self.send(signal.SIGUSR2)
        deadline = time.monotonic() + STACK_SECONDS
        while self.running() and self._unheard(num_ranks) and time.monotonic() < deadline:
            self.wait(0.1)
        return sorted(self._unheard(num_ranks))

    def _unheard(self, num_ranks: int) -> set[int]:
        return set(range(num_ranks)) - self.answered - self.ended

    def kill(self, job_id: int, restart_count: int) -> None:
        """End every rank of a job's start, stopped ones too, and srun. What a dead controller leaves behind, Slurm ends with the job."""
        if not self.running():
            return
        with contextlib.suppress(job_queue.SlurmError):
            for step_id in job_queue.step_ids(job_id, restart_count):
                job_queue.kill_step(step_id)
        self.wait(KILL_SECONDS)
        if self.running():
            self.process.kill()
            self.process.wait()

    def read(self) -> None:
        """Pass on what srun writes until it ends, without the values of secrets, and note what it tells."""
        rest = b""
        while chunk := os.read(self.process.stderr.fileno(), 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            self._pass_on(b"".join(line + b"\n" for line in lines))
            for line in lines:
                self._note(line)
        self._pass_on(rest)

    def _pass_on(self, content: bytes) -> None:
        """Into this process's error output. A full disk loses log lines, and must not end the job."""
        content = os.fsencode(without_secrets(os.fsdecode(content), self.secrets))
        with contextlib.suppress(OSError):
            while content:
                content = content[os.write(sys.stderr.fileno(), content) :]

    def _note(self, line: bytes) -> None:
        label = _LABEL.match(line)
        if label and STACK in line:
            self.answered.add(int(label[1]))
        lost = _LOST_NODE.match(line)
        if lost and not self.lost_node:
            self.lost_node = lost[1].decode(errors="replace")
        bad = _BAD_END.match(line)
        if bad:
            self.ended |= rank_numbers(bad[2].decode())
        if bad and self.bad_end is None:
            code = _EXIT_CODE.match(bad[3])
            if not code or int(code[1]) not in self.good_codes:
                self.bad_end = BadEnd(*(part.decode(errors="replace") for part in bad.groups()))


def rank_numbers(text: str) -> set[int]:
    """`0-2,7` as numbers."""
    spans = (span.partition("-") for span in text.split(","))
    return {number for first, _, last in spans for number in range(int(first), int(last or first) + 1)}


def start_step(command: list[str], environment: dict[str, str], good_codes: frozenset[int] = frozenset()) -> Step:
    """Start `command`, an srun; its exit codes in `good_codes` are no failures of a rank."""
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    step = Step(process, good_codes, own_secrets(environment))
    step.pump = threading.Thread(target=step.read, name="srun-messages", daemon=True)
    step.pump.start()
    return step


def srun_command(job: dict[str, Any], command: list[str]) -> list[str]:
    """The srun line of all ranks of a job's plan. Every word that a cluster's own settings could change is said.

    `--wait=0`: srun must not kill, after a while, the last rank that still writes when the others are done.
    """
    shape = [f"--nodes={job['nodes']}", f"--ntasks={job['nodes'] * job['tasks_per_node']}", f"--ntasks-per-node={job['tasks_per_node']}"]
    threads = [f"--cpus-per-task={job['cpus_per_task']}"] if job.get("cpus_per_task") else []
    ends = ["--kill-on-bad-exit=0", "--wait=0", "--export=ALL", "--label", "--distribution=block", "--input=none"]
    return ["srun", *shape, *threads, *ends, *job.get("srun_options", []), *job.get("command_prefix", []), *command]
