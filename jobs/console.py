"""What the command line prints: lines with the time that has passed, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitoring.timeline import (
    COLUMNS,
    clock,
    evidence_words,
    history_table,
    quality_verdict,
    quality_words,
)
from regraft.records import DriftReport, Leaderboard, PromotionDecision, RetrainDecision

#: Soft wrapping keeps one message one line in files and pipes; links stay whole.
console = Console(soft_wrap=True, highlight=False, force_terminal=sys.stdout.isatty())
#: Where a stage sends its lines.
Say = Callable[[str], None]
#: Columns that tables of the monitor take at least, and fit into.
_WIDTH = 100
_STARTED = time.monotonic()


def say(line: str) -> None:
    """Print a line with the minutes and seconds since the command started."""
    passed = time.monotonic() - _STARTED
    console.print(f"[{int(passed // 60):3d}:{passed % 60:04.1f}] {line}", markup=False)


def stage(number: int, total: int, title: str) -> None:
    """Announce a stage."""
    console.print()
    passed = time.monotonic() - _STARTED
    console.print(
        f"[{int(passed // 60):3d}:{passed % 60:04.1f}] ── {number}/{total} {title} ──",
        markup=False,
        style="bold",
    )


def show_leaderboard(board: Leaderboard) -> None:
    """Print a leaderboard."""
    table = Table(title=f"Leaderboard of {board.sweep_id}, by {board.objective}")
    columns = ["#", "candidate", f"{board.objective} (95 % interval)", "final", "eval loss", "train s"]
    columns += ["memory GiB"]
    columns += ["trainable", "p95 ms", "tok/s", ""]
    for name in columns:
        table.add_column(name, justify="left" if name in {"candidate", ""} else "right", no_wrap=name != "")
    for row in board.rows:
        m = row.metrics
        quality = row.quality
        marks = board.marks(row) + ([row.reason] if row.reason and row.status != "stopped" else [])
        table.add_row(
            str(row.rank or "–"),
            row.label,
            f"{quality.mean:.3f} ({quality.low:.3f}–{quality.high:.3f})" if quality else "–",
            f"{row.final.mean:.3f}" if row.final else "–",
            _number(m, "eval_loss", ".3f"),
            _number(m, "train_seconds", ".0f"),
            _number(m, "memory_peak_gib", ".2f"),
            _number(m, "trainable_parameters", ",.0f"),
            _number(m, "latency_p95_ms", ",.0f"),
            _number(m, "tokens_per_second", ".1f"),
            ", ".join(marks),
            style="bold" if row.key == board.winner_key else None,
        )
    Console(width=max(console.width, 150)).print(table)
    console.print(f"winner: {board.winner_reason}", markup=False)


def _number(metrics: dict[str, float], name: str, form: str) -> str:
    return format(metrics[name], form) if metrics.get(name) else "–"


def show_decision(decision: PromotionDecision) -> None:
    """Print the gate's word and its evidence."""
    table = Table(title=f"{decision.challenger} against {decision.incumbent}: {decision.outcome}")
    words = {"evaluation set", "against"}
    for name in (
        "evaluation set",
        "against",
        "examples",
        "theirs",
        "its",
        "difference",
        "95 % interval",
        "p",
    ):
        table.add_column(name, justify="left" if name in words else "right")
    for c in decision.evidence:
        table.add_row(
            c.split,
            c.against,
            str(c.examples),
            f"{c.incumbent_mean:.3f}",
            f"{c.challenger_mean:.3f}",
            f"{c.difference:+.3f}",
            f"{c.low:+.3f} to {c.high:+.3f}",
            f"{c.p_value:.2g}",
        )
    Console(width=max(console.width, 120)).print(table)
    for check in decision.checks:
        value = "not recorded" if check.challenger is None else f"{check.challenger:.4g}"
        beside = "" if check.incumbent is None else f" the {check.incumbent:.4g} of {check.against}"
        held = "holds" if check.ok else "does not hold"
        console.print(f"  {check.figure} {value}: {check.rule}{beside}: {held}", markup=False)
    if decision.parity is not None:
        ways = ", ".join(
            f"{name} {path.equal + path.ties} of {path.prompts}"
            for name, path in decision.parity.paths.items()
        )
        console.print(f"  answers alike however it is run: {ways}", markup=False)
    console.print(f"{decision.outcome}: {decision.reason}", markup=False)


def show_drift(
    reports: Sequence[tuple[str, DriftReport]], decisions: Mapping[str, RetrainDecision] | None = None
) -> None:
    """Print drift reports, one a row.

    Args:
        reports: With what each is called.
        decisions: What was decided, by the id of the report.
    """
    table = _narrow("Drift checks")
    numbers = {"exchanges", "p-value", "effect", "evidence"}
    for name in COLUMNS:
        whole = name in {"window", "verdict", "evidence", "kind", "decision"}
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=whole, overflow="fold")
    rows = history_table([r for _, r in reports], decisions, [title for title, _ in reports])
    for row in rows:
        table.add_row(*map(_plain, row))
    Console(width=max(console.width, _WIDTH)).print(table)


def show_details(report: DriftReport) -> None:
    """Print what stands behind a check's verdict: quality signals, and what changed."""
    show_quality(report)
    show_attribution(report)


def show_quality(report: DriftReport) -> None:
    """Print the quality signals of a check, those that alarm in bold; nothing where there are none."""
    if not report.quality:
        return
    table = _narrow(f"Quality of {report.model}/{report.model_version}, {clock(report.window_end)} UTC")
    words = {"signal", "verdict"}
    for name in ("signal", "window", "reference", "95 % interval", "count", "verdict", "evidence"):
        table.add_column(name, justify="left" if name in words else "right")
    for signal in report.quality:
        interval = "–"
        if signal.low is not None and signal.high is not None:
            interval = " to ".join(quality_words(signal.name, b) for b in (signal.low, signal.high))
        table.add_row(
            _plain(signal.name.replace("_", " ")),
            quality_words(signal.name, signal.value),
            quality_words(signal.name, signal.reference),
            interval,
            f"{signal.count:,}",
            quality_verdict(report, signal),
            evidence_words(report, signal.name),
            style="bold" if signal.name in report.alarms else None,
        )
    Console(width=max(console.width, _WIDTH)).print(table)


def show_attribution(report: DriftReport) -> None:
    """Print what changed: topics and descriptors, before and now; nothing where it is not known."""
    found = report.attribution
    if found is None:
        return
    from monitoring.descriptors import DESCRIPTORS, FULL, MORE

    since = f" since {clock(found.since)} UTC" if found.since else ""
    called = DESCRIPTORS | MORE | FULL
    table = _narrow(f"What changed{since}: {found.where}")
    for name in ("what", "side", "before", "now", "exchanges"):
        table.add_column(name, justify="left" if name in {"what", "side"} else "right")
    for topic in found.topics:
        name = f"{'new: ' if topic.new else ''}{topic.name}"
        shares = (f"{topic.reference_share:.1%}", f"{topic.window_share:.1%}")
        table.add_row(_plain(name), f"{topic.side}s", *shares, f"{topic.count:,}")
    for moved in found.descriptors:
        means = (f"{moved.reference:.3g}", f"{moved.window:.3g}")
        table.add_row(_plain(called.get(moved.name, moved.name)), f"{moved.side}s", *means, "")
    if table.row_count:
        Console(width=max(console.width, _WIDTH)).print(table)
    else:
        console.print(f"{table.title}; no topic and no descriptor by itself", markup=False)


def _narrow(title: str) -> Table:
    """A table that fits an ordinary terminal."""
    return Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )


def _plain(words: str) -> Text:
    """Words as they are: neither rich's markup nor a terminal's escape codes, which users could have sent."""
    return Text("".join(c if c.isprintable() else " " for c in words)[:200])
