"""Tests that a measure got worse, and intervals of it, valid at any number of observations.

Windows are held against one frozen reference again and again. A test that is exact for one window is not so
for many: a reference that came out lucky makes every later window look a little worse, and an e-detector
adds that up. So each p-value here also holds given the reference, against a bound of what the reference's
true value may be: for 95 of 100 references (`CONFIDENCE`) all checks to come are valid, however many there
are. The larger of that and of the test that is exact over both samples is given.

The other five lie little beyond their bound. Simulated for rates of 1 to 30 %, references of 100 to 1,500
and windows of 100 at an average run length of 1,000: at most 0.8 % of streams alarmed in 30 checks, where 3 %
may, and 3 % in 1,000 checks. A confidence of 0.99 left a quarter of these, and found 20 % of answers cut off,
where 3 % of 300 were, in 78 of 100 first windows in place of 92; below 0.95 Fisher's test bounds it (94).

Observations are taken to be independent: callers give one of each session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: That the reference's true value is no worse than the bound which windows are tested against.
CONFIDENCE = 0.95
#: Of intervals that are shown.
LEVEL = 0.95
#: Smaller p-values are given as this: they say no more, and rounding could make them 0.
LEAST = 1e-15
#: The quantile that `quantile_p` and `quantile_interval` are about.
QUANTILE = 0.95
#: Random permutations of scores: the smallest p-value is one over one more.
PERMUTATIONS = 9_999
#: Steps of the grid that scores are rounded to.
_GRID = 64


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


def mean_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """That a mean is lower than the reference's, one-sided, for scores of any scale.

    Where there are but two scores, such as thumbs up and down, `rate_p` of the lower one. Otherwise the
    larger p-value of two permutation tests: with the reference as it is, which is exact, and with it lowered
    by what its mean may be too high (Student's t at `CONFIDENCE`), which is nearly so given the reference.

    Raises:
        ValueError: If there are fewer than two values of either.
    """
    from scipy.stats import t

    now, before = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if min(len(now), len(before)) < 2:
        raise ValueError("a mean is tested on two values or more of either side")
    levels = np.unique(np.concatenate([now, before]))
    if len(levels) <= 2:
        if len(levels) == 1:
            return 1.0
        worst = levels[0]
        return rate_p(int((now == worst).sum()), len(now), int((before == worst).sum()), len(before))
    margin = float(t.ppf(CONFIDENCE, len(before) - 1) * before.std(ddof=1) / math.sqrt(len(before)))
    return max(_permuted(now, before), _permuted(now, before - margin))


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Interval of a mean: Clopper-Pearson's for two scores, else Student's; None for a single value."""
    from scipy.stats import t

    levels = sorted(set(values))
    if len(levels) == 2:
        low, high = rate_interval(sum(value == levels[1] for value in values) / len(values), len(values))
        span = levels[1] - levels[0]
        return levels[0] + low * span, levels[0] + high * span
    if len(values) < 2:
        return None, None
    found = np.asarray(values, dtype=float)
    half = float(t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return float(found.mean()) - half, float(found.mean()) + half


def _permuted(values: Floats, reference: Floats) -> float:
    """Permutation test of the sum over the window, of values rounded to a grid of both sides' range.

    Rounded values are as exchangeable as the values are, and so few that a permutation is one draw of how
    many of each the window gets.
    """
    both = np.concatenate([values, reference])
    low, span = float(both.min()), float(np.ptp(both))
    grid = np.rint((both - low) / span * _GRID).astype(np.int64) if span else np.zeros(len(both), np.int64)
    levels, place = np.unique(grid, return_inverse=True)
    counts = np.bincount(place)
    draws = np.random.default_rng(0).multivariate_hypergeometric(
        counts, len(values), size=PERMUTATIONS, method="marginals"
    )
    as_low = int((draws @ levels <= int(grid[: len(values)].sum())).sum())
    return _kept((1 + as_low) / (1 + PERMUTATIONS))


def _kept(p_value: float) -> float:
    return float(min(max(p_value, LEAST), 1.0))
