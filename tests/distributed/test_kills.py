"""kill -9 at twenty random points of saves, one after the other in one run: what the tracker names always loads, and no bit is lost."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from tests import layouts, ranks, training_runs
from tests.small_checkpoints import data_digests
from tests.small_corpus import train_run, write_corpus

KILLS, STEPS = 20, 30
CPU = replace(layouts.CPU, micro_batch=4)
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # audit events; writes and syncs are watched besides


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("kills"), {"web": 200, "qa": 100})


def new_run(corpus: Any, name: str, beside: bool) -> Any:
    stage = training_runs.stage(steps=STEPS, save_every_steps=1, plan=replace(CPU, asynchronous_saves=beside, keep_checkpoints=2))
    return train_run(corpus, replace(stage, name=name))


def train_counting(groups: Any, path: str, kill_at: int) -> dict[str, Any]:
    """Train; die at the `kill_at`-th thing that is done to a file of the checkpoints (0: never). How many were done."""
    from megatron_ext.checkpoint import hashing

    numbers, done = itertools.count(1), [0]  # each number is drawn once, whichever thread draws it

    def count() -> int:
        done[0] = next(numbers)
        if done[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done[0]

    def audit(event: str, arguments: Any) -> None:
        writes = event != "open" or (isinstance(arguments[1], str) and arguments[1][:1] in "wa")
        if event in WATCHED and writes and "/checkpoints" in str(arguments[0]):
            count()

    true_write, true_sync = hashing.HashingStream.write, os.fsync

    def write(stream: Any, data: Any) -> int:
        if count() + 1 == kill_at:  # in the middle of a write
            true_write(stream, memoryview(data)[: memoryview(data).nbytes // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return true_write(stream, data)

    def sync(descriptor: int) -> None:
        count()
        true_sync(descriptor)

    hashing.HashingStream.write, os.fsync = write, sync
    sys.addaudithook(audit)
    return {**training_runs._train(groups, path, None, ""), "done": done[0]}


@pytest.mark.parametrize("beside", [False, True], ids=["synchronous", "asynchronous"])
def test_twenty_kills_lose_nothing(corpus, beside):
    whole = new_run(corpus, f"whole {beside}", beside)
    straight = ranks.run(train_counting, CPU, str(whole.path), 0)[0]
    each_save = straight["done"] / STEPS
    assert each_save > 10
    run, rng = new_run(corpus, f"killed {beside}", beside), random.Random(7)
    left_aside = 0
    for _ in range(KILLS):
        with pytest.raises(AssertionError, match=training_runs.DEAD):
            ranks.run(train_counting, CPU, str(run.path), rng.randrange(1, round(2 * each_save)))
        left_aside += bool(list(run.checkpoints_path.glob(".attempt-*/iter_*")))
        last = folders.latest(run.checkpoints_path)
        for iteration in folders.published(run.checkpoints_path):  # not the tracker's alone
            verify(folders.iteration_path(run.checkpoints_path, iteration))
        assert last in {None, *folders.published(run.checkpoints_path)}
    assert left_aside > KILLS // 4  # it died within saves
    resumed = ranks.run(train_counting, CPU, str(run.path), 0)[0]
    assert resumed["start"]["progress"].step == (last or 0)
    assert resumed["steps"] == straight["steps"][last or 0 :]
    assert resumed["digests"] == straight["digests"]
    assert data_digests(folders.iteration_path(run.checkpoints_path, STEPS)) == data_digests(
        folders.iteration_path(whole.checkpoints_path, STEPS)
    )
    # Who dies while it writes down that it begins leaves no attempt.
    assert KILLS * 3 // 4 < len([path for path in (run.path / "attempts").iterdir() if path.name.isdigit()]) <= KILLS + 1
