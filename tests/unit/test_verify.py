"""What a manifest says of a checkpoint, held against its files: everything wrong is found and named, and nothing is opened."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.__main__ import main
from megatron_ext.checkpoint.verify import check_files, check_iteration, find_checkpoints, verify, verify_command, verify_shared
from megatron_ext.errors import CheckpointError, DamagedCheckpointError
from megatron_ext.provenance import MANIFEST, read_manifest, write_manifest
from tests.small_checkpoints import write_files


@pytest.fixture
def path(tmp_path):
    return write_files(tmp_path / "checkpoints", 5)


def flip(path: Path, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def relist(path: Path, name: str) -> None:
    """Let the manifest name one more file."""
    old = read_manifest(path)
    write_manifest(path, replace(old, files={**old.files, name: (1, "0" * 64)}))


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def test_a_whole_checkpoint_passes(path):
    assert verify(path) == read_manifest(path)
    check_files(path, read_manifest(path))
    check_iteration(path, read_manifest(path))
    assert [verify_shared(path, read_manifest(path), rank, 3) for rank in range(3)] == [[], [], []]


DAMAGE = {
    "missing": (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing, though the manifest lists it"),
    "empty": (lambda p: os.truncate(p / "common.pt", 0), r"common\.pt: 0 bytes, the manifest says 20; it was cut short"),
    "cut short": (lambda p: os.truncate(p / ".metadata", 299), r"\.metadata: 299 bytes, the manifest says 300; it was cut short"),
    "longer": (lambda p: os.truncate(p / "__1_0.distcp", 501), r"__1_0\.distcp: 501 bytes, the manifest says 500; it was added to"),
}
HIDDEN = {
    "flipped": (lambda p: flip(p / "__0_0.distcp", 998), r"__0_0\.distcp: its bytes do not hash to what the manifest says"),
}
BESIDE = {
    "unlisted": (lambda p: (p / "__2_0.distcp").write_bytes(b"more"), r"holds __2_0\.distcp, which the manifest does not list"),
    "subfolder": (lambda p: (p / "more").mkdir(), r"holds more, which the manifest does not list"),
    "renamed": (lambda p: write_manifest(p, replace(read_manifest(p), iteration=4)), r"iter_0000005: its manifest says iteration 4"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), r"iter_0000005: has no manifest\.json: it was never published"),
    "manifest cut short": (lambda p: os.truncate(p / MANIFEST, 50), r"manifest\.json: not valid JSON"),
    "manifest of nothing": (lambda p: (p / MANIFEST).write_text("[]"), r"manifest\.json: is not what its own_sha256 says"),
}
HOSTILE = {
    "link outside": (lambda p: replace_by(p / "common.pt", lambda f: f.symlink_to("/etc/passwd")), r"common\.pt: a link to /etc/passwd"),
    "link inside": (lambda p: replace_by(p / "common.pt", lambda f: f.symlink_to(".metadata")), r"common\.pt: a link to \.metadata"),
    "pipe": (lambda p: replace_by(p / "common.pt", os.mkfifo), r"common\.pt: a folder, a pipe or a device, not a file"),
    "folder": (lambda p: replace_by(p / "common.pt", Path.mkdir), r"common\.pt: a folder, a pipe or a device, not a file"),
    "nothing needed": (
        lambda p: write_manifest(p, replace(read_manifest(p), files={"__0_0.distcp": read_manifest(p).files["__0_0.distcp"]})),
        r"manifest\.json: lists no \.metadata, which every load reads",
    ),
}
OUTSIDE = ("../secret", "/etc/passwd", "a/b", "..", ".", "", "x\0y")
for outside in OUTSIDE:
    HOSTILE[f"names {outside!r}"] = (
        lambda p, name=outside: relist(p, name),
        r"names a file outside the checkpoint: " + re.escape(repr(outside)),
    )


@pytest.mark.parametrize("case", [*DAMAGE, *HIDDEN, *BESIDE])
def test_damage_is_found_and_an_older_checkpoint_may_be_taken(path, case):
    do, words = {**DAMAGE, **HIDDEN, **BESIDE}[case]
    do(path)
    with pytest.raises(DamagedCheckpointError, match=words):
        verify(path)


@pytest.mark.parametrize("case", DAMAGE)
def test_sizes_are_seen_without_reading(path, case):
    do, words = DAMAGE[case]
    do(path)
    with pytest.raises(DamagedCheckpointError, match=words):
        check_files(path, read_manifest(path))


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_accident_does_is_refused(path, case):
    do, words = HOSTILE[case]
    do(path)
    for check in (verify, lambda p: check_files(p, read_manifest(p)), lambda p: verify_shared(p, read_manifest(p), 0, 2)):
        with pytest.raises(CheckpointError, match=words) as refusal:
            check(path)
        assert not isinstance(refusal.value, DamagedCheckpointError)  # else training would go on from an older one


def test_every_changed_byte_of_a_manifest_is_found(path):
    """Also where the JSON and all its values stay as they were: other blanks, 1e-3 for 0.001, an E for an e."""
    file = path / MANIFEST
    content = file.read_bytes()
    same_values = [content.replace(b"\n", b"\r", 1), content.replace(b"  ", b" \t", 1), content + b" ", content.replace(b"0.001", b"1e-3")]
    flipped = [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] for at in range(len(content)) for bit in (1, 7, 32)]
    for changed in (*same_values, *flipped):
        assert changed != content
        file.write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: "):
            read_manifest(path)
    file.write_bytes(content)
    read_manifest(path)


def test_everything_wrong_is_listed_at_once(path):
    flip(path / ".metadata")
    flip(path / "__0_0.distcp")
    (path / "__1_0.distcp").unlink()
    (path / "stray").write_text("")
    with pytest.raises(DamagedCheckpointError) as found:
        verify(path)
    assert all(name in str(found.value) for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "stray"))
    assert "common.pt" not in str(found.value)


def test_the_ranks_shares_make_the_whole(path):
    files = read_manifest(path).files
    for name in files:
        flip(path / name)
    for num_ranks in (1, 2, 3, 9):
        found = [verify_shared(path, read_manifest(path), rank, num_ranks) for rank in range(num_ranks)]
        named = [line.split(": ")[0].rpartition("/")[2] for lines in found for line in lines]
        assert sorted(named) == sorted(files)
    assert [len(verify_shared(path, read_manifest(path), rank, 2)) for rank in range(2)] == [1, 4]  # 999 bytes; 500, 300, 20 and 2


def test_a_file_that_cannot_be_read_is_damage(path, monkeypatch):
    """A bad sector shows while reading; a folder in a file's place gives the same kind of error."""
    from megatron_ext.checkpoint import verify as module

    true = module.file_sha256

    def bad_disk(file: Path) -> str:
        return true(file.parent) if file.name == "common.pt" else true(file)

    monkeypatch.setattr(module, "file_sha256", bad_disk)
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt: cannot be read: Is a directory"):
        verify(path)


# ---- the command


def test_the_command_checks_all_below_and_names_each(tmp_path, capsys):
    paths = [write_files(tmp_path / "demo" / run / "checkpoints", iteration) for run in ("base", "stable") for iteration in (2, 4)]
    for run in ("base", "stable"):
        (tmp_path / "demo" / run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4\n")
    for place in (tmp_path, tmp_path / "demo"):
        assert find_checkpoints([place]) == paths
    assert find_checkpoints([tmp_path / "demo" / "base", paths[1], paths[3]]) == [*paths[:2], paths[3]]
    assert main(["verify", str(tmp_path), "--jobs", "3"]) == 0
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.endswith(": whole")] == [f"{path}: whole" for path in paths]
    assert "7,284 / 7,284 bytes (100%)" in said.out

    flip(paths[0] / ".metadata")
    (paths[2] / MANIFEST).unlink()
    (tmp_path / "demo" / "base" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("6\n")
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out.count(": whole") == 2
    assert "error: 2 of 4 checkpoints are not whole:\n" in said.err
    assert re.search(r"base/checkpoints/iter_0000002/\.metadata: its bytes do not hash", said.err)
    assert re.search(r"stable/checkpoints/iter_0000002: has no manifest\.json: it was never published", said.err)
    assert re.search(r"base/checkpoints/latest_checkpointed_iteration\.txt: names iteration 6", said.err)


def test_a_checkpoint_that_a_killed_gc_hides_is_named(tmp_path, capsys):
    hidden, path = (write_files(tmp_path / "run" / "checkpoints", iteration) for iteration in (2, 4))
    (path.parent / "latest_checkpointed_iteration.txt").write_text("4\n")
    waiting = shutil.copytree(hidden, hidden.with_name(f".{hidden.name}.thinned"))
    assert main(["verify", str(tmp_path)]) == 0  # it waits, and nothing is missing
    shutil.rmtree(hidden)
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        f"{hidden}: missing: a gc was killed while it put {waiting.name} into its place; run `megatron-ext gc {tmp_path / 'run'}`" in said
    )


def test_the_command_refuses_what_holds_no_checkpoint(tmp_path, capsys):
    for words in ([str(tmp_path)], [str(tmp_path / "none")], [str(tmp_path / "iter_0000009")]):
        assert main(["verify", *words]) == 2
        assert "no checkpoint here, and none below" in capsys.readouterr().err
    write_files(tmp_path, 5)
    with pytest.raises(CheckpointError, match="--jobs 0: must be at least 1"):
        verify_command([tmp_path], 0)


def test_verifying_loads_no_torch_and_unpickles_nothing(path):
    """In a process where neither can be imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['megatron'] = sys.modules['_pickle'] = None; "
        "from megatron_ext.__main__ import main; raise SystemExit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "verify", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
