"""What a supervisor reads in a run folder, and its rule for giving up: by tables."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import Attempt
from megatron_ext.json_lines import read_json_lines
from megatron_ext.launch import job_events
from megatron_ext.launch.job_events import PREEMPTED, Ledger, Start, idle_starts, lost_starts
from megatron_ext.launch.job_queue import without_parent
from megatron_ext.launch.job_ranks import rank_environment, read_secrets
from megatron_ext.launch.job_step import rank_numbers
from megatron_ext.redaction import SECRETS, without_secrets

ROOT = Path(__file__).resolve().parents[2]
N = None


def start(count: int, iteration: int | None, job_id: int = 7) -> dict[str, Any]:
    return {"event": "start", "job_id": job_id, "restart_count": count, "iteration": iteration}


def end(count: int, reason: str = "fault", job_id: int = 7) -> dict[str, Any]:
    return {"event": "end", "job_id": job_id, "restart_count": count, "reason": reason}


@pytest.mark.parametrize(
    ("events", "iteration", "idle"),
    [
        ([], N, 0),
        ([start(0, N)], N, 1),  # no end: lost, and it counts
        ([start(0, N), end(0)], 5, 0),  # it advanced
        ([start(0, N), end(0), start(1, 5), end(1)], 5, 1),
        ([start(0, 5), end(0), start(1, 5), end(1), start(2, 5), end(2)], 5, 3),
        ([start(0, 5), end(0), start(1, 5), end(1), start(2, 5), end(2)], 6, 0),  # the last one advanced: all is forgotten
        ([start(0, 5), end(0), start(1, 7), end(1)], 5, 2),  # it went back to an older checkpoint: no advance
        ([start(0, 5), end(0), start(1, 5), end(1, PREEMPTED), start(2, 5), end(2)], 5, 2),
        ([start(0, 5, job_id=6), end(0, job_id=6), start(0, 5), end(0)], 5, 1),  # another launch
    ],
)
def test_starts_that_did_not_advance_are_counted(events: list[dict[str, Any]], iteration: int | None, idle: int) -> None:
    assert idle_starts(events, 7, iteration) == idle


def test_starts_without_an_end_are_lost_once() -> None:
    events = [start(0, N), end(0), start(1, N), start(0, N, job_id=6), start(2, N)]
    assert [event["restart_count"] for event in lost_starts(events, Start(7, 2))] == [1]
    told = {"event": "fault", "cause": "lost", "job_id": 7, "restart_count": 2, "lost_restart_count": 1}
    assert lost_starts([*events, told], Start(7, 3)) == [events[-1]]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Start(7, 0), ["n1"])
    ledger.append("start", iteration=None)
    with ledger.path.open("a") as file:
        file.write('{"event": "en')
    Ledger(tmp_path, Start(7, 1), ["n2"]).append("start", iteration=3)
    assert [(event["restart_count"], event["nodes"]) for event in read_json_lines(ledger.path)] == [(0, ["n1"]), (1, ["n2"])]


def test_a_full_disk_does_not_stop_the_supervisor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job/events.jsonl").symlink_to("/dev/full")
    Ledger(tmp_path, Start(7, 0), ["n1"]).append("start", iteration=None)
    assert "No space left on device" in capsys.readouterr().out


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    assert job_events.newest_iteration(tmp_path) is None
    for number in (5, 10, 15):
        (tmp_path / f"checkpoints/iter_{number:07d}").mkdir(parents=True)
    for number in (5, 10):
        (tmp_path / f"checkpoints/iter_{number:07d}/manifest.json").touch()
    assert job_events.newest_iteration(tmp_path) == 10


def test_the_first_failure_of_the_newest_attempt(tmp_path: Path) -> None:
    for attempt, rank, at in ((1, 0, 1), (2, 12, 30), (2, 3, 20)):
        path = tmp_path / f"attempts/{attempt}/rank_{rank:05d}.error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"of rank {rank}")
        os.utime(path, (at, at))
    assert job_events.first_failure(tmp_path, after_attempt=1) == ("3", "of rank 3")
    assert job_events.first_failure(tmp_path, after_attempt=2) is None  # this start began no attempt


def test_the_longest_save_and_step(tmp_path: Path) -> None:
    assert job_events.longest_seconds(tmp_path) == (0.0, 0.0)
    records = [{"kind": "checkpoint", "seconds": 4.5}, {"kind": "checkpoint", "seconds": 2}, {"kind": "train", "step_seconds": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "che')
    assert job_events.longest_seconds(tmp_path) == (4.5, 0.5)


@pytest.mark.parametrize(
    ("dependency", "rest"),
    [
        ("afterok:12(unfulfilled)", ""),
        ("afterok:12(unfulfilled),afterok:13(unfulfilled)", "afterok:13"),
        ("afterok:112(unfulfilled),afterok:12(unfulfilled)", "afterok:112"),
        ("afterok:112(unfulfilled)", None),
        ("singleton(unfulfilled),afterok:12(unfulfilled)", "singleton"),
        ("", None),
    ],
)
def test_one_parent_is_taken_out_of_a_dependency(dependency: str, rest: str | None) -> None:
    assert without_parent(dependency, 12) == rest


@pytest.mark.parametrize(("text", "ranks"), [("3", {3}), ("0-2,7", {0, 1, 2, 7}), ("0,8-9", {0, 8, 9})])
def test_ranks_as_srun_writes_them(text: str, ranks: set[int]) -> None:
    assert rank_numbers(text) == ranks


def test_a_secret_is_taken_out_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    secrets = read_secrets({"secrets": ["TOKEN"], "secrets_file": ""})
    assert without_secrets("xabcx", secrets) == "x<TOKEN>x"


def test_what_is_written_of_an_end_names_a_secret_and_does_not_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    given = rank_environment({"environment": {}}, ["n1"], 0, {"TOKEN": "abc"})
    monkeypatch.setenv(SECRETS, given[SECRETS])
    Attempt(1, tmp_path).finish("failed", error="OSError: https://abc@host", step=3)
    assert json.loads((tmp_path / "exit.json").read_text()) | {"at": ""} == {
        "reason": "failed", "at": "", "error": "OSError: https://<TOKEN>@host", "step": 3,
    }  # fmt: skip
    monkeypatch.delenv(SECRETS)
    Attempt(1, tmp_path).finish("failed", error="abc")
    assert "abc" in (tmp_path / "exit.json").read_text()


def test_slices_are_what_a_tokenize_stage_advances_by(tmp_path: Path) -> None:
    assert job_events.progress_mark(tmp_path) is None
    (tmp_path / "shards/web").mkdir(parents=True)
    for name in ("slice-00000.json", "slice-00011.json", ".slice-00012.json.7.tmp", "train-00011.json"):
        (tmp_path / "shards/web" / name).touch()
    assert job_events.progress_mark(tmp_path) == 2
    assert job_events.newest_iteration(tmp_path) is None


SUPERVISOR = ("job_events", "job_queue", "job_ranks", "job_step", "job_watch", "supervisor")


def test_the_supervisor_needs_no_package() -> None:
    """-I -S: the standard library and the path of the project, nothing else."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megatron_ext.launch.supervisor; "
        "tops = {name.split('.')[0] for name in sys.modules}; print(tops - sys.stdlib_module_names - {'megatron_ext', '__main__'}); "
        "print(sorted(name.rpartition('.')[2] for name in sys.modules if name.startswith('megatron_ext.launch.')))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", str(list(SUPERVISOR))]


@pytest.mark.parametrize("name", [*SUPERVISOR, "../errors", "../__init__", "__init__"])
def test_the_supervisor_is_python_3_9(name: str) -> None:
    """Its grammar, and no union of types outside of annotations, which nothing evaluates."""
    tree = ast.parse((ROOT / f"megatron_ext/launch/{name}.py").read_text(), feature_version=(3, 9))
    assert newer_than_3_9(tree) == []


def newer_than_3_9(tree: ast.Module) -> list[str]:
    """What Python 3.9 parses and cannot run, of what we are likely to write."""
    for node in ast.walk(tree):  # annotations are not evaluated under `from __future__ import annotations`
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
            node.annotation = ast.Constant(0)
    found = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.BinOp) and _is_union(node)]
    words = ("strict", "slots", "kw_only")
    return found + [str(node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in words]


def _is_union(node: ast.BinOp) -> bool:
    names = {ast.unparse(side) for side in (node.left, node.right)}
    return isinstance(node.op, ast.BitOr) and bool(names & {"None", "int", "str", "float", "dict", "list"})


@pytest.mark.parametrize("line", ["A = int | None", "zip([], [], strict=True)", "isinstance(1, int | str)"])
def test_a_newer_word_is_caught(line: str) -> None:
    assert newer_than_3_9(ast.parse(line)) != []
