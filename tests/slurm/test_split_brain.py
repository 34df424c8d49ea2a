"""Two attempts at one stage alive at once: its node is cut off, Slurm starts the job elsewhere, and the cut attempt trains on.

From when the newer attempt has begun, the cut one publishes nothing and appends nothing. With ranks that have no fences it does both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.fault_recipe import ALONE, UNFENCED
from tests.slurm.faulty_stages import FaultyStage, Ground
from tests.slurm.sandbox import REPOSITORY

pytestmark = pytest.mark.slow

SITE = """
from dataclasses import replace
from tests.slurm.fault_recipe import cluster

def unfenced():
    base = cluster()
    return replace(base, slurm=replace(base.slurm, python={python!r}))
"""


@dataclass
class Witness:
    """What the cut attempt does after the newer one has opened the run's metrics, which comes after it took the folder over."""

    stage: FaultyStage
    before: set[tuple[str, int]] = field(default_factory=set)
    published: set[tuple[str, int]] = field(default_factory=set)  # (checkpoint, attempt)

    def has_begun(self) -> bool:
        """Whether the newer attempt has; notes what is published then."""
        self.before = self._published()
        return any(line["attempt"] == 2 for line in self.stage.lines())

    def look(self) -> None:
        self.published |= self._published()

    def stale_checkpoints(self) -> list[tuple[str, int]]:
        return sorted(one for one in self.published - self.before if one[1] == 1)

    def stale_lines(self) -> list[int]:
        attempts = [line["attempt"] for line in self.stage.lines()]
        return [number for number, attempt in enumerate(attempts) if attempt == 1 and number > attempts.index(2)]

    def _published(self) -> set[tuple[str, int]]:
        found = set()
        for path in self.stage.checkpoints.glob("iter_*/manifest.json"):
            try:
                found.add((path.parent.name, json.loads(path.read_text())["attempt"]))
            except FileNotFoundError:  # an old one, just removed
                continue
        return found


@pytest.fixture(scope="module")
def cut(ground: Ground, slurm_root: Path) -> Iterator[dict[str, Witness]]:
    """Both stages, each cut off, with a newer attempt begun."""
    rank = slurm_root / "unfenced_python"
    rank.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY / "tests/slurm/unfenced_rank.py"} "$@"\n')
    rank.chmod(0o755)
    site = slurm_root / "site.py"
    site.write_text(SITE.format(python=str(rank)))
    ground.launch(ALONE)
    ground.launch(UNFENCED, "unfenced", site)
    stages = [ground.stage(ALONE), ground.stage(UNFENCED)]
    nodes = []
    for stage in stages:
        stage.until_half_way()
        nodes += stage.nodes
        ground.slurm.cut(stage.nodes[0])
    witnesses = {stage.name: Witness(stage) for stage in stages}
    for witness in witnesses.values():
        witness.stage.wait(witness.has_begun, "a newer attempt has begun")
    yield witnesses
    for node in nodes:
        ground.slurm.heal(node)


def test_a_cut_attempt_publishes_and_appends_nothing(cut: dict[str, Witness]) -> None:
    witness = cut[ALONE]
    error = witness.stage.path / "attempts/1/rank_00000.error.txt"

    def gave_up() -> bool:
        witness.look()
        return error.is_file() and "lost the run folder to attempt 2" in error.read_text()

    witness.stage.wait(gave_up, "the cut attempt has seen the newer one")  # it was at work until then
    known = len(witness.published)
    witness.stage.wait(lambda: witness.look() or len(witness.published) > known, "the newer attempt publishes")
    assert witness.stale_checkpoints() == []
    assert witness.stale_lines() == []
    assert json.loads((witness.stage.path / "attempts/1/exit.json").read_text())["reason"] == "stopped"


def test_without_fences_it_would_be_seen(cut: dict[str, Witness]) -> None:
    witness = cut[UNFENCED]

    def is_seen() -> bool:
        witness.look()
        return bool(witness.stale_checkpoints() and witness.stale_lines())

    witness.stage.wait(is_seen, "the cut attempt publishes and appends")


def test_a_cut_supervisor_sees_no_steps_of_the_newer_start(cut: dict[str, Witness]) -> None:
    stage = cut[ALONE].stage
    words = f"from megatron_ext.launch.job_queue import step_ids; print(step_ids({stage.job_id}, 0), step_ids({stage.job_id}, 1))"
    assert stage.slurm.output([sys.executable, "-c", words]) == f"[] ['{stage.job_id}.0']"
