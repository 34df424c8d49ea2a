"""Scores of a checkpoint from graded answers, each with the interval that a handful of problems leaves it.

All are pure functions of counts. Intervals are two-sided, 95 % unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from scipy.special import betaincinv, stdtrit

from megatron_ext.errors import DataError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Tally:
    """One problem: how many answers were sampled, and how many of them are right."""

    samples: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.samples or self.samples < 1:
            raise DataError(
                f"{self.correct} right answers of {self.samples}: at least one answer is needed, and no more right than there are"
            )


@dataclass(frozen=True)
class Estimate:
    """A score, the interval around it, and how many problems, runs or sets it is of."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Paired:
    """A run's accuracy less another's on the same problems; `p_value` is that of no difference."""

    difference: Estimate
    p_value: float


def mean_at_k(tallies: Sequence[Tally]) -> float:
    """Mean accuracy of single answers: each problem's share of right ones, averaged over problems."""
    return fmean(tally.correct / tally.samples for tally in _some(tallies))


def pass_at_k(tallies: Sequence[Tally], k: int) -> float:
    """Chance that one of k answers is right, averaged over problems (Chen et al. 2021, section 2.1).

    Unbiased for any number of samples from k on; `DataError` where a problem has fewer.
    """
    return fmean(pass_at_k_of_one(tally, k) for tally in _some(tallies))


def pass_at_k_of_one(tally: Tally, k: int) -> float:
    """1 - C(wrong, k) / C(samples, k): in whole numbers, divided once, so that it is right to the last bit."""
    if not 1 <= k <= tally.samples:
        raise DataError(
            f"pass@{k} of a problem with {tally.samples} samples: k must lie between 1 and {tally.samples}; sample more answers"
        )
    every = math.comb(tally.samples, k)
    return (every - math.comb(tally.samples - tally.correct, k)) / every


def wilson(correct: int, total: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval: close to its confidence also for few problems and for scores near 0 or 1."""
    share, z = _share(correct, total), _z(confidence)
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else (centre - half) / scale  # exactly, where rounding would leave a trace
    high = 1.0 if correct == total else (centre + half) / scale
    return Estimate(share, low, high, total)


def clopper_pearson(correct: int, total: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with the exact binomial interval: never less sure than it says, so wider than Wilson's."""
    share, tail = _share(correct, total), (1 - _checked(confidence)) / 2
    low = 0.0 if correct == 0 else float(betaincinv(correct, total - correct + 1, tail))
    high = 1.0 if correct == total else float(betaincinv(correct + 1, total - correct, 1 - tail))
    return Estimate(share, low, high, total)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """A mean with Student's interval: of seeds, of problems' shares of right answers, or of their differences between two runs.

    `DataError` for fewer than two values, which tell nothing of how they spread.
    """
    if len(values) < 2:
        raise DataError(f"an interval of {len(values)} values: at least two are needed; run more seeds or problems")
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, 1 - (1 - _checked(confidence)) / 2)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE) -> Paired:
    """Accuracy of `first` less that of `second`, problem by problem in the same order.

    The interval is Newcombe's (1998, method 10: Wilson's intervals of both, joined by their correlation), the p-value
    McNemar's exact one: of the problems that only one run solved, either was as likely to be the one.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"a paired difference of {len(first)} and {len(second)} problems: both runs need the same ones, at least one")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    both, only_first, only_second, neither = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    difference = newcombe(both, only_first, only_second, neither, confidence)
    return Paired(difference, mcnemar(only_first, only_second))


def newcombe(both: int, only_first: int, only_second: int, neither: int, confidence: float = CONFIDENCE) -> Estimate:
    """The interval of a paired difference from the four counts of problems: solved by both runs, by one alone, by none."""
    total = both + only_first + only_second + neither
    one, other = wilson(both + only_first, total, confidence), wilson(both + only_second, total, confidence)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    cross = max(0.0, product - total / 2) if product > 0 else product  # Newcombe's continuity correction of positive correlations
    correlation = cross / math.sqrt(margins) if margins else 0.0
    value = (only_first - only_second) / total
    low = value - _joined(one.value - one.low, other.high - other.value, correlation)
    high = value + _joined(one.high - one.value, other.value - other.low, correlation)
    return Estimate(value, low, high, total)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: as uneven a split of the problems that only one run solved, or more, from a fair coin."""
    total = only_first + only_second
    tail = sum(math.comb(total, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """`one` less `other`, as if of different problems: Newcombe's (1998, independent proportions, method 10).

    Of two runs on the same problems, which mostly agree, the true interval is narrower: `paired_difference`, where it is
    known which problems each solved.
    """
    value = one.value - other.value
    low = value - _joined(one.value - one.low, other.high - other.value, 0.0)
    high = value + _joined(one.high - one.value, other.value - other.low, 0.0)
    return Estimate(value, low, high, min(one.count, other.count))


def macro_mean(sets: Mapping[str, Estimate]) -> Estimate:
    """Unweighted mean over sets of independent problems; its interval joins theirs by squares, as `newcombe` does."""
    if not sets:
        raise DataError("a mean over no sets: score at least one")
    value = fmean(each.value for each in sets.values())
    below = math.hypot(*(each.value - each.low for each in sets.values())) / len(sets)
    above = math.hypot(*(each.high - each.value for each in sets.values())) / len(sets)
    return Estimate(value, value - below, value + above, len(sets))


def _joined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def _some(tallies: Sequence[Tally]) -> Sequence[Tally]:
    if not tallies:
        raise DataError("a score of no problems: grade at least one")
    return tallies


def _share(correct: int, total: int) -> float:
    return Tally(total, correct).correct / total


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"a confidence of {confidence}: must lie between 0 and 1, 0.95 for 95 %")
    return confidence


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(1 - (1 - _checked(confidence)) / 2)
