"""This program's source: its identity, and copies of it beside the runs, so that editing code never changes a job that waits.

RUNS/.code/0123456789abcdef/megatron_ext/   a snapshot: read-only files, named by the first digits of their hash
RUNS/.code/.0123456789abcdef.7f....tmp/     being written; never run
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.errors import RunError
from megatron_ext.runs import force_to_disk

PACKAGE = Path(__file__).resolve().parent
FOLDER = ".code"
DIGITS = 16  # of the hash, in a snapshot's name
MOST_NAMED = 5  # changed files that a message names
Files = dict[str, bytes]


def source_files(package: Path) -> Files:
    """Name (relative, with slashes) -> bytes of each source file of a package; an editor's hidden files are none."""
    paths = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py") if not path.name.startswith(".")}
    return {name: paths[name].read_bytes() for name in sorted(paths)}


def files_hash(files: Files) -> str:
    """One SHA-256 over names and bytes."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(name.encode() + b"\0" + content + b"\0")
    return total.hexdigest()


@functools.cache
def code_hash() -> str:
    """The hash of the source that this process runs."""
    return files_hash(source_files(PACKAGE))


def snapshot_path(runs_dir: Path, found: str) -> Path:
    """Where the snapshot of code with this hash stands, if there is one; the folder to put first on Python's path."""
    return runs_dir.resolve() / FOLDER / found[:DIGITS]


def take_snapshot(runs_dir: Path, package: Path = PACKAGE) -> Path:
    """Copy a package's source beside the runs, whole or not at all, and return the snapshot's folder.

    One that is there already is checked and used again; `RunError` where it was changed, or where none can be written.
    """
    files = source_files(package)
    folder = snapshot_path(runs_dir, files_hash(files))
    if os.pathsep in str(folder):
        raise RunError(f"{folder}: '{os.pathsep}' in this path would end it inside PYTHONPATH; keep the runs in a folder without it")
    try:
        if not folder.exists():
            _write(folder, package.name, files)
    except OSError as cause:
        raise RunError(
            f"{folder}: this code's snapshot, which jobs run, cannot be written ({cause.strerror or cause}); "
            f"free space or quota, mend the permissions of {runs_dir}, or name another --runs"
        ) from None
    _check(folder, package.name, files)
    return folder


def _write(folder: Path, name: str, files: Files) -> None:
    """Write aside, force to the disk, rename; of two that write at once, either's copy will do."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        for relative, content in files.items():
            path = aside / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb", opener=functools.partial(os.open, mode=0o444)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for one in (aside, *(path for path in aside.rglob("*") if path.is_dir())):
            force_to_disk(one)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        force_to_disk(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(folder: Path, name: str, files: Files) -> None:
    there = source_files(folder / name)
    changed = sorted(one for one in {*files, *there} if files.get(one) != there.get(one))
    if changed:
        more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
        raise RunError(
            f"{folder}: this code snapshot was changed after it was made, in {', '.join(changed[:MOST_NAMED])}{more}; "
            f"jobs would run code that no hash names. Remove it, and the next launch makes it again: rm -rf {shlex.quote(str(folder))}"
        )


def check_own_snapshot() -> None:
    """`RunError` where this process runs from a snapshot whose files are no longer those of its name."""
    folder = PACKAGE.parent
    if folder.parent.name == FOLDER and folder.name != code_hash()[:DIGITS]:
        raise RunError(
            f"{folder}: this code snapshot was changed after it was made: its name says {folder.name}, its files hash to "
            f"{code_hash()[:DIGITS]}. Remove it (rm -rf {shlex.quote(str(folder))}) and launch again with the code that is meant"
        )


def snapshot_environment(folder: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables under which Python, and every process that it starts, imports the snapshot.

    PYTHONPATH stands before an installed copy; PYTHONSAFEPATH keeps `python -m` from putting the present folder before both.
    """
    rest = environment.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([rest] if rest else [])]), "PYTHONSAFEPATH": "1"}


def snapshot_command(folder: Path, words: list[str]) -> str:
    """A shell line that runs `megatron-ext` with these words from a snapshot."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in snapshot_environment(folder, {}).items()]
    return " ".join(["env", *variables, shlex.join([sys.executable, "-m", "megatron_ext", *words])])


def code_words(codes: Mapping[int, str]) -> str:
    """'attempts 1 to 2 ran code 0123456789ab, attempt 3 ran code ba9876543210'; '' where all that is recorded (by attempt) is one code."""
    spans: list[tuple[int, int, str]] = []
    for number, code in sorted(codes.items()):
        if spans and spans[-1][2] == code:
            spans[-1] = (spans[-1][0], number, code)
        else:
            spans.append((number, number, code))
    if len(spans) < 2:
        return ""
    words = [f"attempt{f' {first}' if first == last else f's {first} to {last}'} ran code {code[:12]}" for first, last, code in spans]
    return ", ".join(words)
