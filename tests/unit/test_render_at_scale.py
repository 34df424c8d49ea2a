"""128 nodes x 8 ranks of the 8B pipeline, as rendered: who sits where, where they meet, what they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.attempts import Attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.memory import files_per_checkpoint
from megatron_ext.config.plan import ParallelPlan
from megatron_ext.launch.graph import with_overrides
from megatron_ext.launch.job_ranks import rank_environment
from megatron_ext.launch.job_step import srun_command
from megatron_ext.launch.render import script_text
from recipes import octothinker
from tests.rendered_jobs import jobs

ROOT = Path(__file__).resolve().parents[2]
NODES, RANKS = 128, 1024
STABLE = with_overrides(octothinker.llama_8b(), [f"stable.plan.nodes={NODES}"]).stage("stable")
JOB = jobs()["scale"]
NAMES = [f"node{number:03}" for number in range(1, NODES + 1)]  # of `scontrol show hostnames`, in Slurm's order
MOST_SHARED_FILES = 8  # of an attempt, for any number of ranks
# Megatron's own groups for some ranks of the plan, in a process of its own: they are global there.
GROUPS = """
import json, sys
import torch.distributed as dist
from megatron_ext.config.base import from_json
from megatron_ext.config.plan import TrainPlan
from megatron_ext.distributed import rehearsed_groups

plan, ranks = from_json(TrainPlan, json.loads(sys.argv[1])), json.loads(sys.argv[2])
found = []
for rank in ranks:
    with rehearsed_groups(plan, rank) as groups:
        tensor = dist.get_process_group_ranks(groups.collection.tp)
        found.append([groups.tensor_rank, groups.pipeline_rank, groups.data_rank, tensor])
print(json.dumps(found))
"""


def node_of(rank: int) -> int:
    """srun --distribution=block fills one node after another."""
    return rank // JOB.tasks_per_node


def places(rank: int, plan: ParallelPlan) -> tuple[int, int, int]:
    """(tensor, pipeline, data) place: tensor ranks are neighbours, data ranks come next."""
    return rank % plan.tensor, rank // (plan.tensor * plan.data_parallel), rank // plan.tensor % plan.data_parallel


def tensor_groups(plan: ParallelPlan) -> list[list[int]]:
    return [list(range(first, first + plan.tensor)) for first in range(0, plan.num_ranks, plan.tensor)]


def across_nodes(groups: list[list[int]]) -> list[list[int]]:
    return [group for group in groups if len({node_of(rank) for rank in group}) > 1]


def test_the_ranks_of_the_job_are_those_of_the_plan() -> None:
    assert (JOB.nodes, JOB.tasks_per_node, JOB.num_ranks, STABLE.plan.num_ranks) == (NODES, 8, RANKS, RANKS)
    script = script_text(JOB)
    for line in ("--nodes=128", "--ntasks-per-node=8", "--cpus-per-task=14", "--gpus-per-node=8"):
        assert f"\n#SBATCH {line}\n" in script
    command = srun_command(to_json(JOB), list(JOB.command))
    assert {"--nodes=128", "--ntasks=1024", "--ntasks-per-node=8", "--cpus-per-task=14"} <= set(command)
    assert any(word.startswith("--distribution=block") for word in command)
    assert Counter(node_of(rank) for rank in range(RANKS)) == dict.fromkeys(range(NODES), 8)
    assert JOB.cpus_per_task * JOB.tasks_per_node <= 112


def test_tensor_groups_stay_within_a_node_as_megatron_makes_them() -> None:
    assert across_nodes(tensor_groups(STABLE.plan)) == []
    shifted = [[rank + 1 for rank in group] for group in tensor_groups(STABLE.plan)[:-1]]
    assert len(across_nodes(shifted)) == NODES - 1  # what a layout that ignores nodes would give
    ranks = [0, 7, 8, 511, RANKS - 1]
    words = [sys.executable, "-c", GROUPS, json.dumps(to_json(STABLE.plan)), json.dumps(ranks)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank, (tensor, pipeline, data, group) in zip(ranks, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (tensor, pipeline, data) == places(rank, STABLE.plan)
        assert group == tensor_groups(STABLE.plan)[rank // STABLE.plan.tensor]


def test_all_meet_at_the_node_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    environment = rank_environment(to_json(JOB), NAMES, 0, {})
    assert environment["MASTER_ADDR"] == NAMES[node_of(0)]
    again = rank_environment(to_json(JOB), NAMES, 1, {})
    assert environment["MASTER_PORT"] != again["MASTER_PORT"]
    assert environment["PYTHONPATH"] == str(Path(JOB.supervisor).parent)


def test_a_thousand_ranks_write_few_files_that_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ext.training.session import _log_path

    monkeypatch.setenv("TMPDIR", JOB.environment["TMPDIR"])
    monkeypatch.setattr("tempfile.tempdir", None)  # asked for once a process
    run: Any = SimpleNamespace(graph=JOB.graph, name=JOB.stage, path=Path(JOB.run))
    attempt = Attempt(1, Path(JOB.run) / "attempts" / "1")

    def log(rank: int) -> Path:
        tensor, pipeline, data = places(rank, STABLE.plan)
        last = pipeline == STABLE.plan.pipeline - 1
        return _log_path(run, attempt, SimpleNamespace(rank=rank, tensor_rank=tensor, data_rank=data, is_last_stage=last))  # type: ignore[arg-type]

    logs = [log(rank) for rank in range(RANKS)]
    assert len(set(logs)) == RANKS
    shared = [path for path in logs if path.is_relative_to(JOB.run)]
    assert shared == [attempt.log_path]  # the last pipeline stage's first rank is rank 0 here
    assert {path.parent for path in logs if path not in shared} == {Path(JOB.scratch)}
    # plan.json, heartbeat, pulse, exit.json stand beside it, and of a failure one file a failing rank
    assert len(shared) + 4 <= MOST_SHARED_FILES
    assert files_per_checkpoint(STABLE.plan) == RANKS + 4
    assert os.fspath(Path(JOB.run) / "job") in script_text(JOB)
