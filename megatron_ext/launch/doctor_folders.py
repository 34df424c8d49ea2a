"""The run folders that a graph would go on in: is each one the same stage, free, and loadable under the plan as it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.attempts import live_attempt
from megatron_ext.config.base import to_json
from megatron_ext.config.plan import LAYOUT_KEYS
from megatron_ext.config.stages import TrainStage, inputs
from megatron_ext.errors import RunError
from megatron_ext.launch.findings import Finding, error, ok
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.joints import latest_iteration, readable_manifest
from megatron_ext.launch.verbs import check_code
from megatron_ext.runs import RECIPE, Run, open_run, refuse_other_science, science_hash
from megatron_ext.snapshot import code_hash


def folder_findings(graph: Graph, folder: Path) -> list[Finding]:
    """Folders that hold another recipe, each against what its own parents would be; and what keeps begun stages from going on."""
    hashes: dict[str, str] = {}
    found = []
    for stage in graph.stages:
        parents = {role: hashes[parent] for role, parent in inputs(stage).items()}
        path = folder / stage.name
        try:
            hashes[stage.name] = refuse_other_science(path, stage, parents)
            run = open_run(path) if (path / RECIPE).is_file() else None
        except RunError as refusal:
            hashes[stage.name] = science_hash(stage, parents)
            found.append(error("run folder", str(refusal), stage=stage.name))
        else:
            found += _begun(run, stage) if run and not run.is_done() else []
    return found or [ok("run folders", f"nothing in {folder} stands in the way")]


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
    if iteration is not None and isinstance(stage, TrainStage):
        found += _resume(run, stage, iteration)
    return found


def _resume(run: Run, stage: TrainStage, iteration: int) -> list[Finding]:
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
