"""The lineage of run folders as text: who starts from whom and where, how far each has come, what is odd about it.

demo  (runs/demo)
  corpus       tokenize  DONE
  base         train     DONE                       tokens 1,024 of 1,024  checkpoint 64
  └─ stable    train     attempt 2: running, pid 7  tokens 512 of 4,096    checkpoint 32  weights of base at 1,024 tokens, LR 0.003
     │ pinned at 256 tokens
     └─ decay  train     not started                tokens 0 of 512                       branch of stable at 256 tokens, LR 0.003

Children stand by the point where they leave their parent, then in the order in which a report of the
folder names them (the graph's order, which no other file keeps), then by name. Below all of them stand
the errors that ended attempts, whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.attempts import EXIT, FALLBACK, RECORD, Attempt, live_attempt
from megatron_ext.config.base import Json
from megatron_ext.config.stages import RLStage, TrainStage
from megatron_ext.errors import RunError
from megatron_ext.launch.joints import joint_of, parent_change, rate_words, readable_manifest
from megatron_ext.launch.tree_rl import accuracy_words, step_words
from megatron_ext.launch.verbs import attempt_codes
from megatron_ext.metrics import read_metrics
from megatron_ext.provenance import Manifest, read_corpus
from megatron_ext.runs import ATTEMPTS, EXPORTS, RECIPE, Run, attempt_numbers, brief, open_run, read_done, read_json
from megatron_ext.snapshot import code_words
from megatron_ext.tracker import newest, published

SHOWN = 100  # characters of a reason
DEPTHS = ("", "*/", "*/*/")  # one run, a graph's folder, a folder of graphs


@dataclass(frozen=True)
class Progress:
    """How far a run has come, read from its folder alone."""

    state: str
    tokens: int | None = None  # trained on by a training stage, sampled by an rl stage, held for training by a corpus
    lineage_tokens: int | None = None
    loss: float | None = None
    iteration: int | None = None  # of the newest checkpoint
    manifest: Manifest | None = None  # of the newest checkpoint
    damage: str = ""  # what is wrong with the tracker


def find_runs(folder: Path) -> list[Run]:
    """Every run folder at, or up to two levels below, `folder`; `RunError` where there is none."""
    recipes = [path for depth in DEPTHS for path in sorted(folder.glob(depth + RECIPE))]
    if not recipes:
        raise RunError(f"{folder}: no run folders here (no {RECIPE}); `megatron-ext launch RECIPE --local --runs DIR` writes them into DIR")
    return [open_run(path.parent) for path in recipes]


def tree_command(runs: Path) -> None:
    """Print the lineage of the run folders under a folder."""
    print(tree_text(runs))


def tree_text(runs_dir: Path) -> str:
    """One block for each graph's folder: data stages, then training along its starts, then what reads it."""
    folders: dict[Path, list[Run]] = {}
    for run in find_runs(runs_dir):
        folders.setdefault(run.path.parent, []).append(run)
    return "\n\n".join(_graph_text(folder, runs) for folder, runs in folders.items())


def _graph_text(folder: Path, runs: list[Run]) -> str:
    runs = in_order(runs)
    children = _children(runs)
    by_path = {run.path: run for run in runs}
    trained = [run for run in runs if run.stage.kind in ("train", "rl") or run.path in children]
    below = {path for members in children.values() for path in members}
    roots = [run for run in trained if run.path not in below]
    paths = {run.path for run in trained}
    others = sorted((run for run in runs if run.path not in paths), key=lambda run: (depth(run, by_path), run.name))
    before = [_Line("", "", run) for run in others if not paths & set(run.inputs.values())]
    after = [_Line("", "", run) for run in others if paths & set(run.inputs.values())]
    drawn = [*before, *(line for root in roots for line in _branches(root, children, by_path)), *after]
    made = [progress(line.run) for line in drawn]
    rows = [[line.mark + line.run.name, line.run.stage.kind, *_cells(line.run, done)] for line, done in zip(drawn, made, strict=True)]
    text = [f"{runs[0].graph}  ({brief(folder)})"]
    for line, row, done in zip(drawn, columns(rows), made, strict=True):
        text += [f"  {row}", *(f"  {line.below}{note}" for note in notes(line.run, done))]
    return "\n".join([*text, *(f"  {words}" for run in runs for words in _error_lines(run))])


@dataclass(frozen=True)
class _Line:
    """A run and what is drawn before its name, and before the notes under it."""

    mark: str
    below: str
    run: Run


def in_order(runs: list[Run]) -> list[Run]:
    """Runs by the point where they leave their parent, then as a report names them, then by name."""
    reports = [run.stage.stages for run in runs if run.stage.kind == "report"]
    named = [name for stages in sorted(reports, key=len, reverse=True) for name in stages]

    def key(run: Run) -> tuple[int, int, str]:
        joint = joint_of(run, None)
        return (joint.tokens or 0 if joint else 0), named.index(run.name) if run.name in named else len(named), run.name

    return sorted(runs, key=key)


def _children(runs: list[Run]) -> dict[Path, list[Path]]:
    """Parent -> the runs that start from it, for the parents that stand in the same folder."""
    known = {run.path for run in runs}
    children: dict[Path, list[Path]] = {}
    for run in runs:
        parent = run.inputs.get("start")
        if parent in known:
            children.setdefault(parent, []).append(run.path)
    return children


def depth(run: Run, by_path: dict[Path, Run]) -> int:
    """How many runs stand before a run, along the longest way."""
    parents = [by_path[path] for path in run.inputs.values() if path in by_path]
    return 1 + max((depth(parent, by_path) for parent in parents), default=0)


def _branches(run: Run, children: dict[Path, list[Path]], by_path: dict[Path, Run], lead: str = "", mark: str = "") -> list[_Line]:
    """A run and all that starts from it, each with the lines drawn before it."""
    inner = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[mark]
    below = children.get(run.path, [])
    lines = [_Line(lead + mark, inner + ("│ " if below else "  "), run)]
    for path in below:
        lines += _branches(by_path[path], children, by_path, inner, "└─ " if path == below[-1] else "├─ ")
    return lines


def progress(run: Run) -> Progress:
    """State, tokens, last loss and newest checkpoint of a run."""
    records = read_metrics(run.metrics_path, "rl" if run.stage.kind == "rl" else "train")
    last: dict[str, Any] = records[-1] if records else {}
    iteration, damage = newest(run.checkpoints_path)
    return Progress(
        state=state(run) + (", its tracker is damaged" if damage else ""),
        tokens=last.get("tokens") if run.stage.kind != "tokenize" else _corpus_tokens(run),
        lineage_tokens=last.get("lineage_tokens"),
        loss=last.get("loss"),
        iteration=iteration,
        manifest=None if iteration is None else readable_manifest(run, iteration),
        damage=damage,
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
    return f"attempt {numbers[-1]}: {_end(run, Attempt(numbers[-1], run.path / ATTEMPTS / str(numbers[-1])))}"


def _end(run: Run, attempt: Attempt) -> str:
    if ended := _recorded_end(attempt):
        kind = ended.get("error", "").partition(":")[0]  # its message is too long for a row
        return f"{ended['reason']}: {kind}" if kind else str(ended["reason"])
    if not (attempt.path / RECORD).is_file():
        return "begun"
    host = attempt.record["host"]
    where = f"pid {attempt.record['pid']}" + ("" if host == os.uname().nodename else f" on {host}")
    try:
        return f"running, {where}" if live_attempt(run.path) else "killed (no word of its end)"
    except OSError:  # a heartbeat is timed by a file beside it, which who may only read cannot make
        return f"running or killed, {where}"


def _recorded_end(attempt: Attempt) -> Json:
    """How an attempt says that it ended; empty where it has not."""
    values: Json = read_json(attempt.path / EXIT, "how an attempt ended") if (attempt.path / EXIT).is_file() else {}
    return values


def _error_lines(run: Run) -> list[str]:
    """The error that ended the newest attempt of a stage that is not done."""
    numbers = [] if run.is_done() else attempt_numbers(run.path)
    ended = _recorded_end(Attempt(numbers[-1], run.path / ATTEMPTS / str(numbers[-1]))) if numbers else {}
    first, *others = str(ended.get("error", "")).splitlines() or [""]
    return [f"{run.name}, attempt {numbers[-1]}, {ended['reason']}: {first}", *(f"  {line}" for line in others)] if first else []


def _cells(run: Run, done: Progress) -> list[str]:
    checkpoint = "" if done.iteration is None else f"checkpoint {done.iteration}" + ("" if done.manifest else " (no readable manifest)")
    return [
        done.state,
        _tokens(run, done),
        "" if done.lineage_tokens is None else f"lineage {done.lineage_tokens:,}",
        _result(run, done),
        checkpoint,
        _start(run, done.manifest),
    ]


def _tokens(run: Run, done: Progress) -> str:
    if isinstance(run.stage, TrainStage):
        return f"tokens {done.tokens or 0:,} of {run.stage.budget.tokens:,}"
    if isinstance(run.stage, RLStage):
        return step_words(run)
    return "" if done.tokens is None else f"tokens {done.tokens:,}"


def _result(run: Run, done: Progress) -> str:
    """The last loss; of reinforcement learning, whose loss says nothing, the first and last accuracies."""
    if isinstance(run.stage, RLStage):
        return accuracy_words(run)
    return "" if done.loss is None else f"loss {done.loss:.4f}"


def _start(run: Run, manifest: Manifest | None) -> str:
    joint = joint_of(run, manifest)
    if joint is None:
        return "from scratch" if isinstance(run.stage, TrainStage) else ""
    at = "its last checkpoint" if joint.is_last else ""
    if joint.tokens is not None:
        at = f"{at} ({joint.tokens:,} tokens)" if at else f"{joint.tokens:,} tokens"
    return f"{joint.start} of {joint.stage} at {at}{rate_words(joint)}"


def notes(run: Run, done: Progress) -> list[str]:
    """What a run's row has no room for: a damaged tracker, pinned and thinned checkpoints, codes, fall-backs, a parent that changed."""
    joint = joint_of(run, done.manifest)
    lines = [done.damage, _kept_words(run), code_words(attempt_codes(run)), *fallbacks(run), parent_change(joint) if joint else ""]
    return [line for line in lines if line]


def _kept_words(run: Run) -> str:
    """Pinned checkpoints besides the last, those without optimizer state, and Hugging Face folders."""
    exports = sorted(int(path.name.removeprefix("iter_")) for path in (run.path / EXPORTS).glob("iter_*"))
    if isinstance(run.stage, RLStage) and exports:
        return f"exported at step {', '.join(f'{step:,}' for step in exports)}"
    if not isinstance(run.stage, TrainStage):
        return ""
    kept = [manifest for i in published(run.checkpoints_path) if (manifest := readable_manifest(run, i))]
    pinned = [f"{m.tokens:,}" for m in kept if m.pinned and m.tokens < run.stage.budget.tokens]
    thinned = [f"{m.tokens:,}" for m in kept if m.thinned_from]
    exported = [f"{step * run.stage.budget.tokens_per_batch:,}" for step in exports]
    kinds = (("pinned", pinned), ("weights only", thinned), ("exported", exported))
    words = [f"{what} at {', '.join(tokens)} tokens" for what, tokens in kinds if tokens]
    return "; ".join(words)


def fallbacks(run: Run) -> list[str]:
    """A line for each attempt that went back to an older checkpoint than the newest."""
    paths = {number: run.path / ATTEMPTS / str(number) / FALLBACK for number in attempt_numbers(run.path)}
    found = {number: read_json(path, "why an attempt fell back") for number, path in paths.items() if path.is_file()}
    return [
        f"attempt {number} fell back from {v['from'] or 'a damaged tracker'} to {v['to']}: {_first_line(v['reason'])}"
        for number, v in found.items()
    ]


def _first_line(text: Any) -> str:
    return str(text).partition("\n")[0][:SHOWN]


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as aligned lines; a column that is empty everywhere is left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    wide = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  ".join(f"{row[i]:<{wide[i]}}" for i in used).rstrip() for row in rows]
