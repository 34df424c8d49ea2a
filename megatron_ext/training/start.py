"""Where a stage's first weights come from: its own last checkpoint, its parent's, or its seed.

| start   | weights | optimizer | data order              | tokens, schedule |
|---------|---------|-----------|-------------------------|------------------|
| scratch | seed    | fresh     | from 0                  | from 0           |
| weights | parent  | fresh     | from 0                  | from 0           |
| branch  | parent  | parent    | on from parent's ledger | from 0           |
| resume  | own     | own       | on                      | on               |

A stage that has published a checkpoint resumes; otherwise its recipe's start holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.attempts import Attempt
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.load import load_state
from megatron_ext.config.base import to_json
from megatron_ext.config.plan import LAYOUT_KEYS
from megatron_ext.config.stages import Scratch
from megatron_ext.data.prepare import Prepared, check_tokenizer
from megatron_ext.distributed import Groups
from megatron_ext.errors import CheckpointError, RunError
from megatron_ext.provenance import MANIFEST, Manifest, Parent, file_sha256, read_manifest
from megatron_ext.runs import Run, open_run
from megatron_ext.training.fallback import check_whole, newest_whole
from megatron_ext.training.state import (
    Progress,
    TrainState,
    build_state,
    load_model,
    load_optimizer,
    sharded_model,
    sharded_state,
)


@dataclass(frozen=True)
class Began:
    """The state that training goes on from, how it came about, and where from."""

    state: TrainState
    progress: Progress
    how: str
    parent: Parent | None
    manifest: Manifest | None = None  # of the checkpoint that was loaded, this stage's or its parent's
    path: Path | None = None  # of that checkpoint


def begin(run: Run, groups: Groups, attempt: Attempt, prepared: Prepared | None) -> Began:
    """Build model and optimizer and load what the start says; `CheckpointError` where it cannot be. None: a stage without a corpus."""
    own = newest_whole(run, groups, attempt)
    return first_weights(run, groups, prepared) if own is None else resume(run, groups, own)


def reload(run: Run, groups: Groups, attempt: Attempt, state: TrainState) -> Began | None:
    """The stage's newest checkpoint loaded over `state`; None, and `state` as it was, where the stage has published none."""
    own = newest_whole(run, groups, attempt)
    return None if own is None else resume(run, groups, own, state)


def first_weights(run: Run, groups: Groups, prepared: Prepared | None) -> Began:
    """The state before a stage's first step: its parent's checkpoint, or its seed."""
    if isinstance(run.stage.start, Scratch):
        return Began(build_state(run.stage, groups, run.stage.seed), Progress(), "scratch", None)
    path, manifest = parent_checkpoint(run)
    check_whole(path, groups)
    if prepared is not None:
        check_tokenizer(prepared.corpus, manifest.tokenizer_hash, f"the checkpoint {path}")
        _check_ledger(prepared, manifest, path)
    state = build_state(run.stage, groups, None)
    if run.stage.start.kind == "branch":
        _load_all(state, run, path, manifest)
    else:
        load_model(state, load_state(sharded_model(state), path))
        state.optimizer.reload_model_params()
    progress = Progress(lineage_tokens=manifest.lineage_tokens)
    return Began(state, progress, run.stage.start.kind, _parent(run, path, manifest), manifest, path)


def parent_checkpoint(run: Run) -> tuple[Path, Manifest]:
    """The checkpoint that a `weights` or `branch` start names; 'last' asks for a finished parent."""
    parent = open_run(run.inputs["start"])
    if parent.science_hash != run.input_hashes["start"]:
        raise RunError(
            f"{parent.path}: holds science {parent.science_hash[:12]}, stage '{run.name}' was made for {run.input_hashes['start'][:12]}: "
            f"the parent was begun again with another recipe; delete {run.path} and launch the graph again"
        )
    tokens = run.stage.start.tokens
    if tokens is None and not parent.is_done():
        raise RunError(
            f"{parent.path}: stage '{run.name}' starts from the last checkpoint of '{parent.name}', which is not finished; "
            f"run it to its end, or name a point of it: {run.stage.start.kind.capitalize()}(stage='{parent.name}', tokens=...)"
        )
    path, manifest = folders.find(parent.checkpoints_path, tokens, parent.name)
    if manifest.science_hash != parent.science_hash:
        raise CheckpointError(
            f"{path}: belongs to science {manifest.science_hash[:12]}, its run '{parent.name}' is {parent.science_hash[:12]}; "
            f"the checkpoint was copied from another run: remove it from {parent.checkpoints_path}"
        )
    return path, manifest


def layout_of(run: Run, pinned: bool) -> str:
    """How the optimizer is written: so that any plan can load it (pinned), or cheaply."""
    if not run.stage.plan.distributed_optimizer:
        return "replicated"
    return "fully_reshardable" if pinned else "dp_reshardable"


def resume(run: Run, groups: Groups, path: Path, state: TrainState | None = None) -> Began:
    """One of the stage's own checkpoints, loaded over `state` or (None) into a state made for it."""
    manifest = read_manifest(path)
    if manifest.science_hash != run.science_hash:
        raise CheckpointError(
            f"{path}: belongs to science {manifest.science_hash[:12]}, this run is {run.science_hash[:12]}; "
            f"the checkpoint was copied from another run: remove it from {run.checkpoints_path}"
        )
    state = state or build_state(run.stage, groups, None)
    _load_all(state, run, path, manifest)
    progress = Progress(manifest.iteration, manifest.tokens, manifest.lineage_tokens)
    return Began(state, progress, "resume", manifest.parent, manifest, path)


def _load_all(state: TrainState, run: Run, path: Path, manifest: Manifest) -> None:
    _check_layout(run, path, manifest)
    loaded = load_state(sharded_state(state, manifest.optimizer_layout, is_loading=True), path)
    load_model(state, loaded)
    load_optimizer(state, loaded)


def _check_layout(run: Run, path: Path, manifest: Manifest) -> None:
    plan = to_json(run.stage.plan)
    if manifest.optimizer_layout == "none":
        raise CheckpointError(f"{path}: holds weights without optimizer state; start from it with Weights(...), not Branch(...)")
    if (manifest.optimizer_layout == "replicated") == plan["distributed_optimizer"]:
        raise CheckpointError(
            f"{path}: was saved with plan.distributed_optimizer={str(not plan['distributed_optimizer']).lower()}; "
            f"use the same value to load its optimizer"
        )
    changed = [f"{key} {manifest.plan[key]} -> {plan[key]}" for key in LAYOUT_KEYS if manifest.plan[key] != plan[key]]
    if manifest.optimizer_layout == "dp_reshardable" and changed:
        readable, _ = folders.manifests(path.parent, folders.published(path.parent))
        others = [i for i, one in readable.items() if one.optimizer_layout == "fully_reshardable"]
        raise CheckpointError(
            f"{path}: a routine checkpoint loads under other data-parallel sizes only, but the plan changed {', '.join(changed)}; "
            f"go back to the old plan, or to a pinned checkpoint: {[f'iter_{i:07d}' for i in others] or 'there is none'}"
        )


def _check_ledger(prepared: Prepared, manifest: Manifest, path: Path) -> None:
    """What the data says the parent has consumed must be what the parent wrote down."""
    computed = {line.source: line.tokens for line in prepared.inherited}
    written = {line.source: line.tokens for line in manifest.ledger}
    if computed != written:
        raise CheckpointError(
            f"{path / MANIFEST}: its ledger says {written}, the parent's data indices say {computed}; "
            f"the parent's corpus or recipe was changed after it was trained"
        )


def _parent(run: Run, path: Path, manifest: Manifest) -> Parent:
    return Parent(
        stage=manifest.stage,
        start=run.stage.start.kind,
        iteration=manifest.iteration,
        tokens=manifest.tokens,
        lineage_tokens=manifest.lineage_tokens,
        learning_rate=manifest.learning_rate,
        science_hash=manifest.science_hash,
        manifest_sha256=file_sha256(path / MANIFEST),
    )
