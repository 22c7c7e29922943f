"""Two-sample statistics for many labellings at once, and the exact joint p-value over them.

A labelling is a column of booleans, true where a row is taken for the window's. Column 0 is the real one,
the others are random permutations of it. Every statistic is a row of values, one for each labelling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
_TIE = 1e-12
#: Where a distribution function is looked at: at each value if there are no more, else at so many quantiles.
_LEVELS = 64
#: Squared distances of unit vectors that differ by less than this are the same.
_DIGITS = 4
#: Labellings whose statistics are computed at once: a matrix of 1,000 rows takes 20 MB.
_AT_ONCE = 5000


def labellings(reference: int, window: int, permutations: int, seed: int) -> Labels:
    """The real labelling and random permutations of it."""
    real = np.zeros(reference + window, dtype=bool)
    real[reference:] = True
    return _permuted(real, permutations, np.random.default_rng(seed), first=True)


def session_labellings(
    sessions: Sequence[str], window: Sequence[bool], permutations: int, seed: int
) -> Labels:
    """The real labelling and random permutations of it that move whole sessions.

    Turns of one session are alike: permuted one by one they would make ordinary windows look strange. Every
    labelling gives the window as many sessions as it has; how many rows these have differs.

    Args:
        sessions: The session of each row.
        window: Which rows are the window's.
        permutations: How many random labellings.
        seed: The same seed, the same labellings.

    Raises:
        ValueError: If rows of one session are on both sides.
    """
    return np.concatenate(list(in_parts(sessions, window, permutations, seed)), axis=1)


def in_parts(
    sessions: Sequence[str], window: Sequence[bool], permutations: int, seed: int
) -> Iterator[Labels]:
    """`session_labellings` a few thousand columns at a time, the real one first."""
    names, which = np.unique(np.asarray(sessions, dtype=object).astype(str), return_inverse=True)
    taken = np.asarray(window, dtype=bool)
    real = np.zeros(len(names), dtype=bool)
    real[which[taken]] = True
    if not np.array_equal(real[which], taken):
        raise ValueError("a session has rows in the reference and in the window")
    generator = np.random.default_rng(seed)
    for begun in range(0, permutations, _AT_ONCE):
        count = min(_AT_ONCE, permutations - begun)
        yield np.asarray(_permuted(real, count, generator, first=begun == 0)[which])


def _permuted(real: Labels, count: int, generator: np.random.Generator, *, first: bool) -> Labels:
    """Permutations of a labelling as columns, with itself in front if `first`."""
    drawn = generator.permuted(np.tile(real, (count, 1)), axis=1).T
    return np.column_stack([real, drawn]) if first else drawn


def mean_difference(values: Floats, labels: Labels) -> Floats:
    """Mean over the window minus mean over the reference.

    Args:
        values: Of each row, a column for each labelling or one for all.
        labels: As above.
    """
    window = labels.sum(axis=0)
    if values.shape[1] == 1:
        inside = values[:, 0] @ labels.astype(np.float64)
    else:
        inside = (values * labels).sum(axis=0)
    return np.asarray(inside / window - (values.sum(axis=0) - inside) / (len(labels) - window))


def excess(values: Floats, labels: Labels) -> Floats:
    """Largest excess, over all thresholds, of the window's share above it over the reference's.

    It is a lower bound of the share of window rows that the reference cannot account for.
    """
    order = np.argsort(values, axis=0, kind="stable")
    sorted_labels = np.take_along_axis(labels, order, axis=0)
    window = labels.sum(axis=0)
    reference = len(labels) - window
    inside = np.cumsum(sorted_labels, axis=0)
    outside = np.arange(1, len(labels) + 1)[:, None] - inside
    return np.asarray((outside / reference - inside / window).max(axis=0))


def kolmogorov_smirnov(values: Floats, labels: Labels) -> Floats:
    """Largest distance of the two distribution functions of one fixed column of values, ties respected.

    Of more than 64 distinct values it is looked at 64 quantiles of both sides together.
    """
    levels = np.unique(values)[:-1]
    if len(levels) >= _LEVELS:
        at = np.arange(1, _LEVELS + 1) / (_LEVELS + 1)
        levels = np.unique(np.quantile(values, at, method="inverted_cdf"))
    if not len(levels):
        return np.zeros(labels.shape[1])
    return np.asarray(rate_differences((values[:, None] <= levels[None, :]), labels).max(axis=0))


def rate_differences(values: NDArray[np.generic], labels: Labels) -> Floats:
    """Absolute differences of rates, a row of them for each column of `values`, which are 0 or 1."""
    inside, outside = _counted(values, labels)
    window = labels.sum(axis=0)
    return np.asarray(np.abs(inside / window - outside / (len(labels) - window)))


def _counted(values: NDArray[np.generic], labels: Labels) -> tuple[Floats, Floats]:
    """How many ones each column of `values` has among the window's rows and among the others.

    In single precision, which is exact for whole numbers below 16 million.
    """
    ones = values.astype(np.float32).T
    inside = (ones @ labels.astype(np.float32)).astype(np.float64)
    return inside, ones.sum(axis=1, dtype=np.float64)[:, None] - inside


def gaussian(squared: Floats) -> Floats:
    """Gaussian kernel at median distance, with zeros for each row and itself.

    Args:
        squared: Squared distance of every row to every other.
    """
    scale = float(np.median(squared[np.triu_indices(len(squared), 1)])) or 1.0
    kernel = np.exp(-squared / scale)
    np.fill_diagonal(kernel, 0.0)
    return np.asarray(kernel)


def squared_distances(similarity: Floats) -> Floats:
    """Squared distance of every row to every other, by their inner products."""
    own = np.diag(similarity)
    return np.asarray(np.maximum(own[:, None] + own[None, :] - 2 * similarity, 0.0))


def kernel_discrepancy(kernel: Floats, labels: Labels) -> Floats:
    """Unbiased squared maximum mean discrepancy (Gretton et al., 2012).

    Args:
        kernel: Of every row and every other, zeros on its diagonal.
        labels: As above.
    """
    taken = labels.astype(np.float32)
    window = labels.sum(axis=0)
    reference = len(labels) - window
    product = kernel.astype(np.float32) @ taken
    both = np.einsum("ij,ij->j", product, taken, dtype=np.float64)
    touching = kernel.sum(axis=0) @ labels.astype(np.float64)
    cross = touching - both
    neither = kernel.sum() - 2 * touching + both
    return np.asarray(
        neither / (reference * (reference - 1))
        + both / (window * (window - 1))
        - 2 * cross / (reference * window)
    )


def company(weights: Floats, near: NDArray[np.bool_], labels: Labels) -> Floats:
    """How many of the window's rows have others of the window for neighbours, each by its weight.

    A new topic is not only far from what is known: its texts lie near each other, and ordinary outliers do
    not (after the nearest-neighbour test of Schilling, 1986).

    Args:
        weights: Of each row, at least 0.
        near: For each row which others are its neighbours.
        labels: As above.
    """
    told = weights > 0
    taken = labels.astype(np.float32)
    beside = near[told].astype(np.float32) @ taken
    found = weights[told] @ (beside * taken[told]).astype(np.float64)
    return np.asarray(found / labels.sum(axis=0) ** 2)


def neighbours(squared: Floats, count: int) -> NDArray[np.bool_]:
    """For each row the `count` nearest others, and all that are as near as the last of them."""
    # Rounded, so that equal texts are equally near whatever the order of additions was.
    apart = np.round(squared, _DIGITS)
    np.fill_diagonal(apart, np.inf)
    last = min(count, len(apart) - 1) - 1
    return np.asarray(apart <= np.partition(apart, last, axis=1)[:, [last]])


def mixture(groups: NDArray[np.intp], labels: Labels) -> Floats:
    """How unlike the two sides spread over groups: the two-sample chi-squared statistic."""
    inside, outside = _counted(_membership(groups), labels)
    share = labels.sum(axis=0) / len(labels)
    expected = (inside + outside) * share
    return np.asarray(((inside - expected) ** 2 / (expected * (1 - share))).sum(axis=0))


def total_variation(groups: NDArray[np.intp], labels: Labels) -> Floats:
    """Share of the window that would have to be in other groups for the sides to be spread alike."""
    return np.asarray(rate_differences(_membership(groups), labels).sum(axis=0) / 2)


def _membership(groups: NDArray[np.intp]) -> NDArray[np.bool_]:
    return np.asarray(groups[:, None] == np.unique(groups)[None, :])


def novelty(similarity: Floats, labels: Labels, ridge: float) -> Floats:
    """How much each row resembles the window rather than the reference, judged without that row's own label.

    A ridge regression of the labels on the texts, left out one by one. The hat matrix depends on the texts
    alone, so the leave-one-out scores for all labellings are one matrix product.
    """
    kernel = similarity + 1.0  # a constant feature, which is the intercept
    hat = np.linalg.solve(kernel + ridge * np.eye(len(kernel)), kernel).T
    own = np.diag(hat)[:, None]
    taken = labels.astype(np.float64)
    return np.asarray((hat @ taken - own * taken) / (1.0 - own))


def p_values(statistic: Floats) -> Floats:
    """For each labelling, the share of labellings with a statistic at least as large, itself included."""
    ordered = np.sort(statistic)
    return np.asarray(
        (len(statistic) - np.searchsorted(ordered, statistic - _TIE, side="left")) / len(statistic)
    )


def strongest(rows: Floats) -> Floats:
    """The largest of several statistics for every labelling, each in its own permutation standard deviations.

    The smallest of their p-values would not do: among B labellings each of k statistics is largest
    somewhere, so a group of 18 could never get below 18/B however strong the drift.
    """
    spread = rows.std(axis=1, keepdims=True)
    spread[spread < _TIE] = 1.0
    return np.asarray(((rows - rows.mean(axis=1, keepdims=True)) / spread).max(axis=0))


def joint_p(groups: dict[str, Floats]) -> tuple[float, dict[str, float]]:
    """Joint p-value over groups, and each group's own, adjusted for there being several.

    The harmonic mean of the groups' p-values (Wilson, 2019) of every labelling is compared with that of the
    real one, so the joint p-value is exact however the groups depend on each other. It is led by the smallest
    as the minimum is, and unlike that has few ties: each of k groups is strongest under some labelling, so
    that by the minimum no p-value could be below about k over the labellings.

    Args:
        groups: For each group the statistics, one row each, one column a labelling.

    Returns:
        The joint p-value, and each group's adjusted one (Westfall and Young, by the minimum).
    """
    single = {name: p_values(strongest(rows)) for name, rows in groups.items()}
    joint = p_values(np.sum([1 / p for p in single.values()], axis=0))
    smallest = np.min(list(single.values()), axis=0)
    return float(joint[0]), {name: float((smallest <= p[0] + _TIE).mean()) for name, p in single.items()}
