"""What a sweep showed, method by method: a function of its records, before it becomes words and charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from regraft.records import Comparison, Leaderboard, LeaderboardRow, TrialResult
from regraft.selection.resampling import paired_comparison
from regraft.selection.slices import Slice, in_words, slices

#: The paired comparison of two rows, where both have scores.
Compare = Callable[[LeaderboardRow | None, LeaderboardRow | None], Comparison | None]
#: Examples laid side by side: those on which the methods differ most.
SAMPLES = 6


class MethodFacts(NamedTuple):
    """One method's best candidate beside full fine-tuning and the control.

    Ratios are of what full fine-tuning took; None where it was not tried or not recorded.
    """

    method: str
    best: LeaderboardRow
    completed: int
    stopped: int
    against_full: Comparison | None
    against_control: Comparison | None
    seconds_ratio: float | None
    memory_ratio: float | None


class RankEffect(NamedTuple):
    """The best of a method at one rank, and what doubling up to it bought over the rank below."""

    method: str
    rank: int
    best: LeaderboardRow
    over_lower: Comparison | None


class Sample(NamedTuple):
    """One example's prompt, reference, and the answers of some candidates with their scores."""

    prompt: str
    reference: str
    answers: tuple[tuple[str, str, float], ...]


class SweepReport(NamedTuple):
    """All that a reader needs to choose.

    `control` is the best of the untuned base; `endpoints` are models elsewhere, with the winner against each.
    """

    board: Leaderboard
    methods: tuple[MethodFacts, ...]
    ranks: tuple[RankEffect, ...]
    control: LeaderboardRow | None
    endpoints: tuple[tuple[LeaderboardRow, Comparison | None], ...]
    full: LeaderboardRow | None
    near: tuple[tuple[LeaderboardRow, Comparison], ...]
    unfinished: tuple[LeaderboardRow, ...]
    left_out: tuple[str, ...]
    samples: tuple[Sample, ...]
    curves: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    slices: tuple[Slice, ...]
    recommendation: str


def report_on(
    board: Leaderboard,
    trials: Sequence[TrialResult],
    *,
    level: float,
    resamples: int,
    left_out: Sequence[str] = (),
) -> SweepReport:
    """Draw from a sweep what it showed.

    Args:
        board: Its ranking.
        trials: Its results; those with scores are compared over the examples both have.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
        left_out: What the budget did not allow, in words.
    """
    results = {t.key: t for t in trials}

    def compare(row: LeaderboardRow | None, other: LeaderboardRow | None) -> Comparison | None:
        if row is None or other is None or row.key == other.key:
            return None
        mine, theirs = results[row.key].report, results[other.key].report
        if mine is None or theirs is None:
            return None
        return paired_comparison(
            mine, theirs, board.objective, split="evaluation", level=level, resamples=resamples
        )

    ranked = [row for row in board.rows if row.rank is not None]
    control = next((row for row in ranked if row.is_control and not row.is_endpoint), None)
    full = next((row for row in ranked if row.method["name"] == "full"), None)
    trained = [row for row in ranked if not row.is_control]
    names = dict.fromkeys(str(row.method["name"]) for row in trained)
    methods = tuple(
        _facts(name, [r for r in board.rows if r.method["name"] == name], control, full, compare)
        for name in names
    )
    winner = next((row for row in ranked if row.key == board.winner_key), None)
    elsewhere = next((row for row in ranked if row.is_endpoint), None)
    near = []
    for row in trained:
        found = compare(row, winner)
        # Not shown to be worse: the interval of the difference reaches zero.
        if found is not None and found.high >= 0:
            near.append((row, found))
    report = SweepReport(
        board=board,
        methods=methods,
        ranks=_ranks(trained, compare),
        control=control,
        endpoints=tuple((row, compare(winner, row)) for row in ranked if row.is_endpoint),
        full=full,
        near=tuple(near),
        unfinished=tuple(r for r in board.rows if r.status in {"infeasible", "failed", "cancelled"}),
        left_out=tuple(left_out),
        samples=samples(
            [results[key] for key in dict.fromkeys(r.key for r in (winner, full, control, elsewhere) if r)],
            board.objective,
        ),
        curves=_curves(board, results),
        slices=_slices(winner, results, board.objective, level, resamples),
        recommendation="",
    )
    said = [_recommend(report, winner, compare(winner, control))]
    said += [_final_words(board, winner, results)] if winner else []
    return report._replace(recommendation=" ".join(filter(None, said)))


def _slices(
    winner: LeaderboardRow | None, results: dict[str, TrialResult], metric: str, level: float, resamples: int
) -> tuple[Slice, ...]:
    """Where the winner is weak."""
    report = results[winner.key].report if winner else None
    return slices(report, metric, level=level, resamples=resamples) if report else ()


def _facts(
    name: str,
    rows: Sequence[LeaderboardRow],
    control: LeaderboardRow | None,
    full: LeaderboardRow | None,
    compare: Compare,
) -> MethodFacts:
    best = next(row for row in rows if row.rank is not None)

    def ratio(figure: str) -> float | None:
        whole = full.metrics.get(figure) if full else None
        return best.metrics[figure] / whole if whole and best.metrics.get(figure) else None

    return MethodFacts(
        method=name,
        best=best,
        completed=sum(row.status == "completed" for row in rows),
        stopped=sum(row.status == "stopped" for row in rows),
        against_full=compare(best, full),
        against_control=compare(best, control),
        seconds_ratio=ratio("train_seconds"),
        memory_ratio=ratio("memory_peak_gib"),
    )


def _curves(
    board: Leaderboard, results: dict[str, TrialResult]
) -> tuple[tuple[str, tuple[tuple[float, float], ...]], ...]:
    """Evaluation loss over tokens seen, of every trial with two points or more, the best first."""
    found = []
    for row in board.rows:
        points = tuple(
            (float(point.tokens_seen), point.eval_loss)
            for point in results[row.key].curve
            if point.eval_loss is not None and math.isfinite(point.eval_loss)
        )
        if len(points) > 1:
            found.append((row.label, points))
    return tuple(found)


def _ranks(trained: Sequence[LeaderboardRow], compare: Compare) -> tuple[RankEffect, ...]:
    found: list[RankEffect] = []
    for name in dict.fromkeys(str(row.method["name"]) for row in trained):
        best: dict[int, LeaderboardRow] = {}
        for row in trained:  # best first
            if row.method["name"] == name and row.method.get("rank") is not None:
                best.setdefault(int(row.method["rank"]), row)
        if len(best) < 2:
            continue
        below: LeaderboardRow | None = None
        for rank in sorted(best):
            found.append(RankEffect(name, rank, best[rank], compare(best[rank], below)))
            below = best[rank]
    return tuple(found)


def samples(trials: Sequence[TrialResult], objective: str) -> tuple[Sample, ...]:
    """The examples on which trials differ most by a metric, in a stable order; of those that all answered."""
    scores = {
        trial.key: {e.example_id: e for e in trial.report.examples if objective in e.scores}
        for trial in trials
        if trial.report is not None
    }
    if not scores:
        return ()
    common = set.intersection(*(set(own) for own in scores.values()))

    def spread(example: str) -> float:
        values = [own[example].scores[objective] for own in scores.values()]
        return max(values) - min(values)

    labels = {trial.key: trial.label for trial in trials}
    found = []
    for example in sorted(common, key=lambda e: (-spread(e), e))[:SAMPLES]:
        answers = {key: own[example] for key, own in scores.items()}
        first = next(iter(answers.values()))
        shown = tuple((labels[key], e.output, e.scores[objective]) for key, e in answers.items())
        found.append(Sample(first.prompt, first.reference, shown))
    return tuple(found)


def _against(endpoint: LeaderboardRow, found: Comparison) -> str:
    """Whether tuning beat a model elsewhere."""
    span = f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
    if found.low > 0:
        return f"It beats {endpoint.label} by {span}."
    if found.high < 0:
        return f"It does not reach {endpoint.label}: {span}."
    return f"It is within noise of {endpoint.label}: {span}."


def _final_words(board: Leaderboard, winner: LeaderboardRow, results: dict[str, TrialResult]) -> str:
    """How the winner does where it was not chosen by; empty if nobody looked."""
    final, chosen = results[winner.key].final, winner.quality
    if final is None or winner.final is None or chosen is None:
        return ""
    luck = f", of which about {board.optimism:.3f} may be the luck of the best of several" * bool(
        board.optimism
    )
    return (
        f"It was chosen at {chosen.mean:.3f}{luck}; on {len(final.examples)} examples that played no part in "
        f"the choice it scores {winner.final.mean:.3f} ({winner.final.low:.3f} to {winner.final.high:.3f})."
    )


def _recommend(report: SweepReport, winner: LeaderboardRow | None, gain: Comparison | None) -> str:
    """What to do, and why, in words."""
    objective = report.board.objective
    if winner is None:
        return f"Nothing to serve: {report.board.winner_reason}."
    words = [f"Take {winner.label}: {report.board.winner_reason}."]
    if gain is not None:
        span = f"{gain.difference:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        if gain.low > 0:
            words.append(f"Over {gain.examples} examples it gains {span} {objective} on the control.")
        else:
            words.append(
                f"Its lead on the control, {span} over {gain.examples} examples, is within noise: prompting "
                "alone may do as well, and more examples would tell."
            )
    words += [_against(row, found) for row, found in report.endpoints if found is not None]
    seconds = winner.metrics.get("train_seconds", 0.0)
    cheaper = [row for row, _ in report.near if 0 < row.metrics.get("train_seconds", 0.0) < 0.8 * seconds]
    if cheaper:
        least = min(cheaper, key=lambda row: row.metrics["train_seconds"])
        times = seconds / least.metrics["train_seconds"]
        words.append(
            f"{least.label} is within noise of it and trained {times:.1f} times faster: where cost counts, "
            "take that, or see select.tie_break."
        )
    elif report.near:
        names = ", ".join(row.label for row, _ in report.near[:3])
        more = f" and {len(report.near) - 3} more" if len(report.near) > 3 else ""
        words.append(f"Within noise of it, but not much cheaper: {names}{more}.")
    if weak := in_words(report.slices, objective):
        words.append(weak)
    if report.left_out:
        words.append(f"Left out by the budget: {len(report.left_out)}.")
    return " ".join(words)
