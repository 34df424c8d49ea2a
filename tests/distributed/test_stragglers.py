"""Slow ranks are named by every rank's own measure, by rank 0 alone."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.config.plan import TrainPlan
from tests import ranks

FEW = TrainPlan(device="cpu", ranks_per_node=3)


def warned(groups: Any, seconds: list[float]) -> tuple[list[str], float]:
    """What a rank's hook says where rank r measures seconds[r]; and what it measures in truth."""
    from megatron_ext.training.stragglers import StragglerHook, matrix_seconds

    said: list[str] = []
    run = SimpleNamespace(stage=SimpleNamespace(plan=groups.plan))
    context: Any = SimpleNamespace(groups=groups, run=run, progress=SimpleNamespace(step=7))
    StragglerHook(said.append, lambda _kind, _side: seconds[groups.rank]).validation(context, [])
    return said, matrix_seconds("cpu", 64)


@pytest.mark.parametrize(("seconds", "words"), [
    ([0.010, 0.010, 0.014], []),
    ([0.010, 0.021, 0.010], ["step 7: WARNING: rank 1 on {host} took 21.0 ms for what others do in 10.0 ms (2.1 x)"]),
    ([0.0, 0.0, 0.0], []),
])  # fmt: skip
def test_rank_0_names_the_slow_rank(seconds: list[float], words: list[str]) -> None:
    found = ranks.run(warned, FEW, seconds)
    assert [said for said, _ in found] == [[line.format(host=os.uname().nodename) for line in words], [], []]
    assert all(0 < measured < 10 for _, measured in found)


def test_of_many_slow_ranks_the_slowest_are_named() -> None:
    from megatron_ext.training.stragglers import straggler_words

    words = straggler_words([("n1", 0.01)] * 40 + [("n2", 0.02 + 0.001 * i) for i in range(10)])
    assert words.startswith("rank 49 on n2 took 29.0 ms")
    assert words.endswith("; and 2 more ranks")
