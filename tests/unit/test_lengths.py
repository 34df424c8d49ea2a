"""The length schedule: the paper's caps step by step, raises by truncation, and a resume at any step."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.base import from_json, override, to_json
from megatron_ext.config.rl import CapFrom, Lengths, ProgressLengths, TruncationLengths
from megatron_ext.errors import ConfigError
from megatron_ext.rl.lengths import LengthState, Seen, after_rollout_step, cap_tokens, check_reachable


def state_from_json(schedule, values, where=""):
    """A saved state, as a checkpoint's is read."""
    state = from_json(LengthState, values, where)
    check_reachable(schedule, state, where)
    return state


def by_progress(caps: dict[int, int], **more) -> ProgressLengths:
    return ProgressLengths(caps=tuple(CapFrom(after=after, cap_tokens=cap) for after, cap in caps.items()), **more)


LONG = by_progress({0: 2048, 100: 4096, 160: 8192})  # the paper's Long branch, in rollout steps
HYBRID = by_progress({0: 4096})
BY_TOKENS = by_progress({0: 64, 1000: 128, 5000: 256}, unit="response_tokens")
BY_TRUNCATION = TruncationLengths(caps_tokens=(64, 128, 256), share=0.25, steps=3)
CALM, CUT_OFF = Seen(num_responses=8, num_truncated=2, response_tokens=300), Seen(num_responses=8, num_truncated=3, response_tokens=500)


def run(schedule, steps: list[Seen], state: LengthState | None = None) -> tuple[list[int], LengthState]:
    """The cap that each rollout step ran under, and the state afterwards."""
    state, caps = state or LengthState(), []
    for seen in steps:
        caps.append(cap_tokens(schedule, state))
        state = after_rollout_step(schedule, state, seen)
    return caps, state


def check_the_papers_caps(cap_at) -> None:
    caps = [cap_at(step) for step in range(201)]
    assert [caps.count(cap) for cap in (2048, 4096, 8192)] == [100, 60, 41]
    assert [caps[step] for step in (0, 99, 100, 159, 160, 200)] == [2048, 2048, 4096, 4096, 8192, 8192]


def test_the_papers_schedule():
    check_the_papers_caps(lambda step: cap_tokens(LONG, LengthState(rollout_steps=step)))
    assert run(LONG, [CUT_OFF] * 201)[0] == [2048] * 100 + [4096] * 60 + [8192] * 41
    assert {cap_tokens(HYBRID, LengthState(rollout_steps=step)) for step in range(500)} == {4096}


def test_one_step_early_or_late_would_be_noticed():
    for shift in (-1, 1):
        with pytest.raises(AssertionError):
            check_the_papers_caps(lambda step, shift=shift: cap_tokens(LONG, LengthState(rollout_steps=max(0, step + shift))))


def test_by_response_tokens():
    caps, state = run(BY_TOKENS, [CUT_OFF] * 12)
    assert caps == [64, 64] + [128] * 8 + [256] * 2  # 0, 500 | 1000 ... 4500 | 5000, 5500
    assert (state.rollout_steps, state.response_tokens) == (12, 6000)


def test_by_truncation():
    c, t = CALM, CUT_OFF  # 2 of 8 are the share of 0.25, 3 are above it
    assert run(BY_TRUNCATION, [c] * 10)[0] == [64] * 10
    assert run(BY_TRUNCATION, [t] * 8)[0] == [64] * 3 + [128] * 3 + [256] * 2
    assert run(BY_TRUNCATION, [t, t, c, t, t, c, t, t, t, t])[0] == [64] * 9 + [128]  # a calm step begins the count anew
    caps, state = run(BY_TRUNCATION, [t] * 20)
    assert caps[6:] == [256] * 14  # the last cap stays
    assert (state.raises, state.steps_above) == (2, 0)


def test_responses_from_under_an_earlier_cap_do_not_count():
    late = Seen(num_responses=0, num_truncated=0, response_tokens=500)
    assert run(BY_TRUNCATION, [CUT_OFF, CUT_OFF, late, CUT_OFF, CALM])[0] == [64, 64, 64, 64, 128]
    assert run(BY_TOKENS, [late] * 3)[0] == [64, 64, 128]  # their tokens do


def test_a_share_of_exactly_the_bound_is_not_above_it():
    for count, total in ((29, 100), (57, 100), (7, 10), (1, 3)):  # 0.29 * 100 is below 29 in floating point
        schedule = TruncationLengths(caps_tokens=(1, 2), share=count / total, steps=1)
        at, above = (Seen(num_responses=total, num_truncated=n, response_tokens=0) for n in (count, count + 1))
        assert (run(schedule, [at, at])[0], run(schedule, [above, at])[0]) == ([1, 1], [1, 2])


@st.composite
def schedules(draw, may_fall: bool = False):
    caps = draw(st.lists(st.integers(1, 9000), min_size=1, max_size=5, unique=True))
    caps = caps if may_fall else sorted(caps)
    if not may_fall and draw(st.booleans()):
        return TruncationLengths(caps_tokens=tuple(caps), share=draw(st.floats(0, 0.9)), steps=draw(st.integers(1, 4)))
    afters = [0, *sorted(draw(st.lists(st.integers(1, 60), min_size=len(caps) - 1, max_size=len(caps) - 1, unique=True)))]
    unit = draw(st.sampled_from(["rollout_steps", "response_tokens"]))
    return by_progress(dict(zip(afters, caps, strict=True)), unit=unit, may_fall=may_fall)


@st.composite
def runs(draw):
    counts = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9)), max_size=40))
    return [Seen(num_responses=8, num_truncated=truncated, response_tokens=tokens) for truncated, tokens in counts]


@given(schedule=schedules(), steps=runs())
def test_caps_never_fall(schedule, steps):
    caps, state = run(schedule, steps)
    assert caps == sorted(caps)
    assert cap_tokens(schedule, state) <= schedule.largest_cap_tokens


@given(schedule=schedules(may_fall=True) | schedules(), steps=runs(), data=st.data())
def test_a_resume_at_any_step_gives_the_same_caps(schedule, steps, data):
    whole, end = run(schedule, steps)
    cut = data.draw(st.integers(0, len(steps)))
    before, state = run(schedule, steps[:cut])
    saved = json.dumps({"state": to_json(state), "schedule": to_json(schedule)})
    read = json.loads(saved)
    schedule = from_json(Lengths, read["schedule"])
    after, resumed_end = run(schedule, steps[cut:], state_from_json(schedule, read["state"]))
    assert (before + after, resumed_end) == (whole, end)


def test_a_resume_that_forgot_the_steps_above_would_be_noticed():
    _, state = run(BY_TRUNCATION, [CUT_OFF] * 2)
    assert run(BY_TRUNCATION, [CUT_OFF] * 2, state)[0] == [64, 128]
    assert run(BY_TRUNCATION, [CUT_OFF] * 2, LengthState(rollout_steps=2, response_tokens=1000))[0] == [64, 64]


def test_a_cap_may_fall_where_that_is_said():
    assert run(by_progress({0: 512, 2: 256}, may_fall=True), [CALM] * 4)[0] == [512, 512, 256, 256]
    assert by_progress({0: 512, 2: 256}, may_fall=True).largest_cap_tokens == 512


def test_an_override_reaches_a_cap():
    assert override(LONG, ["caps.1.cap_tokens=3000"]).caps[1] == CapFrom(after=100, cap_tokens=3000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_progress({}), "no caps; name at least one"),
        (lambda: by_progress({5: 64}), "the first cap begins after 5 rollout_steps, must begin after 0"),
        (lambda: by_progress({0: 64, 9: 128, 4: 256}), "a cap after 4 rollout_steps stands behind one after 9"),
        (lambda: by_progress({0: 4096, 9: 2048}), "2,048 tokens follow 4,096; caps must rise .* may_fall=true"),
        (lambda: by_progress({0: 4096, 9: 4096}, may_fall=True), "4,096 tokens follow 4,096"),
        (lambda: by_progress({0: 0}), "a cap of 0 tokens, must be at least 1"),
        (lambda: TruncationLengths(caps_tokens=(128, 64), share=0.1, steps=1), "64 tokens follow 128"),
        (lambda: TruncationLengths(caps_tokens=(64, 128), share=1.0, steps=1), r"share is 1.0, must lie in \[0, 1\)"),
        (lambda: TruncationLengths(caps_tokens=(64, 128), share=0.1, steps=0), "steps is 0, must be at least 1"),
        (lambda: Seen(num_responses=4, num_truncated=5, response_tokens=1), "5 of 4 responses cut off"),
        (lambda: Seen(num_responses=4, num_truncated=1, response_tokens=-1), "-1 tokens; counts must not be negative"),
        (lambda: state_from_json(LONG, {"rollout_steps": -1}, "state.json"), "state.json.*rollout_steps is -1"),
        (lambda: state_from_json(LONG, {"rollout_step": 1}, "state.json"), "state.json.*did you mean 'rollout_steps'"),
        (lambda: state_from_json(BY_TRUNCATION, {"raises": 3}, "state.json"), "state.json: the length state has 3 raises .* at most 2"),
        (lambda: state_from_json(LONG, {"raises": 1}), "1 raises .* of another schedule; resume with the recipe"),
        (lambda: state_from_json(BY_TRUNCATION, {"steps_above": 3}), "3 steps above the share"),
    ],
)
def test_what_cannot_be_names_the_value(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
