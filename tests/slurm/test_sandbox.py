"""The throw-away cluster itself: nodes are machines of their own, and faults are what they say they are."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.linters import linter
from tests.slurm.sandbox import SCRIPT, Sandbox, call, until

pytestmark = pytest.mark.slow

SLURMCTLD_PORT = 6817


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}")
    return path


def reaches_head(cluster: Sandbox, node: str) -> bool:
    return cluster.on(node, ["timeout", "2", "bash", "-c", f"</dev/tcp/head/{SLURMCTLD_PORT}"]).returncode == 0


def grows(path: Path) -> Callable[[], bool]:
    size = path.stat().st_size
    return lambda: path.stat().st_size > size


def processes_on(cluster: Sandbox, node: str) -> list[str]:
    return cluster.on(node, ["sh", "-c", "cat /proc/[0-9]*/comm 2>/dev/null"]).stdout.split()


def test_nodes_are_machines_of_their_own(cluster: Sandbox, shared_path: Path) -> None:
    on_two = ["srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c"]
    cluster.output([*on_two, "touch /tmp/$(hostname).mark /dev/shm/$(hostname).mark"])
    cluster.output([*on_two, f"echo $(hostname) $(hostname -i) /tmp/*.mark /dev/shm/*.mark > {shared_path}/$SLURM_PROCID"])
    seen = sorted((shared_path / str(rank)).read_text() for rank in range(2))
    assert seen == [f"n{i} 10.77.0.{i} /tmp/n{i}.mark /dev/shm/n{i}.mark\n" for i in (1, 2)]
    assert not Path("/tmp/n1.mark").exists()
    assert "slurmd" in processes_on(cluster, "n1")
    assert "slurmctld" not in processes_on(cluster, "n1")


def test_the_head_works_in_the_folder_of_who_calls_it(cluster: Sandbox, tmp_path: Path) -> None:
    assert cluster.run(["pwd"], cwd=tmp_path).stdout.strip() == str(tmp_path)
    assert cluster.run(["sh", "-c", "exit 7"]).returncode == 7


def test_a_job_outlives_its_node(cluster: Sandbox, shared_path: Path) -> None:
    job = script(shared_path, f'hostname >> {shared_path}/nodes\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 600\n')
    job_id = cluster.submit(["--requeue", "--output=log", job], cwd=shared_path)
    until(lambda: (shared_path / "nodes").exists(), "the job started")
    first = cluster.job(job_id).batch_node
    cluster.crash(first)
    done = cluster.wait_for(job_id, {"COMPLETED"})
    assert done.restarts == 1
    assert (shared_path / "nodes").read_text().split() == [first, done.batch_node]
    assert done.batch_node != first
    cluster.boot(first)
    until(cluster.all_idle, "the node is back")


def test_a_cut_node_goes_on_alone(cluster: Sandbox, shared_path: Path) -> None:
    ticks = shared_path / "ticks"
    cluster.submit(["--output=log", script(shared_path, f"while :; do echo >> {ticks}; sleep 0.05; done")], cwd=shared_path)
    until(ticks.exists, "the job started")
    assert reaches_head(cluster, "n1")
    cluster.cut("n1")
    assert not reaches_head(cluster, "n1")
    until(grows(ticks), "the cut node's job went on")
    cluster.heal("n1")
    until(lambda: reaches_head(cluster, "n1"), "the cable is plugged in again")


def test_jobs_outlive_the_controller(cluster: Sandbox, shared_path: Path) -> None:
    go = shared_path / "go"
    running = cluster.submit(["--output=log", script(shared_path, f"until [ -e {go} ]; do sleep 0.1; done")], cwd=shared_path)
    queued = cluster.submit(["--output=log2", f"--dependency=afterok:{running}", "--wrap=true"], cwd=shared_path)
    cluster.wait_for(running, {"RUNNING"})
    cluster.stop_controller()
    assert "is UP" not in cluster.run(["scontrol", "ping"]).stdout
    cluster.start_controller()
    assert cluster.job(queued).state == "PENDING"
    go.touch()
    assert cluster.wait_for(queued, {"COMPLETED"}).restarts == 0
    assert cluster.job(running).restarts == 0


def test_a_daemon_dies_and_its_job_lives(cluster: Sandbox, shared_path: Path) -> None:
    ticks = shared_path / "ticks"
    job_id = cluster.submit(["--output=log", script(shared_path, f"while :; do echo >> {ticks}; sleep 0.05; done")], cwd=shared_path)
    until(ticks.exists, "the job started")
    cluster.kill_slurmd("n1")
    until(grows(ticks), "the job goes on")
    cluster.start_slurmd("n1")
    cluster.output(["scancel", str(job_id)])
    cluster.wait_for(job_id, {"CANCELLED"})


def test_a_second_cluster_beside_the_first(cluster: Sandbox, slurm_root: Path) -> None:
    other = Sandbox.up(slurm_root / "second", 1, ["--gpus", "2", "--cpus", "3", "--set", "KillWait=7", "--set", "GraceTime=4"])
    try:
        assert other.output(["srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES"]) == "0,1"
        assert other.output(["sinfo", "--noheader", "--partition=main", "--format=%c"]) == "3"
        conf = (other.folder / "slurm.conf").read_text()
        assert "\nKillWait=7\n" in conf
        assert "GraceTime=4\n" in conf
        assert "up already" in call([SCRIPT, "up", "1", other.folder]).stdout
        assert "with 1 nodes instead of 2" in call([SCRIPT, "up", "2", other.folder]).stderr
        # On the head of the other, a file system that was not there at the start: its node sees it.
        (slurm_root / "disk").mkdir()
        other.output(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", slurm_root / "disk"])
        full = other.run(["srun", "dd", "if=/dev/zero", f"of={slurm_root}/disk/file", "bs=128k", "count=1"])
        assert "No space left on device" in full.stderr
    finally:
        other.down()
    assert cluster.all_idle()
    assert sorted(path.name for path in other.folder.iterdir()) == ["log"]
    assert "no cluster is up" in other.run(["sinfo"]).stderr
    other.down()


def first_processes(folder: Path, name: str) -> list[int]:
    """Those that carry a machine's mark: its first process, and who waits for that outside."""
    mark = f"slurm_sandbox:{folder}:{name}"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if (process / "cmdline").read_text().split("\0")[-2:-1] == [mark]:
                found.append(int(process.name))
    return found


def test_the_leftovers_of_a_killed_cluster_are_no_obstacle(slurm_root: Path) -> None:
    killed = Sandbox.up(slurm_root / "killed", 1)
    assert first_processes(killed.folder, "n1")
    for process in first_processes(killed.folder, "head"):
        with contextlib.suppress(ProcessLookupError):  # it went with the one before
            os.kill(process, signal.SIGKILL)
    until(lambda: not first_processes(killed.folder, "n1"), "nodes end with the head")
    assert (killed.folder / "slurm.conf").exists()
    again = Sandbox.up(killed.folder, 1)
    assert again.output(["srun", "hostname"]) == "n1"
    again.down()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["up", "2", "/tmp/slurm"], "every node has a /tmp of its own"),
        (["up", "2", "/etc"], "holds other files"),
        (["up", "none"], "1 to 200 nodes"),
        (["up", "1", "/var/tmp/a b"], "takes only letters"),
        (["up", "1", "/var/tmp/" + "a" * 60], "longer than"),
        (["up", "1", "/var/tmp/never", "--share", "/usr"], "nodes see all outside /tmp"),
        (["up", "1", "/var/tmp/never", "--what"], "knows no --what"),
        (["run", "/var/tmp/never", "--", "true"], "no cluster is up"),
        (["run", "/var/tmp/never"], "a command is missing"),
        (["crash", "n1", "/var/tmp/never"], "no cluster is up"),
        (["what"], "no verb what"),
    ],
)
def test_what_cannot_be_done_is_refused(slurm_root: Path, words: list[str], reason: str) -> None:
    done = call([SCRIPT, *words])
    assert done.returncode == 1
    assert reason in done.stderr


def test_what_is_missing_is_named(slurm_root: Path) -> None:
    nobody = call(["setpriv", "--reuid", "65534", "--clear-groups", "bash", SCRIPT, "check"])
    assert (nobody.returncode, "needs root" in nobody.stderr) == (3, True)
    bare = call(["env", "PATH=/usr/bin:/bin", SCRIPT, "check"])
    assert bare.returncode == 3
    assert "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge" in bare.stderr


def test_the_script_is_clean() -> None:
    done = call([linter("shellcheck"), SCRIPT])
    assert done.returncode == 0, done.stdout
