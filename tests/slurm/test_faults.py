"""Jobs that something happened to end as one that nothing happened to: the same weights and moments, each step once in the metrics.

Some of the faults of tests/slurm/faults.py, side by side, each on nodes of its own; `python -m tools.slurm_faults` does all.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.slurm import faults
from tests.slurm.fault_recipe import UNDISTURBED
from tests.slurm.faults import Outcome
from tests.slurm.faulty_stages import FaultyStage, Ground

pytestmark = pytest.mark.slow

CHOSEN = ("rank_stopped", "node_power_loss", "save_killed", "corrupted_checkpoint", "rank_killed", "full_disk")  # the longest first


@pytest.fixture(scope="module")
def outcomes(ground: Ground) -> Iterator[dict[str, Future[Outcome]]]:
    """Every fault under way; Slurm starts as many stages at once as there are nodes."""

    def finish() -> FaultyStage:
        ground.launch(UNDISTURBED)
        stage = ground.stage(UNDISTURBED)
        stage.until_done()
        return stage

    with ThreadPoolExecutor(len(CHOSEN) + 1) as pool:
        truth = pool.submit(finish)
        yield {name: pool.submit(faults.run, ground, faults.ALL[name], truth.result) for name in CHOSEN}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_changes_nothing(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome = outcomes[name].result()
    assert outcome.differences == ()
    assert outcome.seconds is not None
    assert outcome.attempts >= 2
