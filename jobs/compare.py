"""Trials side by side in the terminal: settings that differ, figures, paired differences, answers.

Runs as `regraft compare RUN RUN`, with run ids of MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.console import console, say
from jobs.workspace import Workspace, tracked
from regraft.config import Experiment
from regraft.errors import RegraftError
from regraft.records import TrialResult
from regraft.selection.resampling import paired_comparison
from regraft.selection.sweep_report import samples


def run(path: Path, runs: Sequence[str], *, answers: int = 3) -> None:
    """Read the runs' records and print them side by side; the others are held against the first."""
    experiment = Experiment.load(path)
    if len(runs) < 2:
        raise RegraftError("there is nothing to compare one run with", "name two or more run ids of MLflow")
    with tracked(experiment, Workspace(), say) as tracker:
        trials = [tracker.result_of(run_id) for run_id in runs]
    width = max(console.width, 60 + 26 * len(trials))
    out = Console(width=width, highlight=False)
    out.print(_settings(trials))
    out.print(_figures(trials))
    if differences := _differences(trials, experiment):
        out.print(differences)
    _show_answers(trials, experiment.select.maximise, answers)


def _table(title: str, trials: Sequence[TrialResult]) -> Table:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for trial in trials:
        table.add_column(trial.label, overflow="fold")
    return table


def _settings(trials: Sequence[TrialResult]) -> Table:
    """What was set otherwise; what is the same in all of them is left out."""
    rows: dict[str, list[Any]] = {"run": [t.run_id for t in trials], "status": [t.status for t in trials]}
    rows |= {"seed": [t.seed for t in trials], "dataset": [t.dataset_id for t in trials]}
    rows |= {"base": [f"{t.base_model} {t.base_revision[:12]}" for t in trials]}
    for field in dict.fromkeys(f for t in trials for f in t.method):
        rows[field] = [json.dumps(t.method[field]) if field in t.method else "–" for t in trials]
    table = _table("What was set otherwise", trials)
    for name, values in rows.items():
        if name in {"run", "status"} or len(set(map(str, values))) > 1:
            table.add_row(name, *map(str, values))
    return table


def _figures(trials: Sequence[TrialResult]) -> Table:
    figures = [t.figures for t in trials]
    table = _table("Figures", trials)
    for name in dict.fromkeys(n for f in figures for n in f):
        table.add_row(name, *(f"{f[name]:,.4g}" if name in f else "–" for f in figures))
    return table


def _differences(trials: Sequence[TrialResult], experiment: Experiment) -> Table | None:
    """Each against the first, metric by metric, over the examples both have a score for."""
    first = trials[0]
    others = [t for t in trials[1:] if t.report is not None and t.dataset_id == first.dataset_id]
    if first.report is None or not others:
        return None
    table = _table(f"Against {first.label}: paired difference and its interval", others)
    for metric in first.report.means:
        cells = []
        for other in others:
            try:
                c = paired_comparison(
                    other.report,  # type: ignore[arg-type]
                    first.report,
                    metric,
                    split="evaluation",
                    level=experiment.select.confidence,
                    resamples=experiment.select.resamples,
                )
                sure = " *" if c.low > 0 or c.high < 0 else ""
                cells.append(f"{c.difference:+.4f} ({c.low:+.4f} to {c.high:+.4f}){sure}")
            except ValueError as error:
                cells.append(str(error))
        table.add_row(metric, *cells)
    table.caption = "* the interval leaves zero out"
    return table


def _show_answers(trials: Sequence[TrialResult], objective: str, count: int) -> None:
    for sample in samples(trials, objective)[:count]:
        console.print(f"\n{sample.prompt}", markup=False, style="bold")
        console.print(f"  reference: {sample.reference}", markup=False)
        for label, text, score in sample.answers:
            console.print(f"  {label} ({score:.3f}): {text}", markup=False)
