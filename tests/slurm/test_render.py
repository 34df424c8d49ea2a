"""Rendered scripts in the hands of a real Slurm: it takes them, reads every word as it was meant, and passes on nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.base import to_json
from megatron_ext.config.cluster import Cluster
from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_step import srun_command
from megatron_ext.launch.render import JOB, JOB_FOLDER, SCRIPT, Job, script_text
from megatron_ext.runs import write_json
from megatron_ext.snapshot import take_snapshot
from recipes import demo, octothinker
from tests.rendered_jobs import job, ours
from tests.slurm.sandbox import Sandbox

pytestmark = pytest.mark.slow

STRANGE = 'it\'s 100%/$HOME "x" `y` #z;& é'
CANARY = "canary-71ab"
RECORDER = """#!/bin/bash
for last; do :; done
printf '%s\\0' "$PWD" "$@" > "$(dirname "$last")/words"
env -0 > "$(dirname "$last")/environment"
echo the log
"""
TWO_NODES = ("stable.plan.nodes=2", "stable.plan.micro_batch=1")


def site(**changes: Any) -> Cluster:
    """The sandbox, as a user would describe it; `urgent` stands for a partition of nodes without GPUs."""
    words = {"partition": "main", "cpu_partition": "urgent", "account": "", "qos": "", "constraint": "", "excluded_nodes": ()}
    return replace(ours(**{**words, **changes}), cores_per_node=8, memory_bytes_per_node=16 * 10**9)


@pytest.fixture(scope="module")
def gpu_cluster(slurm_root: Path) -> Iterator[Sandbox]:
    """Two nodes that say they have eight GPUs each."""
    sandbox = Sandbox.up(slurm_root / "gpus", 2, ["--gpus", "8"])
    yield sandbox
    sandbox.down()


def write(one: Job, folder: Path) -> Path:
    """A job's script in a folder of its own."""
    path = folder / JOB_FOLDER / SCRIPT
    path.parent.mkdir(parents=True)
    path.write_text(script_text(one), encoding="utf-8")
    return path


JOBS = {
    "GPUs": job(octothinker.llama_8b, "stable", site(), overrides=TWO_NODES),
    "typed GPUs": job(octothinker.llama_8b, "stable", site(gpus_option="gres=gpu:h100:{gpus}"), overrides=TWO_NODES),
    "a part of a node": job(octothinker.llama_1b, "rl_long", site(exclusive=False), overrides=("rl_long.plan.ranks_per_node=2",)),
    "ranks on CPUs": job(demo.smoke, "decay_long", site()),
    "one process": job(demo.smoke, "corpus", site(cpu_memory_bytes=2**30)),
}
REFUSED = {
    "no such partition": replace(JOBS["GPUs"], partition="nowhere"),
    "more nodes than there are": replace(JOBS["GPUs"], nodes=3),
    "more GPUs than a node has": replace(JOBS["GPUs"], gpus_option="gpus-per-node=9"),
    "GPUs of another type": replace(JOBS["GPUs"], gpus_option="gres=gpu:a100:8"),
    "no such node": replace(JOBS["GPUs"], excluded_nodes=("n9",)),
}


@pytest.mark.parametrize("name", JOBS)
def test_slurm_takes_the_script(gpu_cluster: Sandbox, shared_path: Path, name: str) -> None:
    one = replace(JOBS[name], directory=str(shared_path), run=str(shared_path))
    done = gpu_cluster.run(["sbatch", "--test-only", write(one, shared_path)])
    assert done.returncode == 0, done.stderr
    assert f"in partition {one.partition}" in done.stderr


@pytest.mark.parametrize("name", REFUSED)
def test_slurm_refuses_what_cannot_be(gpu_cluster: Sandbox, shared_path: Path, name: str) -> None:
    one = replace(REFUSED[name], directory=str(shared_path), run=str(shared_path))
    assert gpu_cluster.run(["sbatch", "--test-only", write(one, shared_path)]).returncode != 0


def test_slurm_reads_every_word_as_it_was_meant(cluster: Sandbox, shared_path: Path) -> None:
    recorder, runs = shared_path / 'a recorder\'s "python"', shared_path / STRANGE
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    one = job(demo.smoke, "stable", site(host_python=str(recorder), exports=("HF_HOME",)), runs)
    one = replace(one, directory=str(shared_path), supervisor=str(runs / ".code" / "megatron_ext"))
    script = write(one, Path(one.run))
    passed = {name: os.environ[name] for name in ("PATH", "HOME")}
    given = {**passed, "HF_TOKEN": f"one\n{CANARY} 'x'", "HF_HOME": "/a b", "UNNAMED": CANARY, "PYTHONPATH": CANARY}
    done = cluster.run(["sbatch", "--parsable", script], cwd=Path("/"), env=given)
    assert done.returncode == 0, done.stderr
    state = cluster.wait_for(int(done.stdout), {"COMPLETED"})
    folder = Path(one.run) / JOB_FOLDER
    where, *words = (folder / "words").read_text(encoding="utf-8").split("\0")[:-1]
    assert (where, words[:2], words[3:]) == (str(shared_path), ["-I", "-c"], [str(runs / ".code"), str(folder / "job.json")])
    assert (folder / f"slurm-{done.stdout.strip()}.log").read_text() == "the log\n"
    variables = dict(pair.split("=", 1) for pair in (folder / "environment").read_text(encoding="utf-8").split("\0")[:-1])
    ours_and_bashs = {"PATH", "HOME", "HF_TOKEN", "HF_HOME", "PWD", "SHLVL", "OLDPWD", "_", "USER", "LANG"}
    assert {name for name in variables if not name.startswith("SLURM")} <= ours_and_bashs
    assert (variables["HF_TOKEN"], variables["HF_HOME"]) == (given["HF_TOKEN"], "/a b")
    shown = cluster.output(["scontrol", "show", "job", done.stdout.strip()])
    for words_shown in (f"Comment={one.comment}", "Requeue=1", f"WorkDir={shared_path}", "TimeLimit=1-00:00:00", "Partition=urgent"):
        assert f" {words_shown} " in shown.replace("\n", " ")
    assert CANARY not in shown + script.read_text(encoding="utf-8")
    assert state.exit_code == 0


def test_the_login_environment_would_pass_without_the_loop(cluster: Sandbox, shared_path: Path) -> None:
    """What the script's loop is for: this Slurm adds what it makes of the user's login."""
    path = shared_path / "job.sh"
    path.write_text(f"#!/bin/bash\n#SBATCH --export=HOME,PATH\nenv -0 > {shared_path}/environment\n")
    cluster.wait_for(cluster.submit(["--output=/dev/null", path], cwd=shared_path), {"COMPLETED"})
    names = {pair.split("=")[0] for pair in (shared_path / "environment").read_text().split("\0")}
    assert "LOGNAME" in names


def test_ranks_fill_one_node_after_another(cluster: Sandbox, shared_path: Path) -> None:
    one = replace(job(demo.smoke, "stable", site()), nodes=2, tasks_per_node=4, cpus_per_task=2)
    places = ["bash", "-c", f'echo "$SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $SLURM_NTASKS" > {shared_path}/"$SLURM_PROCID"']
    done = cluster.run(srun_command(json.loads(json.dumps(to_json(one))), places), cwd=shared_path)
    assert done.returncode == 0, done.stderr
    found = [(shared_path / str(rank)).read_text().split() for rank in range(8)]
    assert found == [[str(rank), str(rank // 4), str(rank % 4), "8"] for rank in range(8)]


def test_the_supervisor_is_the_snapshots_whatever_lies_in_the_present_folder(cluster: Sandbox, shared_path: Path) -> None:
    decoy = shared_path / "megatron_ext"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('the present folder stood before the snapshot')")
    runs = shared_path / "runs"
    one = job(demo.smoke, "corpus", site(host_python=sys.executable, node_check="never", secrets=()), runs)
    command = ("bash", "-c", f"touch {one.run}/DONE")
    one = replace(one, directory=str(shared_path), supervisor=str(take_snapshot(runs) / "megatron_ext"), command=command)
    script = write(one, Path(one.run))
    write_json(script.with_name(JOB), to_json(one))
    job_id = cluster.submit([script], cwd=shared_path)
    cluster.wait_for(job_id, {"COMPLETED", "FAILED"})
    log = (script.parent / f"slurm-{job_id}.log").read_text()
    assert cluster.job(job_id).state == "COMPLETED", log
    assert [event["event"] for event in read_json_lines(script.parent / "events.jsonl")] == ["start", "ranks", "end"]
    by_module = cluster.run([sys.executable, "-m", "megatron_ext.launch.supervisor", script], cwd=shared_path)
    assert "stood before the snapshot" in by_module.stderr  # what -I is for
