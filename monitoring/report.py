"""The page for people: the decision on top in words, then what it rests on, Evidently's view at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from monitoring import markup
from monitoring.advice import done, heading, seen, to_do
from monitoring.descriptors import DESCRIPTORS, FULL, MORE
from monitoring.detectors.base import Detection
from monitoring.pictures import COLOURS, VERDICTS, Mark, bars, trend
from monitoring.sequential import DRIFT
from monitoring.timeline import (
    COLUMNS,
    clock,
    evidence_share,
    evidence_words,
    history_table,
    in_order,
    instant,
    quality_verdict,
    quality_words,
)
from monitoring.windows import Row
from regraft.records import Attribution, DriftReport, RetrainDecision, TopicChange

#: So many of each thing are shown, and so many checks; a page is read by a person.
_SHOWN, _CHECKS, _EXAMPLES, _CURVES = 12, 100, 3, 4
_WHERE = {
    "inputs": "What is asked changed, and answers only with it.",
    "outputs": "Like prompts are answered otherwise.",
    "both": "What is asked changed, and like prompts are answered otherwise too.",
    "neither": "Neither prompts nor answers to like prompts changed significantly.",
}
_ADVISORY = (
    "Below is Evidently's own verdict on each descriptor by itself. It is advisory: with this many columns "
    "some cross their thresholds on ordinary windows too. The calibrated test above decides."
)


def write_report(
    path: Path,
    report: DriftReport,
    detection: Detection | None,
    reference: Sequence[Row],
    window: Sequence[Row],
    *,
    decision: RetrainDecision | None = None,
    history: Sequence[DriftReport] = (),
) -> None:
    """Write one self-contained HTML file.

    Args:
        path: Where to write; folders are made. A reader sees the old file or the new one.
        report: What was seen.
        detection: What it rests on; None if there were too few rows, and then there is no Evidently part.
        reference: The rows compared with.
        window: The rows compared.
        decision: What was decided; None if nothing was.
        history: Earlier reports in any order; those against other references are left out.
    """
    page = markup.EMPTY_PAGE
    if detection:
        # Evidently takes seconds to import.
        from monitoring.evidently_view import evidently_page

        page = evidently_page(detection, report.alpha, reference, window)
    title = f"{heading(report)} - {report.model}/{report.model_version}"
    meta = (
        f'<meta http-equiv="Content-Security-Policy" content="{markup.POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{markup.safe(title)}</title><style>{markup.STYLE}</style>"
    )
    head = "".join(_parts(report, detection, decision, _past(report, history)))
    section = f'<section class="regraft" id="regraft-decision">{head}</section>'
    page = page.replace("<head>", f"<head>{meta}", 1).replace("<body>", f"<body>{section}", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def _parts(
    report: DriftReport,
    detection: Detection | None,
    decision: RetrainDecision | None,
    checks: Sequence[DriftReport],
) -> list[str]:
    parts = [f'<h1 class="{report.status}">{markup.safe(heading(report))}</h1>']
    if decision is not None and decision.page:
        parts.append('<p class="page">A person should look now.</p>')
    plan = [("What was seen", seen(report)), ("What is being done", done(decision))]
    plan.append(("What a person should do", " ".join(to_do(report, decision))))
    parts += [f'<div class="plan">{markup.pairs(plan)}</div>', f"<p>{markup.safe(report.summary, 3000)}</p>"]
    parts += ["<h2>Facts</h2>", markup.pairs(_facts(report, decision)), *_over_time(checks)]
    if detection or report.attribution:
        parts += ["<h2>What changed</h2>", *_changed(report)]
    if report.quality:
        parts += ["<h2>Quality</h2>", _quality(report)]
    if report.tests:
        tests = [
            (t.name, f"{t.p_value:.4f}", f"{t.effect:.3f}", t.detail) for t in report.tests[: 2 * _SHOWN]
        ]
        heads = ["test", "adjusted p-value", "effect", "what the effect is"]
        parts += ["<h2>The tests behind the p-value</h2>", markup.table(heads, tests)]
    return parts + (_detected(detection) if detection else [])


def _detected(detection: Detection) -> list[str]:
    parts = []
    if detection.terms:
        terms = detection.terms[:_SHOWN]
        rows = [(t.text, f"{t.reference_share:.0%}", f"{t.window_share:.0%}") for t in terms]
        parts += ["<h2>Terms that grew most</h2>", markup.table(["term", "reference", "window"], rows)]
    if detection.novel:
        novel = detection.novel[:_SHOWN]
        shown = [(n.row.id, n.row.prompt, n.row.output, f"{n.score:.2f}") for n in novel]
        parts.append("<h2>Exchanges most unlike the reference</h2>")
        parts.append(markup.table(["id", "prompt", "answer", "novelty"], shown, "texts"))
    return [*parts, "<h2>Evidently: column by column (advisory)</h2>", f"<p>{_ADVISORY}</p>"]


def _facts(report: DriftReport, decision: RetrainDecision | None) -> list[tuple[str, str]]:
    p_value, effect = "not computed", "not computed"
    if report.p_value is not None:
        p_value = f"{report.p_value:.4f} (this window alone is suspected at {report.alpha:g} and below)"
    if report.effect is not None:
        effect = f"{report.effect:.2f}"
    facts = [
        ("Model", f"{report.model}/{report.model_version}"),
        (
            "Window",
            f"{report.rows:,} exchanges, {clock(report.window_start)} to {clock(report.window_end)} UTC",
        ),
        ("Reference", f"{report.reference_rows:,} exchanges, {report.reference_id}"),
        ("p-value", p_value),
        ("Effect", effect),
    ]
    if DRIFT in report.evidence:
        evidence = report.evidence[DRIFT]
        facts.append(("Evidence", f"{evidence_words(report, DRIFT)} (alarm), over {evidence.checks} checks"))
    if report.alarms:
        facts.append(("Alarms", ", ".join(report.alarms)))
    if decision is not None:
        facts.append(("Decision", f"{decision.action.replace('_', ' ')}, {decision.id}"))
    return [*facts, ("Report", report.id)]


def _past(report: DriftReport, history: Sequence[DriftReport]) -> list[DriftReport]:
    """The checks against the same reference until this one, oldest first."""
    same = [r for r in history if r.reference_id == report.reference_id and r.id != report.id]
    return [r for r in in_order([*same, report]) if r.window_end <= report.window_end][-_CHECKS:]


def _over_time(checks: Sequence[DriftReport]) -> list[str]:
    placed = [(found.timestamp(), r) for r in checks if (found := instant(r.window_end)) is not None]
    if not placed:
        return []

    def marks(value: Callable[[DriftReport], float | None]) -> list[Mark]:
        found = [(at, value(r), r) for at, r in placed]
        return [
            Mark(at, x, f"{x:.3g}, {r.status}, {clock(r.window_end)}", VERDICTS[r.status])
            for at, x, r in found
            if x is not None
        ]

    last = checks[-1]
    strongest = sorted(last.evidence, key=lambda n: (n != DRIFT, -(evidence_share(last, n) or 0.0), n))
    curves = [(name, marks(lambda r, name=name: evidence_share(r, name))) for name in strongest[:_CURVES]]  # type: ignore[misc]
    curves = [curve for curve in curves if curve[1]]
    p_values = marks(lambda r: r.p_value)
    pictures = []
    if curves:
        pictures.append(
            trend(curves, title="Evidence, as a share of what alarms", line=1.0, line_name="alarm")
        )
    if p_values:
        pictures.append(
            trend(
                [("p-value", p_values)],
                title="p-value of each window",
                line=last.alpha,
                line_name="suspected",
                most=1.0,
            )
        )
    pictures.append(bars(marks(lambda r: float(r.rows)), title="Exchanges compared"))
    figures = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    rows = history_table(checks[::-1])
    return [
        "<h2>The evidence over time</h2>",
        f'<div class="charts">{figures}</div>{_legend([name for name, _ in curves], checks)}',
        f"<details><summary>The same {len(rows)} checks as a table</summary>{_checks_table(rows)}</details>",
    ]


def _checks_table(rows: Sequence[Sequence[str]]) -> str:
    # What was decided about each check is not known here.
    return markup.table(COLUMNS[:-1], [row[:-1] for row in rows])


def _legend(names: Sequence[str], checks: Sequence[DriftReport]) -> str:
    lines = [
        f'<span style="color:{c}">━</span> {markup.safe(n)}' for n, c in zip(names, COLOURS, strict=False)
    ]
    said = {r.status for r in checks}
    dots = [f'<span style="color:{c}">●</span> {s}' for s, c in VERDICTS.items() if s in said]
    return f'<p class="soft">{" &nbsp; ".join([*(lines if len(lines) > 1 else []), *dots])}</p>'


def _changed(report: DriftReport) -> list[str]:
    found = report.attribution
    parts = [markup.items(report.drivers[:_SHOWN] or ("Nothing that stands out.",))]
    if found is None:
        return parts
    parts.append(f"<p>{markup.safe(_WHERE[found.where])} {markup.safe(_where_figures(found))}</p>")
    if found.since:
        parts.append(f"<p>The change most likely began at {markup.safe(clock(found.since))} UTC.</p>")
    topics = found.topics[:_SHOWN]
    if topics:
        most = max(max(t.reference_share, t.window_share) for t in topics)
        parts.append("<h3>Topics, before and now</h3>")
        parts += [_topic(topic, most) for topic in topics]
    if found.descriptors:
        names = DESCRIPTORS | MORE | FULL
        rows = [
            (
                f"{names.get(d.name, d.name)} of {d.side}s",
                f"{d.reference:.3g}",
                f"{d.window:.3g}",
                f"{d.distance:.2f}",
            )
            for d in found.descriptors[:_SHOWN]
        ]
        parts.append("<h3>How texts are written</h3>")
        parts.append(markup.table(["descriptor", "mean before", "mean now", "distance (0 to 1)"], rows))
    return parts


def _where_figures(found: Attribution) -> str:
    said = []
    if found.inputs_p is not None:
        said.append(f"prompts as such: p {found.inputs_p:.3f}")
    if found.outputs_p is not None:
        said.append(f"answers to like prompts: p {found.outputs_p:.3f}")
    if found.new_share is not None:
        said.append(f"new prompts: {found.new_share:+.1%} above the ordinary share")
    return f"({'; '.join(said)})" if said else ""


def _topic(topic: TopicChange, most: float) -> str:
    about = [*(["new"] if topic.new else []), f"{topic.side}s", f"{topic.count:,} in the window"]
    if topic.since:
        about.append(f"first at {clock(topic.since)} UTC")
    name = f'<h3><bdi>{markup.safe(topic.name, 200)}</bdi> <span class="soft">{" · ".join(about)}</span></h3>'
    before = markup.share_bar("before", topic.reference_share, most)
    now = markup.share_bar("now", topic.window_share, most, "now")
    shown = "".join(
        f'<blockquote><p>{markup.safe(e.prompt)}</p><p class="soft">{markup.safe(e.answer)}</p></blockquote>'
        for e in topic.examples[:_EXAMPLES]
    )
    if shown:
        opened = " open" if topic.new else ""
        shown = f"<details{opened}><summary>Examples: prompt, then answer</summary>{shown}</details>"
    return name + before + now + shown


def _quality(report: DriftReport) -> str:
    rows = []
    for signal in report.quality:
        interval = "–"
        if signal.low is not None and signal.high is not None:
            bounds = [quality_words(signal.name, bound) for bound in (signal.low, signal.high)]
            interval = " to ".join(bounds)
        rows.append(
            (
                signal.name.replace("_", " "),
                quality_verdict(report, signal),
                quality_words(signal.name, signal.value),
                quality_words(signal.name, signal.reference),
                interval,
                f"{signal.count:,}",
                evidence_words(report, signal.name),
                signal.detail,
            )
        )
    heads = ["signal", "verdict", "this window", "reference", "95 % interval", "count"]
    return markup.table([*heads, "evidence", "compared"], rows)
