"""From trials to a leaderboard: order, Pareto front, and the winner among those that meet the bounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Protocol

from regraft.records import Leaderboard, LeaderboardRow, TrialResult
from regraft.selection.resampling import mean_interval


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


#: What quality is held against: lower is better.
_PRICES = ("train_seconds", "memory_peak_gib", "latency_p95_ms")


def rank(
    trials: Sequence[TrialResult],
    *,
    sweep_id: str,
    objective: str,
    constraints: Sequence[Bound],
    level: float,
    resamples: int,
) -> Leaderboard:
    """Order trials by the objective and name the winner.

    The winner is the best that was trained, completed, and meets every constraint; among equals the one that
    trained fastest. The control is ranked beside them but never wins: there would be nothing to serve that
    is not served already. A method that was repeated with other seeds is one row, judged by the mean over its
    seeds; what would be served is its first run, not the luckiest.

    Args:
        trials: Results of one sweep, whatever their status.
        sweep_id: The sweep.
        objective: The metric to maximise.
        constraints: Bounds on recorded figures.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
    """
    runs: dict[str, list[TrialResult]] = {}
    for trial in trials:
        if trial.status == "completed" and trial.report is not None and objective in trial.report.means:
            runs.setdefault(trial.repeat_of or trial.key, []).append(trial)
    firsts = {t.key for t in trials if not t.repeat_of}
    scored = [own[0] for key, own in runs.items() if key in firsts and own[0].key == key]
    means = {t.key: statistics.fmean(_quality(run, objective) for run in runs[t.key]) for t in scored}
    scored.sort(key=lambda t: (-means[t.key], t.cost.train_seconds))
    front = _pareto_front(scored, means)
    broken = {t.key: [c for c in constraints if not _meets(t, c)] for t in scored}
    rows = []
    for place, trial in enumerate(scored, start=1):
        own = runs[trial.key]
        reason = "; ".join(_say_broken(trial, c) for c in broken[trial.key])
        rows.append(
            _row(trial, place, reason).model_copy(
                update={
                    "quality": mean_interval(_by_example(own, objective), level=level, resamples=resamples),
                    "seeds": tuple(_quality(run, objective) for run in own) if len(own) > 1 else (),
                    "on_pareto_front": trial.key in front,
                    "meets_constraints": not broken[trial.key],
                }
            )
        )
    settled = {run.key for t in scored for run in runs[t.key]}
    others = [t for t in trials if t.key not in settled]
    rows += [_row(t, None, t.reason) for t in others]
    winner = next((t for t in scored if not broken[t.key] and not t.is_control), None)
    return Leaderboard(
        sweep_id=sweep_id,
        dataset_id=trials[0].dataset_id if trials else "",
        objective=objective,
        rows=tuple(rows),
        winner_key=winner.key if winner else None,
        winner_reason=_why(winner, scored, means, objective, constraints),
    )


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


def _by_example(runs: Sequence[TrialResult], objective: str) -> list[float]:
    """The score of each example, on average over the runs that have one."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for example in run.report.examples if run.report else ():
            if objective in example.scores:
                found.setdefault(example.example_id, []).append(example.scores[objective])
    return [statistics.fmean(values) for values in found.values()]


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


def _meets(trial: TrialResult, bound: Bound) -> bool:
    value = trial.figures.get(bound.metric)
    if value is None:
        return False
    return value <= bound.bound if bound.sense == "<=" else value >= bound.bound


def _say_broken(trial: TrialResult, bound: Bound) -> str:
    value = trial.figures.get(bound.metric)
    had = "not recorded" if value is None else f"{value:.4g}"
    return f"{bound.metric} is {had}, not {bound.sense} {bound.bound:g}"


def _why(
    winner: TrialResult | None,
    scored: Sequence[TrialResult],
    quality: dict[str, float],
    objective: str,
    constraints: Sequence[Bound],
) -> str:
    if winner is None:
        return "no trained candidate completed and met every constraint"
    bounds = " and ".join(f"{c.metric} {c.sense} {c.bound:g}" for c in constraints)
    words = f"highest {objective} ({quality[winner.key]:.3f})"
    words += f" of those with {bounds}" if bounds else f" of {len(scored)}"
    control = next((t for t in scored if t.is_control), None)
    if control is not None:
        words += f"; the control {control.label} scores {quality[control.key]:.3f}"
    return words
