"""From trials to a leaderboard: order, Pareto front, and the winner among those that meet the bounds."""

from __future__ import annotations

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
    is not served already.

    Args:
        trials: Results of one sweep, whatever their status.
        sweep_id: The sweep.
        objective: The metric to maximise.
        constraints: Bounds on recorded figures.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
    """
    scored = [
        t for t in trials if t.status == "completed" and t.report is not None and objective in t.report.means
    ]
    scored.sort(key=lambda t: (-_quality(t, objective), t.cost.train_seconds))
    front = _pareto_front(scored, objective)
    broken = {t.key: [c for c in constraints if not _meets(t, c)] for t in scored}
    rows = []
    for place, trial in enumerate(scored, start=1):
        assert trial.report is not None
        values = [e.scores[objective] for e in trial.report.examples if objective in e.scores]
        reason = "; ".join(_say_broken(trial, c) for c in broken[trial.key])
        rows.append(
            _row(trial, place, reason).model_copy(
                update={
                    "quality": mean_interval(values, level=level, resamples=resamples),
                    "on_pareto_front": trial.key in front,
                    "meets_constraints": not broken[trial.key],
                }
            )
        )
    others = [t for t in trials if t.key not in {s.key for s in scored}]
    rows += [_row(t, None, t.reason) for t in others]
    winner = next((t for t in scored if not broken[t.key] and not t.is_control), None)
    return Leaderboard(
        sweep_id=sweep_id,
        dataset_id=trials[0].dataset_id if trials else "",
        objective=objective,
        rows=tuple(rows),
        winner_key=winner.key if winner else None,
        winner_reason=_why(winner, scored, objective, constraints),
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


def _pareto_front(trials: Sequence[TrialResult], objective: str) -> set[str]:
    """Keys of trials that no other beats or equals in everything while beating it in something."""
    points = {
        t.key: (_quality(t, objective), *(-t.figures.get(price, float("inf")) for price in _PRICES))
        for t in trials
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
    winner: TrialResult | None, scored: Sequence[TrialResult], objective: str, constraints: Sequence[Bound]
) -> str:
    if winner is None:
        return "no trained candidate completed and met every constraint"
    bounds = " and ".join(f"{c.metric} {c.sense} {c.bound:g}" for c in constraints)
    words = f"highest {objective} ({_quality(winner, objective):.3f})"
    words += f" of those with {bounds}" if bounds else f" of {len(scored)}"
    control = next((t for t in scored if t.is_control), None)
    if control is not None:
        words += f"; the control {control.label} scores {_quality(control, objective):.3f}"
    return words
