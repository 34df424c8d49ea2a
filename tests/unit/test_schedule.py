"""The learning rate against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.schedule import Schedule, learning_rate
from megatron_ext.errors import ConfigError

TOTAL = 20_971_520_000
STEP = 4_194_304


def test_constant_never_moves():
    schedule = Schedule(shape="constant", peak=2e-5)
    assert {learning_rate(schedule, n * STEP, 50_000 * STEP) for n in (0, 1, 25_000, 49_999, 50_000)} == {2e-5}


@pytest.mark.parametrize(
    ("shape", "quarter", "half", "three_quarters"),
    [
        ("cosine", 0.1 + 0.45 * (1 + 0.7071067811865476), 0.55, 0.1 + 0.45 * (1 - 0.7071067811865476)),
        ("linear", 0.775, 0.55, 0.325),
        ("minus_sqrt", 0.55, 1 - 0.9 * 0.7071067811865476, 1 - 0.9 * 0.8660254037844386),
    ],
)
def test_decays_from_peak_to_ten_percent(shape, quarter, half, three_quarters):
    schedule = Schedule(shape=shape, peak=1.0)
    rates = [learning_rate(schedule, share * TOTAL // 4, TOTAL) for share in range(5)]
    assert rates == pytest.approx([1.0, quarter, half, three_quarters, 0.1], rel=1e-12)


def test_the_first_decay_step_is_at_the_peak_and_the_second_is_not():
    schedule = Schedule(shape="cosine", peak=2e-5)
    assert learning_rate(schedule, 0, TOTAL) == 2e-5
    assert learning_rate(schedule, STEP, TOTAL) < 2e-5  # a schedule read after the batch would begin here
    last = learning_rate(schedule, TOTAL - STEP, TOTAL)
    assert 2e-6 < last < 2e-6 * (1 + 1e-5)


def test_warm_up_is_linear_from_zero():
    schedule = Schedule(shape="constant", peak=3e-3, warmup_tokens=10)
    assert [learning_rate(schedule, n, 100) for n in (0, 1, 5, 10, 99)] == pytest.approx([0.0, 3e-4, 1.5e-3, 3e-3, 3e-3])


def test_the_decay_starts_where_the_warm_up_ends():
    schedule = Schedule(shape="linear", peak=1.0, floor_fraction=0.0, warmup_tokens=20)
    assert [learning_rate(schedule, n, 100) for n in (10, 20, 60, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


@given(shape=st.sampled_from(["cosine", "linear", "minus_sqrt"]), one=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_a_decay_only_falls_and_stays_within_its_bounds(shape, one, other):
    schedule = Schedule(shape=shape, peak=1e-3, floor_fraction=0.1)
    early, late = sorted((one, other))
    before, after = learning_rate(schedule, early, 10**6), learning_rate(schedule, late, 10**6)
    assert after <= before <= 1e-3
    assert after >= 1e-4 * (1 - 1e-12)


@pytest.mark.parametrize("tokens", [-1, 101])
def test_tokens_outside_the_stage_are_refused(tokens):
    with pytest.raises(ConfigError, match=f"{tokens} tokens lie outside the stage's 100"):
        learning_rate(Schedule(shape="constant", peak=1.0), tokens, 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peak": 0.0}, "peak is 0.0, must be a positive number"),
        ({"peak": float("inf")}, "peak is inf"),
        ({"peak": 1.0, "floor_fraction": 1.5}, r"floor_fraction is 1.5, must lie in \[0, 1\]"),
        ({"peak": 1.0, "warmup_tokens": -5}, "warmup_tokens is -5, must not be negative"),
    ],
)
def test_impossible_schedules_name_the_value(values, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(shape="cosine", **values)
