"""Which prompts come next: a pure state machine over passes through a set of problems.

Pass n is a permutation drawn from (seed, n) of the problems that are still in; what is left of a pass and does not fill a rollout
step is dropped, as in the paper's runs. After a pass, problems that were answered right often enough may leave for good.
A step's prompts are all of one pass, so that none comes twice in it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from megatron_ext.config.base import config


@config
class OrderState:
    """How far the prompts have come; saved with a checkpoint."""

    draws: int = 0  # prompts drawn since the stage began; also the next prompt's number
    epoch: int = 0  # the pass under way
    offset: int = 0  # of its prompts, those that are drawn
    removed: tuple[str, ...] = ()  # ids of problems that left
    right: dict[str, tuple[int, int]] = field(default_factory=dict)  # id -> (right, graded) responses of this pass, where easy ones leave


def draw(ids: Sequence[str], state: OrderState, seed: int, count: int, drop_easy_share: float | None) -> tuple[list[int], OrderState]:
    """Positions in `ids` of a rollout step's `count` problems, and the state after them. There are at least `count` problems."""
    assert len(ids) >= count, "fewer problems than a rollout step takes"
    if state.offset + count > len(_pass(ids, state, seed)):
        state = _next_pass(state, len(ids) - count, drop_easy_share)
    drawn, state = draw_more(ids, state, seed, count)
    assert len(drawn) == count, "a pass is too short for a rollout step"
    return drawn, state


def draw_more(ids: Sequence[str], state: OrderState, seed: int, count: int) -> tuple[list[int], OrderState]:
    """`count` further problems of the pass under way, or as many as it has left; it ends between rollout steps alone."""
    drawn = _pass(ids, state, seed)[state.offset : state.offset + count]
    return drawn, replace(state, draws=state.draws + len(drawn), offset=state.offset + len(drawn))


def graded(state: OrderState, right: Mapping[str, tuple[int, int]]) -> OrderState:
    """The state after some problems' responses were graded: (right, graded) of each."""
    found = {**state.right}
    for name, (one, of) in right.items():
        before = found.get(name, (0, 0))
        found[name] = (before[0] + one, before[1] + of)
    return replace(state, right=found)


def _pass(ids: Sequence[str], state: OrderState, seed: int) -> list[int]:
    out = set(state.removed)
    order = [number for number, name in enumerate(ids) if name not in out]
    random.Random(f"{seed}/{state.epoch}").shuffle(order)
    return order


def _next_pass(state: OrderState, most_removed: int, drop_easy_share: float | None) -> OrderState:
    """The beginning of the next pass, without the easy problems; the least easy of them stay where too few would be left."""
    removed = state.removed
    if drop_easy_share is not None:
        shares = {name: one / of for name, (one, of) in state.right.items()}
        easy = sorted((name for name, share in shares.items() if share >= drop_easy_share), key=lambda name: (-shares[name], name))
        removed = (*removed, *easy[: most_removed - len(removed)])
    return replace(state, epoch=state.epoch + 1, offset=0, removed=removed, right={})
