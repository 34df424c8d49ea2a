"""One immutable picture of the stages that a report names and of their ancestors, from their run folders.

Nothing is computed here: `tables` turns this into numbers, `figures` into drawings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ext.attempts import EXIT, FALLBACK, RECORD
from megatron_ext.config.base import Json
from megatron_ext.config.stages import RLStage, TrainStage, inputs
from megatron_ext.errors import CheckpointError
from megatron_ext.goodput import Goodput, Interval, goodput, interval
from megatron_ext.metrics import Record, read_metrics
from megatron_ext.provenance import CORPUS, MANIFEST, CorpusIndex, Manifest, file_sha256, read_corpus, read_manifest
from megatron_ext.runs import ATTEMPTS, CHECKPOINTS, PROVENANCE, RECIPE, Run, attempt_numbers, open_run, read_done, read_json
from megatron_ext.tracker import iteration_path, newest

State = Literal["done", "begun", "not begun", "missing"]


@dataclass(frozen=True)
class AttemptData:
    """One try at a stage: when it began, under which plan, and how it ended ('' where it left no word)."""

    number: int
    started_at: str = ""
    plan: Json = field(default_factory=dict)
    reason: str = ""
    ended_at: str = ""
    error: str = ""
    code_hash: str = ""
    fallback: Json = field(default_factory=dict)  # from, to and reason, where it went back to an older checkpoint


@dataclass(frozen=True)
class StageData:
    """What one run folder says. `config` is None where the folder is missing; records are those that stand."""

    name: str
    state: State
    config: Any = None
    science_hash: str = ""
    parents: dict[str, str] = field(default_factory=dict)  # role -> name of a stage
    attempts: tuple[AttemptData, ...] = ()
    starts: dict[int, int] = field(default_factory=dict)  # attempt -> step it began after
    train: tuple[Record, ...] = ()
    validation: tuple[Record, ...] = ()
    rl: tuple[Record, ...] = ()  # one a rollout step
    rl_validation: tuple[Record, ...] = ()  # one a held-out set of problems
    manifest: Manifest | None = None  # of the newest checkpoint
    tracker_damage: str = ""  # what is wrong with the file that names it
    parent_sha256: str = ""  # of the manifest of the checkpoint that it started from, as that is now; '' where it is gone
    parent_thinned_from: str = ""  # what that was before its optimizer state was removed
    corpus: CorpusIndex | None = None
    done: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)
    time: Goodput = field(default_factory=Goodput)  # what the stage made of it
    save_interval: Interval | None = None

    @property
    def kind(self) -> str:
        """The stage's kind, or 'unknown' where its folder is missing."""
        return str(self.config.kind) if self.config is not None else "unknown"

    @property
    def is_training(self) -> bool:
        """Whether the stage trains (and so has a mixture, a schedule and metrics)."""
        return isinstance(self.config, TrainStage)

    @property
    def is_rl(self) -> bool:
        """Whether the stage is reinforcement learning."""
        return isinstance(self.config, RLStage)

    @property
    def steps(self) -> tuple[Record, ...]:
        """Its steps that were recorded, training or rollout steps."""
        return self.rl if self.is_rl else self.train


@dataclass(frozen=True)
class Reading:
    """All that a report draws from: the stages it names and their ancestors, each after its parents."""

    title: str
    graph: str
    stages: tuple[StageData, ...]

    @property
    def training(self) -> tuple[StageData, ...]:
        """The training stages, in order."""
        return tuple(s for s in self.stages if s.is_training)

    @property
    def rl(self) -> tuple[StageData, ...]:
        """The stages of reinforcement learning, in order."""
        return tuple(s for s in self.stages if s.is_rl)

    @property
    def learning(self) -> tuple[StageData, ...]:
        """Both, in order: every stage that makes weights from weights."""
        return tuple(s for s in self.stages if s.is_training or s.is_rl)

    def find(self, name: str) -> StageData | None:
        """The stage called `name`, if the report names it."""
        return next((s for s in self.stages if s.name == name), None)


def gather(run: Run) -> Reading:
    """Read the run folders that the report names, and those that they were made from, ancestors first.

    A missing folder or a damaged tracker is said in the reading; another damaged file raises the error that names it.
    """
    found: dict[str, StageData] = {}
    for name, folder in run.inputs.items():
        _visit(name, folder, found)
    return Reading(run.stage.title, run.graph, tuple(found.values()))


def _visit(name: str, folder: Path, found: dict[str, StageData]) -> None:
    if name in found:
        return
    if not (folder / RECIPE).is_file():
        found[name] = StageData(name, "missing")
        return
    run = open_run(folder)
    for role, parent in inputs(run.stage).items():
        _visit(parent, run.inputs[role], found)
    found[name] = _stage(run)


def _stage(run: Run) -> StageData:
    attempts = tuple(_attempt(run.path, number) for number in attempt_numbers(run.path))
    records = read_metrics(run.metrics_path)
    state: State = "done" if run.is_done() else "begun" if attempts or records else "not begun"
    has_provenance = (run.path / PROVENANCE).is_file()
    iteration, damage = newest(run.checkpoints_path)
    manifest = None if iteration is None else read_manifest(iteration_path(run.checkpoints_path, iteration))
    parent_sha256, parent_thinned_from = _parent_now(run, manifest)
    time = goodput(run)
    return StageData(
        name=run.name,
        state=state,
        config=run.stage,
        science_hash=run.science_hash,
        parents=inputs(run.stage),
        attempts=attempts,
        starts={r["attempt"]: r["step"] for r in records if r["kind"] == "attempt"},
        train=_by_step(records, "train"),
        validation=_by_step(records, "validation"),
        rl=_by_step(records, "rl"),
        rl_validation=_by_step(records, "rl_validation"),
        manifest=manifest,
        tracker_damage=damage,
        parent_sha256=parent_sha256,
        parent_thinned_from=parent_thinned_from,
        corpus=read_corpus(run.path) if (run.path / CORPUS).is_file() else None,
        done=read_done(run) if state == "done" else {},
        provenance=read_json(run.path / PROVENANCE, "what the run was made with") if has_provenance else {},
        time=time,
        save_interval=interval(run, time),
    )


def _by_step(records: list[Record], kind: str) -> tuple[Record, ...]:
    return tuple(sorted((r for r in records if r["kind"] == kind), key=lambda r: int(r["step"])))


def _attempt(folder: Path, number: int) -> AttemptData:
    path = folder / ATTEMPTS / str(number)
    plan = read_json(path / RECORD, "how an attempt began") if (path / RECORD).is_file() else {}
    end = read_json(path / EXIT, "how an attempt ended") if (path / EXIT).is_file() else {}
    fallback = read_json(path / FALLBACK, "why an attempt fell back") if (path / FALLBACK).is_file() else {}
    return AttemptData(
        number=number,
        started_at=str(plan.get("started_at", "")),
        plan=plan.get("plan", {}),
        reason=str(end.get("reason", "")),
        ended_at=str(end.get("at", "")),
        error=str(end.get("error", "")),
        code_hash=str(plan.get("code_hash", "")),
        fallback=fallback,
    )


def _parent_now(run: Run, manifest: Manifest | None) -> tuple[str, str]:
    """Of the checkpoint that a run started from: its manifest's hash now, and the one from before it was thinned."""
    if manifest is None or manifest.parent is None:
        return "", ""
    checkpoint = iteration_path(run.inputs["start"] / CHECKPOINTS, manifest.parent.iteration)
    if not (checkpoint / MANIFEST).is_file():
        return "", ""
    found = file_sha256(checkpoint / MANIFEST)
    if found == manifest.parent.manifest_sha256:
        return found, ""
    try:
        return found, read_manifest(checkpoint).thinned_from
    except CheckpointError:  # damaged: its hash says enough
        return found, ""
