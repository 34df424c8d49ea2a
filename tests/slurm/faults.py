"""Fourteen things that go wrong on a cluster, each done to a stage at work, and mended where somebody would mend it."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.launch.job_events import newest_iteration
from tests.slurm import fault_recipe
from tests.slurm.faulty_stages import PATIENCE_SECONDS, FaultyStage, Ground

DISK_BYTES = 32 * 2**20  # some twenty checkpoints


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    words: str  # for the table
    happen: Callable[[FaultyStage], None]  # to a stage at work; it trains again when this returns
    before: Callable[[FaultyStage], None] = lambda _: None  # the launch
    after: Callable[[FaultyStage], None] = lambda _: None  # the stage is done


@dataclass(frozen=True)
class Outcome:
    """What became of a stage that a fault was done to."""

    fault: Fault
    seconds: float | None  # from the fault until it trained again; None: it never stopped
    attempts: int
    differences: tuple[str, ...]  # from an undisturbed stage


def run(ground: Ground, fault: Fault, undisturbed: Callable[[], FaultyStage]) -> Outcome:
    """Launch the fault's stage, let the fault happen, and see the stage to its end."""
    stage = ground.stage(fault.name)
    fault.before(stage)
    ground.launch(fault.name)
    stage.until_half_way()
    fault.happen(stage)
    stage.until_done()
    fault.after(stage)
    attempts = len(list((stage.path / "attempts").glob("[0-9]*")))
    return Outcome(fault, stage.lost_seconds, attempts, tuple(stage.differences(undisturbed())))


def node_power_loss(stage: FaultyStage) -> None:
    _batch_node(stage, stage.slurm.crash, stage.slurm.boot)


def slurmd_killed(stage: FaultyStage) -> None:
    """Slurm takes the node for dead, and what runs on it goes on."""
    _batch_node(stage, stage.slurm.kill_slurmd, stage.slurm.start_slurmd)


def network_cut(stage: FaultyStage) -> None:
    _batch_node(stage, stage.slurm.cut, stage.slurm.heal)


def _batch_node(stage: FaultyStage, harm: Callable[[str], None], mend: Callable[[str], None]) -> None:
    """Harm the node of the batch script; mend it when the stage is at work elsewhere."""
    node = stage.nodes[0]
    stage.strike()
    harm(node)
    stage.until_again()
    mend(node)


def term(stage: FaultyStage) -> None:
    stage.strike()
    stage.slurm.output(["scancel", "--batch", "--signal=TERM", str(stage.job_id)])
    stage.until_again()


def time_limit(stage: FaultyStage) -> None:
    """Of an hour a minute or so is left; afterwards the job has its hour again."""
    minutes = math.ceil((time.time() - stage.events("start")[-1]["started_at"] + 50) / 60)
    stage.slurm.output(["scontrol", "update", f"JobId={stage.job_id}", f"TimeLimit={minutes}"])
    stage.wait(lambda: "the ranks finish their step, save and stop" in stage.log, "told to stop")
    stage.strike()
    stage.slurm.output(["scontrol", "update", f"JobId={stage.job_id}", "TimeLimit=60"])
    stage.until_again()


def requeue(stage: FaultyStage) -> None:
    stage.strike()
    stage.slurm.output(["scontrol", "requeue", str(stage.job_id)])
    stage.until_again()


def preemption(stage: FaultyStage) -> None:
    words = ["--partition=urgent", f"--nodes={stage.slurm.num_nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"]
    stage.strike()
    urgent = stage.slurm.submit(words)
    stage.until_again()
    assert stage.slurm.job(urgent).state == "COMPLETED"


def scancel(stage: FaultyStage) -> None:
    """Of one stage; then a person launches the same again."""
    job_id = stage.job_id
    stage.strike()
    stage.slurm.output(["scancel", str(job_id)])
    stage.slurm.wait_for(job_id, {"CANCELLED"}, PATIENCE_SECONDS)
    stage.ground.launch(stage.name)
    stage.until_again()
    assert stage.job_id != job_id


def rank_killed(stage: FaultyStage) -> None:
    stage.strike()
    stage.signal_rank(1, signal.SIGKILL)
    stage.until_again()


def rank_stopped(stage: FaultyStage) -> None:
    stage.strike()
    stage.signal_rank(1, signal.SIGSTOP)
    stage.until_again()
    assert "no stack came from rank 1" in stage.log


def small_disk(stage: FaultyStage) -> None:
    """The folder of its checkpoints is a small file system, which all nodes see, and this process does not."""
    stage.checkpoints.mkdir(parents=True)
    stage.slurm.output(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", stage.checkpoints])


def full_disk(stage: FaultyStage) -> None:
    """Another's file takes all room, until somebody sees why the stage failed, and removes it."""
    other = stage.checkpoints / "of_another"
    stage.strike()
    stage.slurm.run(["dd", "if=/dev/zero", f"of={other}", "bs=64k"])  # to the end of the disk, where it fails
    stage.wait(lambda: "No space left on device" in stage.log, "the disk is full")
    stage.slurm.output(["rm", other])
    stage.until_again()


def take_off_small_disk(stage: FaultyStage) -> None:
    """What is on it, to where this process sees it."""
    aside = stage.path / "from_small_disk"
    stage.slurm.output(["cp", "-a", stage.checkpoints, aside])
    stage.slurm.output(["umount", stage.checkpoints])
    stage.checkpoints.rmdir()
    aside.rename(stage.checkpoints)


def corrupted_checkpoint(stage: FaultyStage) -> None:
    """One byte of the newest, while the job waits in the queue."""
    stage.strike()
    stage.slurm.output(["scontrol", "requeuehold", str(stage.job_id)])
    stage.slurm.wait_for(stage.job_id, {"PENDING"}, PATIENCE_SECONDS)
    newest = newest_iteration(stage.path)
    folder = stage.checkpoints / f"iter_{newest:07d}"
    path = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    stage.slurm.output(["scontrol", "release", str(stage.job_id)])
    stage.until_again()
    fallback = json.loads((stage.path / "attempts/2/fallback.json").read_text())
    assert fallback["from"] == folder.name, fallback


def save_killed(stage: FaultyStage) -> None:
    """Rank 0 dies between the first byte of a checkpoint and its publish."""
    process = stage.rank_process(0)
    staged = _stopped_in_a_save(stage, process)
    stage.strike()
    os.kill(process, signal.SIGKILL)
    assert staged.is_dir()
    assert not (stage.checkpoints / staged.name).exists()
    stage.until_again()
    assert not staged.exists()


def _stopped_in_a_save(stage: FaultyStage, process: int) -> Path:
    """Stop the process with a checkpoint half written; that one's folder."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if staged := next(stage.checkpoints.glob(".attempt-*/iter_*"), None):
            os.kill(process, signal.SIGSTOP)
            while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            if staged.is_dir():
                return staged
            os.kill(process, signal.SIGCONT)  # it was faster; the next save, then
        time.sleep(0.001)
    raise AssertionError(f"{stage.name}: no save was met half-way")


def controller_restart(stage: FaultyStage) -> None:
    """The stage trains on while nobody answers."""
    stage.slurm.stop_controller()
    try:
        known = len(stage.lines())
        stage.wait(lambda: len(stage.lines()) >= known + 3, "trains on")
    finally:
        stage.slurm.start_controller()
    assert stage.job.restarts == 0


ALL = {
    fault.name: fault
    for fault in (
        Fault("node_power_loss", "power loss of the batch node", node_power_loss),
        Fault("slurmd_killed", "slurmd of the batch node killed", slurmd_killed),
        Fault("network_cut", "network of the batch node cut, and healed later", network_cut),
        Fault("term", "TERM to the job", term),
        Fault("time_limit", "USR1 at the time limit", time_limit),
        Fault("requeue", "`scontrol requeue`", requeue),
        Fault("preemption", "preempted by a job of another partition", preemption),
        Fault("scancel", "`scancel` of the stage, then `launch` again", scancel),
        Fault("rank_killed", "`kill -9` of a rank", rank_killed),
        Fault("rank_stopped", "SIGSTOP of a rank", rank_stopped),
        Fault("full_disk", "full disk, and room made later", full_disk, before=small_disk, after=take_off_small_disk),
        Fault("corrupted_checkpoint", "one byte of the newest checkpoint flipped while the job waits", corrupted_checkpoint),
        Fault("save_killed", "`kill -9` of rank 0 half-way through a save", save_killed),
        Fault("controller_restart", "the controller stopped, and started again", controller_restart),
    )
}
assert tuple(ALL) == fault_recipe.FAULTS
