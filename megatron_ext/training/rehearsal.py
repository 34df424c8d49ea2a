"""`doctor --deep`: what any rank of a plan of any size would build, compared with the plan's arithmetic, on this machine.

A process of its own: it puts torch and Megatron-Core into a state that only a rehearsal can use.

    python -m megatron_ext.training.rehearsal REQUEST ANSWER

REQUEST is JSON: the training stage and the ranks to rehearse. ANSWER is written at the end.

Not rehearsed: anything that computes or communicates, and Transformer Engine's layers (Megatron's
local layers of the same shapes stand for them).
"""

from __future__ import annotations

import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext import device
from megatron_ext.config.base import Json, from_json
from megatron_ext.config.memory import checkpoint_bytes, memory_of_stage, optimizer_bytes_per_parameter, parameters_per_gpu
from megatron_ext.config.stages import Stage, TrainStage
from megatron_ext.runs import read_json, write_json
from megatron_ext.training.rehearsal_build import Part, built, check_together, optimizers, part_of, peer_parts
from megatron_ext.training.state import TrainState, sharded_state

FRAMES = 3  # of a traceback that an error shows
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements; Megatron's param_and_grad_buffer pads to them


class Rehearsal:
    """What was found of one rank, or of the checkpoint as a whole."""

    def __init__(self) -> None:
        self.compared: list[Json] = []
        self.errors: list[Json] = []
        self.checkpoints: Json = {}

    def compare(self, what: str, found: int, planned: int, allowed: int = 0) -> None:
        """Note a figure; an error where it is further than `allowed` from what the plan's arithmetic says."""
        agrees = abs(found - planned) <= allowed
        self.compared.append({"what": what, "built": found, "planned": planned, "allowed": allowed, "agrees": agrees})

    def attempt(self, what: str, do: Callable[..., None], *arguments: Any) -> None:
        """Do a part of the rehearsal; whatever it raises, the job would die of."""
        try:
            do(*arguments)
        except Exception as error:  # noqa: BLE001 - it is recorded, and the other parts still have something to say
            frames = [
                f"{f.filename.rpartition('site-packages/')[2]}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
            ]
            self.errors.append({"what": what, "why": f"{type(error).__name__}: {error}", "where": frames[-FRAMES:]})

    def to_json(self) -> Json:
        """As plain values."""
        return {"compared": self.compared, "errors": self.errors, "checkpoints": self.checkpoints}


def rehearse(stage: TrainStage, ranks: list[int]) -> Json:
    """Rehearse the ranks one after another, then the checkpoint that all ranks write together."""
    swept: set[int] = set()
    answer: Json = {"ranks": [_rank(stage, rank, swept) for rank in ranks]}
    whole = Rehearsal()
    started = time.perf_counter()
    whole.attempt("a pinned checkpoint of all ranks", _whole_checkpoint, stage, whole)
    answer["whole"] = {**whole.to_json(), "seconds": time.perf_counter() - started}
    return {**answer, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _rank(stage: TrainStage, rank: int, swept: set[int]) -> Json:
    """One rank; `swept` holds the pipeline stages whose data-parallel ranks have been looked at, each once."""
    found, place = Rehearsal(), Json()
    started = time.perf_counter()

    def build_and_look() -> None:
        with built(stage, rank) as state:
            groups = state.groups
            place.update(tensor=groups.tensor_rank, pipeline=groups.pipeline_rank, data=groups.data_rank)
            found.attempt("groups", _groups, stage, state, found)
            for layout in _layouts(stage):
                found.attempt(f"its part of a {_words(layout)} checkpoint", _own_part, state, layout, found)
                found.attempt(f"loading a {_words(layout)} checkpoint", _loading, state, layout)
            found.attempt("sizes", _sizes, stage, state, found)
            if stage.plan.distributed_optimizer and groups.pipeline_rank not in swept:
                swept.add(groups.pipeline_rank)
                found.attempt("optimizer shards of its data-parallel ranks", _shards, stage, state, found)

    found.attempt("groups, model and optimizer", build_and_look)
    return {"rank": rank, **place, **found.to_json(), "seconds": time.perf_counter() - started}


def _layouts(stage: TrainStage) -> tuple[str, ...]:
    return ("dp_reshardable", "fully_reshardable") if stage.plan.distributed_optimizer else ("replicated",)


def _words(layout: str) -> str:
    return {"dp_reshardable": "routine", "fully_reshardable": "pinned", "replicated": "full"}[layout]


def _groups(stage: TrainStage, state: TrainState, found: Rehearsal) -> None:
    made, plan = state.groups.collection, stage.plan
    sizes = {"tensor": (made.tp, plan.tensor), "pipeline": (made.pp, plan.pipeline), "context": (made.cp, plan.context)}
    for name, (group, planned) in {**sizes, "data": (made.dp, plan.data_parallel)}.items():
        found.compare(f"ranks of its {name} group", group.size(), planned)


def _own_part(state: TrainState, layout: str, found: Rehearsal) -> None:
    part = part_of(sharded_state(state, layout))
    file = f"__{state.groups.rank}_0.distcp" if part.plan.items else None
    found.checkpoints[_words(layout)] = {"items": len(part.plan.items), "bytes": part.size_bytes, "file": file}


def _loading(state: TrainState, layout: str) -> None:
    part_of(sharded_state(state, layout, is_loading=True))


def _sizes(stage: TrainStage, state: TrainState, found: Rehearsal) -> None:
    """This rank's numbers against the plan's; the optimizer's share may differ by the padding that Megatron adds."""
    parameters = [p for chunk in state.chunks for p in chunk.parameters()]
    precision = "bf16" if stage.precision == "fp8" else stage.precision  # FP8 copies are Transformer Engine's, and not built here
    planned = memory_of_stage(stage.model, stage.budget, precision, stage.plan, state.groups.pipeline_rank)
    padding = _padding(state, len(parameters))
    found.compare("parameters", sum(p.numel() for p in parameters), parameters_per_gpu(stage.model, stage.plan, state.groups.pipeline_rank))
    found.compare("weights bytes", sum(p.numel() * p.element_size() for p in parameters), planned.weights_bytes)
    found.compare("gradients bytes", sum(_bytes(b.grad_data) for b in _buffers(state)), planned.gradients_bytes, 4 * padding)
    held = sum(_optimizer_bytes(optimizer.optimizer, precision) for optimizer in optimizers(state))
    per_parameter = optimizer_bytes_per_parameter(precision)
    found.compare("optimizer bytes", held, planned.optimizer_bytes, per_parameter * padding)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _buffers(state: TrainState) -> list[Any]:
    return [buffer for chunk in state.wrapped for buffer in chunk.buffers]


def _padding(state: TrainState, num_parameters: int) -> int:
    """Elements that Megatron may add to a rank's buffers: none without the distributed optimizer."""
    buffers = _buffers(state)
    if not state.groups.plan.distributed_optimizer:
        return 0
    to_bucket = sum(len(b.buckets) * math.lcm(b.data_parallel_world_size, BUCKET_ALIGNMENT) for b in buffers)
    return PARAMETER_ALIGNMENT * num_parameters + to_bucket


def _optimizer_bytes(optimizer: torch.optim.Optimizer, precision: str) -> int:
    """Moments, and the FP32 master weights where the model's own weights are BF16."""
    masters = [p for group in optimizer.param_groups for p in group["params"]] if precision != "fp32" else []
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(_bytes(tensor) for tensor in (*masters, *moments))


def _shards(stage: TrainStage, state: TrainState, found: Rehearsal) -> None:
    """The shards of all data-parallel ranks beside this one: no overlap, no gap, and together the plan's bytes."""
    parts: list[Part] = []
    for optimizer in optimizers(state):
        own = peer_parts(optimizer)
        check_together(own, f"the optimizer shards of {len(own)} data-parallel ranks")
        parts += own
    masters_and_moments = 12 * parameters_per_gpu(stage.model, stage.plan, state.groups.pipeline_rank)
    padding = _padding(state, sum(1 for chunk in state.chunks for _ in chunk.parameters()))
    found.compare(
        "checkpointed optimizer of its data-parallel ranks bytes", sum(p.tensor_bytes for p in parts), masters_and_moments, 12 * padding
    )


def _whole_checkpoint(stage: TrainStage, found: Rehearsal) -> None:
    """A pinned checkpoint from all ranks that hold different weights: whole, without overlap, and as large as planned.

    Data- and context-parallel ranks hold the same weights, so one rank of each tensor and pipeline place stands for all.
    """
    plan = stage.plan
    places = replace(plan, nodes=1, ranks_per_node=plan.tensor * plan.pipeline, context=1)
    alone = replace(stage, plan=places)
    layout, parts = _layouts(stage)[-1], []
    for rank in range(places.num_ranks):
        with built(alone, rank) as state:
            parts.append(part_of(sharded_state(state, layout)))
    written = [part.size_bytes for part in parts if part.plan.items]
    found.checkpoints[_words(layout)] = {"writers": len(written), "largest_bytes": max(written, default=0)}
    check_together(parts, f"a checkpoint of {len(parts)} tensor- and pipeline-parallel places")
    found.compare("whole checkpoint bytes", sum(p.tensor_bytes for p in parts), checkpoint_bytes(stage.model, stage.precision, plan))


def main(request: Path, answer: Path) -> None:
    """Answer a request."""
    device.activate("cpu", 1)
    values = read_json(request, "the request for a rehearsal")
    write_json(answer, rehearse(from_json(Stage, values["stage"], str(request)), values["ranks"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
