"""The supervisor under a real Slurm: what becomes of a job whose ranks end well, badly, or not at all.

The ranks are small programs that keep (or break, on order) what a stage's ranks promise: tests/slurm/obedient_rank.py. Jobs that need
no hand are submitted together at first, and each test waits for its own.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.sandbox import REPOSITORY, Sandbox, until

pytestmark = pytest.mark.slow

CANARY = "canary-1f7c5b"
ENDLESS = {"steps": 100_000, "save_every": 100_000, "steps_later": 3}  # until told to stop; the next start comes to an end


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[Sandbox]:
    """A cluster of this file's own: jobs of several tests are at work on it at once."""
    sandbox = Sandbox.up(slurm_root / "supervised", 3, ["--cpus", "16"])
    yield sandbox
    sandbox.down()


@pytest.fixture(scope="module")
def folder(slurm_root: Path) -> Path:
    """For run folders, the same on every node."""
    path = slurm_root / "supervisor_runs"
    path.mkdir()
    return path


class Job:
    """One stage's job: its run folder, and what Slurm says of it."""

    def __init__(self, slurm: Sandbox, path: Path, orders: dict[str, Any], **changes: Any) -> None:
        self.slurm, self.path, self.job_id = slurm, path, 0
        (path / "job").mkdir(parents=True)
        self.order(orders)
        script = REPOSITORY / "tests/slurm/obedient_rank.py"
        job = {
            "run": str(path), "graph": "graph", "stage": path.name, "kind": "train", "nodes": 2, "tasks_per_node": 1, "cpus_per_task": 1,
            "gpus_per_node": 0,
            "signal_seconds": 0, "secrets": [], "secrets_file": "", "environment": {"FROM_CLUSTER": "1"}, "srun_options": [],
            "command": [sys.executable, str(script), "megatron_ext", str(path)], "command_prefix": [],
            "scratch": "/tmp", "hang_seconds": 300,
            "max_idle_attempts": 2, "node_check": "never", "save_seconds": 0.1, "joints": [], **changes,
        }  # fmt: skip
        (path / "job/job.json").write_text(json.dumps(job))

    def order(self, orders: dict[str, Any]) -> None:
        """What the ranks of the next start shall do."""
        aside = self.path / "orders.aside"
        aside.write_text(json.dumps({"steps": 6, "save_every": 2, **orders}))
        aside.rename(self.path / "orders.json")

    def submit(self, *options: str) -> Job:
        script = self.path / "job/stage.sbatch"
        # -I -S: no third-party package, nothing of the user's
        module = "runpy.run_module('megatron_ext.launch.supervisor', run_name='__main__')"
        code = f"import sys, runpy; sys.path.insert(0, {str(REPOSITORY)!r}); {module}"
        command = ["exec", sys.executable, "-I", "-S", "-c", code, str(self.path / "job/job.json")]
        script.write_text(f"#!/bin/bash\n{shlex.join(command)}\n")
        shape = ["--nodes=2", "--ntasks-per-node=1", "--requeue", "--open-mode=append", f"--output={self.log_path}", "--export=HOME,PATH"]
        words = ["--kill-on-invalid-dep=yes", *shape, f"--comment=megatron_ext:{self.path}", *options, str(script)]
        self.job_id = self.slurm.submit(words)
        (self.path / "job/submitted.json").write_text(json.dumps({"job_id": self.job_id, "submitted_at": time.time()}))
        return self

    @property
    def log_path(self) -> Path:
        return self.path / "job/slurm.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def shown(self, key: str) -> str:
        """What Slurm says of it."""
        return self.slurm.job(self.job_id).fields[key]

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        path = self.path / "job/events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [event for event in events if kind in (None, event["event"])]

    def told(self) -> str:
        """All that is known of it, for a test that fails."""
        return f"{self.slurm.job(self.job_id)}\n{self.events()}\n{self.log}"

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until(condition, lambda: f"{self.path.name} {what}; {self.told()}")

    def ended(self) -> str:
        """The state that it ends in."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait(lambda: self.shown("JobState") in final, "ended")
        return self.shown("JobState")

    def is_at_work(self, start: int) -> bool:
        """Whether the ranks of the start have finished a step."""
        return any(event["restart_count"] == start for event in self.events("ranks")) and any(
            path.name.split(".")[0] > "2" for path in (self.path / "meetings" / f"{self.job_id}.{start}").glob("[0-9]*")
        )


@pytest.fixture(scope="module")
def jobs(slurm: Sandbox, folder: Path) -> Iterator[dict[str, Job]]:
    """Jobs that need no hand, at work side by side."""

    def job(name: str, orders: dict[str, Any], **changes: Any) -> Job:
        return Job(slurm, folder / name, orders, **changes)

    secrets_file = folder / "secrets"
    secrets_file.write_text(f"# tokens\nCANARY={CANARY}\nOTHER=1\n")
    secrets_file.chmod(0o600)
    readable = folder / "readable"
    readable.write_text("CANARY=x\n")
    readable.chmod(0o644)
    made = {
        "done": job("done", {}),
        "fails": job("fails", {"fault": {"rank": 1, "step": 3, "kind": "raise"}}, secrets=["CANARY"], secrets_file=str(secrets_file)),
        "advances": job("advances", {"fault": {"rank": 1, "step": 3, "kind": "kill", "start": "0"}}),
        "stopped_rank": job("stopped_rank", {"fault": {"rank": 1, "step": 4, "kind": "stop", "start": "0"}}, hang_seconds=3),
        "asleep": job("asleep", {"fault": {"rank": 0, "step": 4, "kind": "sleep", "start": "0"}}, hang_seconds=3),
        "open_secrets": job("open_secrets", {}, secrets=["CANARY"], secrets_file=str(readable)),
        "limit": job("limit", ENDLESS),
    }
    for name, one in made.items():
        one.submit(*(["--time=1"] if name == "limit" else []))
    made["child"] = job("child", {}).submit(f"--dependency=afterok:{made['fails'].job_id}")
    yield made
    slurm.run(["scancel", *[str(one.job_id) for one in made.values()]])


def test_a_good_end(jobs: dict[str, Job]) -> None:
    job = jobs["done"]
    assert job.ended() == "COMPLETED", job.told()
    assert [event["event"] for event in job.events()] == ["start", "ranks", "end"]
    start, _, end = job.events()
    assert (start["job_id"], start["restart_count"], start["nodes"], start["iteration"]) == (job.job_id, 0, start["nodes"], None)
    assert len(start["nodes"]) == 2
    assert start["submitted_at"] <= start["eligible_at"] <= start["started_at"] <= start["at"] + 1
    assert (end["decision"], end["exit_code"], end["iteration"]) == ("done", 0, 6)


def test_a_stage_that_fails_at_once_is_given_up_with_its_dependants(jobs: dict[str, Job]) -> None:
    job = jobs["fails"]
    assert job.ended() == "FAILED"
    ends = job.events("end")
    assert [end["decision"] for end in ends] == ["requeue", "requeue", "stop"]  # the first start advanced to 2, and counts no more
    assert "was started 2 times in a row without a checkpoint newer than iteration 2" in ends[-1]["reason"]
    assert "ValueError: a rank's own words" in ends[-1]["reason"]
    assert job.log.count("is not started again") == 1
    assert "the first traceback is of rank 1:\nTraceback" in job.log
    assert jobs["child"].ended() == "CANCELLED"


def test_secrets_reach_the_ranks_and_no_file(jobs: dict[str, Job], folder: Path) -> None:
    job = jobs["fails"]
    job.ended()
    assert "a rank's own words, and <CANARY>" in job.log  # the rank quoted it, so it had it
    written = [path for path in job.path.rglob("*") if path.is_file() and "error.txt" not in path.name]
    assert len(written) > 5
    assert [path for path in written if CANARY in path.read_text(errors="replace")] == []


def test_a_secrets_file_that_others_can_read_is_refused(jobs: dict[str, Job]) -> None:
    job = jobs["open_secrets"]
    assert job.ended() == "FAILED"
    assert job.events("end")[-1]["decision"] == "stop"
    assert "others may read the secrets in it (mode 0644); run: chmod 600" in job.log
    assert job.events("ranks") == []


def test_a_killed_rank_is_named_and_the_same_job_goes_on(jobs: dict[str, Job]) -> None:
    job = jobs["advances"]
    assert job.ended() == "COMPLETED", job.told()
    fault = job.events("fault")[0]
    assert (fault["cause"], fault["restart_count"]) == ("rank", 0)
    assert f"rank 1 on {job.events('start')[0]['nodes'][1]}: Killed" in fault["words"]
    assert [end["decision"] for end in job.events("end")] == ["requeue", "done"]
    assert "most recent call first" in job.log  # of rank 0, which waited
    assert {event["job_id"] for event in job.events()} == {job.job_id}
    assert job.events("start")[1]["iteration"] == 2


def test_a_stopped_rank_is_named_by_its_silence(jobs: dict[str, Job]) -> None:
    job = jobs["stopped_rank"]
    assert job.ended() == "COMPLETED", job.told()
    fault = job.events("fault")[0]
    assert fault["cause"] == "hang"
    assert f"no stack came from rank 1 ({job.events('start')[0]['nodes'][1]})" in fault["words"]
    assert "0:   File" in job.log


def test_a_rank_asleep_shows_where(jobs: dict[str, Job]) -> None:
    job = jobs["asleep"]
    assert job.ended() == "COMPLETED", job.told()
    fault = job.events("fault")[0]
    assert fault["cause"] == "hang"
    assert "no stack came" not in fault["words"]
    assert "in misbehave" in job.log
    assert "in meet" in job.log


def test_the_ranks_stop_before_the_time_is_over(jobs: dict[str, Job]) -> None:
    job = jobs["limit"]
    assert job.ended() == "COMPLETED", job.told()
    end = job.events("end")[0]
    assert (end["exit_code"], end["decision"]) == (75, "requeue")
    assert end["reason"].endswith("s left")
    assert end["iteration"] > 0
    assert job.events("fault") == []
    assert [start["restart_count"] for start in job.events("start")] == [0, 1]


@pytest.fixture(scope="module")
def told(slurm: Sandbox, folder: Path) -> dict[str, Job]:
    """Jobs at work side by side, each then told something by Slurm or a person."""
    made = {name: Job(slurm, folder / name, ENDLESS).submit() for name in ("usr1", "term", "cancelled", "requeued", "killed")}
    for job in made.values():
        job.wait(lambda job=job: job.is_at_work(0), "at work")
    for name, signal in (("usr1", "USR1"), ("term", "TERM"), ("usr1", "USR1"), ("term", "TERM")):
        slurm.output(["scancel", "--batch", f"--signal={signal}", str(made[name].job_id)])
    slurm.output(["scancel", str(made["cancelled"].job_id)])
    slurm.output(["scontrol", "requeue", str(made["requeued"].job_id)])
    return made


def went_on(job: Job) -> dict[str, Any]:
    """The end of its first start, once the second has come to a good end."""
    assert job.ended() == "COMPLETED", job.told()
    assert [event["restart_count"] for event in job.events("start")] == [0, 1]
    assert job.events("end")[-1]["decision"] == "done"
    return job.events("end")[0]


@pytest.mark.parametrize("name", ["usr1", "term"])
def test_a_signal_saves_and_requeues_and_a_second_changes_nothing(told: dict[str, Job], name: str) -> None:
    job = told[name]
    end = went_on(job)
    assert (end["exit_code"], end["decision"], end["reason"]) == (75, "requeue", "preempted")
    assert end["iteration"] > 0
    assert job.log.count("the ranks finish their step, save and stop") == 1
    assert job.events("fault") == []


def test_a_cancelled_job_is_not_requeued(told: dict[str, Job]) -> None:
    job = told["cancelled"]
    assert job.ended() == "CANCELLED"
    end = job.events("end")[-1]
    assert (end["decision"], end["reason"]) == ("stop", "cancelled")
    assert end["iteration"] > 0  # it has saved, all the same
    assert job.shown("Restarts") == "0"


def test_a_requeue_by_hand_goes_on(told: dict[str, Job]) -> None:
    assert went_on(told["requeued"])["reason"] == "preempted"


def processes(slurm: Sandbox, node: str, word: str) -> list[str]:
    """Ids of a node's processes that have this word among their arguments."""
    found = slurm.on(node, ["sh", "-c", 'grep -lsaF -- "$0" /proc/[0-9]*/cmdline', word]).stdout.split()
    own = ("self", "thread-self")
    return [path.split("/")[2] for path in found if path.split("/")[2] not in own]


def test_a_killed_supervisor_leaves_no_rank_behind(told: dict[str, Job], slurm: Sandbox) -> None:
    job = told["killed"]
    nodes, rank = job.events("start")[0]["nodes"], f"obedient_rank.py\0{job.path}"
    rank = str(REPOSITORY / "tests/slurm/obedient_rank.py")

    def ranks() -> list[str]:
        pids = [pid for node in nodes for pid in processes(slurm, node, rank) if pid in processes(slurm, node, str(job.path))]
        return pids

    assert ranks()
    supervisor = processes(slurm, nodes[0], str(job.path / "job/job.json"))
    slurm.on(nodes[0], ["kill", "-9", *supervisor])
    assert job.ended() == "FAILED"
    until(lambda: not ranks(), "no rank is left")


def test_a_job_that_another_preempts_goes_on_after_it(slurm: Sandbox, folder: Path) -> None:
    job = Job(slurm, folder / "preempted", ENDLESS).submit("--exclusive")
    job.wait(lambda: job.is_at_work(0), "at work")
    slurm.submit(["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"])
    end = went_on(job)
    assert end["reason"] == "preempted"
    assert end["iteration"] > 0
    assert job.events("fault") == []


def test_a_published_checkpoint_releases_the_child_of_this_parent_alone(slurm: Sandbox, folder: Path) -> None:
    joints = [{"checkpoint": str(folder / "parent/checkpoints/iter_0000002"), "child": str(folder / "of_joint")}]
    other = slurm.submit(["--hold", "--output=/dev/null", "--wrap=true"])
    parent = Job(slurm, folder / "parent", {"fault": {"rank": 1, "step": 5, "kind": "sleep"}}, joints=joints).submit()
    child = Job(slurm, folder / "of_joint", {}).submit(f"--dependency=afterok:{parent.job_id}:{other}")
    parent.wait(lambda: parent.events("released"), "released its child")
    released = parent.events("released")[0]
    assert (released["child_job_id"], released["checkpoint"]) == (child.job_id, joints[0]["checkpoint"])
    assert child.shown("Dependency") == f"afterok:{other}(unfulfilled)"
    slurm.output(["scontrol", "release", str(other)])
    assert child.ended() == "COMPLETED"  # while the parent, which hangs, is still at work
    assert parent.shown("JobState") == "RUNNING"
    slurm.output(["scancel", str(parent.job_id)])
    assert parent.ended() == "CANCELLED"  # a node that still ends it while the controller is away is drained


def test_a_controller_that_is_away_is_waited_for(slurm: Sandbox, folder: Path) -> None:
    fault = {"step": 60, "kind": "raise", "start": "0"}
    job = Job(slurm, folder / "alone", {"fault": fault, "save_every": 1, "steps": 62}).submit()
    job.wait(lambda: job.is_at_work(0), "at work")
    slurm.stop_controller()
    try:
        until(lambda: job.events("end"), "the supervisor has decided")
    finally:
        slurm.start_controller()
    assert went_on(job)["decision"] == "requeue"


def test_a_lost_node_is_written_down(slurm: Sandbox, folder: Path) -> None:
    slurm.restore()
    other = Job(slurm, folder / "lost_other", ENDLESS).submit()
    batch_host = Job(slurm, folder / "lost_batch_host", ENDLESS).submit("--nodelist=n2,n3")
    for job in (other, batch_host):
        job.wait(lambda job=job: job.is_at_work(0), "at work")
    assert other.events("start")[0]["nodes"] == ["n1", "n2"]
    slurm.crash("n2")
    for job in (other, batch_host):
        job.wait(lambda job=job: job.shown("Restarts") == "1", "requeued")
    slurm.boot("n2")
    assert went_on(other)["reason"] == "node n2 was lost"
    assert [fault["cause"] for fault in other.events("fault")] == ["lost node"]
    # the other job's supervisor went with the node: its next start says so
    assert batch_host.ended() == "COMPLETED"
    assert [(fault["cause"], fault["restart_count"]) for fault in batch_host.events("fault")] == [("lost", 1)]
    assert "start 0 of the job, on n2, n3, ended without a word" in batch_host.events("fault")[0]["words"]


def test_a_broken_node_is_left_out_of_the_next_start(slurm: Sandbox, folder: Path) -> None:
    slurm.restore()
    for node in slurm.nodes:
        slurm.on(node, ["mkdir", "/tmp/scratch"])
    assert slurm.on("n2", ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/tmp/scratch"]).returncode == 0
    killed_later = {"fault": {"rank": 1, "step": 3, "kind": "kill", "start": "1"}}
    job = Job(slurm, folder / "checked", killed_later, node_check="first", scratch="/tmp/scratch").submit()
    assert job.ended() == "COMPLETED", job.told()
    assert [start["nodes"] for start in job.events("start")] == [["n1", "n2"], ["n1", "n3"], ["n1", "n3"]]
    assert "n2: disk write: OSError: [Errno 28] No space left on device" in job.events("fault")[0]["words"]
    assert [event["restart_count"] for event in job.events("ranks")] == [1, 2]
    assert [event["restart_count"] for event in job.events("checked")] == [1, 2], "checked again after a fault"
    assert job.shown("ExcNodeList") == "n2"
    result = json.loads((job.path / "job/node_check.json").read_text())
    assert set(result["seconds"]["n3"]) >= {"matrix product", "disk write", "all-reduce between nodes"}
