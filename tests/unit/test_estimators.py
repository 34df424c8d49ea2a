"""Scores against enumeration and published tables; intervals by the share of outcomes for which they hold the truth."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from megatron_ext.errors import DataError
from megatron_ext.estimators import (
    Estimate,
    Tally,
    clopper_pearson,
    macro_mean,
    mcnemar,
    mean_at_k,
    mean_interval,
    newcombe,
    paired_difference,
    pass_at_k,
    pass_at_k_of_one,
    wilson,
)


def bounds(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def test_mean_weighs_problems_not_answers():
    assert mean_at_k([Tally(4, 1), Tally(2, 2), Tally(1, 0)]) == pytest.approx((0.25 + 1 + 0) / 3)


def check_pass_at_k(estimate) -> None:
    """Every subset of k answers was as likely to be the k: what share of them holds a right one?"""
    for samples in range(1, 8):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                subsets = [any(i < correct for i in subset) for subset in combinations(range(samples), k)]
                assert estimate(Tally(samples, correct), k) == sum(subsets) / len(subsets)


def test_pass_at_k_is_the_share_of_subsets_to_the_last_bit():
    check_pass_at_k(pass_at_k_of_one)


def test_the_plug_in_estimate_would_be_noticed():
    with pytest.raises(AssertionError):
        check_pass_at_k(lambda tally, k: 1 - (1 - tally.correct / tally.samples) ** k)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_pass_at_k_is_unbiased(rate, k):
    weights = [math.comb(10, c) * rate**c * (1 - rate) ** (10 - c) for c in range(11)]
    expected = sum(weight * pass_at_k_of_one(Tally(10, c), k) for c, weight in enumerate(weights))
    assert expected == pytest.approx(1 - (1 - rate) ** k, rel=1e-12)


@pytest.mark.parametrize("samples", [256, 10_000])
def test_pass_at_k_keeps_every_digit_of_many_samples(samples):
    for k in (1, 7, samples // 2, samples):
        assert pass_at_k_of_one(Tally(samples, 1), k) == k / samples
        assert pass_at_k_of_one(Tally(samples, 0), k) == 0.0
        assert pass_at_k_of_one(Tally(samples, samples), k) == 1.0


def test_pass_at_k_of_a_set():
    tallies = [Tally(4, 1), Tally(8, 2)]
    assert pass_at_k(tallies, 2) == pytest.approx((1 / 2 + (1 - 15 / 28)) / 2)
    assert pass_at_k(tallies, 1) == pytest.approx(mean_at_k(tallies))


NEWCOMBE_1998 = [  # Table I: right, of, Wilson, Clopper-Pearson
    (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
    (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
    (0, 20, (0.0, 0.1611), (0.0, 0.1684)),
    (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
]


@pytest.mark.parametrize(("correct", "total", "score", "exact"), NEWCOMBE_1998)
def test_published_intervals(correct, total, score, exact):
    assert bounds(wilson(correct, total)) == pytest.approx(score, abs=5e-5)
    assert bounds(clopper_pearson(correct, total)) == pytest.approx(exact, abs=5e-5)
    assert wilson(correct, total).value == correct / total


@given(total=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_intervals_as_scipy_has_them(total, share, confidence):
    correct = round(share * total)
    for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        theirs = binomtest(correct, total).proportion_ci(confidence, method)
        assert bounds(ours(correct, total, confidence)) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
        assert ours(correct, total).low <= correct / total <= ours(correct, total).high


def wald(correct: int, total: int) -> Estimate:
    share = correct / total
    half = 1.96 * math.sqrt(share * (1 - share) / total)
    return Estimate(share, share - half, share + half, total)


def coverage(interval, total: int) -> list[float]:
    """For true rates from 1 % to 99 %: how likely the interval is to hold the rate."""
    found = [interval(correct, total) for correct in range(total + 1)]
    return [
        sum(math.comb(total, c) * p**c * (1 - p) ** (total - c) for c in range(total + 1) if found[c].low <= p <= found[c].high)
        for p in (percent / 100 for percent in range(1, 100))
    ]


def test_intervals_hold_the_truth_as_often_as_they_say():
    assert min(coverage(clopper_pearson, 40)) >= 0.95  # 40 problems, as in AMC23
    assert fmean(coverage(wilson, 40)) == pytest.approx(0.95, abs=0.01)
    assert fmean(coverage(wald, 40)) < 0.93  # the textbook's interval would be noticed
    assert min(coverage(wilson, 40)) < 0.95  # as published: close on average, not always above


def test_certain_scores_end_at_0_and_1():
    for total in (1, 3, 40, 1319):
        for interval in (wilson, clopper_pearson):
            assert interval(0, total).low == 0.0
            assert interval(total, total).high == 1.0


@pytest.mark.parametrize(
    ("counts", "interval", "p_value"),
    [
        (
            (59, 6, 16, 80),
            (-0.1186, -0.0046),
            0.0525,
        ),  # Cavo 2012, in Fagerland, Lydersen & Laake, Statistical Analysis of Contingency Tables
        ((1, 1, 7, 12), (-0.507, -0.026), 0.0703),  # Bentur 2009, there too
    ],
)
def test_published_paired_differences(counts, interval, p_value):
    digits = 5e-5 if counts[0] == 59 else 5e-4
    assert bounds(newcombe(*counts)) == pytest.approx(interval, abs=digits)
    assert mcnemar(counts[1], counts[2]) == pytest.approx(p_value, abs=5e-5)


def test_pairs_are_counted_problem_by_problem():
    first = [True] * 59 + [True] * 6 + [False] * 16 + [False] * 80
    second = [True] * 59 + [False] * 6 + [True] * 16 + [False] * 80
    found = paired_difference(first, second)
    assert found.difference == newcombe(59, 6, 16, 80)
    assert found.p_value == mcnemar(6, 16)
    turned = paired_difference(second, first)
    assert bounds(turned.difference) == pytest.approx((-found.difference.high, -found.difference.low))
    assert turned.p_value == found.p_value


def test_pairing_narrows_the_interval_of_runs_that_solve_the_same_problems():
    alike, unlike = newcombe(50, 5, 10, 35), newcombe(30, 25, 30, 15)  # the same two accuracies
    assert alike.value == unlike.value
    assert alike.high - alike.low < 0.6 * (unlike.high - unlike.low)


@given(counts=st.tuples(*[st.integers(0, 60)] * 4).filter(any))
def test_a_paired_interval_holds_its_difference_and_stays_within_bounds(counts):
    found = newcombe(*counts)
    assert -1 - 1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    assert 0 <= mcnemar(counts[1], counts[2]) <= 1
    if counts[1] + counts[2]:
        assert mcnemar(counts[1], counts[2]) == pytest.approx(binomtest(counts[1], counts[1] + counts[2]).pvalue, rel=1e-9)


def test_three_seeds():
    found = mean_interval([1.0, 2.0, 3.0])
    assert bounds(found) == pytest.approx((2 - 4.302652729696142 / math.sqrt(3), 2 + 4.302652729696142 / math.sqrt(3)))  # t of 2 degrees
    theirs = ttest_1samp([0.2, 0.5, 0.4, 0.9], 0).confidence_interval(0.9)
    assert bounds(mean_interval([0.2, 0.5, 0.4, 0.9], 0.9)) == pytest.approx((theirs.low, theirs.high))


def test_the_macro_mean_weighs_sets_alike():
    sets = {"a": Estimate(0.5, 0.4, 0.7, 1319), "b": Estimate(0.1, 0.07, 0.14, 40)}
    found = macro_mean(sets)
    assert found.value == pytest.approx(0.3)
    assert bounds(found) == pytest.approx((0.3 - math.hypot(0.1, 0.03) / 2, 0.3 + math.hypot(0.2, 0.04) / 2))
    alone = macro_mean({"a": sets["a"]})
    assert (alone.value, *bounds(alone)) == pytest.approx((0.5, 0.4, 0.7))
    assert (found.count, alone.count) == (2, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tally(4, 5), "5 right answers of 4"),
        (lambda: Tally(0, 0), "0 right answers of 0: at least one answer is needed"),
        (lambda: pass_at_k([Tally(8, 1), Tally(4, 1)], 5), "pass@5 of a problem with 4 samples: k must lie between 1 and 4; sample more"),
        (lambda: pass_at_k([Tally(8, 1)], 0), "pass@0"),
        (lambda: mean_at_k([]), "a score of no problems"),
        (lambda: wilson(3, 2), "3 right answers of 2"),
        (lambda: clopper_pearson(0, 0), "0 right answers of 0"),
        (lambda: wilson(1, 2, 95), "a confidence of 95: must lie between 0 and 1"),
        (lambda: mean_interval([0.3]), "an interval of 1 values: at least two"),
        (lambda: paired_difference([True], [True, False]), "of 1 and 2 problems: both runs need the same ones"),
        (lambda: paired_difference([], []), "of 0 and 0 problems"),
        (lambda: macro_mean({}), "a mean over no sets"),
    ],
)
def test_what_cannot_be_says_why(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_estimators_need_no_torch():
    program = "import sys\nsys.modules['torch'] = None\nimport megatron_ext.estimators"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
