"""A throw-away Slurm cluster (tools/slurm_sandbox.sh) in the hands of a test.

Everything that waits asks again until a deadline that only a broken cluster reaches; nothing sleeps for a fixed time.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tools" / "slurm_sandbox.sh"
DEADLINE_SECONDS = 120.0
# A node that is idle, but for a controller that has not noticed yet, is so within this time.
SETTLING_SECONDS = 5.0


def call(
    words: Sequence[str | Path],
    timeout_seconds: float = DEADLINE_SECONDS,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; after `timeout_seconds` it is killed with all it started: subprocess.TimeoutExpired."""
    process = subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def until(condition: Callable[[], object], what: str | Callable[[], str], timeout_seconds: float = DEADLINE_SECONDS) -> None:
    """Ask until `condition` holds; AssertionError with `what` when the time is up."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says of one, also after its end."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def reason(self) -> str:
        return self.fields["Reason"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def batch_node(self) -> str:
        """Empty before the first start."""
        return self.fields.get("BatchHost", "")

    @property
    def exit_code(self) -> int:
        return int(self.fields["ExitCode"].split(":")[0])

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.fields.items())


@dataclass(frozen=True)
class Sandbox:
    """A cluster that is up: nodes n1 to n`num_nodes`, its files in `folder`."""

    folder: Path
    num_nodes: int

    @staticmethod
    def up(folder: Path, num_nodes: int, options: Iterable[str] = ()) -> Sandbox:
        """Start one; `options` are those of `slurm_sandbox.sh up`. Nodes see the repository and this Python wherever they lie."""
        outside = {REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
        shares = [word for path in sorted(outside) if path.is_relative_to("/tmp") for word in ("--share", str(path))]
        _good(call([SCRIPT, "up", str(num_nodes), folder, *shares, *options]))
        return Sandbox(folder, num_nodes)

    def down(self) -> None:
        _good(call([SCRIPT, "down", self.folder]))

    @property
    def nodes(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.num_nodes)]

    # commands

    def run(
        self,
        words: Sequence[str | Path],
        timeout_seconds: float = DEADLINE_SECONDS,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """On the head, where users of a cluster sit."""
        return call([SCRIPT, "run", self.folder, "--", *words], timeout_seconds, cwd, env)

    def on(self, node: str, words: Sequence[str | Path], timeout_seconds: float = DEADLINE_SECONDS) -> subprocess.CompletedProcess[str]:
        """On a node, among its processes."""
        return call([SCRIPT, "on", node, self.folder, "--", *words], timeout_seconds)

    def output(self, words: Sequence[str | Path]) -> str:
        """Of a command on the head that must succeed."""
        return _good(self.run(words)).stdout.strip()

    # faults

    def crash(self, node: str) -> None:
        self._do("crash", node)

    def boot(self, node: str) -> None:
        self._do("boot", node)

    def cut(self, node: str) -> None:
        self._do("cut", node)

    def heal(self, node: str) -> None:
        self._do("heal", node)

    def kill_slurmd(self, node: str) -> None:
        self._do("kill-slurmd", node)

    def start_slurmd(self, node: str) -> None:
        self._do("start-slurmd", node)

    def stop_controller(self) -> None:
        self._do("stop-controller")

    def start_controller(self) -> None:
        self._do("start-controller")

    def _do(self, verb: str, *node: str) -> None:
        _good(call([SCRIPT, verb, *node, self.folder]))

    # jobs and nodes

    def submit(self, words: Sequence[str | Path], cwd: Path | None = None) -> int:
        """`sbatch WORDS`; the job's id."""
        return int(_good(self.run(["sbatch", "--parsable", *words], cwd=cwd)).stdout)

    def job(self, job_id: int) -> Job:
        line = self.output(["scontrol", "--oneliner", "show", "job", str(job_id)])
        return Job(dict(re.findall(r"(\S+?)=(.*?)(?= [\w:/]+=|$)", line)))

    def wait_for(self, job_id: int, states: Collection[str], timeout_seconds: float = DEADLINE_SECONDS) -> Job:
        """Until the job is in one of `states`; the job as it is then."""
        seen: list[Job] = []

        def is_there() -> bool:
            seen[:] = [self.job(job_id)]
            return seen[0].state in states

        until(is_there, lambda: f"job {job_id} {' or '.join(states)}\n{seen[0]}\n{self.log_end()}", timeout_seconds)
        return seen[0]

    def node_states(self) -> dict[str, str]:
        """`idle`, `mixed`, `down`, ...; with a star where the node does not answer."""
        lines = self.output(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).splitlines()
        return dict(line.split() for line in lines)

    def all_idle(self) -> bool:
        return set(self.node_states().values()) == {"idle"}

    def log_end(self) -> str:
        """The controller's last lines."""
        return "\n".join((self.folder / "log" / "slurmctld.log").read_text().splitlines()[-30:])

    def restore(self) -> None:
        """As after the start: no jobs, every node idle."""
        if "is UP" not in self.run(["scontrol", "ping"]).stdout:
            self.start_controller()
        _good(self.run(["scancel", "--user", "root"]))
        if self._becomes_idle(0.0):
            return
        for node in self.nodes:
            call([SCRIPT, "heal", node, self.folder])  # one that is off has no cable
        for node, state in self.node_states().items():
            if state in ("drained", "draining"):  # and it answers: of one that does not Slurm would say that it is idle
                self.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
        if self._becomes_idle(SETTLING_SECONDS):
            return
        for node in (node for node, state in self.node_states().items() if state != "idle"):
            call([SCRIPT, "crash", node, self.folder])  # it may be off
            self.boot(node)
        until(self.all_idle, lambda: f"all nodes idle: {self.node_states()}\n{self.log_end()}")

    def _becomes_idle(self, seconds: float) -> bool:
        try:
            until(self.all_idle, "", seconds)
        except AssertionError:
            return False
        return True


def _good(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
