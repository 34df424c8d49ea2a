"""Processes and plan must agree before any group is made."""

from __future__ import annotations

import socket

import pytest

from megatron_ext.config.plan import TrainPlan
from megatron_ext.distributed import environment_ranks, process_groups
from megatron_ext.errors import ConfigError


def test_more_or_fewer_processes_than_the_plan_has_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = r"1 node\(s\) x 2 rank\(s\) = 2 ranks, but 3 process\(es\) were started; start as many as the plan says"
    with pytest.raises(ConfigError, match=message), process_groups(TrainPlan(device="cpu", ranks_per_node=2)):
        pass


def test_ranks_come_from_torchrun_before_slurm(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert environment_ranks() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert environment_ranks() == (0, 1)  # a job's script, not a step
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert environment_ranks() == (5, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment_ranks() == (1, 2)


def test_a_machine_that_other_nodes_cannot_reach_is_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    message = "nodes 2, but the name of this machine, localhost, has no address that other nodes could reach .* set GLOO_SOCKET_IFNAME"
    with pytest.raises(ConfigError, match=message), process_groups(TrainPlan(device="cpu", nodes=2)):
        pass
