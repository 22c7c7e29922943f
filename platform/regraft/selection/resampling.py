"""Bootstrap (Efron & Tibshirani, 1993) and permutation over examples.

Seeded: the same records give the same intervals and p-values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regraft.records import Comparison, EvalReport, ExampleScore, Interval

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_SEED = 20260101


def mean_interval(values: Sequence[float], *, level: float, resamples: int) -> Interval:
    """Mean with its percentile bootstrap interval.

    Args:
        values: One score an example.
        level: Coverage, such as 0.95.
        resamples: Bootstrap samples.

    Raises:
        ValueError: If there are no values.
    """
    means = _resampled_means(np.asarray(values, dtype=float), resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(np.mean(values)), low=float(low), high=float(high), level=level)


def paired_comparison(
    challenger: EvalReport,
    incumbent: EvalReport,
    metric: str,
    *,
    split: str,
    level: float,
    resamples: int,
    of_set: str | None = None,
) -> Comparison:
    """Compare two candidates over the examples both have a score for.

    Args:
        challenger: Scores of the one that wants to win.
        incumbent: Scores of the one that is there.
        metric: What to compare; higher is better.
        split: A name for what is compared over.
        level: Coverage of the interval.
        resamples: Bootstrap samples.
        of_set: Only examples tagged as of this evaluation set; all if None.

    Raises:
        ValueError: If no example has a score from both, or the metric's versions differ.
    """
    if challenger.metric_versions != incumbent.metric_versions:
        raise ValueError(
            f"metric versions differ: {challenger.metric_versions} and {incumbent.metric_versions}"
        )
    before = {e.example_id: e for e in incumbent.examples}

    def counts(example: ExampleScore) -> bool:
        other = before.get(example.example_id)
        wanted = of_set is None or example.tags.get("set") == of_set
        return wanted and other is not None and metric in example.scores and metric in other.scores

    pairs = [
        (e.scores[metric], before[e.example_id].scores[metric]) for e in challenger.examples if counts(e)
    ]
    if not pairs:
        raise ValueError(f"no example of {split} has {metric} from both candidates")
    scores = np.asarray(pairs, dtype=float)
    differences = scores[:, 0] - scores[:, 1]
    means = _resampled_means(differences, resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Comparison(
        metric=metric,
        split=split,
        examples=len(pairs),
        challenger_mean=float(scores[:, 0].mean()),
        incumbent_mean=float(scores[:, 1].mean()),
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        level=level,
        p_value=sign_flip_p_value(differences, resamples),
    )


def sign_flip_p_value(differences: Floats, resamples: int) -> float:
    """How likely a mean this high or higher is, if either candidate was as likely to be ahead on any example.

    A permutation test of paired differences (Fisher, 1935): exchanging the candidates on an example turns its
    sign. Its level holds for any number of examples, where a bootstrap's falls short for few.

    Args:
        differences: One an example, challenger minus incumbent.
        resamples: Random exchanges; the observed one counts as one more (Phipson & Smyth, 2010).
    """
    rng = np.random.default_rng(_SEED)
    signs = rng.integers(0, 2, size=(resamples, differences.size), dtype=np.int8) * 2 - 1
    # The same sum in another order may differ in its last bit: that is no difference.
    high = np.count_nonzero(signs @ differences >= differences.sum() - 1e-9)
    return float((1 + high) / (resamples + 1))


def step_down_p_values(differences: Floats, resamples: int) -> Floats:
    """P-values of several one-sided comparisons over the same examples, corrected for their number.

    The step-down procedure on the largest statistic (Westfall & Young, 1993) with random exchanges of signs:
    the chance of one wrong claim or more among all of them is bounded, and because they are exchanged
    together, candidates that are alike cost little.

    Args:
        differences: Of shape (candidates, examples), each candidate minus what it is held against.
        resamples: Random exchanges.

    Returns:
        One a candidate, of shape (candidates,).
    """
    # The sum of squares does not change with the signs: it makes candidates of different spread comparable.
    scale = np.sqrt((differences**2).sum(axis=1))
    scaled = np.divide(differences, scale[:, None], out=np.zeros_like(differences), where=scale[:, None] > 0)
    observed = scaled.sum(axis=1)
    rng = np.random.default_rng(_SEED)
    signs = rng.integers(0, 2, size=(resamples, differences.shape[1]), dtype=np.int8) * 2 - 1
    order = np.argsort(-observed)
    exchanged = (signs @ scaled.T)[:, order]
    # Of each, the largest among itself and those below it.
    largest = np.maximum.accumulate(exchanged[:, ::-1], axis=1)[:, ::-1]
    high = (largest >= observed[order] - 1e-9).sum(axis=0)
    found = np.empty(len(order))
    found[order] = np.maximum.accumulate((1 + high) / (resamples + 1))
    return found


def optimism(scores: Floats, resamples: int) -> float:
    """By how much the best of several candidates may look better than it is on what it was chosen by.

    The bootstrap's estimate of that bias (Efron & Tibshirani, 1993, chapter 17): on resampled examples the
    best is chosen anew, and looks better there than on the examples themselves.

    Args:
        scores: Of shape (candidates, examples); higher is better.
        resamples: Bootstrap samples.
    """
    count = scores.shape[1]
    rng = np.random.default_rng(_SEED)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    resampled = weights @ scores.T
    best = resampled.argmax(axis=1)
    return float((resampled[np.arange(resamples), best] - scores.mean(axis=1)[best]).mean())


def _resampled_means(values: Floats, resamples: int) -> Floats:
    if values.size == 0:
        raise ValueError("there are no values to resample")
    rng = np.random.default_rng(_SEED)
    means: Floats = values[rng.integers(0, values.size, size=(resamples, values.size))].mean(axis=1)
    return means
