"""The demo's bars: a folder that reaches them passes, and one that misses any of them is told which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import RECORD
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.runs import ATTEMPTS, DONE, read_json, write_json, write_run
from recipes import demo
from tools.check_demo import SUMMARY, main, pair, stated

TEXTS = {"short_cot": "What is 12+25?\n12+25=37.", "math_web": "from 1990-1995, 3.5 and 7"}
ASKED = {"question": "What is 17+28?", "answer": "45", "kind": "add", "operands": [17, 28]}
LEARNT = {"question": "Ann has 41 eggs and gives 13 to Ben.", "answer": "28", "kind": "word_subtract", "operands": [41, 13]}
ACCURACIES = {"rl_long": (0.5, 0.75), "rl_short": (0.25, 0.5), "rl_hybrid": (0.5, 0.5), "rl_base": (0.0, 0.9)}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smoke graph's folders as a demo would leave them that took 11 minutes and 2 GB."""
    graph = demo.smoke()
    for number, stage in enumerate(graph.stages):
        parents = {role: tmp_path / parent for parent, child, role in graph.edges() if child == stage.name}
        run = write_run(tmp_path / stage.name, graph.name, stage, parents)
        attempt = run.path / ATTEMPTS / "1"
        attempt.mkdir(parents=True)
        write_json(attempt / RECORD, {"started_at": f"2026-01-01T10:{number // 2:02d}:00+0000"})
        memory = {"peak_memory_bytes": 2 * 10**9} if isinstance(stage, TrainStage | RLStage) else {}
        write_json(run.path / DONE, {"science_hash": run.science_hash, "finished_at": "2026-01-01T10:11:00+0000", **memory})
    for name, text in TEXTS.items():
        write_lines(tmp_path / "text" / "text" / f"{name}.jsonl", [{"id": "0", "text": text}])
    write_lines(tmp_path / "text" / "evaluation" / "problems.jsonl", [ASKED])
    write_lines(tmp_path / "text" / "rl_problems.jsonl", [LEARNT])
    set_accuracies(tmp_path, ACCURACIES)
    return tmp_path


def set_accuracies(folder: Path, accuracies: dict[str, tuple[float, float]]) -> None:
    rows = [
        {"stage": name, "set": "held_out", "before": {"accuracy": before}, "after": {"accuracy": after}}
        for name, (before, after) in accuracies.items()
    ]
    write_json(folder / "report" / SUMMARY, {"rl_scores": rows})


def missed(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """First words of the bars that are missed."""
    code = main([str(folder), *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSED")]
    assert code == (1 if lines else 0)
    return [line.split()[1] for line in lines]


def test_a_demo_that_reaches_the_bars_passes(folder, capsys) -> None:
    assert missed(folder, capsys) == []


def test_the_controls_do_not_count_as_branches(folder, capsys) -> None:
    set_accuracies(folder, {**ACCURACIES, "rl_long": (0.5, 0.625)})
    assert missed(folder, capsys) == ["gain:"]


def test_a_run_without_scores_gains_nothing(folder, capsys) -> None:
    set_accuracies(folder, {"rl_long": (0.5, 0.75)})
    assert missed(folder, capsys) == ["gain:"]


def test_time_and_memory(folder, capsys) -> None:
    assert missed(folder, capsys, "--most-minutes", "10.9") == ["time:"]
    assert missed(folder, capsys, "--most-minutes", "11") == []
    path = folder / "stable" / DONE
    write_json(path, {**read_json(path, "a mark"), "peak_memory_bytes": 7 * 10**9})
    assert missed(folder, capsys) == ["memory:"]


@pytest.mark.parametrize("text", ["17+28", "28 + 17 = 45", "45-17=28", "so 3+45-17 is", "1+45-28."])
def test_an_asked_problem_in_a_text_is_found(folder, capsys, text) -> None:
    write_lines(folder / "text" / "text" / "long_cot.jsonl", [{"id": "0", "text": "12+25"}, {"id": "1", "text": f"Now {text}"}])
    assert missed(folder, capsys) == ["disjoint:"]


def test_an_asked_problem_among_those_of_rl_is_found(folder, capsys) -> None:
    write_lines(folder / "text" / "rl_problems.jsonl", [LEARNT, {**LEARNT, "operands": [45, 28]}])
    assert missed(folder, capsys) == ["disjoint:"]


def test_nothing_to_compare_is_not_disjoint(folder, capsys) -> None:
    for path in (folder / "text" / "text").iterdir():
        path.unlink()
    assert missed(folder, capsys) == ["disjoint:"]


def test_a_demo_that_is_not_finished_or_not_there_is_said(folder, capsys) -> None:
    (folder / "rl_long" / DONE).unlink()
    assert main([str(folder)]) == 1
    assert "not finished" in capsys.readouterr().err
    assert main([str(folder / "nowhere")]) == 1
    assert "make demo" in capsys.readouterr().err


def test_what_a_text_states() -> None:
    assert stated("12+30-5, 7 - 9 and 1990") == {(12, 30), (5, 25), (-2, 9)}
    assert {pair("+", 30, 12), pair("-", 42, 30), pair("-", 42, 12)} == {(12, 30)}
