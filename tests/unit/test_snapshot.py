"""Code snapshots: whole, read-only, checked when used again; what a stage runs is the snapshot and nothing else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext import snapshot
from megatron_ext.errors import RunError
from megatron_ext.launch.local import run_stage
from megatron_ext.launch.ranks import torchrun_command
from megatron_ext.runs import read_json, write_run
from megatron_ext.snapshot import (
    code_hash,
    code_words,
    files_hash,
    snapshot_command,
    snapshot_environment,
    snapshot_path,
    source_files,
    take_snapshot,
)
from recipes import demo

SMOKE = demo.smoke()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this package's checkout, to be edited."""
    shutil.copytree(snapshot.PACKAGE, tmp_path / "checkout" / "megatron_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "checkout"


def say(checkout: Path, word: str) -> None:
    """Make the program of a checkout say a word before anything else."""
    main = checkout / "megatron_ext" / "__main__.py"
    lines = [line for line in main.read_text().splitlines(keepends=True) if not line.startswith("print(")]
    main.write_text("".join(lines).replace("import argparse\n", f"import argparse\nprint({word!r})\n", 1))


def test_a_snapshot_is_whole_read_only_and_taken_once(tmp_path: Path) -> None:
    folder = take_snapshot(tmp_path / "runs")
    assert folder == snapshot_path(tmp_path / "runs", code_hash()) == tmp_path / "runs" / ".code" / code_hash()[:16]
    copied = source_files(folder / "megatron_ext")
    assert copied == source_files(snapshot.PACKAGE)
    assert files_hash(copied) == code_hash()
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o222 for path in folder.rglob("*.py"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing is left of the writing
    before = folder.stat().st_ino
    assert take_snapshot(tmp_path / "runs") == folder
    assert folder.stat().st_ino == before


def test_the_package_holds_nothing_that_a_snapshot_would_lack() -> None:
    others = [p for p in snapshot.PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts]
    assert others == []


def test_the_hash_is_of_names_and_bytes_and_not_of_an_editors_files(checkout: Path) -> None:
    package = checkout / "megatron_ext"
    (package / ".#runs.py").write_text("an editor's lock")
    assert files_hash(source_files(package)) == code_hash()
    (package / "runs.py").rename(package / "runner.py")
    renamed = files_hash(source_files(package))
    (package / "runner.py").write_text("x = 1\n")
    assert len({code_hash(), renamed, files_hash(source_files(package))}) == 3


def edit(folder: Path) -> None:
    path = folder / "megatron_ext" / "training" / "step.py"
    path.chmod(0o644)
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit, "training/step.py"),
        (lambda folder: (folder / "megatron_ext" / "runs.py").unlink(), "runs.py"),
        (lambda folder: (folder / "megatron_ext" / "more.py").write_text(""), "more.py"),
        (lambda folder: shutil.rmtree(folder / "megatron_ext" / "launch"), "launch/__init__.py.* and [0-9]+ more"),
    ],
)
def test_a_changed_snapshot_is_refused_by_name(tmp_path: Path, change, named: str) -> None:
    folder = take_snapshot(tmp_path)
    change(folder)
    with pytest.raises(RunError, match=rf"{folder}: this code snapshot was changed after it was made, in {named}.*rm -rf {folder}"):
        take_snapshot(tmp_path)
    shutil.rmtree(folder)
    assert take_snapshot(tmp_path) == folder  # the way out


def test_two_that_write_one_snapshot_at_once_share_it(tmp_path: Path, checkout: Path) -> None:
    """The other one publishes while this one is still writing: between its look and its rename."""
    files = source_files(checkout / "megatron_ext")
    folder = take_snapshot(tmp_path, checkout / "megatron_ext")
    inode = folder.stat().st_ino
    snapshot._write(folder, "megatron_ext", files)
    assert folder.stat().st_ino == inode
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: take_snapshot(tmp_path / "many", checkout / "megatron_ext"), range(4)))
    assert len(set(taken)) == 1
    assert len(list((tmp_path / "many" / ".code").iterdir())) == 1


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        snapshot._write(tmp_path / ".code" / "0", "megatron_ext", {"a.py": b"", "a.py/b.py": b""})
    assert list((tmp_path / ".code").iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", Path("/proc/x")):
        with pytest.raises(RunError, match=rf"{runs}/.code/[0-9a-f]+: .* cannot be written \(.*mend the permissions of {runs}"):
            take_snapshot(runs)


def test_a_folder_that_pythons_path_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="':' in this path would end it inside PYTHONPATH"):
        take_snapshot(tmp_path / "a:b")


def first_word(environment: dict[str, str]) -> str:
    """What a process of the program says first, started here."""
    words = [sys.executable, "-m", "megatron_ext", "--version"]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def test_a_stage_runs_the_snapshot_although_the_checkout_it_stands_in_was_edited(
    tmp_path: Path, checkout: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(checkout, "snapshot")
    folder = take_snapshot(tmp_path / "runs", checkout / "megatron_ext")
    say(checkout, "checkout")
    run = write_run(tmp_path / "runs" / "small" / "text", "small", SMOKE.stage("text"), {})
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PYTHONPATH", str(checkout))  # as some users do; the snapshot stands before it
    run_stage(run, folder)
    assert capfd.readouterr().out.split()[0] == "snapshot"
    record = read_json(run.path / "attempts" / "1" / "plan.json", "an attempt")
    assert record["code_hash"] == files_hash(source_files(folder / "megatron_ext")) != code_hash()
    # The deliberate faults: without either variable, the same process in the same place runs other code.
    assert first_word(snapshot_environment(folder)) == "snapshot"
    assert first_word({**snapshot_environment(folder), "PYTHONSAFEPATH": ""}) == "checkout"
    assert first_word({**snapshot_environment(folder), "PYTHONPATH": ""}) not in ("snapshot", "checkout")  # the installed one


RANK = """import os, sys, megatron_ext
if __name__ == "__main__":
    open(f"{sys.argv[-1]}/rank{os.environ['RANK']}", "w").write(f"{megatron_ext.WORD} {sys.argv[1]}")
"""


def test_every_rank_of_torchrun_runs_the_snapshot(tmp_path: Path) -> None:
    """The command and environment of a stage of two ranks, with a package of two lines for megatron_ext."""
    package = tmp_path / "checkout" / "megatron_ext"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WORD = 'snapshot'\n")
    (package / "__main__.py").write_text(RANK)
    folder = take_snapshot(tmp_path / "runs", package)
    (package / "__init__.py").write_text("WORD = 'checkout'\n")
    text = write_run(tmp_path / "runs" / "g" / "text", "g", SMOKE.stage("text"), {})
    stage = SMOKE.stage("base")
    two = replace(stage, plan=replace(stage.plan, ranks_per_node=2, micro_batch=4))
    run = write_run(tmp_path / "runs" / "g" / "base", "g", two, {"corpus": text.path})
    command = torchrun_command(run)
    subprocess.run(command, cwd=package.parent, env={**os.environ, **snapshot_environment(folder)}, check=True)
    assert [(run.path / f"rank{rank}").read_text() for rank in range(2)] == ["snapshot train"] * 2


def test_a_process_of_a_changed_snapshot_stops(tmp_path: Path) -> None:
    run = write_run(tmp_path / "g" / "text", "g", SMOKE.stage("text"), {})
    folder = take_snapshot(tmp_path)
    edit(folder)
    command = snapshot_command(folder, ["text", str(run.path)])
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {folder}: this code snapshot was changed after it was made: its name says {folder.name}" in done.stderr
    assert not (run.path / "attempts").exists()


def test_the_codes_of_a_runs_attempts_in_words() -> None:
    a, b = "a" * 64, "b" * 64
    assert code_words({}) == code_words({1: a, 2: a}) == ""
    assert (
        code_words({1: a, 2: a, 4: b, 5: a})
        == f"attempts 1 to 2 ran code {a[:12]}, attempt 4 ran code {b[:12]}, attempt 5 ran code {a[:12]}"
    )
