"""The files of problems that a graph names: are they there, can each problem be read, are held-out ones trained on. No torch.

What reads them knows graders, which nothing here imports: it is asked in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config.base import Json, canonical, to_json
from megatron_ext.config.stages import RLStage
from megatron_ext.config.tasks import ProblemSet
from megatron_ext.launch.findings import Finding, error, ok, warning

READER = "megatron_ext.tasks.problem_files"
FETCH = "python -m tools.fetch_assets"
FETCHED = {  # file -> the name that the command above takes; nothing of the package imports tools, so a test compares the two
    "math500.jsonl": "math500",
    "gsm8k_test.jsonl": "gsm8k",
    "olympiad_bench.jsonl": "olympiad_bench",
    "amc23.jsonl": "amc23",
    "math8k.jsonl": "math8k",
}
FETCHED_INTO = "assets"  # unless told


def problem_findings(stages: Sequence[RLStage]) -> list[Finding]:
    """Findings on each set of problems once, however many stages name it."""
    asked = {canonical([to_json(one) for one in sets]): sets for stage in stages if (sets := _readable_here(stage))}
    trained_on = {stage.problems for stage in stages}
    found = [finding for sets in asked.values() for finding in _of_sets(sets, trained_on)]
    written = {stage.text for stage in stages if stage.text is not None}
    return list(dict.fromkeys([*found, *(ok("problems", f"written by stage {name}") for name in sorted(written))]))


def _readable_here(stage: RLStage) -> list[ProblemSet]:
    """The sets of a stage, the one that is trained on first; relative paths of a text stage's are yet to be written."""
    sets = [stage.problems, *stage.validation.sets]
    return [one for one in sets if stage.text is None or os.path.isabs(one.path)]


def _of_sets(sets: list[ProblemSet], trained_on: set[ProblemSet]) -> list[Finding]:
    """The first set may be trained on. Those that are not there are errors; the others are read."""
    missing = [one for one in sets if not Path(one.path).is_file()]
    found = []
    if missing:
        listed = ", ".join(f"{one.name}: {one.path}" for one in missing)
        found.append(error("problems", f"{len(missing)} of {len(sets)} files are not there: {listed}", _ways_to(missing)))
    there = [one for one in sets if one not in missing]
    if not there:
        return found
    answer = _ask(there)
    if isinstance(answer, Finding):
        return [*found, answer]
    for one, row in zip(there, answer, strict=True):
        found += _of_set(one, row, trained_on=there[0].name if there[0] in trained_on else "")
    return found


def _ways_to(missing: list[ProblemSet]) -> str:
    """How to come by files that are not there."""
    ways = ["correct their paths"]
    if not all(os.path.isabs(one.path) for one in missing):
        ways.append(f"run from the folder that they are relative to (now {Path.cwd()})")
    folders: dict[str, list[str]] = {}
    for path in (Path(one.path) for one in missing):
        if path.name in FETCHED:
            folders.setdefault(str(path.parent), []).append(FETCHED[path.name])
    for folder, names in folders.items():
        into = "" if folder == FETCHED_INTO else f" --into {folder}"
        ways.append(f"fetch with `{FETCH} {' '.join(dict.fromkeys(names))}{into}`")
    return ", or ".join(ways)


def _of_set(one: ProblemSet, row: Json, trained_on: str) -> list[Finding]:
    what = f"problems {one.name}"
    if row["wrong"]:
        return [error(what, row["wrong"])]
    found = [ok(what, f"{row['problems']:,} in {one.path}" + (f", {len(one.leave_out)} left out" if one.leave_out else ""))]
    if row["shared"] and trained_on:
        text = f"{row['shared']:,} of its questions stand in {trained_on} too, which is trained on"
        found.append(warning(what, text, "leave them out of one of the two by leave_out: a score on what was trained on says little"))
    return found


def _ask(sets: list[ProblemSet]) -> list[Json] | Finding:
    """The reader's answer, or an error where its process ended without one."""
    request = json.dumps([to_json(one) for one in sets])
    done = subprocess.run([sys.executable, "-m", READER], input=request, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        answer: list[Json] = json.loads(done.stdout)
        return answer
    end = done.stderr.rstrip().splitlines()[-1:] or ["no word of why"]
    way_out = "install the packages that it names" if "ModuleNotFoundError" in end[0] else "read the files with the stage itself"
    return error("problems", f"what reads {', '.join(one.path for one in sets)} ended with exit code {done.returncode}: {end[0]}", way_out)
