"""A sweep's report as Markdown and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import html

from regraft.records import Comparison, LeaderboardRow
from regraft.selection.chart import lines, scatter
from regraft.selection.slices import Slice
from regraft.selection.sweep_report import MethodFacts, SweepReport

_PRICES = {
    "train_seconds": "training, seconds",
    "memory_peak_gib": "peak memory, GiB",
    "latency_p95_ms": "answer p95, ms",
}
#: So many of the worst slices are shown.
_SLICES = 12
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a78d6; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.words { white-space: normal; text-align: left; min-width: 20rem; }
.lead { background: var(--soft); border-left: 4px solid var(--accent); padding: .8rem 1rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 22rem; max-width: 36rem; }
svg text { fill: CanvasText; font-size: 11px; }
.sample { border-top: 1px solid var(--line); padding: .6rem 0; }
.sample p { margin: .2rem 0; white-space: pre-wrap; }
.who { color: GrayText; }
"""


def markdown(report: SweepReport) -> str:
    """The report for a terminal, a pull request, an artifact pane."""
    parts = [f"# Sweep {report.board.sweep_id}", report.recommendation]
    for title, words, table in _tables(report):
        parts += [f"## {title}", words, markdown_table(table)]
    if report.samples:
        parts.append("## Where they differ most")
    for sample in report.samples:
        parts.append(f"**{_line(sample.prompt)}**\n\nReference: {_line(sample.reference)}\n")
        answers = (f"- {label} ({score:.3f}): {_line(text)}" for label, text, score in sample.answers)
        parts.append("\n".join(answers))
    return "\n\n".join(part for part in parts if part) + "\n"


def page(report: SweepReport) -> str:
    """The report as one HTML file: no script, no link, pictures inside."""
    board = report.board
    parts = [
        f"<h1>Sweep {_safe(board.sweep_id)}</h1>",
        f'<p class="lead">{_safe(report.recommendation)}</p>',
        _charts(report),
    ]
    for title, words, table in _tables(report):
        parts.append(f"<h2>{_safe(title)}</h2>" + (f"<p>{_safe(words)}</p>" if words else ""))
        parts.append(_html_table(table))
    if report.samples:
        parts.append("<h2>Where they differ most</h2>")
    for sample in report.samples:
        answers = "".join(
            f'<p><span class="who">{_safe(label)} ({score:.3f}):</span> {_safe(text)}</p>'
            for label, text, score in sample.answers
        )
        parts.append(
            f'<div class="sample"><p><b>{_safe(sample.prompt)}</b></p>'
            f'<p><span class="who">reference:</span> {_safe(sample.reference)}</p>{answers}</div>'
        )
    title = f"Sweep {_safe(board.sweep_id)}"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


Table = list[list[str]]


def _tables(report: SweepReport) -> list[tuple[str, str, Table]]:
    """Title, words and table of each section; a table's first row is its head."""
    board = report.board
    sections = [
        (
            "Each method's best",
            f"Differences in {board.objective} are paired over the examples, with their interval; p is of "
            "the lead on the control, corrected for how many candidates were held against it; time and "
            "memory are shares of what full fine-tuning took. Final is over examples that nobody was chosen "
            "by, and latency is measured alone, when the sweep is over.",
            _method_table(report),
        ),
        ("All trials", "", _trial_table(report)),
    ]
    if report.ranks:
        head = ["method", "rank", board.objective, "over the rank below", "trained parameters"]
        rows = [
            [
                e.method,
                str(e.rank),
                _quality(e.best),
                _difference(e.over_lower),
                f"{e.best.metrics.get('trainable_parameters', 0):,.0f}",
            ]
            for e in report.ranks
        ]
        sections.append(("What rank bought", "", [head, *rows]))
    if report.near:
        rows = [
            [r.label, _quality(r), _difference(c), _number(r, "train_seconds", ".0f")] for r, c in report.near
        ]
        head = ["trial", board.objective, "against the winner", "training s"]
        sections.append(("Within noise of the winner", "", [head, *rows]))
    if report.slices:
        head = ["examples of", "", "", board.objective, "all others", ""]
        rows = [
            [
                s.field, s.value, str(s.examples),
                _quality(s), f"{s.others:.3f}", "weak" if s.weak else "",
            ]
            for s in report.slices[:_SLICES]
        ]  # fmt: skip
        words = (
            "The winner's worst kinds of examples. Weak are those below all others by more than luck, given "
            f"that {len(report.slices)} were looked at."
        )
        sections.append(("Where the winner is weakest", words, [head, *rows]))
    if report.unfinished:
        rows = [[r.label, r.status, r.reason] for r in report.unfinished]
        sections.append(("What did not come through", "", [["trial", "", "reason"], *rows]))
    if report.left_out:
        sections.append(("Left out", "", [["trial"], *([line] for line in report.left_out)]))
    return sections


def _method_table(report: SweepReport) -> Table:
    objective = report.board.objective
    head = ["method", "best", objective, "final", "against full", "against control", "p", "time", "memory"]
    head += ["p95 ms", ""]
    rows = [head, *(_method_row(facts) for facts in report.methods)]
    if report.control is not None:
        control = report.control
        latency = _number(control, "latency_p95_ms", ",.0f")
        final = _final(control)
        rows.append([control.label, "control", _quality(control), final, *[""] * 5, latency, ""])
    for endpoint, _ in report.endpoints:
        latency, cost = _number(endpoint, "latency_p95_ms", ",.0f"), _number(endpoint, "answer_money", ".4g")
        words = f"answers cost {cost}" if cost else ""
        rows.append(
            [endpoint.label, "control", _quality(endpoint), _final(endpoint), *[""] * 5, latency, words]
        )
    return rows


def _method_row(facts: MethodFacts) -> list[str]:
    counts = f"{facts.completed} completed" + (f", {facts.stopped} stopped" if facts.stopped else "")
    return [
        facts.method,
        facts.best.label,
        _quality(facts.best),
        _final(facts.best),
        _difference(facts.against_full),
        _difference(facts.against_control),
        "" if facts.best.p_control is None else f"{facts.best.p_control:.2g}",
        f"{facts.seconds_ratio:.0%}" if facts.seconds_ratio else "",
        f"{facts.memory_ratio:.0%}" if facts.memory_ratio else "",
        _number(facts.best, "latency_p95_ms", ",.0f"),
        counts,
    ]


def _trial_table(report: SweepReport) -> Table:
    head = ["trial", "#", report.board.objective, "eval loss", "training s", "memory GiB", "p95 ms", ""]
    rows = [
        [
            row.label,
            str(row.rank or ""),
            _quality(row),
            _number(row, "eval_loss", ".3f"),
            _number(row, "train_seconds", ".0f"),
            _number(row, "memory_peak_gib", ".2f"),
            _number(row, "latency_p95_ms", ",.0f"),
            ", ".join(report.board.marks(row)),
        ]
        for row in report.board.rows
    ]
    return [head, *rows]


def _charts(report: SweepReport) -> str:
    board, figures = report.board, []
    for figure, words in _PRICES.items():
        points = [
            (row.metrics[figure], row.quality.mean, row.label, row.on_pareto_front, row.is_control)
            for row in board.rows
            if row.quality is not None and row.metrics.get(figure)
        ]
        if len(points) > 1:
            figures.append(f"<figure>{scatter(points, words, board.objective)}</figure>")
    if report.curves:
        drawn = lines(report.curves, "tokens seen", "evaluation loss")
        figures.append(f"<figure>{drawn}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _quality(row: LeaderboardRow | Slice) -> str:
    q = row.quality
    return f"{q.mean:.3f} ({q.low:.3f} to {q.high:.3f})" if q else ""


def _final(row: LeaderboardRow) -> str:
    return f"{row.final.mean:.3f}" if row.final else ""


def _difference(c: Comparison | None) -> str:
    return f"{c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f})" if c else ""


def _number(row: LeaderboardRow, figure: str, form: str) -> str:
    return format(row.metrics[figure], form) if row.metrics.get(figure) else ""


def markdown_table(table: Table) -> str:
    """A table as Markdown; the first row is its head."""
    rows = [[_line(cell).replace("|", "\\|") for cell in row] for row in table]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in table[0])
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f'<td class="words">{_safe(text)}</td>' if len(text) > 40 else f"<td>{_safe(text)}</td>"


def _line(text: str) -> str:
    return " ".join(text.split())


def _safe(text: str) -> str:
    return html.escape(text)
