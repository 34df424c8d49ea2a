"""The lineage of run folders as text: who starts from whom, how far each has come.

demo  (runs/demo)
  corpus      tokenize  DONE
  base        train     DONE                       tokens 1,024 of 1,024  loss 5.1034  checkpoint 64
  └─ stable   train     attempt 2: running, pid 7  tokens 512 of 4,096    loss 4.8810  checkpoint 32  branch at 1,024 of base
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.stages import TrainStage
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import Manifest, read_corpus, read_manifest
from megatron_ext.runs import RECIPE, Run, attempt_numbers, open_run, read_done, read_json

LATEST = "latest_checkpointed_iteration.txt"
DEPTHS = ("", "*/", "*/*/")  # one run, a graph's folder, a folder of graphs


@dataclass(frozen=True)
class Progress:
    """How far a run has come, read from its folder alone."""

    state: str
    tokens: int | None = None  # trained on by a training stage, held for training by a corpus
    lineage_tokens: int | None = None
    loss: float | None = None
    iteration: int | None = None  # of the newest checkpoint
    manifest: Manifest | None = None  # of the newest checkpoint


def find_runs(folder: Path) -> list[Run]:
    """Every run folder at, or up to two levels below, `folder`; `RunError` where there is none."""
    recipes = [path for depth in DEPTHS for path in sorted(folder.glob(depth + RECIPE))]
    if not recipes:
        raise RunError(f"{folder}: no run folders here (no {RECIPE}); `megatron-ext launch RECIPE --local --runs DIR` writes them into DIR")
    return [open_run(path.parent) for path in recipes]


def tree_text(runs_dir: Path) -> str:
    """One block for each graph's folder: data stages, then training along its starts, then what reads it."""
    folders: dict[Path, list[Run]] = {}
    for run in find_runs(runs_dir):
        folders.setdefault(run.path.parent, []).append(run)
    return "\n\n".join(_graph_text(folder, runs) for folder, runs in folders.items())


def _graph_text(folder: Path, runs: list[Run]) -> str:
    children = _children(runs)
    by_path = {run.path: run for run in runs}
    trained = [run for run in runs if run.stage.kind == "train" or run.path in children]
    below = {path for members in children.values() for path in members}
    roots = [run for run in trained if run.path not in below]
    paths = {run.path for run in trained}
    others = sorted((run for run in runs if run.path not in paths), key=lambda run: (_depth(run, by_path), run.name))
    before = [("", run) for run in others if not paths & set(run.inputs.values())]
    after = [("", run) for run in others if paths & set(run.inputs.values())]
    drawn = [line for root in roots for line in _branches(root, children, by_path)]
    rows = [[prefix + run.name, run.stage.kind, *_cells(run, progress(run))] for prefix, run in (*before, *drawn, *after)]
    return "\n".join([f"{runs[0].graph}  ({os.path.relpath(folder)})", *(f"  {line}" for line in columns(rows))])


def _children(runs: list[Run]) -> dict[Path, list[Path]]:
    """Parent -> the runs that start from it, for the parents that stand in the same folder."""
    known = {run.path for run in runs}
    children: dict[Path, list[Path]] = {}
    for run in runs:
        parent = run.inputs.get("start")
        if parent in known:
            children.setdefault(parent, []).append(run.path)
    return children


def _depth(run: Run, by_path: dict[Path, Run]) -> int:
    parents = [by_path[path] for path in run.inputs.values() if path in by_path]
    return 1 + max((_depth(parent, by_path) for parent in parents), default=0)


def _branches(
    run: Run, children: dict[Path, list[Path]], by_path: dict[Path, Run], lead: str = "", mark: str = ""
) -> list[tuple[str, Run]]:
    """A run and all that starts from it, each with the lines drawn before its name."""
    lines = [(lead + mark, run)]
    inner = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[mark]
    below = children.get(run.path, [])
    for path in below:
        lines += _branches(by_path[path], children, by_path, inner, "└─ " if path == below[-1] else "├─ ")
    return lines


def progress(run: Run) -> Progress:
    """State, tokens, last loss and newest checkpoint of a run."""
    records = read_metrics(run.metrics_path, "train")
    last: dict[str, Any] = records[-1] if records else {}
    iteration = _latest_iteration(run)
    return Progress(
        state=state(run),
        tokens=last.get("tokens") if run.stage.kind != "tokenize" else _corpus_tokens(run),
        lineage_tokens=last.get("lineage_tokens"),
        loss=last.get("loss"),
        iteration=iteration,
        manifest=None if iteration is None else _manifest(run, iteration),
    )


def _corpus_tokens(run: Run) -> int | None:
    if not run.is_done():
        return None
    return sum(source.tokens for source in read_corpus(run.path).sources.values())


def state(run: Run) -> str:
    """DONE, `attempt n: ...` with what is known of its end, or `not started`."""
    if run.is_done():
        try:
            read_done(run)
        except RunError:
            return "DONE, but its mark is not of this recipe"
        return "DONE"
    numbers = attempt_numbers(run.path)
    if not numbers:
        return "not started"
    folder = run.path / "attempts" / str(numbers[-1])
    return f"attempt {numbers[-1]}: {_end(folder)}"


def _end(attempt: Path) -> str:
    if (attempt / "exit.json").is_file():
        values = read_json(attempt / "exit.json", "how an attempt ended")
        first_line = str(values.get("error", "")).partition("\n")[0]
        return f"{values['reason']}: {first_line[:100]}" if first_line else str(values["reason"])
    if not (attempt / "plan.json").is_file():
        return "begun"
    values = read_json(attempt / "plan.json", "how an attempt began")
    if values["host"] != os.uname().nodename:
        return f"running or lost, on {values['host']}"
    alive = Path(f"/proc/{values['pid']}").exists()
    return f"running, pid {values['pid']}" if alive else "killed (no word of its end)"


def _latest_iteration(run: Run) -> int | None:
    path = run.checkpoints_path / LATEST
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise RunError(f"{path}: holds {text[:40]!r}, not the number of a checkpoint; write the newest iter_ folder's number into it")
    return int(text)


def _manifest(run: Run, iteration: int) -> Manifest | None:
    try:
        return read_manifest(run.checkpoints_path / f"iter_{iteration:07d}")
    except CheckpointError:
        return None  # the tree says so, and goes on to the other runs


def _cells(run: Run, done: Progress) -> list[str]:
    checkpoint = "" if done.iteration is None else f"checkpoint {done.iteration}" + ("" if done.manifest else " (no readable manifest)")
    return [
        done.state,
        _tokens(run, done),
        "" if done.lineage_tokens is None else f"lineage {done.lineage_tokens:,}",
        "" if done.loss is None else f"loss {done.loss:.4f}",
        checkpoint,
        _start(run, done.manifest),
    ]


def _tokens(run: Run, done: Progress) -> str:
    if isinstance(run.stage, TrainStage):
        return f"tokens {done.tokens or 0:,} of {run.stage.budget.tokens:,}"
    return "" if done.tokens is None else f"tokens {done.tokens:,}"


def _start(run: Run, manifest: Manifest | None) -> str:
    """Where a run's first weights come from: the manifest knows it, the recipe says what was asked for."""
    start = getattr(run.stage, "start", None)
    if start is None or start.kind == "scratch":
        return "from scratch" if start is not None else ""
    if manifest is not None and manifest.parent is not None:
        return f"{start.kind} of {start.stage} at {manifest.parent.tokens:,} tokens"
    return f"{start.kind} of {start.stage} at {'its last checkpoint' if start.tokens is None else f'{start.tokens:,} tokens'}"


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as aligned lines; a column that is empty everywhere is left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    wide = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  ".join(f"{row[i]:<{wide[i]}}" for i in used).rstrip() for row in rows]
