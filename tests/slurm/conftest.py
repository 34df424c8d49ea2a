"""A real Slurm cluster for the tests of this folder, and folders that its nodes share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.faulty_stages import Ground
from tests.slurm.sandbox import SCRIPT, Sandbox, call

NUM_NODES, NUM_FAULT_NODES = 3, 7
# Not below /tmp, where pytest's own folders are: each node has a /tmp of its own.
PARENT = Path("/var/tmp")
PREFIX = "megatron_ext_test_"
LOCK = "lock"  # held as long as the session lives


@pytest.fixture(scope="session")
def slurm_root() -> Iterator[Path]:
    """A short path outside /tmp, for clusters and what their nodes share; gone at the end. Skips where no cluster can run."""
    check = call([SCRIPT, "check"])
    if check.returncode:
        pytest.skip(f"no Slurm here: {check.stderr.strip()}")
    _end_leftovers()
    root = PARENT / f"{PREFIX}{os.getpid()}"
    unlocked = PARENT / f"new_{root.name}"
    unlocked.mkdir(mode=0o755)
    with (unlocked / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(root)  # nobody sees it without its lock
        yield root
        _end(root)


@pytest.fixture(scope="session")
def cluster(slurm_root: Path) -> Iterator[Sandbox]:
    """Three nodes of eight CPUs each (so they say), up as long as the session."""
    sandbox = Sandbox.up(slurm_root / "slurm", NUM_NODES)
    yield sandbox
    sandbox.down()


@pytest.fixture(scope="session")
def ground(slurm_root: Path) -> Iterator[Ground]:
    """Seven nodes for stages that faults are done to: three pairs at work at a time, and one node to go to."""
    sandbox = Sandbox.up(slurm_root / "faults", NUM_FAULT_NODES)
    yield Ground.prepare(sandbox, slurm_root / "fault_runs")
    sandbox.down()


@pytest.fixture(autouse=True)
def _restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds the cluster as it was at the start."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").restore()


@pytest.fixture
def shared_path(slurm_root: Path, request: pytest.FixtureRequest) -> Path:
    """This test's own folder, the same on every node."""
    path = slurm_root / "shared" / re.sub(r"\W+", "_", request.node.name)
    path.mkdir(parents=True)
    return path


def _end_leftovers() -> None:
    """What sessions left that were killed: nobody holds their lock."""
    for root in PARENT.glob(f"{PREFIX}*"):
        # another session may end, or clean up, at this moment
        with contextlib.suppress(FileNotFoundError, BlockingIOError), (root / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end(root)


def _end(root: Path) -> None:
    for conf in root.glob("*/slurm.conf"):
        Sandbox(conf.parent, 0).down()
    shutil.rmtree(root)
