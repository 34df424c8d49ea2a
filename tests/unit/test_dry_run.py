"""A dry run for a cluster: the whole plan and every stage's script, quickly, without torch, and without writing anything."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.__main__ import main
from megatron_ext.launch import render
from megatron_ext.launch.dry_run import dry_run_text
from megatron_ext.launch.plan import plan_text
from megatron_ext.launch.render import jobs_of
from megatron_ext.snapshot import code_hash, snapshot_path
from recipes import clusters, octothinker
from tests.linters import linter

GRAPH = octothinker.llama_8b()


def scripts_of(text: str) -> dict[str, str]:
    """Path and what it waits for -> script, of a dry run's text."""
    parts = re.split(r"^==> (.*) <==\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_it_prints_every_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "octothinker:llama_8b", "--cluster", "h100", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert plan_text(GRAPH, clusters.h100()) in out
    folder = tmp_path / "runs" / GRAPH.name
    jobs = jobs_of(GRAPH, folder, clusters.h100(), snapshot_path(tmp_path / "runs", code_hash()), tmp_path)
    found = scripts_of(out)
    assert [text.strip() for text in found.values()] == [text.strip() for job in jobs for text in render.scripts_of(job).values()]
    assert [Path(job.run).name for job in jobs] == [stage.name for stage in GRAPH.stages]
    titles = list(found)
    assert titles[:2] == [f"{folder}/corpus/job/parts.sbatch", f"{folder}/corpus/job/stage.sbatch, after its parts"]
    assert titles[3] == f"{folder}/stable/job/stage.sbatch, after llama, corpus"
    assert list(tmp_path.iterdir()) == []


def test_the_scripts_are_clean(tmp_path: Path) -> None:
    paths = []
    for number, text in enumerate(scripts_of(dry_run_text(GRAPH, clusters.h100(), Path("/shared/runs"), Path("/home/me"))).values()):
        paths.append(tmp_path / f"{number}.sbatch")
        paths[-1].write_text(text)
    assert len(paths) == len(GRAPH.stages) + 1  # one stage has parts
    done = subprocess.run([linter("shellcheck"), "--shell=bash", *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_without_slurm_there_are_no_scripts() -> None:
    for cluster in (None, replace(clusters.h100(), slurm=None)):
        assert scripts_of(dry_run_text(GRAPH, cluster, Path("/shared/runs"), Path("/home/me"))) == {}
