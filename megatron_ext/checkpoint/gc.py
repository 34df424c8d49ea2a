"""Cleaning run folders: what dead writers left, checkpoints beyond the plan's number, optimizer state that nothing needs.

A run with a live attempt is left alone, and so is one that a live child may be about to load from. Of two
gcs the second leaves a run alone: a gc owns what it cleans as an attempt owns its run, by a record of its own in
`.gc`, for an attempt of the run would be shown as the run's state. A trainer that begins during an act loses nothing
it needs: what its attempt stages did not exist when the act was chosen, its newest checkpoints and its joints
are never touched, and at most its load of an older one fails with an error and succeeds at the next start. What
may start from where is read from the recipes below the folder and beside each run: a point that a recipe
names is not removed, and keeps its optimizer state where that recipe's start is a branch.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.attempts import attempting, live_attempt
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.swap import REPLACED, finish_swaps, unfinished_swaps
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.provenance import read_manifest
from megatron_ext.runs import EXPORTS, RECIPE, Run, open_run

DEPTHS = ("", "*/", "*/*/")  # one run, a graph's folder, a folder of graphs
CLAIM = ".gc"  # in a run folder: which gc cleans it, in the form of an attempt
LEFT_OVER = {
    re.compile(r"\.(attempt-[0-9]+|revoked-.*|iter_.*\.tmp)"): "not published by an attempt that is dead",
    re.compile(r"\.iter_.*\.damaged"): "set aside as damaged when its run fell back to an older one",
    re.compile(r"\.iter_.*\.(thinning-.*|discarded)"): "left by a gc that was killed",
    re.compile(rf"\.iter_.*\{REPLACED}"): "replaced by its weights alone",
    re.compile(rf"\.{re.escape(folders.TRACKER)}\..*\.tmp"): "left by a writer that was killed",
}
Starts = dict[Path, set[tuple[str, int | None]]]  # run folder -> kind and point (None: the last) of what may start from it


@dataclass(frozen=True)
class Act:
    """One thing to do to a path, why, and the bytes that it frees."""

    verb: str  # remove, thin or keep
    path: Path
    why: str
    freed_bytes: int = 0


def gc_command(runs: Path, dry_run: bool, thin: bool = False) -> None:
    """Clean every run at or below `runs`; prints each act, and the sum.

    `RunError` where there is no run folder; `CheckpointError`, after the rest is done, lists what could not be cleaned.
    """
    found = runs_below(runs)
    starts = starts_beside(found)
    freed_bytes, failures = 0, []
    for run in found:
        try:
            freed_bytes += _clean(run, starts.get(run.path, set()), dry_run, thin)
        except (CheckpointError, RunError, OSError) as error:
            failures.append(str(error))
    print(f"{freed_bytes:,} bytes {'would be freed; nothing was touched' if dry_run else 'freed'}")
    if failures:
        raise CheckpointError("not cleaned:\n  " + "\n  ".join(failures))


def _clean(run: Run, starts: set[tuple[str, int | None]], dry_run: bool, thin: bool) -> int:
    """Clean one run, until somebody is at work on it; the bytes that were freed."""
    claim = replace(run, path=run.path / CLAIM)
    other = live_attempt(claim.path)
    if other is not None:
        print(f"{run.path}: gc {other.describe()} is at work: left alone")
        return 0
    if not dry_run and next(_until_busy(run, starts, thin), None) is None:
        return 0
    freed_bytes = 0
    with contextlib.nullcontext() if dry_run else attempting(claim):
        for act in _until_busy(run, starts, thin):
            print(f"{act.verb:6}  {act.freed_bytes:15,} bytes  {act.path}  ({act.why})", flush=True)
            if not dry_run:
                do(act, lambda: who_is_busy(run))
            freed_bytes += act.freed_bytes
    return freed_bytes


def _until_busy(run: Run, starts: set[tuple[str, int | None]], thin: bool) -> Iterator[Act]:
    """What is to be done in one run, up to where somebody is at work on it; who that is, is printed."""
    todo = acts(run, starts, thin)
    while not (busy := who_is_busy(run)):
        act = next(todo, None)
        if act is None:
            return
        busy = who_is_busy(run)  # after the look at the folder: whose things it saw began before
        if busy:
            break
        yield act  # it may take minutes
    print(f"{run.path}: {busy}: left alone")


def runs_below(folder: Path) -> list[Run]:
    """Every run folder at, or up to two levels below, `folder`; `RunError` where there is none."""
    found = [open_run(path.parent) for depth in DEPTHS for path in sorted(folder.glob(depth + RECIPE))]
    if not found:
        raise RunError(f"{folder}: no run folders here (no {RECIPE}); name a run folder, or a folder of them")
    return found


def starts_beside(runs: list[Run]) -> Starts:
    """What may start from which run, by the recipes of these runs and of all that stand beside them."""
    paths = {run.path: run for run in runs}
    for parent in {run.path.parent for run in runs}:
        for recipe in parent.glob(f"*/{RECIPE}"):
            paths.setdefault(recipe.parent, open_run(recipe.parent))
    starts: Starts = {}
    for run in paths.values():
        if "start" in run.inputs:
            starts.setdefault(run.inputs["start"], set()).add((run.stage.start.kind, run.stage.start.tokens))
    return starts


def who_is_busy(run: Run) -> str:
    """The live attempt that forbids to touch a run: its own, or a child's that has not begun its first checkpoint; '' for none."""
    own = live_attempt(run.path)
    if own is not None:
        return f"{own.describe()} is at work"
    for recipe in sorted(run.path.parent.glob(f"*/{RECIPE}")):
        child = open_run(recipe.parent)
        if child.inputs.get("start") == run.path and not folders.published(child.checkpoints_path):
            attempt = live_attempt(child.path)
            if attempt is not None:
                return f"{attempt.describe()} of '{child.name}' may be loading from it"
    return ""


def acts(run: Run, starts: set[tuple[str, int | None]], thin: bool = False) -> Iterator[Act]:
    """What is to be done in one run, and with `thin` also which pinned checkpoints keep their optimizer state and why."""
    checkpoints, exports = run.checkpoints_path, run.path / EXPORTS
    if exports.is_dir():
        yield from _left_overs(exports)
    if not checkpoints.is_dir():
        return
    yield from _left_overs(checkpoints)
    named = {tokens for _, tokens in starts}
    keep = run.stage.plan.keep_checkpoints if run.stage.kind == "train" else 0
    for iteration in folders.routine_beyond(checkpoints, keep) if keep else ():
        path = folders.iteration_path(checkpoints, iteration)
        if read_manifest(path).tokens not in named:
            yield Act("remove", path, f"routine, beyond the newest {keep}", size_bytes(path))
    if thin:
        yield from _pinned(checkpoints, {tokens for kind, tokens in starts if kind == "branch"})


def _pinned(checkpoints: Path, joints: set[int | None]) -> Iterator[Act]:
    """The pinned checkpoints that have optimizer state: which keep it, and which need not."""
    from megatron_ext.checkpoint.thin import thinnable_bytes  # loads torch

    published = folders.published(checkpoints)
    for iteration in published:
        path = folders.iteration_path(checkpoints, iteration)
        manifest = read_manifest(path)
        if not manifest.pinned or manifest.optimizer_layout == "none":
            continue
        if iteration in (folders.latest(checkpoints), published[-1]):
            yield Act("keep", path, "the last of its run")
        elif manifest.tokens in joints:
            yield Act("keep", path, "a stage branches from it")
        else:
            yield Act("thin", path, "pinned; no stage branches from it", thinnable_bytes(path))


def do(act: Act, who_is_busy: Callable[[], str] = lambda: "") -> None:
    """Carry out an act; half of a removed checkpoint is never seen as one, and none is replaced while somebody is at work."""
    if act.verb == "thin":
        from megatron_ext.checkpoint.thin import thin  # loads torch

        thin(act.path, who_is_busy)
    elif act.verb == "finish":
        finish_swaps(act.path.parent)
    elif act.verb == "remove" and act.path.is_dir() and not act.path.name.startswith("."):
        doomed = act.path.rename(act.path.with_name(f".{act.path.name}.discarded"))
        shutil.rmtree(doomed)
    elif act.verb == "remove":
        shutil.rmtree(act.path) if act.path.is_dir() else act.path.unlink()


def _left_overs(checkpoints: Path) -> Iterator[Act]:
    """What no process will come back for; a replacement that is whole is put into place instead."""
    for path in unfinished_swaps(checkpoints):
        yield Act("finish", path, "weights alone, made ready by a gc that was killed")
    for path in sorted(checkpoints.iterdir()):
        why = next((why for name, why in LEFT_OVER.items() if name.fullmatch(path.name)), "")
        if why and path.exists():
            yield Act("remove", path, why, size_bytes(path))


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if not path.is_dir() else [one for one in path.rglob("*") if not one.is_dir()]
    return sum(one.lstat().st_size for one in files)
