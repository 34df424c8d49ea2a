"""The run folders that a graph would go on in: is each one the same stage, free, and loadable under the plan as it is now.

`launch` asks some of this too: what could not start is refused before anything is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_ext.attempts import live_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.plan import LAYOUT_KEYS
from megatron_ext.config.stages import Branch, RLStage, TrainStage, Weights, inputs
from megatron_ext.errors import ConfigError, DamagedCheckpointError, RunError
from megatron_ext.launch.findings import Finding, error, ok, warning
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.joints import checkpoint_path, joint_of, latest_iteration, parent_change, readable_manifest
from megatron_ext.launch.plan_words import many
from megatron_ext.launch.verbs import check_code
from megatron_ext.provenance import Manifest, read_manifest
from megatron_ext.runs import CHECKPOINTS, DONE, RECIPE, Run, attempt_numbers, open_run, refuse_other_science, science_hash
from megatron_ext.snapshot import code_hash
from megatron_ext.tracker import newest, published


def folder_findings(graph: Graph, folder: Path) -> list[Finding]:
    """Folders that hold another recipe, each against what its parents' folders hold; and what keeps begun stages from going on."""
    hashes: dict[str, str] = {}  # of what stands in a stage's folder, or would be made there
    refusals: dict[str, str] = {}
    origins: dict[str, str] = {}  # stage -> the first one whose recipe is another, of those that it is made from
    found = []
    for stage in graph.stages:
        parents = {role: hashes[parent] for role, parent in inputs(stage).items()}
        path = folder / stage.name
        origin = next((origins[parent] for parent in inputs(stage).values() if parent in origins), "")
        try:
            hashes[stage.name] = refuse_other_science(path, stage, parents)
            run = open_run(path) if (path / RECIPE).is_file() else None
        except (RunError, OSError) as refusal:
            hashes[stage.name] = _standing(path) or science_hash(stage, parents)
            refusals[stage.name] = str(refusal)
            origin = stage.name
        else:
            if not origin:
                found += _begun(run, stage) if run and not run.is_done() else []
                found += _joint(folder, stage, run)
        if origin:
            origins[stage.name] = origin
    found += [error("run folder", f"{text}{_made_from(name, origins, folder)}", stage=name) for name, text in refusals.items()]
    return found or [ok("run folders", f"nothing in {folder} stands in the way")]


def _standing(path: Path) -> str:
    """The science hash of what a run folder holds; '' where it cannot be read."""
    try:
        return open_run(path).science_hash
    except (RunError, ConfigError, OSError):
        return ""


def _made_from(name: str, origins: dict[str, str], folder: Path) -> str:
    """The begun stages that are made from one whose recipe is another, and could not go on after it either."""
    made = [stage for stage, origin in origins.items() if origin == name != stage and attempt_numbers(folder / stage)]
    return f"\n{many(len(made), 'stage')} made from it would have to start over too: {', '.join(made)}" if made else ""


def unfinished(graph: Graph, folder: Path) -> list[Any]:
    """The stages without a completion mark; `folder` holds the graph's run folders."""
    return [stage for stage in graph.stages if not (folder / stage.name / DONE).is_file()]


def obstacle(runs: Path) -> str:
    """What keeps folders from being made in `runs`, as names and permissions tell it; '' where these do not."""
    path = Path(os.path.realpath(runs))
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written by this user"


def changed_parent(run: Run) -> str:
    """What became of the checkpoint that a run started from; '' where it is the same, or the run has started from none."""
    iteration, _ = newest(run.checkpoints_path)
    joint = joint_of(run, None if iteration is None else readable_manifest(run, iteration))
    return parent_change(joint) if joint else ""


def start_problem(folder: Path, stage: Any) -> str:
    """Why a stage cannot start where its recipe says, from what its parent's run folder holds; '' where it can, or may yet.

    `folder` holds the graph's run folders. A parent that is not done may still come to the point, unless it is past it.
    """
    start = getattr(stage, "start", None)
    own = folder / stage.name
    if not isinstance(start, Weights | Branch) or (own / DONE).is_file() or published(own / CHECKPOINTS):
        return ""  # what has its own checkpoints goes on from them
    parent = folder / start.stage
    manifests, damage = _manifests(parent)
    if not (parent / DONE).is_file() and (start.tokens is None or max(manifests, default=0) <= start.tokens):
        return ""
    tokens = start.tokens or _last_tokens(parent, manifests, damage)
    where = f"stage '{stage.name}' starts from '{start.stage}' at {f'{start.tokens:,} tokens' if start.tokens else 'its last checkpoint'}"
    again = f"remove {parent} to train it again" + (", with this point pinned" if start.tokens else "")
    if tokens not in manifests:
        what = f"{parent / CHECKPOINTS} holds {_points(manifests) if manifests else 'no checkpoint that can be read'}"
        return f"{where}, but {what}{''.join(f'; {one}' for one in damage)}. Name a point that is there, or {again}"
    if start.kind == "branch" and manifests[tokens].optimizer_layout == "none":
        whole = {at: one for at, one in manifests.items() if one.optimizer_layout != "none"}
        instead = [*([f"branch from {_points(whole)}"] if whole else []), "start with Weights(...)", again]
        return (
            f"{where} with its optimizer state, but checkpoint {checkpoint_path(parent, manifests[tokens].iteration)} holds weights only. "
            f"Way out: {', or '.join(instead)}"
        )
    return ""


def _manifests(parent: Path) -> tuple[dict[int, Manifest], list[str]]:
    """Tokens -> manifest of the checkpoints of a run folder, and what is wrong with those that cannot be read."""
    found: dict[int, Manifest] = {}
    damage = []
    for iteration in published(parent / CHECKPOINTS):
        try:
            manifest = read_manifest(checkpoint_path(parent, iteration))
        except DamagedCheckpointError as problem:
            damage.append(str(problem))
        else:
            found[manifest.tokens] = manifest
    return found, damage


def _last_tokens(parent: Path, manifests: dict[int, Manifest], damage: list[str]) -> int:
    """Tokens of a run's last checkpoint; 0, where none is ever saved, if that or the tracker is broken."""
    iteration, broken = newest(parent / CHECKPOINTS)
    if broken:
        damage.append(broken)
        return 0
    return next((tokens for tokens, manifest in manifests.items() if manifest.iteration == iteration), 0)


def _points(manifests: dict[int, Manifest]) -> str:
    return f"{', '.join(f'{tokens:,}' for tokens in sorted(manifests))} tokens"


def _joint(folder: Path, stage: Any, run: Run | None) -> list[Finding]:
    """Whether the point that a stage starts from is there, and is still what it started from."""
    problem = start_problem(folder, stage)
    if problem:
        return [error("start", problem, stage=stage.name)]
    change = changed_parent(run) if run else ""
    way_out = f"remove {folder / stage.name} to train it again from what its parent holds then"
    return [warning("start", change, way_out, stage.name)] if change else []


def _begun(run: Run, stage: Any) -> list[Finding]:
    """What would keep a stage from going on: another owner, other code, a checkpoint that the new plan cannot load."""
    found = []
    try:
        check_code(run, code_hash())
        iteration = latest_iteration(run)
    except RunError as refusal:
        return [error("run folder", str(refusal), stage=run.name)]
    owner = live_attempt(run.path)
    if owner is not None:
        text = f"{run.path}: {owner.describe()} is at work on it, and a second one is refused"
        found.append(error("run folder", text, "wait for it, or stop it", run.name))
    if iteration is not None and isinstance(stage, TrainStage | RLStage):
        found += _resume(run, stage, iteration)
    return found


def _resume(run: Run, stage: TrainStage | RLStage, iteration: int) -> list[Finding]:
    """Whether the optimizer state of the newest checkpoint loads under the plan as it is now."""
    manifest = readable_manifest(run, iteration)
    if manifest is None:
        text = f"checkpoint {iteration} of {run.path}, which it would go on from, has no readable manifest"
        return [error("resume", text, f"megatron-ext verify {run.path}", stage.name)]
    plan, old = to_json(stage.plan), manifest.plan
    keys = ("distributed_optimizer", *(LAYOUT_KEYS if manifest.optimizer_layout == "dp_reshardable" else ()))
    changed = [f"{key} {old[key]} -> {plan[key]}" for key in keys if old.get(key) != plan[key]]
    if not changed:
        return []
    text = f"checkpoint {iteration} ({manifest.optimizer_layout}) loads under its own {', '.join(keys)}; now {', '.join(changed)}"
    way_out = "go back to the old plan, at least until the next pinned checkpoint (plan.pin_tokens, plan.pin_every_tokens)"
    return [error("resume", text, way_out, stage.name)]
