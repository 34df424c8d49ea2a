"""`doctor --deep`: asks a rehearsal, in a process of its own, what ranks of each training stage would build. No torch here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_ext.config.base import Json, canonical, to_json
from megatron_ext.config.stages import TrainStage
from megatron_ext.errors import ConfigError
from megatron_ext.launch.findings import Finding, error, ok
from megatron_ext.launch.graph import Graph
from megatron_ext.launch.plan_words import size
from megatron_ext.runs import read_json

REHEARSAL = "megatron_ext.training.rehearsal"
LAST_LINES = 12
# Stages that are equal in these are built alike, and rehearsed once.
BUILT_FROM = ("device", "nodes", "ranks_per_node", "tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "overlap_p2p", "context",
              "distributed_optimizer", "recompute")  # fmt: skip


def rehearsed(graph: Graph, name: str | None, rank: int | None) -> list[Finding]:
    """Findings on a rank, or on telling ones (None), of a training stage, or of all that differ in what is built (None)."""
    stages = [stage for stage in graph.stages if isinstance(stage, TrainStage)]
    if name is not None:
        chosen = graph.stage(name)
        if not isinstance(chosen, TrainStage):
            raise ConfigError(f"doctor: stage '{name}' is of kind '{chosen.kind}'; --deep rehearses training stages")
        stages = [chosen]
    groups: dict[str, list[TrainStage]] = {}
    for stage in stages:
        plan = to_json(stage.plan)
        identity = [to_json(stage.model), stage.precision, *(plan[key] for key in BUILT_FROM)]
        groups.setdefault(canonical(identity), []).append(stage)
    if rank is not None:
        _check_rank(stages, rank)
    return [finding for alike in groups.values() for finding in _of_stages(alike, rank)]


def _check_rank(stages: list[TrainStage], rank: int) -> None:
    if not any(0 <= rank < stage.plan.num_ranks for stage in stages):
        largest = max(stages, key=lambda stage: stage.plan.num_ranks)
        plan = largest.plan
        raise ConfigError(
            f"doctor: --rank {rank}, but {largest.name} has ranks 0 to {plan.num_ranks - 1} ({plan.nodes} nodes x {plan.ranks_per_node}); "
            f"name one of these, or more nodes: {largest.name}.plan.nodes=N"
        )


def telling_ranks(stage: TrainStage) -> list[int]:
    """The first rank, one in the middle, the last: first, middle and last pipeline stage, first and last data-parallel rank."""
    last = stage.plan.num_ranks - 1
    return sorted({0, (last + 1) // 2, last})


def _of_stages(alike: list[TrainStage], rank: int | None) -> list[Finding]:
    stage, name = alike[0], ", ".join(stage.name for stage in alike)
    if rank is not None and not 0 <= rank < stage.plan.num_ranks:
        return [ok("deep", f"{name}: not rehearsed, with {stage.plan.num_ranks} ranks it has no rank {rank}")]
    answer = _ask(stage, telling_ranks(stage) if rank is None else [rank])
    if isinstance(answer, Finding):
        return [answer]
    found = [finding for one in answer["ranks"] for finding in _of_rank(name, stage, one)]
    found += _figures(f"deep, {name}, all {stage.plan.num_ranks} ranks together", answer["whole"])
    return [*found, ok("deep", f"{name}: {_not_checked(stage)}; the rehearsal took {size(answer['peak_bytes'])} of memory at most")]


def _not_checked(stage: TrainStage) -> str:
    layers = "Transformer Engine's layers (Megatron's local ones of the same shapes stood for them), " if stage.plan.device == "gpu" else ""
    return f"not checked: {layers}computing, communication, and the speed of either"


def _ask(stage: TrainStage, ranks: list[int]) -> Json | Finding:
    """The rehearsal's answer, or an error where its process ended without one."""
    with tempfile.TemporaryDirectory(prefix="megatron_ext.doctor.") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"stage": to_json(stage), "ranks": ranks}), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", REHEARSAL, str(request), str(answer)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if answer.is_file():
            values: Json = read_json(answer, "the answer of a rehearsal")
            return values
        end = "\n".join(done.stderr.rstrip().splitlines()[-LAST_LINES:])
        missing = "ModuleNotFoundError" in end
        way_out = "install the packages that it names: --deep needs torch and Megatron-Core" if missing else "run doctor without --deep"
        return error("deep", f"the rehearsal of {stage.name} ended with exit code {done.returncode}:\n{end}", way_out)


def _environment() -> dict[str, str]:
    """This environment without any GPU and without another job's ranks: a rehearsal touches neither."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    return {**{key: value for key, value in os.environ.items() if key not in ranks}, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _of_rank(name: str, stage: TrainStage, one: Json) -> list[Finding]:
    place = f" (tensor {one['tensor']}, pipeline {one['pipeline']}, data {one['data']})" if "tensor" in one else ""
    return _figures(f"deep, {name}, rank {one['rank']} of {stage.plan.num_ranks}{place}", one)


def _figures(what: str, one: Json) -> list[Finding]:
    """What failed, and what disagrees with the plan, each an error; else one line of figures."""
    found = [_failure(what, failed) for failed in one["errors"]]
    found += [_mismatch(what, row) for row in one["compared"] if not row["agrees"]]
    agreed = [f"{row['what'].removesuffix(' bytes')} {_number(row)}" for row in one["compared"] if row["agrees"] and row["built"] > 1]
    written = [_written(kind, part) for kind, part in one["checkpoints"].items()]
    if agreed or written:
        found.append(ok(what, "; ".join([f"as planned: {', '.join(agreed)}", *written])))
    return found


def _number(row: Json) -> str:
    return size(row["built"]) if row["what"].endswith(" bytes") else f"{row['built']:,}"


def _written(kind: str, part: Json) -> str:
    if "writers" in part:
        return f"ranks that write a {kind} one: {part['writers']}, up to {size(part['largest_bytes'])} each"
    if part["file"] is None:
        return f"of a {kind} checkpoint it writes nothing"
    return f"of a {kind} checkpoint it writes {part['items']:,} pieces, {size(part['bytes'])}, into {part['file']}"


def _failure(what: str, failed: Json) -> Finding:
    where = "\n".join(f"  at {frame}" for frame in failed["where"])
    return error(what, f"{failed['what']}: {failed['why']}\n{where}\nA job would stop here", "change the plan (tensor, pipeline, nodes)")


def _mismatch(what: str, row: Json) -> Finding:
    margin = f" (within {row['allowed']:,} of padding)" if row["allowed"] else ""
    text = f"{row['what']}: built {row['built']:,}, but the plan's arithmetic says {row['planned']:,}{margin}"
    return error(what, text, "the plan's memory or disk figures are wrong for this model: report it, and plan with the built ones")
