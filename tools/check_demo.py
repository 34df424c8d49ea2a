"""Check a finished demo against its bars: that RL taught something, on problems no text held, within its time and memory.

    python -m tools.check_demo [RUNS] [--most-minutes 12] [--most-gigabytes 6] [--least-gain 0.15] [--least-branches 2]

RUNS is the folder of the graph's run folders, runs/demo unless told. Checked, and printed line by line:

gain      held-out accuracy after RL less that before its first update, of every run of RL that starts from a branch
time      from the begin of the first stage to the end of the last: of a demo that ran in one go, without a stop between
memory    of each training and RL stage: the peak of rank 0 (DONE) times its ranks, which run side by side
disjoint  no validation problem's operands stand in any text for training or in any problem of RL. An addition and the two
          subtractions that undo it have the same operands. Read from the files here, without the code that made them

Exits 1 where a bar is missed, with a line for each.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ext.attempts import RECORD
from megatron_ext.config.stages import Branch, ReportStage, RLStage, TextStage, TrainStage
from megatron_ext.config.tasks import ProblemSet
from megatron_ext.errors import MegatronExtError, RunError
from megatron_ext.runs import ATTEMPTS, RECIPE, Run, attempt_numbers, open_run, read_done, read_json

SUMMARY = "summary.json"
STATED = re.compile(r"(\d+)[ \t]*([+-])[ \t]*(?=(\d+))")  # the right operand may be the left one of the next: 12+30-5 states two
GIGABYTE = 10**9
Operands = tuple[int, int]  # the two numbers of a sum, the smaller one first


@dataclass(frozen=True)
class Bars:
    """What a demo must reach."""

    most_minutes: float
    most_gigabytes: float
    least_gain: float
    least_branches: int


@dataclass
class Findings:
    """What was found, and of it what misses a bar."""

    lines: list[str]
    missed: list[str]

    def add(self, line: str, good: bool) -> None:
        """Keep a line, among the missed ones too where it is not good."""
        self.lines.append(f"{'ok    ' if good else 'MISSED'}  {line}")
        if not good:
            self.missed.append(line)


def check(folder: Path, bars: Bars) -> Findings:
    """All checks of the run folders in `folder`; `RunError` where the demo is not finished or not there."""
    runs = {path.parent.name: open_run(path.parent) for path in sorted(folder.glob(f"*/{RECIPE}"))}
    if not runs:
        raise RunError(f"{folder}: holds no run folders; run the demo first: make demo")
    marks = {name: read_done(run) for name, run in runs.items()}
    found = Findings([], [])
    _check_gain(runs, bars, found)
    _check_time(runs, marks, bars, found)
    _check_memory(runs, marks, bars, found)
    _check_disjoint(runs, found)
    return found


# ---- gain


def _check_gain(runs: dict[str, Run], bars: Bars, found: Findings) -> None:
    branches = {name for name, run in runs.items() if isinstance(run.stage, TrainStage) and isinstance(run.stage.start, Branch)}
    from_branch = [run for run in _of(runs, RLStage) if run.stage.start.stage in branches]
    report = _of(runs, ReportStage)[0]  # by name; demo:control puts another beside the demo's own
    scores = read_json(report.path / SUMMARY, "the numbers of a report")["rl_scores"]
    reached = 0
    for run in from_branch:
        rows = [row for row in scores if row["stage"] == run.name and row["before"] and row["after"]]
        gains = [row["after"]["accuracy"] - row["before"]["accuracy"] for row in rows]
        reached += bool(gains) and min(gains) >= bars.least_gain
        words = [f"{row['set']} {row['before']['accuracy']:.3f} -> {row['after']['accuracy']:.3f}" for row in rows]
        found.lines.append(f"        gain: {run.name}: {', '.join(words) or 'not measured before and after'}")
    found.add(
        f"gain: {reached} of {len(from_branch)} runs of RL from a branch gain at least {bars.least_gain:g}; {bars.least_branches} must",
        reached >= bars.least_branches,
    )


# ---- time and memory


def _check_time(runs: dict[str, Run], marks: dict[str, Any], bars: Bars, found: Findings) -> None:
    begins = {name: _begun(run) for name, run in runs.items()}
    ends = {name: datetime.fromisoformat(mark["finished_at"]) for name, mark in marks.items()}
    for name in sorted(runs, key=begins.__getitem__):
        found.lines.append(f"        time: {name}: {(ends[name] - begins[name]).total_seconds():.0f} s")
    minutes = (max(ends.values()) - min(begins.values())).total_seconds() / 60
    found.add(f"time: {minutes:.1f} min in all, at most {bars.most_minutes:g}", minutes <= bars.most_minutes)


def _begun(run: Run) -> datetime:
    first = run.path / ATTEMPTS / str(attempt_numbers(run.path)[0]) / RECORD
    return datetime.fromisoformat(read_json(first, "how an attempt began")["started_at"])


def _check_memory(runs: dict[str, Run], marks: dict[str, Any], bars: Bars, found: Findings) -> None:
    used = {run.name: marks[run.name]["peak_memory_bytes"] * run.stage.plan.num_ranks for run in _of(runs, TrainStage | RLStage)}
    most = max(used, key=used.__getitem__)
    gigabytes = used[most] / GIGABYTE
    found.add(f"memory: {gigabytes:.2f} GB at most, in {most}; at most {bars.most_gigabytes:g}", gigabytes <= bars.most_gigabytes)


# ---- disjoint


def _check_disjoint(runs: dict[str, Run], found: Findings) -> None:
    (text,) = _of(runs, TextStage)
    stages = [run.stage for run in _of(runs, RLStage)]
    asked = _problems(text, {one for stage in stages for one in stage.validation.sets})
    files = sorted((text.path / "text").glob("*.jsonl"))
    shared: set[Operands] = set()
    for path in files:
        for number, row in _rows(path):
            overlap = stated(row["text"]) & asked
            shared |= overlap
            if overlap:
                found.lines.append(f"        disjoint: {path.name}:{number} states {_shown(overlap)}")
    learnt = _problems(text, {stage.problems for stage in stages})
    if learnt & asked:
        found.lines.append(f"        disjoint: the problems of RL hold {_shown(learnt & asked)}")
    shared |= learnt & asked
    where = f"{len(files)} files of text and {len(learnt)} pairs of RL"
    good = bool(asked) and bool(files) and bool(learnt) and not shared
    found.add(f"disjoint: {len(shared)} of {len(asked)} pairs of operands of the validation stand in {where}", good)


def _problems(text: Run, sets: set[ProblemSet]) -> set[Operands]:
    """The operands of all problems of some sets, and what their questions state."""
    operands: set[Operands] = set()
    for one in sets:
        for _, row in _rows(text.path / one.path):
            left, right = row["operands"]
            operands |= {pair("-" if row["kind"].endswith("subtract") else "+", left, right), *stated(row["question"])}
    return operands


def stated(text: str) -> set[Operands]:
    """The operands of all sums and differences that a text states."""
    return {pair(sign, int(left), int(right)) for left, sign, right in STATED.findall(text)}


def pair(sign: str, left: int, right: int) -> Operands:
    """12+30, 42-30 and 42-12 are one: (12, 30)."""
    first, second = sorted((left, right) if sign == "+" else (left - right, right))
    return first, second


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, json.loads(line)


def _shown(pairs: set[Operands]) -> str:
    return ", ".join(f"{left}+{right}" for left, right in sorted(pairs)[:3])


def _of(runs: dict[str, Run], kind: Any) -> list[Run]:
    return [run for run in runs.values() if isinstance(run.stage, kind)]


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Print what was found; 0 where every bar is reached, 1 where one is missed or the demo is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/demo"), help="folder of the demo's run folders")
    parser.add_argument("--most-minutes", type=float, default=12.0, help="of all stages; more where the machine is slow or shared")
    parser.add_argument("--most-gigabytes", type=float, default=6.0, help="of any stage, 1e9 bytes each")
    parser.add_argument("--least-gain", type=float, default=0.15, help="of held-out accuracy, absolute")
    parser.add_argument("--least-branches", type=int, default=2, help="runs of RL from a branch that must gain so much")
    words = parser.parse_args(arguments)
    try:
        found = check(words.runs, Bars(words.most_minutes, words.most_gigabytes, words.least_gain, words.least_branches))
    except MegatronExtError as problem:
        print(problem, file=sys.stderr)
        return 1
    for line in found.lines:
        say(line)
    if found.missed:
        print("\n".join(["the demo misses:", *found.missed]), file=sys.stderr)
    return 1 if found.missed else 0


if __name__ == "__main__":
    sys.exit(main())
