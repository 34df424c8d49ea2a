"""A stage that fails at once is given up after some tries, with one message, and what waits for it does not wait for ever."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm import fault_recipe
from tests.slurm.faulty_stages import RECIPE, Ground
from tests.slurm.sandbox import REPOSITORY, Sandbox, until

pytestmark = pytest.mark.slow


def test_a_stage_that_fails_at_once_ends_its_chain(cluster: Sandbox, shared_path: Path) -> None:
    ground = Ground(cluster, shared_path)
    text, tokenizer, corpus = (ground.stage(name) for name in ("text", "tokenizer", "corpus"))
    text.path.mkdir(parents=True)
    (text.path / "text").write_text("a file stands where the stage puts its folder")
    launch = ["launch", f"{RECIPE}:corpus", "--cluster", f"{RECIPE}:cluster", "--runs", shared_path]
    done = cluster.run([sys.executable, "-m", "megatron_ext", *launch], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    text.wait(lambda: text.job.state in ("FAILED", "COMPLETED", "CANCELLED"), "ended")
    assert text.job.state == "FAILED"
    tries = fault_recipe.MAX_IDLE_ATTEMPTS
    assert [end["decision"] for end in text.events("end")] == ["requeue"] * (tries - 1) + ["stop"]
    assert text.job.restarts == tries - 1
    assert text.log.count("is not started again") == 1
    assert f"stage 'text' was started {tries} times in a row" in text.events("end")[-1]["reason"]
    for waiting in (tokenizer, corpus):
        waiting.wait(lambda waiting=waiting: waiting.job.state == "CANCELLED", "cancelled")  # type: ignore[misc]
        assert waiting.events() == []
    until(lambda: cluster.output(["squeue", "--noheader"]) == "", "nothing is queued")
