"""The run folder: one stage's recipe, attempts, marks. It is the truth; everything else reads it.

RUN/recipe.json       what the stage is: science (immutable) and plan (may change per attempt)
RUN/provenance.json   what it was made from and with
RUN/attempts/N/       appears by one rename: plan.json, log.txt, exit.json
RUN/metrics.jsonl     every line carries its attempt
RUN/checkpoints/      training and convert stages only
RUN/exports/          Hugging Face folders of a training stage's checkpoints (plan.export_tokens)
RUN/DONE              written last; holds the science hash
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config.base import Json, content_hash, from_json, to_json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.stages import Stage, science
from megatron_ext.errors import RunError

FORMAT = 1
RECIPE, PROVENANCE, DONE, METRICS, ATTEMPTS, CHECKPOINTS, EXPORTS = (
    "recipe.json", "provenance.json", "DONE", "metrics.jsonl", "attempts", "checkpoints", "exports",
)  # fmt: skip
PARTS = "parts.json"  # which code did slices ahead of a stage


@dataclass(frozen=True)
class Run:
    """An opened run folder: its stage, the run folders it reads (by role), its science hash."""

    path: Path
    graph: str
    stage: Any
    inputs: dict[str, Path]
    science_hash: str
    cluster: Cluster | None = None
    input_hashes: dict[str, str] = field(default_factory=dict)  # role -> science hash of the run it was made for

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.stage.name)

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl of the run."""
        return self.path / METRICS

    @property
    def checkpoints_path(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.path / CHECKPOINTS

    def is_done(self) -> bool:
        """Whether the completion mark stands."""
        return (self.path / DONE).is_file()


def science_hash(stage: Any, input_hashes: dict[str, str]) -> str:
    """Hash of what a stage means: its science and, through their hashes, all that it was made from."""
    return content_hash({"science": science(stage), "inputs": input_hashes})


def brief(path: str | Path) -> str:
    """A path for a message: from the present folder where it lies below that, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def atomic_write(path: Path, text: str) -> None:
    """Write a whole file or none: aside, fsynced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def force_to_disk(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write readable JSON atomically."""
    atomic_write(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, error: type[Exception] = RunError) -> Any:
    """Read a JSON file of ours; a missing or broken one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file ({what})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{path}: not valid JSON ({what}): {cause}; it was not written by this program, or was cut short") from None


def write_run(path: Path, graph: str, stage: Any, inputs: dict[str, Path], cluster: Cluster | None = None) -> Run:
    """Create or refresh a run folder; `RunError` where one that was begun holds other science, or where it cannot be written."""
    path = path.resolve()
    parents = {role: open_run(folder) for role, folder in inputs.items()}
    hashes = {role: parent.science_hash for role, parent in parents.items()}
    values = {
        "format": FORMAT,
        "graph": graph,
        "science_hash": refuse_other_science(path, stage, hashes),
        "inputs": {role: {"path": os.path.relpath(p.path, path), "science_hash": p.science_hash} for role, p in parents.items()},
        "cluster": to_json(cluster) if cluster else None,
        "stage": to_json(stage),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / RECIPE, values)
    except OSError as cause:
        raise RunError(
            f"{path}: the run folder cannot be written ({cause.strerror or cause}); "
            f"free space or quota, mend its permissions, or name another --runs"
        ) from None
    return open_run(path)


def open_run(path: Path) -> Run:
    """Read a run folder; `RunError` names what is missing or altered."""
    path = Path(path).resolve()
    if not (path / RECIPE).is_file():
        raise RunError(f"{path}: not a run folder (no {RECIPE}); `megatron-ext launch RECIPE` writes run folders")
    values = read_json(path / RECIPE, "the recipe of a run", RunError)
    if values.get("format") != FORMAT:
        raise RunError(f"{path / RECIPE}: format {values.get('format')!r}, this program reads {FORMAT}; use the version that wrote it")
    where = str(path / RECIPE)
    stage = from_json(Stage, values["stage"], where)
    hashes = {role: item["science_hash"] for role, item in values["inputs"].items()}
    found = science_hash(stage, hashes)
    if found != values["science_hash"]:
        raise RunError(
            f"{where}: its science hashes to {found[:12]}, but it says {values['science_hash'][:12]}: the file was edited by hand. "
            f"Change the recipe and launch it under another name instead"
        )
    cluster = from_json(Cluster, values["cluster"], where) if values["cluster"] else None
    folders = {role: (path / item["path"]).resolve() for role, item in values["inputs"].items()}
    return Run(path, values["graph"], stage, folders, found, cluster, hashes)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Readable lines for every value that differs between two JSON trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in dict.fromkeys([*old, *new])
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {json.dumps(old)[:200]} -> {json.dumps(new)[:200]}"]


def refuse_other_science(path: Path, stage: Any, input_hashes: dict[str, str]) -> str:
    """The hash of what a stage would be; `RunError` with every difference where the folder was begun with another recipe.

    A folder that was written and never begun holds nothing of its recipe yet, and may take another.
    """
    found = science_hash(stage, input_hashes)
    old = read_json(path / RECIPE, "the recipe of a run") if (path / RECIPE).is_file() else None
    if old is None or old.get("science_hash") == found or not _was_begun(path):
        return found
    new = {"stage": to_json(stage), "inputs": {role: {"science_hash": value} for role, value in input_hashes.items()}}
    lines = differences(_identity(old), _identity(new))
    state = "is DONE" if (path / DONE).is_file() else "was begun"
    raise RunError(
        f"{path}: this run {state} with another recipe, and its science cannot change:\n  " + "\n  ".join(lines) + "\n"
        f"Launch into another folder (--runs), or delete {path} to start this stage over"
    )


def _was_begun(path: Path) -> bool:
    return bool(attempt_numbers(path)) or (path / DONE).is_file() or (path / CHECKPOINTS).is_dir()


def _identity(values: Json) -> Json:
    """What of a recipe.json is science: the stage without its plan, and the hashes of its inputs."""
    inputs = {role: item["science_hash"][:12] for role, item in values["inputs"].items()}
    return {**{k: v for k, v in values["stage"].items() if k != "plan"}, "inputs": inputs}


def mark_done(run: Run, summary: Json) -> None:
    """Write the completion mark, last of all."""
    write_json(run.path / DONE, {"science_hash": run.science_hash, "finished_at": now(), **summary})


def read_done(run: Run) -> Json:
    """The completion mark's content; `RunError` where the run is not done."""
    if not run.is_done():
        raise RunError(
            f"{run.path}: stage '{run.name}' is not finished (no {DONE}); run it first: megatron-ext {run.stage.kind} {run.path}"
        )
    values: Json = read_json(run.path / DONE, "the completion mark")
    if values.get("science_hash") != run.science_hash:
        raise RunError(
            f"{run.path / DONE}: holds science {str(values.get('science_hash'))[:12]}, "
            f"the recipe holds {run.science_hash[:12]}; delete the run to redo it"
        )
    return values


def attempt_numbers(run_path: Path) -> list[int]:
    """Numbers of the attempts so far, ascending."""
    folder = run_path / ATTEMPTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def now() -> str:
    """The time with its zone, for records."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
