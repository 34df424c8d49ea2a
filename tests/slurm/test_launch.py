"""A whole graph through `launch --cluster` on a real Slurm: in the graph's order, one stage over two nodes, nothing submitted twice."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch.job_events import EVENTS
from megatron_ext.metrics import read_metrics
from megatron_ext.runs import DONE, Run, open_run
from megatron_ext.tracker import iteration_path, published
from tests.slurm.sandbox import Sandbox, call, until
from tests.small_checkpoints import data_digests

TWO_NODES = ("decay_long.plan.nodes=2", "decay_long.plan.pipeline=2")
TWO_RANKS = ("decay_long.plan.ranks_per_node=2", "decay_long.plan.pipeline=2")
CANARIES = {"CANARY_TOKEN": "canary-6b1f-of-the-environment", "HF_TOKEN": "canary-91ce-passed-by-name"}
IN_FILE = "canary-27aa-of-the-file"


def site(folder: Path, **fields: str) -> str:
    """A cluster file for the sandbox; `fields` are Python text of Slurm's fields."""
    path = folder / "site.py"
    more = "".join(f", {key}={value}" for key, value in fields.items())
    path.write_text(
        "from dataclasses import replace\nfrom recipes import clusters\n\n\ndef here():\n    cluster = clusters.sandbox()\n"
        f"    slurm = replace(cluster.slurm, python={sys.executable!r}, host_python={sys.executable!r}{more})\n"
        "    return replace(cluster, slurm=slurm)\n"
    )
    return f"{path}:here"


def megatron_ext(cluster: Sandbox, *words: str | Path, env: dict[str, str] | None = None) -> str:
    """Output of a command on the head node."""
    done = cluster.run([sys.executable, "-m", "megatron_ext", *words], env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refusal(cluster: Sandbox, *words: str | Path) -> str:
    """What a command says that must be refused."""
    done = cluster.run([sys.executable, "-m", "megatron_ext", *words])
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def new_jobs(output: str) -> list[int]:
    """Ids of the jobs that a launch says it submitted."""
    lines = [line for line in output.splitlines() if line.startswith("[") and "queued before" not in line and ": job " in line]
    return [int(line.split(": job ")[1].split(",")[0]) for line in lines]


def data(run: Run) -> list[dict[str, str]]:
    """Digests of the data files of every checkpoint of a run."""
    return [data_digests(iteration_path(run.checkpoints_path, step)) for step in published(run.checkpoints_path)]


def wait_for_all(cluster: Sandbox, folder: Path, stages: list[str]) -> None:
    """Until every stage is done; a job that is cancelled or failed ends the wait."""

    def over() -> bool:
        return all((folder / stage / DONE).is_file() for stage in stages) or not cluster.output(["squeue", "--noheader"])

    until(over, lambda: megatron_ext(cluster, "status", folder), timeout_seconds=400)
    assert all((folder / stage / DONE).is_file() for stage in stages), megatron_ext(cluster, "status", folder)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the graph twice, beside other tests
def test_the_graph_runs_to_its_report_and_equals_a_local_run(cluster: Sandbox, shared_path: Path) -> None:
    (secrets := shared_path / "secrets").write_text(f"WANDB_API_KEY={IN_FILE}\n")
    secrets.chmod(0o600)
    where = site(shared_path, secrets='("WANDB_API_KEY",)', secrets_file=repr(str(secrets)), exports='("CANARY_SEEN",)')
    runs, local = shared_path / "runs", shared_path / "local"
    launch = ("launch", "demo:smoke", *TWO_NODES, "--cluster", where, "--runs", runs)

    first = megatron_ext(cluster, *launch, env=CANARIES)
    stages = [line.split("] ")[1].split(":")[0] for line in first.splitlines() if line.startswith("[")]
    assert len(new_jobs(first)) == len(stages) == 14
    assert new_jobs(megatron_ext(cluster, *launch, env=CANARIES)) == [], "all are queued"
    assert "waits for its parents" in megatron_ext(cluster, "status", runs)
    wait_for_all(cluster, runs / "smoke", stages)
    assert new_jobs(megatron_ext(cluster, *launch, env=CANARIES)) == [], "all are done"

    ends = [event for event in read_json_lines(runs / "smoke" / "decay_long" / EVENTS) if event["event"] == "end"]
    assert [(end["decision"], len(end["nodes"])) for end in ends] == [("done", 2)]
    found = [path for path in shared_path.rglob("*") if path.is_file() and path != secrets]
    for canary in (*CANARIES.values(), IN_FILE):
        assert [path for path in found if canary.encode() in path.read_bytes()] == []

    call([sys.executable, "-m", "megatron_ext", "launch", "demo:smoke", *TWO_RANKS, "--local", "--runs", local], timeout_seconds=400)
    for stage in [name for name in stages if (runs / "smoke" / name / "checkpoints").is_dir()]:
        ours, theirs = (open_run(folder / "smoke" / stage) for folder in (runs, local))
        assert data(ours), stage
        assert data(ours) == data(theirs), stage
        losses = [[one["loss"] for one in read_metrics(run.metrics_path, "rl" if "rl_" in stage else "train")] for run in (ours, theirs)]
        assert losses[0] == losses[1], stage


@pytest.mark.slow
def test_an_array_does_the_slices_and_the_stage_puts_them_together(cluster: Sandbox, shared_path: Path) -> None:
    where, runs = site(shared_path), shared_path / "runs"
    (shared_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom recipes import demo\n\n\n"
        "def run():\n    graph = demo.smoke()\n"
        "    return replace(graph, name='text', stages=tuple(one for one in graph.stages if one.name in ('text', 'tokenizer', 'corpus')))\n"
    )
    recipe, folder = f"{shared_path / 'mine.py'}:run", runs / "text"
    launch = ("launch", recipe, "corpus.plan.parts=3", "--cluster", where, "--runs", runs)
    too_many = refusal(cluster, "launch", recipe, "corpus.plan.parts=99999", "--cluster", where, "--runs", runs)
    assert "99999 times in an array" in too_many
    assert "Invalid job array specification" in too_many
    assert not folder.exists()
    assert cluster.output(["squeue", "--noheader"]) == ""
    said = megatron_ext(cluster, *launch)
    assert "Slurm has jobs for text (job" in refusal(cluster, "launch", recipe, "--local", "--runs", runs)
    assert "its 3 parts in array" in said
    assert "waits for 3 of its 3 parts" in megatron_ext(cluster, "status", folder)
    megatron_ext(cluster, "cancel", folder / "corpus")
    queue = cluster.output(["squeue", "--noheader", "--array", "--format", "%j"]).split()
    assert not [name for name in queue if "corpus" in name], "the array goes with the stage"
    assert len(new_jobs(megatron_ext(cluster, *launch))) == 1
    array, job = ids_of_corpus(cluster)
    cluster.output(["scancel", str(job)])  # the stage's own job alone
    assert len(new_jobs(megatron_ext(cluster, *launch))) == 1
    assert ids_of_corpus(cluster)[0] == array, "the parts that wait are not submitted twice"
    cluster.output(["scancel", f"{array}_1"])  # a part that never comes

    wait_for_all(cluster, folder, ["text", "tokenizer", "corpus"])
    logs = {path.name: path.read_text() for path in (folder / "corpus" / "job").glob("part-*.log")}
    assert sorted(logs) == [f"part-{array}_{part}.log" for part in (0, 2)]
    shares = [int(text.split(" slices, 0 of them done before")[0].rsplit(" ", 1)[1]) for text in logs.values()]
    assert min(shares) > 0, logs
    records = sorted((folder / "corpus" / "shards").glob("*/slice-*.json"), key=lambda path: path.stat().st_mtime_ns)
    began = (folder / "corpus" / "attempts" / "1" / "plan.json").stat().st_mtime_ns
    assert [path.stat().st_mtime_ns < began for path in records] == [True] * sum(shares) + [False] * (len(records) - sum(shares))
    assert len(records) > sum(shares), "the stage itself did the part that never came"

    call([sys.executable, "-m", "megatron_ext", "launch", recipe, "--local", "--runs", shared_path / "local"], timeout_seconds=400)
    theirs = shared_path / "local" / "text" / "corpus"
    for path in sorted((folder / "corpus" / "shards").rglob("*.*")):
        if path.suffix in (".bin", ".idx", ".ids"):
            assert path.read_bytes() == (theirs / path.relative_to(folder / "corpus")).read_bytes(), path


def ids_of_corpus(cluster: Sandbox) -> tuple[int, int]:
    """Of the array of the corpus' parts, and of its own job."""
    lines = [line.split("|") for line in cluster.output(["squeue", "--noheader", "--array", "--format", "%j|%F"]).splitlines()]
    (array,) = {int(job_id) for name, job_id in lines if name.endswith(".corpus.part")}
    (job,) = {int(job_id) for name, job_id in lines if name.endswith(".corpus")}
    return array, job


@pytest.mark.slow
def test_a_child_of_the_middle_starts_when_its_checkpoint_is_there_and_cancel_takes_the_rest(cluster: Sandbox, shared_path: Path) -> None:
    where, runs = site(shared_path), shared_path / "runs"
    (shared_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom megatron_ext.config.stages import Branch\nfrom recipes import demo\n\n\n"
        "def run():\n    graph = demo.smoke()\n    stable = graph.stage('stable')\n"
        "    long = replace(stable, budget=replace(stable.budget, steps=40_000), plan=replace(stable.plan, save_every_steps=500))\n"
        "    early = replace(graph.stage('decay_long'), name='early', start=Branch(stage='stable', tokens=10 * 512))\n"
        "    kept = [one for one in graph.stages if one.name in ('text', 'tokenizer', 'base')]\n"
        "    corpus = graph.stage('corpus')\n"
        "    corpus = replace(corpus, sources=tuple(replace(one, max_epochs=1000.0) for one in corpus.sources))\n"
        "    return replace(graph, name='joint', stages=(*kept[:2], corpus, *kept[2:], long, early))\n"
    )
    launch = ("launch", f"{shared_path / 'mine.py'}:run", "--cluster", where, "--runs", runs)
    assert len(new_jobs(megatron_ext(cluster, *launch))) == 6
    folder = runs / "joint"
    until(lambda: (folder / "early" / DONE).is_file(), lambda: megatron_ext(cluster, "status", folder), timeout_seconds=200)
    assert not (folder / "stable" / DONE).is_file(), "the parent is still at work"
    assert [e["child"] for e in read_json_lines(folder / "stable" / EVENTS) if e["event"] == "released"] == [str(folder / "early")]
    assert "running on" in megatron_ext(cluster, "status", folder)
    (shared_path / "more.py").write_text(
        "from dataclasses import replace\nfrom megatron_ext.config.stages import Branch\nimport mine\n\n\n"
        "def run():\n    graph, last = mine.run(), Branch(stage='stable', tokens=39_999 * 512)\n"
        "    late = replace(graph.stage('early'), name='late', start=last)\n"
        "    return replace(graph, stages=(*graph.stages, late))\n"
    )
    more = megatron_ext(cluster, "launch", f"{shared_path / 'more.py'}:run", *launch[2:], env={"PYTHONPATH": str(shared_path)})
    assert "warning: stable is at work and learns at its next start that it must keep its checkpoint at 20,479,488 tokens" in more
    assert "stable: job" in (out := megatron_ext(cluster, "cancel", folder)) or "cancelled" in out
    until(lambda: not cluster.output(["squeue", "--noheader"]), "the queue is empty")
    assert "step" in megatron_ext(cluster, "logs", folder / "stable")

    again = megatron_ext(cluster, *launch, "--from", "stable")
    assert len(new_jobs(again)) == 1, "of what comes of it, early is done"
    numbers = json.loads((folder / "stable" / "job" / "submitted.json").read_text())
    assert numbers["job_id"] == new_jobs(again)[0]
    refused = refusal(cluster, *launch, "stable.plan.save_every_steps=7")
    assert "is queued as job" in refused
    assert "save_every_steps: 500 -> 7" in refused
    megatron_ext(cluster, "cancel", folder)
    until(lambda: not cluster.output(["squeue", "--noheader"]), "the queue is empty")
