"""The evidence over time: as points for MLflow, and as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from monitoring.sequential import DRIFT, PROMPTS, alarm_at
from regraft.records import DriftReport, QualitySignal, RetrainDecision
from regraft.times import utc

#: Columns of `history_table`.
COLUMNS = ("window", "exchanges", "verdict", "p-value", "effect", "evidence", "alarms", "kind", "decision")

_EVIDENCE = {DRIFT: "drift/evidence", PROMPTS: "drift/prompts_evidence"}


class Point(NamedTuple):
    """One value of one metric.

    `step` is the window's end in minutes since 1970, `timestamp_ms` the same in milliseconds: a check that is
    logged twice gives the same point, and checks keep their order whoever logs them and when.
    """

    name: str
    value: float
    step: int
    timestamp_ms: int


def metric_points(report: DriftReport) -> tuple[Point, ...]:
    """What a check adds to the lines of its model version's run.

    Args:
        report: Of the check. One without an end of its window has no place in time and gives no points.

    Returns:
        `drift/p_value`, `drift/effect`, `drift/evidence`, `drift/prompts_evidence`, `drift/rows` and
        `drift/alarm` (0 or 1), `drift/answer_logprob` and `drift/answer_logprob_reference`; for each quality
        signal `quality/<name>`, `quality/<name>_reference` and `quality/<name>_evidence`. What was not
        computed is left out.
    """
    end = instant(report.window_end)
    if end is None:
        return ()
    values: dict[str, float | None] = {
        "drift/rows": report.rows,
        "drift/p_value": report.p_value,
        "drift/effect": report.effect,
        "drift/alarm": float(bool(report.alarms)),
    }
    if report.answer_logprob is not None:
        values["drift/answer_logprob"] = report.answer_logprob.window
        values["drift/answer_logprob_reference"] = report.answer_logprob.reference
    for name, evidence in report.evidence.items():
        values[_EVIDENCE.get(name, f"quality/{name}_evidence")] = evidence.value
    for signal in report.quality:
        values[f"quality/{signal.name}"] = signal.value
        values[f"quality/{signal.name}_reference"] = signal.reference
    seconds = end.timestamp()
    return tuple(
        Point(name, float(value), int(seconds // 60), int(seconds * 1000))
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    )


def alarm_line(report: DriftReport, name: str) -> float | None:
    """The evidence at which `name` alarms; None where the report does not say the average run length."""
    return None if report.arl is None else alarm_at(name, report.arl, len(report.quality))


def evidence_share(report: DriftReport, name: str) -> float | None:
    """The evidence as a share of what raises the alarm: 1 and more alarms. None where there is none."""
    line, evidence = alarm_line(report, name), report.evidence.get(name)
    return None if line is None or evidence is None else evidence.value / line


def in_order(reports: Iterable[DriftReport]) -> list[DriftReport]:
    """Each report once, by the end of its window."""
    once = {report.id: report for report in reports}
    return sorted(once.values(), key=lambda report: (report.window_end, report.id))


def history_table(
    reports: Sequence[DriftReport],
    decisions: Mapping[str, RetrainDecision] | None = None,
    titles: Sequence[str] = (),
) -> list[tuple[str, ...]]:
    """Checks as rows of words, in the order given; the columns are `COLUMNS`.

    Args:
        reports: What was seen.
        decisions: What was decided, by the id of the report.
        titles: What the rows are called; when their windows ended, if not given.
    """
    rows: list[tuple[str, ...]] = []
    for index, report in enumerate(reports):
        decision = (decisions or {}).get(report.id)
        rows.append(
            (
                titles[index] if titles else clock(report.window_end),
                f"{report.rows:,}",
                report.status,
                "–" if report.p_value is None else f"{report.p_value:.4f}",
                "–" if report.effect is None else f"{report.effect:+.2f}",
                _strongest(report),
                ", ".join(report.alarms) or "–",
                report.kind.replace("_", " ") if report.kind else "–",
                decision.action.replace("_", " ") if decision else "–",
            )
        )
    return rows


def evidence_words(report: DriftReport, name: str) -> str:
    """Such as `12.3 of 1000`; a dash where there is none."""
    evidence, line = report.evidence.get(name), alarm_line(report, name)
    if evidence is None:
        return "–"
    return _short(evidence.value) + (f" of {_short(line)}" if line is not None else "")


def _strongest(report: DriftReport) -> str:
    """The evidence that is nearest to its alarm, named unless it is that of the answers."""
    if not report.evidence:
        return "–"
    name = max(report.evidence, key=lambda n: (evidence_share(report, n) or 0.0, n == DRIFT))
    return ("" if name == DRIFT else f"{name} ") + evidence_words(report, name)


def quality_words(name: str, value: float | None) -> str:
    """A value of a quality signal with its unit, which its name tells; a dash where there is none."""
    if value is None:
        return "–"
    if name.endswith("_rate"):
        return f"{value:.1%}"
    if name.endswith("_ms"):
        return f"{value:,.0f} ms"
    return f"{value:.3f}"


def quality_verdict(report: DriftReport, signal: QualitySignal) -> str:
    """What is to be thought of a signal, in words."""
    if signal.name in report.alarms:
        return "alarm: worse"
    if signal.value is None or signal.p_value is None:
        return "too few to test" if signal.reference is not None else "nothing to compare with"
    if not signal.worse:
        return "as before"
    return "worse in this window" if signal.p_value <= report.alpha else "worse, perhaps by chance"


def instant(time: str) -> datetime | None:
    """A time in ISO 8601; without a zone it is taken for UTC. None for ""."""
    return utc(time) if time else None


def clock(time: str) -> str:
    """A time to the minute, in UTC; a dash for ""."""
    found = instant(time)
    return "–" if found is None else f"{found:%Y-%m-%d %H:%M}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
