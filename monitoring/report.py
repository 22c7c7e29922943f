"""The page for people: the decision on top in words, Evidently's view of the columns below it."""

from __future__ import annotations

import os

os.environ["DO_NOT_TRACK"] = "1"  # before Evidently is imported, or it reports its use

import html as markup
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evidently import Report
from evidently.core.metric_types import SingleValueCalculation, SingleValueMetric
from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data
from evidently.tests import gte

from monitoring.detectors.base import Detection
from monitoring.detectors.evidently_preset import column_metrics, dataset, frames
from monitoring.windows import Row
from regraft.records import DriftReport

_HEADINGS = {
    "stable": "Stable: no drift",
    "drift": "Drift",
    "insufficient": "Insufficient: too few exchanges to tell",
}
#: The page may run its own scripts and load nothing at all.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_EMPTY_PAGE = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="UTF-8"></head>\n<body></body></html>\n'
_STYLE = """
.regraft{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:64rem;margin:2rem auto;padding:0 1.5rem}
.regraft h1{font-size:1.9rem;margin:0 0 .5rem;padding-left:.8rem;border-left:.5rem solid #6b7280}
.regraft h1.drift{border-color:#b91c1c}.regraft h1.stable{border-color:#15803d}
.regraft h2{font-size:1.15rem;margin:1.6rem 0 .4rem}
.regraft table{border-collapse:collapse;width:100%}
.regraft th,.regraft td{text-align:left;vertical-align:top;padding:.35rem .6rem}
.regraft th,.regraft td{border-bottom:1px solid #d4d4d4}
.regraft td{overflow-wrap:anywhere;white-space:pre-wrap}
"""


class CalibratedDrift(SingleValueMetric):  # type: ignore[misc]
    """The calibrated test as a metric of Evidently's, so that it stands in its report and snapshots."""

    p_value: float
    effect: float
    tests_table: list[list[str]] = []


class CalibratedDriftCalculation(SingleValueCalculation[CalibratedDrift]):  # type: ignore[misc]
    """Hands the figures on: they were computed before, on texts that Evidently never sees."""

    def calculate(self, context: Any, current_data: Any, reference_data: Any) -> Any:
        """Give the p-value, with its widgets."""
        result = self.result(self.metric.p_value)
        result.widget = [
            counter(
                title="Calibrated drift test (this one decides)",
                counters=[
                    CounterData("joint p-value", f"{self.metric.p_value:.4f}"),
                    CounterData("effect", f"{self.metric.effect:.2f}"),
                ],
            ),
            table_data(
                column_names=["test", "adjusted p-value", "effect"], data=self.metric.tests_table, title=""
            ),
        ]
        return result

    def display_name(self) -> str:
        """Name of the metric in the report."""
        return "Calibrated drift: joint p-value"


def write_report(
    path: Path,
    report: DriftReport,
    detection: Detection | None,
    reference: Sequence[Row],
    window: Sequence[Row],
) -> None:
    """Write one self-contained HTML file.

    Args:
        path: Where to write; folders are made.
        report: The decision.
        detection: What it rests on; None if there were too few rows, and then there is no Evidently part.
        reference: The rows compared with.
        window: The rows compared.
    """
    head = _decision(report, detection)
    page = _evidently(report, detection, reference, window) if detection else _EMPTY_PAGE
    title = f"{_HEADINGS[report.status]} - {report.model}/{report.model_version}"
    meta = (
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{markup.escape(title)}</title><style>{_STYLE}</style>"
    )
    page = page.replace("<head>", f"<head>{meta}", 1).replace("<body>", f"<body>{head}", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _evidently(
    report: DriftReport, detection: Detection, reference: Sequence[Row], window: Sequence[Row]
) -> str:
    # Numbers only: Evidently writes what it is given into a script element without escaping it.
    before, now = frames(reference, window)
    calibrated = CalibratedDrift(
        p_value=detection.p_value,
        effect=detection.effect,
        tests_table=[[t.name, f"{t.p_value:.4f}", f"{t.effect:.3f}"] for t in detection.tests],
        tests=[gte(report.alpha)],
    )
    metrics = [calibrated, *column_metrics(list(before.columns), 0.05)]
    run = Report(metrics, include_tests=True).run(dataset(now), dataset(before))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "evidently.html"
        run.save_html(str(file))
        return file.read_text(encoding="utf-8")


def _decision(report: DriftReport, detection: Detection | None) -> str:
    say = markup.escape
    p_value = (
        "not computed" if report.p_value is None else f"{report.p_value:.4f} (alarm below {report.alpha:g})"
    )
    effect = "not computed" if report.effect is None else f"{report.effect:.2f}"
    facts = [
        ("Model", f"{report.model}/{report.model_version}"),
        ("Window", f"{report.rows} exchanges, {report.window_start or '-'} to {report.window_end or '-'}"),
        ("Reference", f"{report.reference_rows} exchanges, {report.reference_id}"),
        ("p-value", p_value),
        ("Effect", effect),
        ("Report", report.id),
    ]
    parts = [
        f'<h1 class="{report.status}">{_HEADINGS[report.status]}</h1>',
        f"<p>{say(report.summary)}</p>",
        _table([], facts),
    ]
    if detection:
        parts += ["<h2>What changed</h2>", _list(report.drivers or ("Nothing that stands out.",))]
        parts += [
            "<h2>The tests behind the p-value</h2>",
            _table(
                ["test", "adjusted p-value", "effect", "what the effect is"],
                [(t.name, f"{t.p_value:.4f}", f"{t.effect:.3f}", t.detail) for t in report.tests],
            ),
        ]
        if detection.terms:
            rows = [(t.text, f"{t.reference_share:.0%}", f"{t.window_share:.0%}") for t in detection.terms]
            parts += ["<h2>Terms that grew most</h2>", _table(["term", "reference", "window"], rows)]
        if detection.novel:
            shown = [(n.row.id, n.row.prompt, n.row.output, f"{n.score:.2f}") for n in detection.novel]
            parts += [
                "<h2>Exchanges most unlike the reference</h2>",
                _table(["id", "prompt", "answer", "novelty"], shown),
            ]
        parts += [
            "<h2>Evidently: column by column (advisory)</h2>",
            "<p>Below is Evidently's own verdict on each descriptor by itself. It is advisory: with this "
            "many columns some cross their thresholds on ordinary windows too. The calibrated test above "
            "decides.</p>",
        ]
    return f'<section class="regraft" id="regraft-decision">{"".join(parts)}</section>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{markup.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{markup.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if columns else ''}<tbody>{body}</tbody></table>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{markup.escape(item)}</li>" for item in items) + "</ul>"
