"""From trials to a leaderboard: order, Pareto front, and the winner among those that meet the bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from regraft.records import Interval, Leaderboard, LeaderboardRow, TrialResult
from regraft.selection.resampling import Floats, mean_interval, optimism, step_down_p_values


class Bound(Protocol):
    """A bound on a recorded figure."""

    @property
    def metric(self) -> str:
        """A name that `figures` gives."""
        ...

    @property
    def sense(self) -> str:
        """`<=` or `>=`."""
        ...

    @property
    def bound(self) -> float:
        """The bound, in the figure's own unit."""
        ...


def holds(bound: Bound, value: float | None) -> bool:
    """Whether a figure keeps within its bound; what was not recorded does not."""
    if value is None:
        return False
    return value <= bound.bound if bound.sense == "<=" else value >= bound.bound


#: What quality is held against: lower is better.
_PRICES = ("train_seconds", "memory_peak_gib", "latency_p95_ms")


def rank(
    trials: Sequence[TrialResult],
    *,
    sweep_id: str,
    objective: str,
    constraints: Sequence[Bound],
    tie_break: str | None,
    level: float,
    resamples: int,
) -> Leaderboard:
    """Order trials by the objective and name the winner.

    The winner is one that was trained, completed, and meets every constraint: of the best and those within
    one standard error of it, by their paired difference, the cheapest (the one-standard-error rule of Breiman
    et al., 1984). A control is ranked beside them but never wins: there would be nothing to serve that is not
    served already. A method that was repeated with other seeds is one row, judged by the mean over its
    seeds; what would be served is its first run, not the luckiest.

    Args:
        trials: Results of one sweep, whatever their status.
        sweep_id: The sweep.
        objective: The metric to maximise.
        constraints: Bounds on recorded figures.
        tie_break: The figure by which one is cheaper than another; None for the best whatever it costs.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
    """
    runs: dict[str, list[TrialResult]] = {}
    for trial in trials:
        if trial.status == "completed" and trial.report is not None and objective in trial.report.means:
            runs.setdefault(trial.repeat_of or trial.key, []).append(trial)
    firsts = {t.key for t in trials if not t.repeat_of}
    scored = [own[0] for key, own in runs.items() if key in firsts and own[0].key == key]
    scores = {t.key: _by_example(runs[t.key], objective) for t in scored}
    means = {t.key: statistics.fmean(_quality(run, objective) for run in runs[t.key]) for t in scored}
    scored.sort(key=lambda t: (-means[t.key], t.cost.train_seconds))
    # An endpoint's training and memory are not ours, and no price beside those that are.
    front = _pareto_front([t for t in scored if not t.is_endpoint], means)
    broken = {t.key: [c for c in constraints if not holds(c, t.figures.get(c.metric))] for t in scored}
    corrected = _p_against_control(scored, scores, resamples)
    rows = []
    for place, trial in enumerate(scored, start=1):
        own = runs[trial.key]
        reason = "; ".join(_say_broken(trial, c) for c in broken[trial.key])
        rows.append(
            _row(trial, place, reason).model_copy(
                update={
                    "quality": mean_interval(
                        list(scores[trial.key].values()), level=level, resamples=resamples
                    ),
                    "final": _final(trial, objective, level, resamples),
                    "p_control": corrected.get(trial.key),
                    "seeds": tuple(_quality(run, objective) for run in own) if len(own) > 1 else (),
                    "on_pareto_front": trial.key in front,
                    "meets_constraints": not broken[trial.key],
                }
            )
        )
    settled = {run.key for t in scored for run in runs[t.key]}
    others = [t for t in trials if t.key not in settled]
    rows += [_row(t, None, t.reason) for t in others]
    fit = [t for t in scored if not broken[t.key] and not t.is_control]
    winner = _cheapest(fit, scores, tie_break) if fit else None
    return Leaderboard(
        sweep_id=sweep_id,
        dataset_id=trials[0].dataset_id if trials else "",
        objective=objective,
        rows=tuple(rows),
        winner_key=winner.key if winner else None,
        winner_reason=_why(winner, fit, scored, means, objective, constraints, tie_break),
        optimism=optimism(_matrix(fit, scores), resamples) if winner else None,
    )


def _cheapest(
    fit: Sequence[TrialResult], scores: dict[str, dict[str, float]], tie_break: str | None
) -> TrialResult:
    """Of the best, which comes first, and those within one standard error of it, the cheapest."""
    if tie_break is None:
        return fit[0]
    near = [t for t in fit if t is fit[0] or _within_error(scores[fit[0].key], scores[t.key])]
    return min(near, key=lambda t: t.figures.get(tie_break, math.inf))  # of equals the best: it comes first


def _within_error(best: dict[str, float], other: dict[str, float]) -> bool:
    """Whether a mean is less than one standard error of the paired difference below another."""
    differences = [best[key] - other[key] for key in best.keys() & other.keys()]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) <= error


def _p_against_control(
    scored: Sequence[TrialResult], scores: dict[str, dict[str, float]], resamples: int
) -> dict[str, float]:
    """Of each trained candidate, whether its lead on the best control may be luck, all looked at together."""
    control = next((t for t in scored if t.is_control and not t.is_endpoint), None)
    trained = [t for t in scored if not t.is_control]
    if control is None or not trained:
        return {}
    matrix = _matrix([*trained, control], scores)
    if not matrix.shape[1]:
        return {}
    found = step_down_p_values(matrix[:-1] - matrix[-1], resamples)
    return {t.key: float(p) for t, p in zip(trained, found, strict=True)}


def _matrix(trials: Sequence[TrialResult], scores: dict[str, dict[str, float]]) -> Floats:
    """Scores of shape (trials, examples), over the examples that all of them have a score for."""
    common = sorted(set.intersection(*(set(scores[t.key]) for t in trials)))
    return np.array([[scores[t.key][key] for key in common] for t in trials], dtype=float)


def _final(trial: TrialResult, objective: str, level: float, resamples: int) -> Interval | None:
    if trial.final is None:
        return None
    values = [e.scores[objective] for e in trial.final.examples if objective in e.scores]
    return mean_interval(values, level=level, resamples=resamples) if values else None


def _row(trial: TrialResult, place: int | None, reason: str) -> LeaderboardRow:
    return LeaderboardRow(
        rank=place,
        key=trial.key,
        run_id=trial.run_id,
        label=trial.label,
        method=trial.method,
        status=trial.status,
        reason=reason,
        metrics=trial.figures,
        is_control=trial.is_control,
    )


def _quality(trial: TrialResult, objective: str) -> float:
    assert trial.report is not None
    return trial.report.mean(objective)


def _by_example(runs: Sequence[TrialResult], objective: str) -> dict[str, float]:
    """The score of each example, on average over the runs that have one."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for example in run.report.examples if run.report else ():
            if objective in example.scores:
                found.setdefault(example.example_id, []).append(example.scores[objective])
    return {key: statistics.fmean(values) for key, values in found.items()}


def _pareto_front(trials: Sequence[TrialResult], quality: dict[str, float]) -> set[str]:
    """Keys of trials that no other beats or equals in everything while beating it in something."""
    points = {
        t.key: (quality[t.key], *(-t.figures.get(price, float("inf")) for price in _PRICES)) for t in trials
    }
    return {
        key
        for key, mine in points.items()
        if not any(
            all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine
            for other in points.values()
        )
    }


def _say_broken(trial: TrialResult, bound: Bound) -> str:
    if trial.figures.get(bound.metric) is None:
        return f"{bound.metric} was not measured"
    return f"{bound.metric} is {_figure(trial, bound.metric)}, not {bound.sense} {bound.bound:g}"


def _why(
    winner: TrialResult | None,
    fit: Sequence[TrialResult],
    scored: Sequence[TrialResult],
    quality: dict[str, float],
    objective: str,
    constraints: Sequence[Bound],
    tie_break: str | None,
) -> str:
    if winner is None:
        return "no trained candidate completed and met every constraint"
    bounds = " and ".join(f"{c.metric} {c.sense} {c.bound:g}" for c in constraints)
    among = f"of those with {bounds}" if bounds else f"of {len(scored)}"
    best = fit[0]
    if winner is best:
        words = f"highest {objective} ({quality[winner.key]:.3f}) {among}"
    else:
        words = (
            f"within one standard error of the highest {objective} {among} ({quality[winner.key]:.3f}; "
            f"{best.label} has {quality[best.key]:.3f}) and the cheapest by {tie_break} "
            f"({_figure(winner, tie_break)} against {_figure(best, tie_break)})"
        )
    for elsewhere in (False, True):
        control = next((t for t in scored if t.is_control and t.is_endpoint == elsewhere), None)
        if control is not None:
            words += f"; the control {control.label} scores {quality[control.key]:.3f}"
    return words


def _figure(trial: TrialResult, name: str | None) -> str:
    value = trial.figures.get(name or "")
    return "not recorded" if value is None else f"{value:.4g}"
