"""Benchmarks and tokenizers from a hub on this machine: what is fetched, what is recorded, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_ext.errors import DataError
from megatron_ext.provenance import file_sha256
from megatron_ext.tasks.problems import read_problems
from megatron_ext.tokenizer import load_tokenizer
from tests.benchmark_files import BENCHMARKS
from tests.small_hub import Hub, folder_files, serving, use
from tests.unit.small_tokenizers import END, hugging_face
from tools import fetch_assets
from tools.asset_table import ASSETS, Asset

TOKEN = "hf_abcdefghijklmnop"
ROWS = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n), "unique_id": f"sums/{n}"} for n in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SUMS = Asset(
    "sums", "sums.jsonl", "owner/sums", "main", "MIT", "test.jsonl", "math", sha256=hashlib.sha256(JSONL).hexdigest(), rows=3, note="easy"
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(tokens=(TOKEN,))) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def fetch(asset: Asset, into: Path) -> str:
    """What it said."""
    said: list[str] = []
    fetch_assets.fetch(asset, into, said.append)
    return "\n".join(said)


def parquet(rows: list[dict], file: Path) -> bytes:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), file)
    return file.read_bytes()


def test_a_set_is_fetched_with_its_licence_and_a_record(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("datasets/owner/sums", {"test.jsonl": JSONL, "train.jsonl": b"other", "README.md": b""})
    said = fetch(SUMS, tmp_path / "assets")
    assert said.index("licence: MIT") < said.index("sha256")
    assert hub.fetched() == {"test.jsonl"}
    assert (tmp_path / "assets/sums.jsonl").read_bytes() == JSONL
    assert len(read_problems(tmp_path / "assets/sums.jsonl", "math")) == 3
    assert json.loads((tmp_path / "assets/sums.source.json").read_text()) == {
        "name": "sums", "repository": "owner/sums", "page": f"{hub.endpoint}/datasets/owner/sums", "commit": commit, "licence": "MIT",
        "note": "easy", "files": {"test.jsonl": SUMS.sha256}, "form": "math", "rows": 3, "without_answer": 0, "leave_out": [],
        "sha256": {"sums.jsonl": SUMS.sha256},
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == ["sums.jsonl", "sums.source.json"]


def test_what_is_there_is_left_alone_and_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("datasets/owner/sums", {"test.jsonl": JSONL})
    fetch(SUMS, tmp_path)
    asked = len(hub.requests)
    assert f"already there, unchanged: {tmp_path}/sums.jsonl, commit {commit}" in fetch(SUMS, tmp_path)
    assert len(hub.requests) == asked
    with pytest.raises(DataError, match=rf"fetched from owner/sums at {commit}; move it away"):
        fetch(replace(SUMS, revision="0" * 40), tmp_path)
    (tmp_path / "sums.jsonl").write_bytes(JSONL + b"\n")
    with pytest.raises(DataError, match="changed since it was fetched"):
        fetch(SUMS, tmp_path)
    (tmp_path / "sums.jsonl").unlink()
    fetch(SUMS, tmp_path)
    assert (tmp_path / "sums.jsonl").read_bytes() == JSONL


def test_nothing_is_overwritten_but_what_a_killed_fetch_left_is_taken(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/owner/sums", {"test.jsonl": JSONL})
    (tmp_path / "sums.jsonl").write_bytes(b"mine")
    with pytest.raises(DataError, match="another file of this name"):
        fetch(SUMS, tmp_path)
    assert (tmp_path / "sums.jsonl").read_bytes() == b"mine"
    (tmp_path / "sums.jsonl").write_bytes(JSONL)  # killed before the record was written
    fetch(SUMS, tmp_path)
    assert (tmp_path / "sums.source.json").is_file()


BAD = [
    ({"test.jsonl": JSONL}, {"sha256": "0" * 64}, r"test.jsonl has sha256 .*, not 0{64}"),
    ({"test.jsonl": JSONL}, {"rows": 4}, r"3 problems in test.jsonl, not 4"),
    ({"other.jsonl": JSONL}, {}, r"has no test.jsonl; name another commit"),
    ({"test.jsonl": JSONL}, {"revision": "0" * 40}, r"has no commit 0{40}; its history was rewritten"),
    ({"test.jsonl": JSONL}, {"repository": "owner/none"}, r"owner/none is not there any more, or not for this account \(401\)"),
    ({"test.jsonl": b"{}\n"}, {"sha256": None}, r"test|sums.jsonl:1: no key 'problem'"),
]


@pytest.mark.parametrize(("files", "changes", "message"), BAD)
def test_what_is_not_what_it_should_be_is_not_written(hub: Hub, tmp_path: Path, files: dict, changes: dict, message: str) -> None:
    hub.add("datasets/owner/sums", files)
    with pytest.raises(DataError, match=message):
        fetch(replace(SUMS, **changes), tmp_path / "assets")
    assert not (tmp_path / "assets").exists() or not list((tmp_path / "assets").iterdir())


def test_an_unknown_digest_is_recorded_and_said(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/owner/sums", {"test.jsonl": JSONL})
    said = fetch(replace(SUMS, sha256=None), tmp_path)
    assert f"sha256 {SUMS.sha256} (recorded; none was known to compare with)" in said


def test_a_gated_repository_and_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/owner/sums", {"test.jsonl": JSONL})
    hub.repositories["datasets/owner/sums"].gated = True
    with pytest.raises(DataError, match=r"sums: gated \(401\); accept its licence at .*/datasets/owner/sums, and set HF_TOKEN"):
        fetch(SUMS, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(SUMS, tmp_path)


def test_half_a_download_is_said_and_the_next_one_ends_it(hub: Hub, tmp_path: Path) -> None:
    hub.add("datasets/owner/sums", {"test.jsonl": JSONL})
    hub.cut["test.jsonl"] = 20
    with pytest.raises(DataError, match=r"503 .*try again later|goes on where it stopped"):
        fetch(SUMS, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()
    hub.broken.clear()
    fetch(SUMS, tmp_path / "assets")
    assert (tmp_path / "assets/sums.jsonl").read_bytes() == JSONL


def test_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.is_portal = True
    with pytest.raises(DataError, match=r"sums: the download stopped .*carry the assets here"):
        fetch(SUMS, tmp_path)
    hub.is_portal, hub.is_down = False, True
    with pytest.raises(DataError, match="503"):
        fetch(SUMS, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        fetch(SUMS, tmp_path)


def test_problems_that_no_grader_can_read_are_named(hub: Hub, tmp_path: Path) -> None:
    row = {"problem": "?", "answer": r"\frac{1}{", "unique_id": "broken"}
    hub.add("datasets/owner/sums", {"test.jsonl": JSONL + json.dumps(row).encode()})
    said = fetch(replace(SUMS, sha256=None, rows=4), tmp_path)
    assert "name them in leave_out: broken" in said
    assert json.loads((tmp_path / "sums.source.json").read_text())["leave_out"] == ["broken"]


TABLES = {  # rows of the columns that each repository's file has
    "gsm8k": [{"question": "1+1?", "answer": "1+1=2\n#### 2"}],
    "olympiad_bench": [
        {
            "id": 1, "subfield": "Algebra", "context": None, "question": "?", "solution": ["so"], "final_answer": ["$2$", "$3$"],
            "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None, "image_1": None, "difficulty": "x",
        }
    ],
    "amc23": [{"id": 0, "answer": 27.0, "url": "x", "question": "?"}],
    "math8k": [
        {"prompt": "x", "question": "2+2?", "gt_answer": "4", "level": 3, "subject": "Algebra"},
        {"prompt": "x", "question": "2+3?", "gt_answer": "", "level": 5, "subject": "Algebra"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_sets_that_come_as_parquet(hub: Hub, tmp_path: Path, name: str) -> None:
    """Read where pyarrow is installed; elsewhere its absence is told before anything is fetched."""
    asset = replace(ASSETS[name], revision="main", sha256=None, rows=None)
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(DataError, match="pip install pyarrow"):
            fetch(asset, tmp_path / "assets")
        assert hub.requests == []
        return
    hub.add(f"datasets/{asset.repository}", {asset.file: parquet(TABLES[name], tmp_path / "table")})
    fetch(asset, tmp_path / "assets")
    assert asset.form
    assert len(read_problems(tmp_path / "assets" / asset.target, asset.form)) == 1
    assert json.loads((tmp_path / "assets" / asset.record).read_text())["without_answer"] == len(TABLES[name]) - 1
    hub.add(f"datasets/{asset.repository}", {asset.file: parquet([{"other": 1}], tmp_path / "table")})
    with pytest.raises(DataError, match=r"row 0 of .* has no '\w+' \(but other\)"):
        fetch(asset, tmp_path / "others")
    hub.add(f"datasets/{asset.repository}", {asset.file: b"PAR1 no table"})
    with pytest.raises(DataError, match="is no parquet file"):
        fetch(asset, tmp_path / "others")


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        fetch_assets.fetch(ASSETS["gsm8k"], Path("nowhere"), lambda _: None)


def test_a_tokenizer(hub: Hub, tmp_path: Path) -> None:
    files = folder_files(hugging_face(tmp_path / "made", names={"eos_token": END}))
    hub.add("owner/model", {**files, "model.safetensors": b"x", "original/tokenizer.model": b"x"})
    asset = Asset("some_tokenizer", "Some-1B", "owner/model", "main", "a licence")
    for _ in range(2):
        said = fetch(asset, tmp_path / "assets")
    assert "already there, unchanged" in said
    assert hub.fetched() == {"tokenizer.json", "tokenizer_config.json"}
    made = load_tokenizer(tmp_path / "made")
    record = json.loads((tmp_path / "assets/Some-1B/source.json").read_text())
    assert record["identity_hash"] == load_tokenizer(tmp_path / "assets/Some-1B").identity_hash == made.identity_hash
    assert (record["licence"], record["vocab_size"]) == ("a licence", made.vocab_size)
    (tmp_path / "assets/Some-1B/tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="changed since it was fetched"):
        fetch(asset, tmp_path / "assets")


@pytest.mark.shared
@pytest.mark.skipif(not (BENCHMARKS / "math500.jsonl").is_file(), reason="no benchmark files here")
def test_a_digest_of_the_table_is_that_of_the_real_file() -> None:
    assert file_sha256(BENCHMARKS / "math500.jsonl") == ASSETS["math500"].sha256


def test_problems_shared_by_training_and_test_set_are_counted(tmp_path: Path) -> None:
    assert fetch_assets.overlap(tmp_path) == ""
    lines = [json.dumps({"problem": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(9)]
    (tmp_path / "math8k.jsonl").write_text("\n".join(lines[:6]))
    (tmp_path / "math500.jsonl").write_text("\n".join(lines[4:]).replace("What is", "What  is"))
    assert fetch_assets.overlap(tmp_path).startswith("2 of 5 MATH500 problems")


def test_the_command_lists_and_fetches_nothing_by_default(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "tools.fetch_assets", "--into", str(tmp_path / "assets")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for asset in ASSETS.values():
        assert f"{asset.name}: " in done.stdout
        assert f"licence: {asset.licence}" in done.stdout
    assert not (tmp_path / "assets").exists()
    done = subprocess.run([*run, "gsm9k"], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (2, "")
    assert "no asset is named gsm9k; there are math500, gsm8k" in done.stderr
