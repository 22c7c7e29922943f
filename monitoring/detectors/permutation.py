"""Two-sample statistics for many labellings at once, and the exact joint p-value over them.

A labelling is a column of booleans, true where a row is taken for the window's. Column 0 is the real one,
the others are random permutations of it. Every statistic is a row of values, one for each labelling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.bool_]
_TIE = 1e-12


def labellings(reference: int, window: int, permutations: int, seed: int) -> Labels:
    """The real labelling and random permutations of it."""
    generator = np.random.default_rng(seed)
    real = np.zeros(reference + window, dtype=bool)
    real[reference:] = True
    columns = [real, *(generator.permutation(real) for _ in range(permutations))]
    return np.stack(columns, axis=1)


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
    names, which = np.unique(np.asarray(sessions, dtype=object).astype(str), return_inverse=True)
    taken = np.asarray(window, dtype=bool)
    real = np.zeros(len(names), dtype=bool)
    real[which[taken]] = True
    if not np.array_equal(real[which], taken):
        raise ValueError("a session has rows in the reference and in the window")
    generator = np.random.default_rng(seed)
    columns = [real, *(generator.permutation(real) for _ in range(permutations))]
    return np.asarray(np.stack(columns, axis=1)[which])


def mean_difference(values: Floats, labels: Labels) -> Floats:
    """Mean over the window minus mean over the reference; `values` has a column for each labelling."""
    window = labels.sum(axis=0)
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
    """Largest distance of the two distribution functions of one fixed column of values, ties respected."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    window = labels.sum(axis=0)
    inside = np.cumsum(labels[order], axis=0, dtype=np.int32)[last]
    outside = np.arange(1, len(values) + 1, dtype=np.int32)[last][:, None] - inside
    return np.asarray(np.abs(inside / window - outside / (len(values) - window)).max(axis=0))


def rate_differences(values: Floats, labels: Labels) -> Floats:
    """Kolmogorov-Smirnov distances of columns that are 0 or 1: a row of differences of rates for each."""
    taken = labels.astype(np.float64)
    window = taken.sum(axis=0)
    inside = values.T @ taken
    outside = values.sum(axis=0)[:, None] - inside
    return np.asarray(np.abs(inside / window - outside / (len(labels) - window)))


def kernel_discrepancy(similarity: Floats, labels: Labels) -> Floats:
    """Unbiased squared maximum mean discrepancy (Gretton et al., 2012), Gaussian at median distance."""
    own = np.diag(similarity)
    distance = np.maximum(own[:, None] + own[None, :] - 2 * similarity, 0.0)
    pairs = distance[np.triu_indices(len(distance), 1)]
    scale = float(np.median(pairs)) or 1.0
    kernel = np.exp(-distance / scale)
    np.fill_diagonal(kernel, 0.0)
    taken = labels.astype(np.float64)
    window = taken.sum(axis=0)
    reference = len(taken) - window
    product = kernel @ taken
    both = (product * taken).sum(axis=0)
    touching = product.sum(axis=0)
    cross = touching - both
    neither = kernel.sum() - 2 * touching + both
    return np.asarray(
        neither / (reference * (reference - 1))
        + both / (window * (window - 1))
        - 2 * cross / (reference * window)
    )


def mixture(groups: NDArray[np.intp], labels: Labels) -> Floats:
    """How unlike the two sides spread over groups: the two-sample chi-squared statistic."""
    present = np.unique(groups)
    member = (groups[:, None] == present[None, :]).astype(np.float64)
    taken = labels.astype(np.float64)
    share = taken.sum(axis=0) / len(labels)
    expected = member.sum(axis=0)[:, None] * share
    return np.asarray(((member.T @ taken - expected) ** 2 / (expected * (1 - share))).sum(axis=0))


def total_variation(groups: NDArray[np.intp], labels: Labels) -> Floats:
    """Share of the window that would have to be in other groups for the sides to be spread alike."""
    present = np.unique(groups)
    member = (groups[:, None] == present[None, :]).astype(np.float64)
    taken = labels.astype(np.float64)
    window = taken.sum(axis=0)
    inside = member.T @ taken
    outside = member.sum(axis=0)[:, None] - inside
    return np.asarray(np.abs(inside / window - outside / (len(labels) - window)).sum(axis=0) / 2)


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


def min_p(groups: dict[str, Floats]) -> tuple[float, dict[str, float]]:
    """Joint p-value over groups by the smallest one (Westfall and Young), each group with an equal share.

    The smallest p-value of every labelling is compared with that of the real one, so the joint p-value is
    exact however the groups depend on each other. It is at least about (number of groups)/(labellings).

    Args:
        groups: For each group the statistics, one row each, one column a labelling.

    Returns:
        The joint p-value, and each group's adjusted one.
    """
    single = {name: p_values(strongest(rows)) for name, rows in groups.items()}
    smallest = np.min(list(single.values()), axis=0)
    adjusted = {name: float((smallest <= p[0] + _TIE).mean()) for name, p in single.items()}
    return min(adjusted.values()), adjusted
