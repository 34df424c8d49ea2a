"""The judgement of a step in tables of numbers, and that what it depends on goes through a manifest unchanged."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.base import from_json, to_json
from megatron_ext.config.faults import Faults
from megatron_ext.config.stages import science
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.provenance import Skipped
from megatron_ext.training.guard import GuardState, check_row, judge, mean_and_deviation, rolled_back, words
from tests.small_corpus import STAGE

WATCHING = Faults(spike="skip", window_steps=4, sigmas=3.0, least_steps=4)
WINDOW = GuardState(losses=(1.0, 3.0, 1.0, 3.0), grad_norms=(10.0, 30.0, 10.0, 30.0))  # means 2 and 20, deviations 1.1547 and 11.547
LIMIT = 2 + 3 * math.sqrt(4 / 3)


def skipped(step: int, action: str = "skip", stage: str = "stable") -> Skipped:
    return Skipped(stage=stage, step=step, tokens={"web": 96, "qa": 32}, reason="loss spike", action=action, value=9.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (2.0, 20.0, None),
        (LIMIT - 1e-9, 20.0, None),
        (LIMIT + 1e-9, 20.0, "loss spike"),
        (2.0, 10 * LIMIT - 1e-8, None),
        (2.0, 10 * LIMIT + 1e-8, "gradient norm spike"),
        (100.0, 1e6, "loss spike"),
        (-100.0, 0.0, None),  # far below the mean is no spike
        (math.nan, 20.0, "loss not finite"),
        (-math.inf, math.nan, "loss not finite"),
        (2.0, math.inf, "gradient norm not finite"),
    ],
)
def test_what_is_found(loss, grad_norm, reason):
    found = judge(WATCHING, WINDOW, loss, grad_norm)
    assert (found and found.reason) == reason
    if found:
        assert found.action == ("stop" if "finite" in found.reason else "skip")
        assert (found.value is None) == ("finite" in found.reason)


@pytest.mark.parametrize("action", ["stop", "skip", "roll_back"])
def test_the_recipe_says_what_is_done(action):
    assert judge(replace(WATCHING, non_finite=action), WINDOW, math.nan, 1.0).action == action
    assert judge(replace(WATCHING, spike=action), WINDOW, 99.0, 1.0).action == action


def test_spikes_are_ignored_unless_the_recipe_says_otherwise():
    assert judge(Faults(), WINDOW, 1e9, 1e9) is None
    assert GuardState().trained(Faults(), 1.0, 1.0) == GuardState()  # so no window is carried about


def test_nothing_is_judged_a_spike_before_the_window_is_long_enough():
    short = GuardState(losses=(1.0, 3.0, 1.0), grad_norms=(1.0, 3.0, 1.0))
    assert judge(WATCHING, short, 1e9, 1e9) is None
    assert judge(WATCHING, short.trained(WATCHING, 3.0, 3.0), 1e9, 1e9) is not None


def test_the_window_holds_the_last_steps_that_were_trained_on():
    state = GuardState()
    for step in range(1, 8):
        state = state.left_out(skipped(step)) if step == 6 else state.trained(WATCHING, float(step), 10.0 * step)
    assert state.losses == (3.0, 4.0, 5.0, 7.0)
    assert state.grad_norms == (30.0, 40.0, 50.0, 70.0)
    assert [one.step for one in state.skipped] == [6]


def test_mean_and_deviation_are_those_of_the_textbook():
    values = np.random.default_rng(0).normal(5.0, 0.01, size=128).tolist()
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-15)
    assert deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert mean_and_deviation(values[::-1]) == (mean, deviation)


def test_a_spike_in_words():
    found = judge(WATCHING, WINDOW, 9.0, 1.0)
    assert words(found, WATCHING, 4) == "loss 9 is a spike: more than 2 + 3 x 1.15, mean and deviation of the last 4 steps"


def test_the_state_goes_through_json_bit_for_bit():
    values = tuple(np.random.default_rng(1).normal(size=16).tolist())
    state = GuardState(values, tuple(v / 3 for v in values), marked=(skipped(9, "roll_back"),), skipped=(skipped(3),))
    assert GuardState.from_json(json.loads(json.dumps(state.to_json())), state.skipped) == state
    assert GuardState.from_json({}) == GuardState()


@pytest.mark.parametrize(
    ("steps", "step", "too_many"),
    [
        ((), 1, False),
        ((4, 5), 6, False),
        ((4, 5, 6), 7, True),
        ((3, 4, 6), 7, False),  # not in a row
        ((4, 5, 6), 8, False),
    ],
)
def test_too_many_in_a_row(steps, step, too_many):
    state = GuardState(skipped=(*(skipped(s, stage="parent") for s in range(1, 9)), *(skipped(s) for s in steps)))
    faults = replace(WATCHING, most_in_a_row=3)
    if not too_many:
        check_row(faults, state, "stable", step)
        return
    with pytest.raises(TrainingError, match=r"steps 4 to 6 were left out \(faults.most_in_a_row=3\), and that of step 7 is no better"):
        check_row(faults, state, "stable", step)


def test_a_roll_back_marks_the_step_and_goes_back_to_the_window_of_then():
    then = GuardState(losses=(1.0,), grad_norms=(2.0,), skipped=(skipped(2),))
    now = replace(then, losses=(1.0, 1.1), grad_norms=(2.0, 2.1))
    once = rolled_back(WATCHING, now, then, 4, skipped(7, "roll_back"))
    assert once == replace(then, marked=(skipped(7, "roll_back"),))
    assert once.mark(7) == skipped(7, "roll_back")
    assert once.mark(6) is None
    passed = once.left_out(once.mark(7))
    assert passed.marked == ()
    twice = rolled_back(WATCHING, passed, then, 4, skipped(8, "roll_back"))
    assert [one.step for one in twice.marked] == [7, 8]  # what was left out after the checkpoint will be again


def test_a_checkpoint_is_not_gone_back_to_for_ever():
    faults, then = replace(WATCHING, most_roll_backs=2), GuardState()
    state = rolled_back(faults, then, then, 4, skipped(6, "roll_back"))
    state = rolled_back(faults, state.left_out(state.mark(6)), then, 4, skipped(8, "roll_back"))
    said = r"checkpoint of step 4 2 times \(faults.most_roll_backs=2\) and steps 6, 8, 9 could not be trained on"
    with pytest.raises(TrainingError, match=said):
        rolled_back(faults, state, then, 4, skipped(9, "roll_back"))
    after = GuardState(skipped=(skipped(6, "roll_back"), skipped(8, "roll_back")))
    assert len(rolled_back(faults, after, after, 8, skipped(9, "roll_back")).marked) == 1  # a later checkpoint: counted anew


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"least_steps": 200}, "least_steps 200 exceed window_steps 128"),
        ({"least_steps": 1}, "least_steps is 1, must be at least 2"),
        ({"sigmas": 0.0}, "sigmas is 0.0, must be positive"),
        ({"most_in_a_row": 0}, "most_in_a_row is 0, must be at least 1; to leave no batch out, use 'stop'"),
        ({"most_roll_backs": 0}, "most_roll_backs is 0"),
        ({"spike": "panic"}, "spike"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        Faults(**values)


def test_the_policy_is_science_and_goes_through_json():
    stage = replace(STAGE, faults=replace(WATCHING, non_finite="roll_back"))
    assert science(stage) != science(STAGE)
    assert from_json(type(stage), to_json(stage)) == stage
