"""One tiny model under many parallel layouts: train it on fixed batches, and gather what must not depend on the layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.stages import Documents, TrainStage
from tests import ranks
from tests.small_corpus import EOD, LENGTH, VOCAB_SIZE
from tests.training_runs import stage

CPU = TrainPlan(device="cpu")
TWO = replace(CPU, ranks_per_node=2)
INTERLEAVED = replace(TWO, pipeline=2, virtual_pipeline=2, overlap_p2p=True, micro_batch=2)
LAYOUTS = {
    "one rank": CPU,
    "tensor 2": replace(TWO, tensor=2, micro_batch=4),
    "tensor 2, sequence parallel": replace(TWO, tensor=2, sequence_parallel=True, micro_batch=4),
    "pipeline 2": replace(TWO, pipeline=2, micro_batch=2),
    "pipeline 2, interleaved": INTERLEAVED,
    "tensor 2 x pipeline 2": replace(CPU, ranks_per_node=4, tensor=2, pipeline=2, micro_batch=2),
    "data 2": replace(TWO, micro_batch=2),
    "data 2 x tensor 2": replace(CPU, ranks_per_node=4, tensor=2, micro_batch=2),
    "data 2, plain optimizer": replace(TWO, distributed_optimizer=False, micro_batch=2),
}
STEPS, RATE, SEED = 10, 1e-3, 7
RAGGED = Documents(eod_loss=False)  # the micro-batches of a step differ in their number of valid tokens
Part = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]  # name, whole shape, offset, this rank's numbers


@dataclass(frozen=True)
class Observed:
    """What one layout computed: first weights by name, loss and gradient norm of each step, weights after them."""

    first: dict[str, np.ndarray]
    steps: list[tuple[float, float]]
    last: dict[str, np.ndarray]


def toy_stage(plan: TrainPlan = CPU, **changes: Any) -> TrainStage:
    """The tiny model's stage under a plan."""
    return stage(plan=plan, **{"documents": RAGGED, **changes})


def batches(of: TrainStage, step: int, data_rank: int) -> list[Any]:
    """A data-parallel rank's micro-batches of a step: random documents, the same sequences under every layout."""
    from megatron_ext.data.loader import make_batch

    rng = np.random.default_rng(step)
    texts = rng.integers(3, VOCAB_SIZE, size=(of.budget.sequences_per_batch, LENGTH + 1))
    texts[rng.random(texts.shape) < 0.3 * rng.random((len(texts), 1))] = EOD  # ragged: 0 to 30 % of a sequence
    share = len(texts) // of.plan.data_parallel
    own = texts[data_rank * share : (data_rank + 1) * share]
    made = [make_batch(list(own[i : i + of.plan.micro_batch]), of.documents, EOD) for i in range(0, share, of.plan.micro_batch)]
    return [{"attention_mask": None, **batch} for batch in made]


def train_steps(state: Any, of: TrainStage, steps: Sequence[int]) -> list[tuple[float, float]]:
    """Train the numbered steps; loss and gradient norm of each."""
    from megatron_ext.training.step import train_step

    results = [train_step(state, batches(of, step, state.groups.data_rank), RATE, of.seed, step) for step in steps]
    return [(result.loss, result.grad_norm) for result in results]


def parts(sharded: Any) -> list[Part]:
    """This rank's pieces of a sharded state dict's tensors, under their checkpoint names."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = []
    for entry in nested_values(sharded):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for one in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(one, ShardedTensor):
                data = one.data.detach().numpy().copy().reshape((1,) * one.prepend_axis_num + tuple(one.local_shape))
                found.append((one.key, tuple(one.global_shape), tuple(one.global_offset), data))
    return found


def whole(of_ranks: list[list[Part]]) -> dict[str, np.ndarray]:
    """The ranks' pieces put together; pieces that overlap must be equal, and every place must be filled."""
    tensors: dict[str, np.ndarray] = {}
    for key, shape, offset, data in (part for pieces in of_ranks for part in pieces):
        tensor = tensors.setdefault(key, np.full(shape, np.nan, dtype=data.dtype))
        window = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
        filled = ~np.isnan(tensor[window])
        assert np.array_equal(tensor[window][filled], data[filled]), f"ranks differ in {key}"
        tensor[window] = data
    for key, tensor in tensors.items():
        assert not np.isnan(tensor).any(), f"no rank holds all of {key}"
    return tensors


def observe(groups: Any, of: TrainStage, steps: int) -> Any:
    """Build the model from the seed and train it."""
    from megatron_ext.training.state import build_state, sharded_model

    state = build_state(of, groups, SEED)
    first = parts(sharded_model(state))
    return first, train_steps(state, of, range(steps)), parts(sharded_model(state))


def observe_layout(plan: TrainPlan, steps: int = STEPS, **changes: Any) -> Observed:
    """Run `observe` on a plan's ranks; every rank must report the same losses and norms."""
    return observe_stage(toy_stage(plan, **changes), steps)


def observe_stage(of: TrainStage, steps: int) -> Observed:
    """The same for a stage as it is."""
    found = ranks.run(observe, of.plan, of, steps)
    first, losses, last = zip(*found, strict=True)
    assert all(one == losses[0] for one in losses), "ranks report different losses or norms"
    return Observed(whole(list(first)), losses[0], whole(list(last)))


@functools.cache
def observed(name: str) -> Observed:
    """What the layout of that name computes; run once a session."""
    return observe_layout(LAYOUTS[name])
