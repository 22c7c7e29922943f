"""Tests that a measure got worse, and intervals of it, valid at any number of observations.

Windows are held against one frozen reference again and again. A test that is exact for one window is not so
for many: a reference that came out lucky makes every later window look a little worse, and an e-detector
adds that up. So each p-value here also holds given the reference, against a bound of what the reference's
true value may be: for 99 of 100 references (`CONFIDENCE`) all checks to come are valid however many there
are. Where a test that is exact over both samples exists the larger of the two p-values is given.

Observations are taken to be independent: callers give one of each session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: That the reference's true value is no worse than the bound which windows are tested against.
CONFIDENCE = 0.99
#: Of intervals that are shown.
LEVEL = 0.95
#: Smaller p-values are given as this: they say no more, and rounding could make them 0.
LEAST = 1e-15
#: The quantile that `quantile_p` and `quantile_interval` are about.
QUANTILE = 0.95
#: What share of the most that may be betted is betted. The mean over many bets is as valid as one of them.
_BETS = np.geomspace(0.01, 0.99, 24)


def rate_p(bad: int, of: int, reference_bad: int, reference_of: int) -> float:
    """That a rate is higher than the reference's, one-sided.

    The larger of Fisher's exact test and the exact binomial test against the Clopper-Pearson upper bound of
    the reference's rate.
    """
    from scipy.stats import beta, binom, hypergeom

    together = hypergeom.sf(bad - 1, of + reference_of, bad + reference_bad, of)
    if reference_bad == reference_of:
        return 1.0
    bound = beta.ppf(CONFIDENCE, reference_bad + 1, reference_of - reference_bad)
    return _kept(max(together, binom.sf(bad - 1, of, bound)))


def bound_p(bad: int, of: int, allowed: float) -> float:
    """That a rate is higher than what is allowed: the exact binomial test, one-sided."""
    from scipy.stats import binom

    return _kept(binom.sf(bad - 1, of, allowed))


def rate_interval(share: float, of: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share of `of` observations, which need be no whole number of them."""
    from scipy.stats import beta

    bad, tail = share * of, (1 - LEVEL) / 2
    low = beta.ppf(tail, bad, of - bad + 1) if bad > 0 else 0.0
    high = beta.ppf(1 - tail, bad + 1, of - bad) if bad < of else 1.0
    return float(low), float(high)


def quantile_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """That the 95th percentile is higher than the reference's, one-sided.

    Counts the values beyond the reference's sample percentile. The share that lies beyond an order statistic
    has a beta distribution whatever the values' own; ties make the test conservative. The larger p-value of
    the exact test over both samples (beta-binomial) and the binomial test at that share's upper bound.
    """
    from scipy.stats import beta, betabinom, binom

    rank = math.ceil(QUANTILE * len(reference))
    threshold = sorted(reference)[rank - 1]
    beyond = sum(value > threshold for value in values)
    shape = (len(reference) - rank + 1, rank)
    together = betabinom.sf(beyond - 1, len(values), *shape)
    return _kept(max(together, binom.sf(beyond - 1, len(values), beta.ppf(CONFIDENCE, *shape))))


def quantile_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Interval of the 95th percentile by order statistics; None for an end that so few values do not have."""
    from scipy.stats import binom

    ordered, tail = sorted(values), (1 - LEVEL) / 2
    low = int(binom.ppf(tail, len(ordered), QUANTILE))
    high = int(binom.ppf(1 - tail, len(ordered), QUANTILE)) + 1
    return (ordered[low - 1] if low >= 1 else None), (ordered[high - 1] if high <= len(ordered) else None)


def mean_p(values: Sequence[float], reference: Sequence[float], least: float, most: float) -> float:
    """That a mean is lower than the reference's, one-sided, for values that lie in bounds.

    One over the wealth of bets that the mean is below the reference's lower bound (Waudby-Smith and Ramdas,
    arXiv:2010.09686, with fixed bets): valid for any distribution in the bounds, and the less the values
    vary the sharper.

    Args:
        values: Of the window.
        reference: Of the reference.
        least: No value is lower.
        most: No value is higher.
    """
    floor = mean_bound(reference, least, most, CONFIDENCE)
    if floor <= least:  # nothing lies below it
        return 1.0
    # From above: that the mirrored mean is higher than the mirrored floor.
    return _kept(math.exp(-max(0.0, _wealth(most - np.asarray(values, dtype=float), most - floor))))


def mean_interval(values: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Interval of a mean of values in bounds, by the same bets."""
    level = (1 + LEVEL) / 2
    low = mean_bound(values, least, most, level)
    high = -mean_bound([-value for value in values], -most, -least, level)
    return low, high


def mean_bound(values: Sequence[float], least: float, most: float, confidence: float) -> float:
    """Lower bound of the mean of values in bounds: the lowest mean that the bets do not rule out."""
    above = np.asarray(values, dtype=float) - least
    low, high = 0.0, float(above.mean())
    wanted = -math.log(1 - confidence)
    for _ in range(40):
        middle = (low + high) / 2
        if middle <= 0:
            break
        low, high = (middle, high) if _wealth(above, middle) >= wanted else (low, middle)
    return least + min(low, most - least)


def _wealth(above: Floats, mean: float) -> float:
    """Log of what bets on a mean higher than `mean`, of values from 0 up, have come to."""
    found, counts = np.unique(above, return_counts=True)
    # At most all but 1 % is lost at a value of 0: no bet can be ruined.
    logs = counts @ np.log1p(_BETS[None, :] * (found[:, None] / mean - 1.0))
    most = float(logs.max())
    return most + math.log(float(np.exp(logs - most).mean()))


def _kept(p_value: float) -> float:
    return float(min(max(p_value, LEAST), 1.0))
