"""Tokens, steps and batches."""

from __future__ import annotations

import pytest

from megatron_ext.config.budget import Budget, nearest_budget
from megatron_ext.errors import ConfigError

STABLE = Budget(steps=50_000, sequences_per_batch=512, sequence_length=8192)


def test_the_papers_stable_budget():
    assert STABLE.tokens_per_batch == 4_194_304
    assert STABLE.tokens == 209_715_200_000
    assert STABLE.samples == 25_600_000
    assert STABLE.tokens_before(0) == 0
    assert STABLE.tokens_before(30_994) == 129_998_258_176


@pytest.mark.parametrize(
    ("nominal", "steps"), [(20 * 10**9, 4_768), (10 * 10**9, 2_384), (100 * 10**9, 23_842), (200 * 10**9, 47_684), (1, 1)]
)
def test_nearest_budgets(nominal, steps):
    budget = nearest_budget(nominal, 512, 8192)
    assert budget.steps == steps
    if nominal > 1:
        assert abs(budget.tokens - nominal) <= budget.tokens_per_batch / 2


def test_step_at_is_exact():
    assert STABLE.step_at(0) == 0
    assert STABLE.step_at(129_998_258_176) == 30_994
    assert STABLE.step_at(STABLE.tokens) == 50_000
    with pytest.raises(ConfigError, match=r"130,000,000,000 tokens is no step of this stage.*the nearest below is 129,998,258,176"):
        STABLE.step_at(130 * 10**9)
    with pytest.raises(ConfigError, match="the nearest below is 209,715,200,000"):
        STABLE.step_at(STABLE.tokens + STABLE.tokens_per_batch)


def test_nearest_step_stays_inside_the_stage():
    assert STABLE.nearest_step(130 * 10**9) == 30_994
    assert STABLE.nearest_step(0) == 0
    assert STABLE.nearest_step(10**15) == 50_000


@pytest.mark.parametrize("key", ["steps", "sequences_per_batch", "sequence_length"])
def test_nothing_may_be_empty(key):
    values = {"steps": 1, "sequences_per_batch": 1, "sequence_length": 1}
    with pytest.raises(ConfigError, match=f"budget: {key} is 0, must be at least 1"):
        Budget(**{**values, key: 0})
