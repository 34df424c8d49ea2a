"""Shares, tokens and epochs of mixtures; what may not be mixed."""

from __future__ import annotations

import pytest

from megatron_ext.config.mixture import Mixture, Row, draws
from megatron_ext.errors import ConfigError, DataError

BILLION = 10**9


def mixture(**weights: float) -> Mixture:
    return Mixture(rows=tuple(Row(source=source, weight=weight) for source, weight in weights.items()))


def test_draws_are_shares_of_the_tokens():
    table = draws(mixture(web=0.725, qa=0.275), 209_715_200_000, {"web": 738 * BILLION // 10, "qa": 60 * BILLION}, {"web": 2.5, "qa": 1.0})
    assert [(d.source, d.tokens) for d in table] == [("web", 152_043_520_000), ("qa", 57_671_680_000)]
    assert table[0].epochs == pytest.approx(2.0602, abs=1e-4)  # 152.04 / 73.8
    assert sum(d.tokens for d in table) == 209_715_200_000


def test_epochs_count_what_the_lineage_drew_before():
    table = draws(mixture(qa=1.0), 40, {"qa": 100}, {"qa": 1.0}, {"qa": 60})
    assert (table[0].tokens, table[0].already_tokens, table[0].epochs) == (40, 60, 1.0)


def test_excess_is_refused_with_its_arithmetic_and_ways_out():
    with pytest.raises(DataError) as caught:
        draws(mixture(qa=0.5, web=0.5), 100, {"qa": 100, "web": 1000}, {"qa": 1.0, "web": 1.0}, {"qa": 60})
    text = str(caught.value)
    assert "'qa' would be repeated 1.100 times, more than its most epochs 1" in text
    assert "(60 already drawn + 0.5 x 100 = 50) / 100 tokens" in text
    assert "Lower its weight to 0.4000" in text
    assert draws(mixture(qa=0.4, web=0.6), 100, {"qa": 100, "web": 1000}, {"qa": 1.0, "web": 1.0}, {"qa": 60})[0].epochs == 1.0


@pytest.mark.parametrize(
    ("available", "message"),
    [({"web": 10}, "no source 'qa' in the corpus; it has: web"), ({"qa": 0, "web": 10}, r"source 'qa' is empty \(0 training tokens\)")],
)
def test_missing_and_empty_sources_are_refused(available, message):
    with pytest.raises(DataError, match=message):
        draws(mixture(qa=1.0), 5, available, {"qa": 1.0, "web": 1.0})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no rows"),
        ((("a", 0.5), ("b", 0.4)), r"weights must sum to 1, but 0.5 \+ 0.4 = 0.9"),
        ((("a", 0.5), ("a", 0.5)), "source 'a' stands 2 times"),
        ((("a", 1.5), ("b", -0.5)), "source 'b' has weight -0.5"),
        ((("a", 1.0), ("b", 0.0)), "source 'b' has weight 0.0"),
        ((("a", float("nan")),), "source 'a' has weight nan"),
    ],
)
def test_mixtures_that_cannot_be_right(rows, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(rows=tuple(Row(source=source, weight=weight) for source, weight in rows))


def test_weights_may_miss_one_by_rounding_only():
    assert mixture(a=1 / 3, b=1 / 3, c=1 / 3).sources == ("a", "b", "c")
    with pytest.raises(ConfigError, match="sum to 1"):
        mixture(a=0.333, b=0.333, c=0.333)
