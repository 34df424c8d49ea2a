"""Which prompts come next: every problem once a pass, the same after a resume, easy ones leave."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.rl.order import OrderState, draw, draw_more, graded

IDS = [f"p{number}" for number in range(10)]


def drawn(count, times, state=None, seed=1, share=None, ids=IDS):
    """What `times` draws give, and the last state."""
    state, found = state or OrderState(), []
    for _ in range(times):
        one, state = draw(ids, state, seed, count, share)
        found.append(one)
    return found, state


def test_a_pass_holds_each_problem_once_and_drops_what_fills_no_draw():
    found, state = drawn(4, 4)
    first, second = found[0] + found[1], found[2] + found[3]
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert (state.epoch, state.offset, state.draws) == (1, 8, 16)


def test_order_depends_on_the_seed_and_on_nothing_else():
    assert drawn(5, 6)[0] == drawn(5, 6)[0]
    assert drawn(5, 6)[0] != drawn(5, 6, seed=2)[0]


def test_a_saved_state_goes_on_as_if_nothing_had_been():
    straight = drawn(3, 7)[0]
    for after in range(1, 7):
        first, state = drawn(3, after)
        assert first + drawn(3, 7 - after, state)[0] == straight


def test_problems_answered_right_often_enough_leave_after_the_pass():
    _, state = drawn(5, 2)
    state = graded(state, {"p0": (4, 4), "p1": (2, 4), "p2": (3, 4)})
    state = graded(state, {"p1": (2, 4)})
    assert state.right == {"p0": (4, 4), "p1": (4, 8), "p2": (3, 4)}
    found, after = drawn(4, 2, state, share=0.75)
    assert after.removed == ("p0", "p2"), "p1 has a half"
    assert after.right == {}
    assert not {0, 2} & {number for one in found for number in one}
    kept, stays = drawn(4, 2, state, share=None)
    assert stays.removed == ()
    assert len({number for one in kept for number in one}) == 8


def test_the_least_easy_stay_where_too_few_would_be_left():
    state = replace(drawn(5, 2)[1], right={name: (number, 10) for number, name in enumerate(IDS, start=1)})
    found, after = drawn(8, 1, state, share=0.1)
    assert after.removed == ("p9", "p8"), "ten problems, eight a draw: two may leave, the easiest"
    assert sorted(found[0]) == list(range(8))


def test_redrawing_leaves_each_step_whole_and_asks_no_problem_twice_in_it():
    """Ten problems, six a step, two redrawn; most of them easy."""
    state = OrderState()
    for step in range(12):
        first, state = draw(IDS, state, 1, 6, 0.5)
        more, state = draw_more(IDS, state, 1, 2)
        assert len(first) == 6, step
        assert len(set(first + more)) == len(first + more), step
        state = graded(state, {IDS[number]: (4, 4) for number in first + more})
    assert len(state.removed) == 4, "all were easy, and six must stay"
    assert more == [], "a pass of six has nothing more"


def test_redrawing_takes_what_the_pass_has_left():
    _, state = draw(IDS, OrderState(), 1, 8, None)
    more, after = draw_more(IDS, state, 1, 5)
    assert (len(more), after.draws, after.offset, after.epoch) == (2, 10, 10, 0)
