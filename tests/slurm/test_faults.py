"""Jobs that something happened to end as one that nothing happened to: the same weights and moments, each step once in the metrics.

Some of the faults of tests/slurm/faults.py, side by side, each on nodes of its own; `python -m tools.slurm_faults` does all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import small_checkpoints
from tests.slurm import faults
from tests.slurm.fault_recipe import SAVE_EVERY_STEPS, STEPS, UNDISTURBED
from tests.slurm.faults import Outcome
from tests.slurm.faulty_stages import FaultyStage, Ground

pytestmark = pytest.mark.slow

CHOSEN = ("rank_stopped", "node_power_loss", "save_killed", "corrupted_checkpoint", "rank_killed", "full_disk")  # the longest first


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each stage."""
    with ThreadPoolExecutor(len(CHOSEN) + 1) as threads:
        yield threads


@pytest.fixture(scope="module")
def undisturbed(ground: Ground, pool: ThreadPoolExecutor) -> Future[FaultyStage]:
    """The stage that nothing happens to, once it is done."""

    def finish() -> FaultyStage:
        stage = ground.stage(UNDISTURBED)
        ground.launch(stage.name)
        stage.until_done()
        return stage

    return pool.submit(finish)


@pytest.fixture(scope="module")
def outcomes(ground: Ground, pool: ThreadPoolExecutor, undisturbed: Future[FaultyStage]) -> dict[str, Future[Outcome]]:
    """Every fault under way; Slurm starts as many stages at once as there are nodes."""
    return {name: pool.submit(faults.run, ground, faults.ALL[name], undisturbed.result) for name in CHOSEN}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_changes_nothing(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome = outcomes[name].result()
    assert outcome.differences == ()
    assert outcome.seconds is not None
    assert outcome.attempts >= 2


def test_a_difference_would_be_seen(undisturbed: Future[FaultyStage], slurm_root: Path) -> None:
    stage = undisturbed.result()
    other = FaultyStage(stage.ground, slurm_root / "other")
    shutil.copytree(stage.path, other.path)
    assert other.differences(stage) == []
    lines = (other.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    middle = next(number for number, line in enumerate(lines) if '"kind": "train", "step": 30,' in line)
    (other.path / "metrics.jsonl").write_text("".join([*lines[:middle], lines[middle], *lines[middle:]]))
    assert [words[:20] for words in other.differences(stage)] == ["steps of the metrics", "other losses"]
    data = max((other.checkpoints / f"iter_{STEPS:07d}").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data.write_bytes((other.checkpoints / f"iter_{STEPS - SAVE_EVERY_STEPS:07d}" / data.name).read_bytes())
    small_checkpoints.sign_again(data.parent)
    assert "other weights or moments" in other.differences(stage)
