"""What doctor says of a cluster: image, secrets, a package that looks like NVIDIA's apex, a Slurm that is not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.cluster import Container, Slurm
from megatron_ext.errors import LaunchError
from megatron_ext.launch.doctor import refuse_what_would_fail
from megatron_ext.launch.doctor_cluster import cluster_findings
from megatron_ext.launch.findings import Finding
from megatron_ext.runs import mark_done, write_run
from recipes import clusters, demo

SMOKE = demo.smoke()
NAMES = [stage.name for stage in SMOKE.stages]


def found(folder: Path, slurm: Slurm) -> dict[str, Finding]:
    """Findings by what was looked at."""
    cluster = replace(clusters.sandbox(), slurm=slurm)
    return {one.what: one for one in cluster_findings(SMOKE, cluster, folder, NAMES)}


SLURM = clusters.sandbox().slurm or Slurm()


def test_without_a_slurm_nothing_is_said_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_findings(SMOKE, None, tmp_path, NAMES) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    one = found(tmp_path, SLURM)["Slurm"]
    assert (one.level, "squeue: no such command" in one.found) == ("warning", True)


def test_interpreters_that_this_machine_cannot_start_are_warned_of(tmp_path: Path) -> None:
    def words(**changes: Any) -> list[tuple[str, str]]:
        cluster = replace(clusters.sandbox(), slurm=replace(SLURM, **{"python": sys.executable, **changes}))
        return [(one.level, one.found) for one in cluster_findings(SMOKE, cluster, tmp_path, NAMES) if one.what == "Python"]

    assert [level for level, _ in words()] == ["ok", "ok"]
    assert ("warning", "slurm.python is /nonexistent/python, which is not on this machine") in words(python="/nonexistent/python")
    (bare := tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    assert ("warning", f"slurm.python is {bare} here, and lacks torch, megatron-core or pydantic") in words(python=str(bare))
    assert words(python="/nonexistent/python", setup=("module load python",)) == []


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    image = tmp_path / "image.sqsh"
    slurm = replace(SLURM, container=Container(runtime="pyxis", image=str(image)))
    assert (found(tmp_path, slurm)["container"].level, str(image) in found(tmp_path, slurm)["container"].found) == ("error", True)
    image.touch()
    assert found(tmp_path, slurm)["container"].level == "ok"


def test_a_graph_that_is_done_needs_no_image(tmp_path: Path) -> None:
    slurm = replace(SLURM, container=Container(runtime="pyxis", image=str(tmp_path / "image.sqsh")))
    cluster = replace(clusters.sandbox(), slurm=slurm)
    with pytest.raises(LaunchError, match="no such file"):
        refuse_what_would_fail(SMOKE, cluster, tmp_path, by_jobs=True)
    for stage in SMOKE.stages:
        parents = {role: tmp_path / SMOKE.name / parent for parent, child, role in SMOKE.edges() if child == stage.name}
        mark_done(write_run(tmp_path / SMOKE.name / stage.name, SMOKE.name, stage, parents), {})
    refuse_what_would_fail(SMOKE, cluster, tmp_path, by_jobs=True)


def test_secrets_that_others_may_read_or_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    slurm = replace(SLURM, secrets=("HF_TOKEN",), secrets_file=str(path))
    assert "cannot be read" in found(tmp_path, slurm)["secrets"].found
    path.write_text("HF_TOKEN=one\n")
    path.chmod(0o640)
    assert f"chmod 600 {path}" in found(tmp_path, slurm)["secrets"].found
    path.chmod(0o600)
    assert found(tmp_path, slurm)["secrets"].level == "ok"
    assert "WANDB_API_KEY are not in" in found(tmp_path, replace(slurm, secrets=("HF_TOKEN", "WANDB_API_KEY")))["secrets"].found
    tmp_path.chmod(0o777)
    assert "anybody may put another file" in found(tmp_path, slurm)["secrets"].found


def test_secrets_by_name_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    one = found(tmp_path, replace(SLURM, secrets=("HF_TOKEN",)))["secrets"]
    assert (one.level, "canary" in one.found) == ("warning", False)


@pytest.mark.parametrize(("inside", "known"), [("views", False), ("normalization", True)])
def test_the_other_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, known: bool) -> None:
    (tmp_path / "apex" / inside).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert ("packages" in found(tmp_path, SLURM)) is not known
