"""One rank's engine for all ranks of a model copy: the same answers, the same errors, and no rank left waiting in the hand-over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import Sampling
from megatron_ext.errors import ConfigError
from megatron_ext.generation.engine import Request, generate_all
from tests import ranks
from tests.layouts import CPU

PLAN = replace(CPU, ranks_per_node=2, tensor=2)


def _use(groups: Any) -> list[Any]:
    import torch

    from megatron_ext.errors import TrainingError
    from megatron_ext.generation.shared_engine import SharedEngine, hand_over
    from megatron_ext.model.bucket import Bucket
    from megatron_ext.model.build import build_model
    from tests.engine_of_numbers import REFUSED, EngineOfNumbers
    from tests.training_runs import MODEL

    found: list[Any] = []
    try:
        SharedEngine(lambda: EngineOfNumbers(refuses="no such engine"), groups)
    except ConfigError as error:
        found.append(str(error))
    made: list[EngineOfNumbers] = []

    def make() -> EngineOfNumbers:
        made.append(EngineOfNumbers())
        return made[-1]

    engine = SharedEngine(make, groups)
    chunks = build_model(MODEL, "fp32", groups, None)
    hand_over(engine, chunks, MODEL, groups, version=4, bucket_bytes=10_000, dtype=torch.float32)
    requests = [Request(number, (1,), 3 - number, Sampling(), seed=0) for number in range(2)]
    found.append([(one.id, one.tokens.tolist(), one.weight_versions.tolist()) for one in generate_all(engine, requests)])
    refused = (Bucket(((name, torch.ones(1)),)) for name in ("one", "refused", "two"))
    for call in (lambda: engine.submit([Request(9, (REFUSED,), 1, Sampling(), seed=0)]), lambda: engine.update_weights(5, refused)):
        try:
            call()
        except (ConfigError, TrainingError) as error:
            found.append(str(error))
    found.append(next(refused, "taken to the end"))
    found.append(engine.stats().weight_version)
    engine.close()
    return [*found, len(made)]


def test_all_ranks_of_a_copy_have_its_answers_and_its_errors() -> None:
    first, second = ranks.run(_use, PLAN)
    assert first[-1] == 1
    assert second[-1] == 0
    assert first[:-1] == second[:-1]
    assert first[0] == "no such engine"
    assert [(number, versions) for number, _, versions in first[1]] == [(0, [4, 4, 4]), (1, [4, 4])]
    assert first[2:-1] == ["a request is refused", "a tensor is refused", "taken to the end", 4]


def test_a_copy_of_one_rank_needs_no_other() -> None:
    assert ranks.run(_use, TrainPlan(device="cpu"))[0][2:-1] == ["a request is refused", "a tensor is refused", "taken to the end", 4]
