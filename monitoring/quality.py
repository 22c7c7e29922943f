"""Measures of quality over a window of traffic, each held against what it was when the reference was frozen.

They say that answers got worse whatever the texts look like. Pure functions of records; what is read off an
exchange is in `monitoring.measures`, the tests are in `monitoring.exact`. Turns of one session are alike, so
that one of each session is tested, chosen by the hash of its id; rates that are shown are of all exchanges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from monitoring import exact, measures
from monitoring.baseline import Count, QualityBaseline
from monitoring.windows import Row, session_of
from regraft.monitor_sections import QualitySection
from regraft.records import CapturedExchange, Feedback, QualitySignal

#: So many times are kept with a reference.
SAMPLE = 2000


def baseline_of(
    exchanges: Sequence[CapturedExchange],
    feedback: Iterable[Feedback] = (),
    *,
    scores: Iterable[float] = (),
    judge: Iterable[float] = (),
) -> QualityBaseline:
    """What quality was over the first accepted traffic.

    Args:
        exchanges: All of that time, those that failed too, of the version alone.
        feedback: On any answers; what is on none of these is left out.
        scores: `select.maximise` of the version's answers whose references are known.
        judge: The judge's verdicts on some of the exchanges, asked as it is about later ones.
    """
    units = {e.id: measures.unit_of(e) for e in exchanges}
    return QualityBaseline(
        counts={
            name: _count(found, units) for name, (found, _) in measures.marks(exchanges).items() if found
        },
        latency_ms=tuple(measures.one_each(measures.latencies(exchanges), units)[:SAMPLE]),
        first_token_ms=tuple(measures.one_each(measures.first_tokens(exchanges), units)[:SAMPLE]),
        feedback=tuple(measures.unit_means(measures.feedback_scores(feedback, units), units)),
        judge=tuple(judge),
        scores=tuple(scores),
    )


def baseline_of_rows(
    rows: Sequence[Row], scores: Iterable[float] = (), judge: Iterable[float] = ()
) -> QualityBaseline:
    """What quality was on evaluation sets: of how answers end and how long they take nothing is known."""
    units = {row.id: session_of(row) for row in rows}
    marks = {
        name: {row.id: bad(row.output) for row in rows} for name, (bad, _) in measures.TEXT_RATES.items()
    }
    return QualityBaseline(
        counts={name: _count(found, units) for name, found in marks.items() if found},
        judge=tuple(judge),
        scores=tuple(scores),
    )


def quality_signals(
    exchanges: Sequence[CapturedExchange],
    baseline: QualityBaseline,
    settings: QualitySection,
    *,
    feedback: Iterable[Feedback] = (),
    late_scores: Mapping[str, float] = {},
    judged: Mapping[str, float] = {},
) -> tuple[QualitySignal, ...]:
    """Hold a window against the reference, measure by measure; what nothing is known of is left out.

    Each p-value is that of one measure: whoever looks at several at once allows for that. It is None for
    fewer than `min_count` sessions. Slow answers come in bursts, so the p-values of times overstate what one
    window shows; `worse` is what keeps them from alarming.

    Args:
        exchanges: Of the window and the version, those that failed too.
        baseline: What it is held against. A rate that it has no count of is held against the share that the
            settings allow.
        settings: How much worse is worse, and how many sessions are enough to test.
        feedback: On any answers; what is on none of these is left out.
        late_scores: `select.maximise` of answers whose references came later, by id of the exchange.
        judged: The judge's verdicts, 0 to 1, by id of the exchange.
    """
    units = {e.id: measures.unit_of(e) for e in exchanges}
    signals = [
        _rate(name, what, found, units, baseline.counts.get(name), settings)
        for name, (found, what) in measures.marks(exchanges).items()
        if found
    ]
    for name, times, reference in (
        ("latency_p95_ms", measures.latencies(exchanges), baseline.latency_ms),
        ("first_token_p95_ms", measures.first_tokens(exchanges), baseline.first_token_ms),
    ):
        if times:
            signals.append(_percentile(name, measures.one_each(times, units), reference, settings))
    means = (
        _Mean("feedback_score", "feedback, -1 to 1", baseline.feedback, settings.feedback_drop),
        _Mean("reference_score", "scores on references that came later", baseline.scores,
              settings.reference_drop),
        _Mean("judge_score", "verdicts of the judge, 0 to 1", baseline.judge, settings.judge_drop),
    )  # fmt: skip
    given = (measures.feedback_scores(feedback, units), late_scores, judged)
    signals += [
        _mean(of, scores, units, settings.min_count)
        for of, scores in zip(means, given, strict=True)
        if scores
    ]
    return tuple(signals)


def by_segment(
    exchanges: Sequence[CapturedExchange],
    segments: Mapping[str, str],
    baseline: QualityBaseline,
    settings: QualitySection,
    *,
    baselines: Mapping[str, QualityBaseline] = {},
    feedback: Sequence[Feedback] = (),
    late_scores: Mapping[str, float] = {},
    judged: Mapping[str, float] = {},
) -> dict[str, tuple[QualitySignal, ...]]:
    """The same for each segment, largest first: whether known topics are answered as well as before.

    p-values are multiplied by the number of segments (Bonferroni): one of many looks bad by chance.

    Args:
        exchanges: As in `quality_signals`.
        segments: The segment of an exchange, such as its topic, by id; exchanges of none are left out.
        baseline: What a segment without a baseline of its own is held against, of all traffic: a topic that
            always was a harder one is worse than that without any change.
        settings: As in `quality_signals`.
        baselines: Of single segments, by name.
        feedback: As in `quality_signals`.
        late_scores: As in `quality_signals`, of the window alone.
        judged: As in `quality_signals`, of the window alone.
    """
    parts: dict[str, list[CapturedExchange]] = defaultdict(list)
    for exchange in exchanges:
        if exchange.id in segments:
            parts[segments[exchange.id]].append(exchange)
    found = {}
    for name in sorted(parts, key=lambda name: (-len(parts[name]), name)):
        ids = {e.id for e in parts[name]}
        signals = quality_signals(
            parts[name],
            baselines.get(name, baseline),
            settings,
            feedback=feedback,
            late_scores={i: score for i, score in late_scores.items() if i in ids},
            judged={i: score for i, score in judged.items() if i in ids},
        )
        found[name] = tuple(
            s if s.p_value is None else s.model_copy(update={"p_value": min(1.0, s.p_value * len(parts))})
            for s in signals
        )
    return found


class _Mean(NamedTuple):
    """A score whose mean is looked at: what it was, and how far it may drop."""

    name: str
    what: str
    reference: tuple[float, ...]
    drop: float


def _count(marks: Mapping[str, bool], units: Mapping[str, str]) -> Count:
    chosen = measures.one_each(marks, units)
    share = None if len(chosen) == len(marks) else sum(marks.values()) / len(marks)
    return Count(bad=sum(chosen), of=len(chosen), share=share)


def _rate(
    name: str,
    what: str,
    marks: Mapping[str, bool],
    units: Mapping[str, str],
    before: Count | None,
    settings: QualitySection,
) -> QualitySignal:
    allowed = float(getattr(settings, name))
    now = _count(marks, units)
    detail = f"{what}: {sum(marks.values())} of {len(marks)}{_of_units(now.of, len(marks))}, against "
    if before is None:
        p_value = exact.bound_p(now.bad, now.of, allowed)
        reference, worse = allowed, now.rate > allowed
        detail += f"the {allowed:.1%} that are allowed (exact binomial test)"
    else:
        p_value = exact.rate_p(now.bad, now.of, before.bad, before.of)
        reference, worse = before.rate, now.rate > before.rate + allowed
        detail += f"{before.rate:.1%} of the reference's {before.of} (exact tests)"
    low, high = exact.rate_interval(now.rate, now.of)
    return QualitySignal(
        name=name,
        value=now.rate,
        reference=reference,
        count=len(marks),
        p_value=p_value if now.of >= settings.min_count else None,
        worse=worse,
        low=low,
        high=high,
        detail=detail + _untested(now.of, settings.min_count),
    )


def _percentile(
    name: str, times: Sequence[float], before: Sequence[float], settings: QualitySection
) -> QualitySignal:
    value = float(np.quantile(times, exact.QUANTILE))
    reference = float(np.quantile(before, exact.QUANTILE)) if before else None
    tested = len(times) >= settings.min_count and bool(before)
    low, high = exact.quantile_interval(times)
    return QualitySignal(
        name=name,
        value=value,
        reference=reference,
        count=len(times),
        p_value=exact.quantile_p(times, before) if tested else None,
        worse=reference is not None and value > reference * settings.latency_times,
        low=low,
        high=high,
        detail=f"95th percentile of {len(times)} sessions, against {len(before)} of the reference (exact "
        f"quantile test){_untested(len(times), settings.min_count)}",
    )


def _mean(of: _Mean, scores: Mapping[str, float], units: Mapping[str, str], min_count: int) -> QualitySignal:
    values = measures.unit_means(scores, units)
    value = sum(values) / len(values)
    reference = sum(of.reference) / len(of.reference) if of.reference else None
    tested = len(values) >= min_count and len(of.reference) >= 2
    low, high = exact.mean_interval(values)
    return QualitySignal(
        name=of.name,
        value=value,
        reference=reference,
        count=len(scores),
        p_value=exact.mean_p(values, of.reference) if tested else None,
        worse=reference is not None and value < reference - of.drop,
        low=low,
        high=high,
        detail=f"{of.what}: {len(scores)}{_of_units(len(values), len(scores))}, against "
        f"{len(of.reference)} of the reference (permutation test){_untested(len(values), min_count)}",
    )


def _of_units(units: int, count: int) -> str:
    return f" in {units} sessions" if units < count else ""


def _untested(units: int, min_count: int) -> str:
    return f"; not tested, below min_count ({min_count})" if units < min_count else ""
