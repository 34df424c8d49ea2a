"""Cleaning run folders: what goes, what stays and why, and that a run somebody is at work on is not touched."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.__main__ import main
from megatron_ext.attempts import begin_attempt
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import gc as module
from megatron_ext.checkpoint.swap import finish_swaps, ready_path, show_hidden, swap_in
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.stages import Branch, Weights
from megatron_ext.errors import CheckpointError
from megatron_ext.provenance import MANIFEST, file_sha256, read_manifest, write_manifest
from megatron_ext.runs import RECIPE, attempt_numbers
from tests.small_checkpoints import CONTENT, TOKENS_PER_STEP, write_files
from tests.small_corpus import STAGE, train_run, write_corpus

KEEP = 2
BYTES = sum(map(len, CONTENT.values()))


def stage(name: str, **changes):
    return replace(STAGE, name=name, plan=replace(STAGE.plan, keep_checkpoints=KEEP), **changes)


@pytest.fixture
def graph(tmp_path):
    """A corpus, and a run with checkpoints 1 to 6, of which 2 and 6 are pinned."""
    corpus = write_corpus(tmp_path / "demo", {"web": 6, "qa": 6}, heldout=2, num_shards=1)
    run = train_run(corpus, stage("stable"))
    for iteration in range(1, 7):
        write_files(run.checkpoints_path, iteration, pinned=iteration in (2, 6))
    (run.checkpoints_path / folders.TRACKER).write_text("6\n")
    return corpus, run


def leave_behind(run) -> list[str]:
    """What a killed attempt, a stale owner, a fall-back and killed cleanings leave; their names."""
    left = [
        ".attempt-1",
        ".revoked-0a1b",
        ".iter_0000003.damaged",
        ".iter_0000003.thinning-0a1b",
        ".iter_0000003.discarded",
        ".iter_0000002.replaced",
    ]
    for name in left:
        (run.checkpoints_path / name / "iter_0000007").mkdir(parents=True)
        (run.checkpoints_path / name / "iter_0000007" / "part").write_bytes(b"x" * 50)
    (run.checkpoints_path / f".{folders.TRACKER}.99.tmp").write_bytes(b"x" * 50)
    return [*left, f".{folders.TRACKER}.99.tmp"]


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


def gc(capsys, *words) -> str:
    assert main(["gc", *map(str, words)]) == 0
    return capsys.readouterr().out


def freed(text: str) -> int:
    return int(re.search(r"([\d,]+) bytes (would be )?freed", text)[1].replace(",", ""))


def test_leftovers_and_routine_checkpoints_go(graph, capsys):
    _, run = graph
    left = leave_behind(run)
    (run.checkpoints_path / "notes").mkdir()
    dead = run.path / "exports" / ".attempt-1" / "iter_0000004"
    dead.mkdir(parents=True)
    whole = run.path / "exports" / "iter_0000002"
    whole.mkdir()
    (run.checkpoints_path / ".snapshot").mkdir()  # of a file server: not ours
    before = sum(len(content or b"") for content in listing(run.checkpoints_path).values())
    said = gc(capsys, run.path.parent)
    assert (dead.parent.exists(), whole.exists()) == (False, True)
    assert folders.published(run.checkpoints_path) == [2, 4, 5, 6]
    assert {p.name for p in run.checkpoints_path.iterdir()} == {
        folders.TRACKER,
        "notes",
        ".snapshot",
        *(f"iter_{i:07d}" for i in (2, 4, 5, 6)),
    }
    for name in (*left, "iter_0000001", "iter_0000003"):
        assert re.search(rf"^remove +[\d,]+ bytes  .*/{re.escape(name)}  \(.+\)$", said, re.M), name
    assert f"iter_0000001  (routine, beyond the newest {KEEP})" in said
    assert ".attempt-1  (not published by an attempt that is dead)" in said
    after = sum(len(content or b"") for content in listing(run.checkpoints_path).values())
    assert freed(said) == before - after > 2 * BYTES + 7 * 50
    for iteration in (2, 4, 5, 6):
        verify(folders.iteration_path(run.checkpoints_path, iteration))
    assert gc(capsys, run.path.parent) == "0 bytes freed\n"


def test_a_dry_run_says_the_same_and_touches_nothing(graph, capsys):
    _, run = graph
    leave_behind(run)
    before = listing(run.path)
    said = gc(capsys, run.path, "--dry-run")
    assert listing(run.path) == before
    done = gc(capsys, run.path)
    assert said.splitlines()[:-1] == done.splitlines()[:-1]
    assert said.endswith("bytes would be freed; nothing was touched\n")
    assert freed(said) == freed(done) > 0


def test_a_run_at_work_is_left_alone(graph, capsys):
    corpus, run = graph
    other = train_run(corpus, stage("other"))
    left = leave_behind(other)
    attempt = begin_attempt(run)
    before = listing(run.checkpoints_path)
    said = gc(capsys, run.path.parent)
    assert f"{run.path}: attempt 1 (pid " in said
    assert " is at work: left alone" in said
    assert listing(run.checkpoints_path) == before
    assert all(f"/other/checkpoints/{name}  (" in said for name in left)  # the others are cleaned
    attempt.finish("done")
    assert "left alone" not in gc(capsys, run.path.parent)
    assert listing(run.checkpoints_path) != before


def test_of_two_gcs_the_second_leaves_a_run_alone(graph, capsys):
    """Else it would take away what the first is writing."""
    _, run = graph
    leave_behind(run)
    first = begin_attempt(replace(run, path=run.path / module.CLAIM))
    before = listing(run.checkpoints_path)
    for words in ([], ["--dry-run"]):
        assert re.search(rf"{run.path}: gc attempt 1 \(pid .* is at work: left alone", gc(capsys, run.path, *words))
    assert listing(run.checkpoints_path) == before
    first.finish("done")
    assert "left alone" not in gc(capsys, run.path)
    assert listing(run.checkpoints_path) != before
    assert attempt_numbers(run.path) == []  # no attempt of the run: its state is not that of a gc


def test_a_gc_owns_what_it_cleans_and_is_heard_of_only_where_it_did_something(graph, capsys, monkeypatch):
    _, run = graph
    claim = run.path / module.CLAIM
    seen = []
    true = module.do
    monkeypatch.setattr(module, "do", lambda act, busy: (seen.append(module.live_attempt(claim)), true(act, busy)))
    gc(capsys, run.path, "--dry-run")
    assert not claim.exists()
    gc(capsys, run.path)
    assert [attempt.number for attempt in seen] == [1, 1]
    assert module.live_attempt(claim) is None
    gc(capsys, run.path)  # nothing to do
    assert attempt_numbers(claim) == [1]


def test_a_trainer_that_begins_while_gc_looks_keeps_what_it_stages(graph, capsys, monkeypatch):
    _, run = graph
    true, began = module.acts, []

    def slow_look(*arguments):
        if not began and (run.path / module.CLAIM).exists():
            began.append(begin_attempt(run))
            folders.staging_path(run.checkpoints_path, began[0].number).mkdir()
        yield from true(*arguments)

    monkeypatch.setattr(module, "acts", slow_look)
    before = listing(run.checkpoints_path)
    assert "is at work: left alone" in gc(capsys, run.path)
    assert listing(run.checkpoints_path) == {**before, ".attempt-1": None}
    began[0].finish("done")


def test_a_run_that_a_live_child_may_load_from_is_left_alone(graph, capsys):
    corpus, run = graph
    child = train_run(corpus, stage("child", start=Weights(stage="stable")), run)
    attempt = begin_attempt(child)
    before = listing(run.checkpoints_path)
    assert re.search(rf"{run.path}: attempt 1 .* of 'child' may be loading from it: left alone", gc(capsys, run.path))
    assert listing(run.checkpoints_path) == before
    write_files(child.checkpoints_path, 1)  # from now on it goes on from its own
    assert "left alone" not in gc(capsys, run.path)
    attempt.finish("done")


@pytest.mark.parametrize("start", [Branch, Weights])
def test_a_point_that_a_recipe_names_stays(graph, capsys, start):
    """Also where only the parent is cleaned: the recipes beside it are read."""
    corpus, run = graph
    train_run(corpus, stage("child", start=start(stage="stable", tokens=3 * TOKENS_PER_STEP)), run)
    gc(capsys, run.path)
    assert folders.published(run.checkpoints_path) == [2, 3, 4, 5, 6]


def test_what_the_tracker_names_stays(graph, capsys):
    _, run = graph
    (run.checkpoints_path / folders.TRACKER).write_text("1\n")  # set back by hand
    gc(capsys, run.path)
    assert folders.published(run.checkpoints_path) == [1, 2, 4, 5, 6]


def test_what_cannot_be_cleaned_is_said_after_the_rest_is_done(graph, capsys):
    corpus, run = graph
    other = train_run(corpus, stage("a run before it"))
    write_files(other.checkpoints_path, 1)
    (other.checkpoints_path / folders.TRACKER).write_text("7\n")
    assert main(["gc", str(run.path.parent)]) == 2
    assert re.search(
        rf"error: not cleaned:\n.*a run before it/checkpoints/{folders.TRACKER}: names iteration 7",
        capsys.readouterr().err,
    )
    assert folders.published(run.checkpoints_path) == [2, 4, 5, 6]


def test_an_unreadable_recipe_beside_stops_everything(graph, capsys):
    """It may name any point of any run."""
    _, run = graph
    before = listing(run.checkpoints_path)
    (run.path.parent / "broken").mkdir()
    (run.path.parent / "broken" / RECIPE).write_text("{")
    assert main(["gc", str(run.path)]) == 2
    assert "broken/recipe.json: not valid JSON" in capsys.readouterr().err
    assert listing(run.checkpoints_path) == before


def test_no_run_folders(tmp_path, capsys):
    assert main(["gc", str(tmp_path)]) == 2
    assert "no run folders here (no recipe.json)" in capsys.readouterr().err


def test_a_cleaning_that_was_killed_between_two_renames_is_finished(graph, capsys):
    _, run = graph
    path = folders.iteration_path(run.checkpoints_path, 2)
    thin_copy(path, ready_path(path))
    path.rename(path.with_name(f".{path.name}.replaced"))
    said = gc(capsys, run.path, "--dry-run")
    assert re.search(r"^finish .*\.iter_0000002\.thinned  \(weights alone, made ready by a gc that was killed\)$", said, re.M)
    assert not path.exists()
    gc(capsys, run.path)
    assert verify(path).optimizer_layout == "none"
    assert not list(run.checkpoints_path.glob(".*"))


# ---- one checkpoint in the place of another


def thin_copy(path: Path, copy: Path, **changes) -> Path:
    """A folder that is to take the place of a checkpoint."""
    shutil.copytree(path, copy)
    write_manifest(copy, replace(read_manifest(path), optimizer_layout="none", thinned_from=file_sha256(path / MANIFEST), **changes))
    return copy


def test_a_replacement_takes_the_place_of_what_it_was_made_from(tmp_path):
    path = write_files(tmp_path, 2)
    thin_copy(path, ready_path(path))
    finish_swaps(tmp_path)
    assert verify(path).optimizer_layout == "none"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("how", ["published again", "published again without a manifest", "replacement gutted", "replacement unreadable"])
def test_a_replacement_that_does_not_fit_is_deleted_and_what_stands_stays(tmp_path, how):
    path = write_files(tmp_path, 2)
    ready = thin_copy(path, ready_path(path))
    if how.startswith("published again"):
        shutil.rmtree(path)
        write_files(tmp_path, 2, learning_rate=5e-4)
    if how.endswith("without a manifest"):
        (path / MANIFEST).unlink()
    elif how == "replacement gutted":
        (ready / ".metadata").unlink()
    elif how == "replacement unreadable":
        (ready / MANIFEST).write_text("{}")
    before = listing(path)
    finish_swaps(tmp_path)
    assert listing(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_trainer_brings_back_what_is_hidden_and_touches_nothing_else(tmp_path):
    """A gc may be in the middle of a swap while it does."""
    hidden, standing, gutted = (write_files(tmp_path, iteration) for iteration in (2, 4, 6))
    for path in (hidden, standing, gutted):
        thin_copy(path, ready_path(path))
    (ready_path(gutted) / ".metadata").unlink()
    for path in (hidden, gutted):
        path.rename(path.with_name(f".{path.name}.replaced"))
    waiting = ready_path(hidden).name
    expected = {name.replace(waiting, hidden.name): content for name, content in listing(tmp_path).items()}
    show_hidden(tmp_path)
    assert listing(tmp_path) == expected
    assert verify(hidden).optimizer_layout == "none"


def test_a_gc_whose_copy_a_trainer_puts_into_place_ends_well(tmp_path, monkeypatch):
    path = write_files(tmp_path, 2)
    whole = thin_copy(path, tmp_path / "whole")
    true = Path.rename

    def rename(old: Path, new: Path) -> Path:
        moved = true(old, new)
        if new.name.endswith(".replaced"):  # the gap: the checkpoint is missing
            show_hidden(tmp_path)
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    swap_in(whole, path)
    assert verify(path).optimizer_layout == "none"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_gutted_replacement_gives_back_what_it_had_replaced(tmp_path):
    path = write_files(tmp_path, 2)
    ready, before = thin_copy(path, ready_path(path)), listing(path)
    (ready / ".metadata").unlink()
    path.rename(path.with_name(f".{path.name}.replaced"))
    finish_swaps(tmp_path)
    assert listing(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_swap_that_does_not_fit_is_refused_and_what_stands_stays(tmp_path):
    path = write_files(tmp_path, 2)
    whole, before = thin_copy(path, tmp_path / "whole"), listing(path)
    (whole / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000002 stands as it was; .*\.metadata: missing, though the manifest lists it"):
        swap_in(whole, path)
    assert listing(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "whole"]
    whole = thin_copy(path, tmp_path / "again")
    write_manifest(path, replace(read_manifest(path), learning_rate=5e-4))
    with pytest.raises(CheckpointError, match=r"was made from another checkpoint than .*iter_0000002 holds now"):
        swap_in(whole, path)
    assert read_manifest(path).optimizer_layout != "none"
