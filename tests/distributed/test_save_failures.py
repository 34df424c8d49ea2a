"""A save that dies or is refused: the last checkpoint stands, and the next attempt goes on from it to the bit."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.plan import TrainPlan
from megatron_ext.errors import CheckpointError
from megatron_ext.metrics import read_metrics
from megatron_ext.runs import Run
from tests import layouts, ranks, training_runs
from tests.documented_metrics import undocumented
from tests.small_corpus import train_run, write_corpus

CPU, TWO = (replace(plan, micro_batch=4) for plan in (layouts.CPU, layouts.TWO))
STEPS, AT = 6, 4  # checkpoints at 2, 4, 6; the one at 4 fails
POINTS = ("in a data file", "before the manifest", "before the rename", "before the tracker", "after the tracker")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("failures"), {"web": 60, "qa": 30})


def new_run(corpus: Run, name: str, plan: TrainPlan = CPU) -> Run:
    return train_run(corpus, replace(training_runs.stage(steps=STEPS, save_every_steps=2, plan=plan), name=name))


@pytest.fixture(scope="module")
def straight(corpus):
    """What is computed without a failure, by one rank and by two."""
    return {plan: training_runs.trace(new_run(corpus, f"straight {plan.num_ranks}", plan)) for plan in (CPU, TWO)}


def patch_save(point: str, fail: Callable[[], None]) -> None:
    """Make the save of step `AT` call `fail` at a point."""
    from megatron_ext.checkpoint import hashing, save

    def before(holder: Any, name: str, here: Callable[..., bool]) -> None:
        true = getattr(holder, name)

        def wrapped(*arguments: Any) -> Any:
            if here(*arguments):
                fail()
            return true(*arguments)

        setattr(holder, name, wrapped)

    match point:
        case "in a data file":
            written: list[int] = []

            def second_write(stream: Any, data: Any) -> bool:
                if f"iter_{AT:07d}" not in str(stream._file.name) or not stream._file.name.endswith(".distcp"):
                    return False
                written.append(1)
                return len(written) == 2

            before(hashing.HashingStream, "write", second_write)
        case "before the manifest":
            before(save, "write_manifest", lambda _, manifest: manifest.iteration == AT)
        case "before the rename":
            before(folders, "publish", lambda *arguments: arguments[1] == AT)
        case "before the tracker":
            before(folders, "_rename", lambda path, target: target.name == folders.TRACKER and path.read_text() == f"{AT}\n")
        case "after the tracker":
            before(save, "force_to_disk", lambda path: folders.latest(path) == AT)
        case "tracker first":  # the fault: the tracker moves, then the folder

            def wrong(folder: Path, iteration: int, attempt: int, _: Any) -> Path:
                folders.atomic_write(folder / folders.TRACKER, f"{iteration}\n")
                if iteration == AT:
                    fail()
                return folders.aside_path(folder, iteration, attempt).rename(folders.iteration_path(folder, iteration))

            folders.publish = wrong


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(groups: Any, path: str, point: str, on_rank: int) -> None:
    if groups.rank == on_rank:
        patch_save(point, die)
    training_runs._train(groups, path, None, "")


def killed(run: Run, point: str, on_rank: int = 0) -> None:
    with pytest.raises(AssertionError, match=training_runs.DEAD):
        ranks.run(train_and_die, run.stage.plan, str(run.path), point, on_rank)


def goes_on_from(run: Run, iteration: int, straight: Any) -> None:
    """The tracker names a whole checkpoint, and the next attempt ends as if nothing had happened."""
    assert folders.latest(run.checkpoints_path) == iteration
    assert verify(folders.iteration_path(run.checkpoints_path, iteration)).iteration == iteration
    resumed = training_runs.trace(run)
    assert resumed["steps"] == straight["steps"][iteration:]
    assert resumed["digests"] == straight["digests"]
    assert sorted(p.name for p in run.checkpoints_path.iterdir()) == [f"iter_{i:07d}" for i in (2, 4, 6)] + [folders.TRACKER]
    for each in folders.published(run.checkpoints_path):
        verify(folders.iteration_path(run.checkpoints_path, each))


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_save_leaves_the_last_checkpoint(corpus, straight, point):
    run = new_run(corpus, point)
    killed(run, point)
    left = {p.name for p in run.checkpoints_path.iterdir()}
    assert folders.aside_path(run.checkpoints_path, AT, 1).exists() == (POINTS.index(point) < 3)  # it died where it should
    assert (f"iter_{AT:07d}" in left) == (POINTS.index(point) >= 3)
    goes_on_from(run, AT if point == "after the tracker" else 2, straight[CPU])


def test_the_death_of_another_rank_leaves_the_last_checkpoint(corpus, straight):
    run = new_run(corpus, "other rank", TWO)
    killed(run, "in a data file", on_rank=1)
    goes_on_from(run, 2, straight[TWO])


def test_a_tracker_that_moves_first_is_noticed(corpus):
    run = new_run(corpus, "tracker first")
    killed(run, "tracker first")
    with pytest.raises(CheckpointError, match=r"names iteration 4, but .* is no published checkpoint; published are \[2\]"):
        folders.latest(run.checkpoints_path)


# ---- refused by the disk


def bound_files(file_bytes: int, at: int = AT) -> None:
    """Make the save of step `at` refuse files larger than so many bytes."""
    from megatron_ext.checkpoint.writing import Planned

    true_write = Planned.write

    def bounded(planned: Planned) -> Any:
        if f"iter_{at:07d}" in planned.aside.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        try:
            return true_write(planned)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Planned.write = bounded  # type: ignore[method-assign]


def train_into_refusal(groups: Any, path: str, file_bytes: int, at: int = AT) -> str:
    """Train until a save is refused; what was said. `file_bytes` bounds the size of a file in the save of step `at`."""
    if file_bytes:
        bound_files(file_bytes, at)
    with pytest.raises(CheckpointError) as error:
        training_runs._train(groups, path, None, "")
    return str(error.value)


def train_past_refusal(groups: Any, path: str, file_bytes: int) -> Any:
    """Train on past a refused save."""
    bound_files(file_bytes)
    return training_runs._train(groups, path, None, "")


@pytest.mark.parametrize(("file_bytes", "name"), [(100_000, r"__\d_0\.distcp"), (500, r"common\.pt")], ids=["data file", "common.pt"])
def test_a_refused_write_stops_every_rank_and_the_last_checkpoint_stands(corpus, straight, file_bytes, name):
    """A bound on the size of files (it needs no privilege) refuses the data files, or what is not sharded on rank 0."""
    run = new_run(corpus, f"bounded {file_bytes}", TWO)
    said = ranks.run(train_into_refusal, TWO, str(run.path), file_bytes)
    for one in said:
        assert re.search(
            r"\.attempt-1/iter_0000004: could not be written: .*; make room .*: the last published checkpoint stands$", one, re.S
        ), one
        assert re.search(rf"\[Errno 27\] File too large: '.*/iter_0000004/{name}'", one), one
    goes_on_from(run, 2, straight[TWO])


BESIDE = replace(TWO, asynchronous_saves=True)


@pytest.mark.parametrize("plan", [TWO, BESIDE], ids=["synchronous", "asynchronous"])
def test_training_goes_on_past_a_refused_save_where_the_plan_says_so(corpus, straight, plan):
    run = new_run(corpus, f"goes on {plan.asynchronous_saves}", replace(plan, on_failed_save="go_on"))
    found = ranks.run(train_past_refusal, run.stage.plan, str(run.path), 100_000)
    assert found[0]["steps"] == straight[TWO]["steps"]
    assert [one["digests"] for one in found] == straight[TWO]["digests"]
    assert folders.published(run.checkpoints_path) == [2, 6]  # nothing of the refused one is left
    assert not list(run.checkpoints_path.glob(".*"))
    (refused,) = read_metrics(run.metrics_path, "failed_save")
    assert refused["step"] == AT
    assert undocumented([refused]) == []
    assert re.search(r"File too large.*Training goes on \(plan\.on_failed_save=go_on\)$", refused["problem"])


def test_a_refused_asynchronous_save_stops_every_rank(corpus, straight):
    run = new_run(corpus, "refused beside", BESIDE)
    said = ranks.run(train_into_refusal, BESIDE, str(run.path), 100_000)
    assert all(re.search(r"iter_0000004: could not be written: .*File too large", one) for one in said)
    assert folders.latest(run.checkpoints_path) == 2
    assert not list(run.checkpoints_path.glob(".*"))


def train_into(groups: Any, path: str, what: str) -> Any:
    """Train with a save at `AT` that fails of something else than its disk, on the last rank or at its very begin."""
    from megatron_ext.checkpoint import writing

    def fail(true: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
        def failing(first: Any, *more: Any, **options: Any) -> Any:
            if f"iter_{AT:07d}" in str(getattr(first, "aside", first)):
                raise error
            return true(first, *more, **options)

        return failing

    if what == "begin" and groups.rank == 0:
        writing.shutil.rmtree = fail(writing.shutil.rmtree, OSError(28, "No space left on device"))
    elif what in ("write", "copy") and groups.rank == groups.plan.num_ranks - 1:
        setattr(writing.Planned, what, fail(getattr(writing.Planned, what), MemoryError("no more")))
    try:
        return training_runs._train(groups, path, None, "")
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(("plan", "what", "said"), [
    (TWO, "write", r"MemoryError: no more \(rank 1\)"),
    (BESIDE, "copy", r"MemoryError: no more \(rank 1\)"),
    (TWO, "begin", r"could not be begun: \[Errno 28\] No space left on device"),
])  # fmt: skip
def test_whatever_fails_on_one_rank_every_rank_hears_of_it(corpus, straight, plan, what, said):
    run = new_run(corpus, f"fails {what}", plan)
    assert all(re.search(rf"iter_0000004: .*{said}", one) for one in ranks.run(train_into, plan, str(run.path), what))
    goes_on = new_run(corpus, f"goes on after {what}", replace(plan, on_failed_save="go_on"))
    found = ranks.run(train_into, goes_on.stage.plan, str(goes_on.path), what)
    assert found[0]["steps"] == straight[TWO]["steps"]
    assert re.search(said, read_metrics(goes_on.metrics_path, "failed_save")[0]["problem"])
    assert folders.published(goes_on.checkpoints_path) == [2, 6]


def test_the_last_save_must_succeed(corpus):
    run = new_run(corpus, "last refused", replace(TWO, on_failed_save="go_on"))
    said = ranks.run(train_into_refusal, run.stage.plan, str(run.path), 100_000, STEPS)
    assert all(re.search(r"iter_0000006: could not be written: .*File too large", one) for one in said)
    assert folders.latest(run.checkpoints_path) == 4


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many bytes at a folder; skipped where this user may not mount."""
    mounted: list[Path] = []

    def mount(at: Path, size_bytes: int) -> None:
        at.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(at)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
        mounted.append(at)

    yield mount
    for at in mounted:
        subprocess.run(["umount", str(at)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(corpus, straight, small_disk):
    run = new_run(corpus, "full disk")
    checkpoint = folders.iteration_path(train_checkpoints(corpus), 2)
    one_bytes = sum(p.stat().st_size for p in checkpoint.iterdir())
    small_disk(run.checkpoints_path, one_bytes * 3 // 2)
    (said,) = ranks.run(train_into_refusal, CPU, str(run.path), 0)
    assert re.search(r"\.attempt-1/iter_0000004: could not be written: .*No space left on device.*: the last published", said, re.S), said
    assert folders.latest(run.checkpoints_path) == 2
    verify(folders.iteration_path(run.checkpoints_path, 2))
    subprocess.run(["mount", "-o", f"remount,size={10 * one_bytes}", str(run.checkpoints_path)], check=True)
    goes_on_from(run, 2, straight[CPU])


def train_checkpoints(corpus: Run) -> Path:
    """The checkpoints of the run that went straight."""
    return corpus.path.parent / "straight 1" / "checkpoints"
