"""`doctor --deep`: a rehearsed rank is what the real rank is, at any size; each deliberate fault is found."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.plan import TrainPlan
from megatron_ext.launch.doctor_deep import rehearsed, telling_ranks
from megatron_ext.launch.graph import with_overrides
from recipes import demo, octothinker
from tests import ranks
from tests.layouts import CPU, toy_stage

FOUR = replace(CPU, ranks_per_node=4, tensor=2, micro_batch=2)  # tensor 2 x data 2
SMALL = demo.smoke().stage("stable")
LARGE = with_overrides(octothinker.llama_8b(), ["stable.plan.nodes=128"])  # 1,024 GPUs: tensor 2 x data 512


def alone(tmp_path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, which has torch and Megatron-Core loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOADED)
    answer = tmp_path / "answer"
    process = context.Process(target=_answer, args=(answer, function, arguments))
    process.start()
    process.join()
    value = pickle.loads(answer.read_bytes())
    assert process.exitcode == 0, value
    return value


def _answer(path: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from megatron_ext import device

    try:
        device.activate("cpu", 1)
        path.write_bytes(pickle.dumps(function(*arguments)))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        path.write_bytes(pickle.dumps(traceback.format_exc()))
        raise SystemExit(1) from None


def rehearse(stage: Any, numbers: list[int]) -> Any:
    from megatron_ext.training import rehearsal

    return rehearsal.rehearse(stage, numbers)


def everything(answer: Any) -> list[Any]:
    """The errors and disagreements of an answer."""
    parts = [*answer["ranks"], answer["whole"]]
    return [x for part in parts for x in part["errors"]] + [c for part in parts for c in part["compared"] if not c["agrees"]]


Pieces = dict[str, list[tuple[Any, ...]]]


def pieces(state: Any) -> Pieces:
    """What this rank would write, layout by layout: names, places, sizes."""
    from megatron_ext.training.rehearsal_build import part_of
    from megatron_ext.training.state import sharded_state

    found: Pieces = {}
    for layout in ("dp_reshardable", "fully_reshardable"):
        items = part_of(sharded_state(state, layout)).plan.items
        found[layout] = [
            (i.index.fqn, i.tensor_data and tuple(i.tensor_data.chunk.offsets), i.tensor_data and tuple(i.tensor_data.chunk.sizes))
            for i in items
        ]
    return found


def real_pieces(groups: Any) -> Pieces:
    from megatron_ext.training.state import build_state

    return pieces(build_state(toy_stage(groups.plan), groups, 7))


def rehearsed_pieces(plan: TrainPlan) -> list[Pieces]:
    from megatron_ext.training.rehearsal_build import built

    found = []
    for rank in range(plan.num_ranks):
        with built(toy_stage(plan), rank) as state:
            found.append(pieces(state))
    return found


def test_a_rehearsed_rank_writes_what_the_real_rank_writes(tmp_path: Path) -> None:
    real, fake = ranks.run(real_pieces, FOUR), alone(tmp_path, rehearsed_pieces, FOUR)
    assert fake == real
    assert all(of_rank["dp_reshardable"] for of_rank in real)
    assert [len(of_rank["fully_reshardable"]) > 0 for of_rank in real] == [True, True, False, False]  # data rank 0 writes


@pytest.mark.parametrize(
    "plan",
    [
        replace(CPU, ranks_per_node=4, tensor=2, pipeline=2, micro_batch=2),
        replace(CPU, ranks_per_node=2, distributed_optimizer=False, micro_batch=2),
        TrainPlan(ranks_per_node=8, tensor=2, sequence_parallel=True, context=2),
        TrainPlan(ranks_per_node=8, pipeline=2, virtual_pipeline=2, overlap_p2p=True),
    ],
    ids=["tensor x pipeline", "plain optimizer", "context, BF16", "interleaved, BF16"],
)
def test_a_sound_plan_agrees_with_the_arithmetic(tmp_path: Path, plan: TrainPlan) -> None:
    stage = toy_stage(plan, precision="fp32" if plan.device == "cpu" else "bf16")
    answer = alone(tmp_path, rehearse, stage, telling_ranks(stage))
    assert everything(answer) == []
    assert len(answer["ranks"][0]["compared"]) >= 4


def test_the_8b_on_1024_gpus() -> None:
    """The verb's own path: a subprocess, from which only JSON comes back."""
    found = rehearsed(LARGE, "stable", 517)
    assert [one.level for one in found] == ["ok"] * 3, found
    assert found[0].what == "deep, stable, rank 517 of 1024 (tensor 1, pipeline 0, data 258)"
    assert "parameters 4,015,263,744" in found[0].found
    assert "of a routine checkpoint it writes 21 pieces, 94.1 MB, into __517_0.distcp" in found[0].found
    assert "whole checkpoint 112.4 GB" in found[1].found
    assert "not checked: Transformer Engine" in found[2].found
    assert re.search(r"took \d{3}\.\d MB of memory", found[2].found), found[2].found  # 8 GB would be allowed


def with_wrong_arithmetic(stage: Any) -> Any:
    from megatron_ext.training import rehearsal

    true = rehearsal.parameters_per_gpu
    rehearsal.parameters_per_gpu = lambda *of: true(*of) + 1
    return rehearse(stage, [0])


def with_overlapping_shards(stage: Any) -> Any:
    """Every data-parallel rank's shard starts 64 elements early: the first one of the next rank's are written twice."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    true = DistributedOptimizer.sharded_param_state_dp_reshardable

    def shifted(self: Any, *arguments: Any) -> Any:
        state = true(self, *arguments)
        if self.data_parallel_group.rank():
            for piece in (p for buckets in state[0].values() for bucket in buckets for part in bucket for p in part.values()):
                if hasattr(piece, "global_offset"):
                    piece.global_offset = (piece.global_offset[0] - 64,)
        return state

    DistributedOptimizer.sharded_param_state_dp_reshardable = shifted
    return rehearse(stage, [0])


def with_one_layer_offset(stage: Any) -> Any:
    """Every pipeline stage takes its layers for the first ones."""
    from megatron.core.transformer import transformer_block

    transformer_block.get_transformer_layer_offset = lambda *_, **__: 0
    from megatron.core.transformer import transformer_layer

    transformer_layer.get_transformer_layer_offset = lambda *_, **__: 0
    return rehearse(stage, [0])


def with_a_plan_that_no_rule_saw(stage: Any) -> Any:
    from megatron_ext.config import stages

    stages.check_plan = lambda *_: None
    model, plan = replace(stage.model, num_layers=3), replace(stage.plan, ranks_per_node=2, pipeline=2)
    return rehearse(replace(stage, model=model, plan=plan), [0])


def test_wrong_arithmetic_is_found(tmp_path: Path) -> None:
    (wrong,) = everything(alone(tmp_path, with_wrong_arithmetic, SMALL))
    assert (wrong["what"], wrong["planned"] - wrong["built"]) == ("parameters", 1)


def test_overlapping_optimizer_shards_are_found(tmp_path: Path) -> None:
    stage = toy_stage(replace(CPU, ranks_per_node=2, micro_batch=2))
    assert everything(alone(tmp_path, rehearse, stage, [0])) == []
    (wrong,) = everything(alone(tmp_path, with_overlapping_shards, stage))
    assert wrong["what"] == "optimizer shards of its data-parallel ranks"
    assert "do not make a whole" in wrong["why"]
    assert "overlapping chunks" in wrong["why"]


def test_missing_layers_are_found(tmp_path: Path) -> None:
    stage = toy_stage(replace(CPU, ranks_per_node=2, pipeline=2, micro_batch=2))
    found = everything(alone(tmp_path, with_one_layer_offset, stage))
    assert any("written by more than one rank" in one.get("why", "") for one in found), found


def test_what_no_rule_refuses_megatron_does(tmp_path: Path) -> None:
    found = everything(alone(tmp_path, with_a_plan_that_no_rule_saw, SMALL))
    assert {one["what"] for one in found} == {"groups, model and optimizer", "a pinned checkpoint of all ranks"}
    assert all("divi" in one["why"] and one["where"][-1].startswith("megatron/core/") for one in found), found


def test_a_model_too_small_for_its_ranks_is_found(tmp_path: Path) -> None:
    """131,392 parameters over 63 ranks, padded to a multiple of 63 x 128: the last ranks' shards are padding alone, and cannot be saved."""
    plan = TrainPlan(nodes=9, ranks_per_node=7)
    stage = replace(SMALL, precision="bf16", plan=plan, budget=replace(SMALL.budget, sequences_per_batch=63))
    found = everything(alone(tmp_path, rehearse, stage, [0]))
    assert any("empty bucket" in one.get("why", "") for one in found), found


def leftovers() -> list[bool]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    from megatron_ext.training.rehearsal_build import built

    gather = dist.all_gather_object
    with contextlib.suppress(ZeroDivisionError), built(SMALL, 0):
        assert dist.get_backend() == "fake"
        assert dist.all_gather_object is not gather
        raise ZeroDivisionError
    real = layers.torch.empty(2, device="cuda").device.type == "cpu"  # no longer meta
    return [dist.is_initialized(), dist.all_gather_object is gather, real]


def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path) -> None:
    assert alone(tmp_path, leftovers) == [False, True, True]
