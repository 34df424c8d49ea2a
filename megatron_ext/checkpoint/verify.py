"""Is a checkpoint what its manifest says? Files, sizes, digests, and nothing beside them.

Nothing is unpickled, and torch is not loaded. Two kinds of wrong are told apart:

- damage, as disks, copies and crashes do it: `DamagedCheckpointError`; an older checkpoint may be whole;
- what none of them does (a name that leads outside, a link, a pipe): refused by a plain `CheckpointError`.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint import folder as folders
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.progress import progress
from megatron_ext.provenance import MANIFEST, Manifest, file_sha256, is_plain_name, read_manifest

NEEDED = (".metadata", "common.pt", "metadata.json")  # what every load reads
OTHER = "use another checkpoint of the run"
BELOW = ("iter_*", "checkpoints/iter_*", "*/checkpoints/iter_*", "*/*/checkpoints/iter_*")  # a run, a graph's folder, a folder of graphs
READY = ".thinned"  # ends the name of a whole replacement that waits to be put into place (checkpoint.swap)
_ITERATION = re.compile(r"iter_([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `hostile` where no accident does it."""

    text: str
    hostile: bool = False


def refuse_hostile(folder: Path, manifest: Manifest) -> None:
    """`CheckpointError` where names lead elsewhere, or a file is a link or a pipe: no damage does it, so nothing is to go on from here."""
    _raise([problem for problem in _look(folder, manifest).values() if problem.hostile])


def check_files(folder: Path, manifest: Manifest) -> None:
    """The cheap check of every load: each file of the manifest is there, a file of this folder, and has its size.

    `DamagedCheckpointError` lists all that is missing or has another size; `CheckpointError` as `refuse_hostile`.
    """
    _raise(list(_look(folder, manifest).values()))


def check_iteration(folder: Path, manifest: Manifest) -> None:
    """`DamagedCheckpointError` where a folder's name says another iteration than its manifest."""
    _raise(_renamed(folder, manifest))


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint and compare digests, and see that no other lies beside them.

    `DamagedCheckpointError`, or `CheckpointError` where something is refused, lists everything that is wrong.
    """
    manifest = read_manifest(folder)
    cheap, sound = _look_all(folder, manifest)
    wrong = [_hash(folder, name, manifest) for name in sound]
    _raise(cheap + [problem for problem in wrong if problem])
    return manifest


def verify_shared(folder: Path, manifest: Manifest, rank: int, num_ranks: int) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, all of them read; the ranks' shares make the whole.

    Shares are near equal in bytes and split between files only. Raises `CheckpointError`, on every rank alike, as `refuse_hostile`.
    """
    refuse_hostile(folder, manifest)
    problems = [] if rank else _renamed(folder, manifest)
    for name in _shares(manifest, num_ranks)[rank]:
        problem = _look_at(folder, name, manifest.files[name][0]) or _hash(folder, name, manifest)
        problems += [problem] if problem else []
    return [problem.text for problem in problems]


def verify_command(paths: list[Path], jobs: int) -> None:
    """Verify every checkpoint at or below `paths` with `jobs` threads; prints the whole ones.

    `CheckpointError` lists everything that is wrong with any of them, or says that there are none.
    """
    if jobs < 1:
        raise CheckpointError(f"--jobs {jobs}: must be at least 1")
    checkpoints = find_checkpoints(paths)
    problems = _verify_all(checkpoints, jobs)
    for folder in checkpoints:
        if not problems[folder]:
            print(f"{folder}: whole")
    beside = [line for parent in dict.fromkeys(path.parent for path in checkpoints) for line in _problems_beside(parent)]
    lines = [text for found in problems.values() for text in sorted(problem.text for problem in found)] + beside
    if lines:
        bad = sum(bool(found) for found in problems.values())
        raise CheckpointError(f"{bad} of {len(checkpoints)} checkpoints are not whole:\n  " + "\n  ".join(lines))


def find_checkpoints(paths: list[Path]) -> list[Path]:
    """Checkpoint folders at or below run folders or folders of them; `CheckpointError` where a path holds none."""
    found: dict[Path, None] = {}
    for path in paths:
        itself = _ITERATION.fullmatch(path.resolve().name) or any((path / name).exists() for name in (MANIFEST, NEEDED[0]))
        below = [path] if itself else [folder for pattern in BELOW for folder in sorted(path.glob(pattern)) if folder.is_dir()]
        if not below or not path.is_dir():
            raise CheckpointError(f"{path}: no checkpoint here, and none below; name a folder iter_*, a run folder, or a folder of runs")
        found.update(dict.fromkeys(below))
    return list(found)


def _verify_all(checkpoints: list[Path], jobs: int) -> dict[Path, list[Problem]]:
    """Problems of each checkpoint: names and sizes first, then every file's digest, several at a time."""
    problems: dict[Path, list[Problem]] = {}
    sound: list[tuple[Path, Manifest, str]] = []
    for folder in checkpoints:
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            problems[folder] = [Problem(str(error))]
            continue
        problems[folder], names = _look_all(folder, manifest)
        sound += [(folder, manifest, name) for name in names]
    total_bytes = sum(manifest.files[name][0] for _, manifest, name in sound)
    pool = ThreadPoolExecutor(jobs)  # hashing releases the interpreter
    try:
        waiting: dict[Future[Problem | None], tuple[Path, int]] = {
            pool.submit(_hash, folder, name, manifest): (folder, manifest.files[name][0]) for folder, manifest, name in sound
        }
        with progress("Verify", total=total_bytes, unit="bytes") as bar:
            for done in as_completed(waiting):
                folder, size_bytes = waiting[done]
                problems[folder] += [problem] if (problem := done.result()) else []
                bar.update(size_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return problems


def _look_all(folder: Path, manifest: Manifest) -> tuple[list[Problem], list[str]]:
    """All that is wrong and seen without reading, and the names of the files that are left to be read."""
    found = _look(folder, manifest)
    unlisted = sorted({path.name for path in folder.iterdir()} - {*manifest.files, MANIFEST})
    beside = [Problem(f"{folder}: holds {name}, which the manifest does not list; it was altered") for name in unlisted]
    return [*_renamed(folder, manifest), *found.values(), *beside], [name for name in manifest.files if name not in found]


def _look(folder: Path, manifest: Manifest) -> dict[str, Problem]:
    """What is wrong with files without reading them: file name -> problem."""
    absent = [name for name in NEEDED if name not in manifest.files]
    found = {
        name: Problem(f"{folder / MANIFEST}: lists no {name}, which every load reads; it was altered", hostile=True) for name in absent
    }
    for name, (size_bytes, _) in manifest.files.items():
        problem = _look_at(folder, name, size_bytes)
        if problem:
            found[name] = problem
    return found


def _look_at(folder: Path, name: str, size_bytes: int) -> Problem | None:
    if not is_plain_name(name):
        return Problem(f"{folder}: the manifest names a file outside the checkpoint: {name!r}; it was altered", hostile=True)
    path = folder / name
    try:
        status = path.lstat()
    except FileNotFoundError:
        return Problem(f"{path}: missing, though the manifest lists it; {OTHER}")
    except OSError as error:
        return Problem(f"{path}: cannot be looked at: {error.strerror}; {OTHER}")
    if stat.S_ISLNK(status.st_mode):
        return Problem(f"{path}: a link to {os.readlink(path)}, not a file of this checkpoint; put the file itself there", hostile=True)
    if not stat.S_ISREG(status.st_mode):
        return Problem(f"{path}: a folder, a pipe or a device, not a file; it was altered", hostile=True)
    if status.st_size != size_bytes:
        how = "it was cut short" if status.st_size < size_bytes else "it was added to"
        return Problem(f"{path}: {status.st_size:,} bytes, the manifest says {size_bytes:,}; {how} or altered; {OTHER}")
    return None


def _hash(folder: Path, name: str, manifest: Manifest) -> Problem | None:
    try:
        found = file_sha256(folder / name)
    except OSError as error:  # a bad disk says so here
        return Problem(f"{folder / name}: cannot be read: {error.strerror}; {OTHER}")
    if found != manifest.files[name][1]:
        return Problem(f"{folder / name}: its bytes do not hash to what the manifest says; {OTHER}")
    return None


def _renamed(folder: Path, manifest: Manifest) -> list[Problem]:
    named = _ITERATION.fullmatch(folder.name)
    if not named or int(named[1]) == manifest.iteration:
        return []
    return [Problem(f"{folder}: its manifest says iteration {manifest.iteration}: it was renamed, or copied over another; {OTHER}")]


def replaced_by(ready: Path) -> Path:
    """The checkpoint whose place a waiting replacement is to take."""
    return ready.with_name(ready.name.removeprefix(".").removesuffix(READY))


def _problems_beside(folder: Path) -> list[str]:
    """What is wrong in a folder of checkpoints: with its tracker, and with a replacement that was stopped half way."""
    lines = [
        f"{replaced_by(ready)}: missing: a gc was killed while it put {ready.name} into its place; run `megatron-ext gc {folder.parent}`"
        for ready in sorted(folder.glob(f".iter_*{READY}"))
        if not replaced_by(ready).exists()
    ]
    try:
        folders.latest(folder)
    except CheckpointError as error:
        lines.append(str(error))
    return lines


def _shares(manifest: Manifest, num_ranks: int) -> list[list[str]]:
    """Every file once, the largest first, each to the rank with the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for name, (size_bytes, _) in sorted(manifest.files.items(), key=lambda item: (-item[1][0], item[0])):
        load, rank = loads[0]
        shares[rank].append(name)
        heapq.heapreplace(loads, (load + size_bytes, rank))
    return shares


def _raise(problems: list[Problem]) -> None:
    if problems:
        kind = CheckpointError if any(problem.hostile for problem in problems) else DamagedCheckpointError
        raise kind("\n".join(problem.text for problem in problems))
