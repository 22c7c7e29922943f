"""Measure a version once more: on today's evaluation sets, alone on its worker, kept as a run of its own.

Runs as `regraft evaluate PATH [VERSION]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.console import Say, console, say
from jobs.evaluation_sets import with_registered
from jobs.workspace import Workspace, connected
from regraft.cluster.quiet import QuietWorker
from regraft.config import Experiment
from regraft.data.dataset import load_dataset
from regraft.errors import RegraftError
from regraft.records import DatasetVersion, EvalReport, ExampleScore, ModelVersion, Speed
from regraft.tracking.registry import CHAMPION

#: So many of the worst kinds of examples are shown.
_SLICES = 8


def evaluate_version(
    experiment: Experiment,
    dataset: DatasetVersion,
    version: ModelVersion,
    worker: QuietWorker,
    say: Say = say,
    known: Sequence[ExampleScore] = (),
) -> tuple[EvalReport, Speed | None]:
    """Have a version answer the final part of all evaluation sets, and time it.

    Args:
        experiment: How to answer and score.
        dataset: With the evaluation sets.
        version: What to measure.
        worker: Where.
        say: Called with what is worth seeing.
        known: Scores from before that need no second answer.
    """
    from regraft.training.final import Entry
    from regraft.tuning.finals import Quiet

    entry = Entry(
        label=version.served_id, method=version.method, base_model=version.base_model,
        base_revision=version.base_revision, logged_model_id=version.logged_model_id,
    )  # fmt: skip
    say(f"measuring {version.served_id} alone")
    return Quiet(experiment, dataset, worker)(entry, known)


def show(experiment: Experiment, version: ModelVersion, report: EvalReport, speed: Speed | None) -> None:
    """Print figures by evaluation set with intervals, the weakest kinds of examples, and the speed."""
    from regraft.selection.resampling import mean_interval
    from regraft.selection.slices import slices

    select = experiment.select
    sets = sorted({e.tags["set"] for e in report.examples})
    table = Table(title=f"{version.served_id} on {len(report.examples)} examples")
    for name in ("figure", "all sets", *(sets if len(sets) > 1 else ())):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name in report.means:
        cells = []
        for of_set in (None, *(sets if len(sets) > 1 else ())):
            rows = [e for e in report.examples if of_set is None or e.tags["set"] == of_set]
            values = [e.scores[name] for e in rows if name in e.scores]
            found = (
                mean_interval(values, level=select.confidence, resamples=select.resamples) if values else None
            )
            cells.append(f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})" if found else "–")
        table.add_row(name, *cells)
    for name, value in report.whole.items():
        table.add_row(name, f"{value:.3f}")
    Console(width=max(console.width, 100)).print(table)
    weakest = slices(report, select.maximise, level=select.confidence, resamples=select.resamples)
    for s in weakest[:_SLICES]:
        mark = ": weak" if s.weak else ""
        console.print(
            f"  {s.field} {s.value} ({s.examples}): {s.quality.mean:.3f}, all others {s.others:.3f}{mark}",
            markup=False,
        )
    for name, reason in report.whole_failures.items():
        console.print(f"  {name} failed: {reason}", markup=False)
    if speed is not None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in speed.figures.items())
        console.print(f"{shown}\n  {speed.how}", markup=False)


def run(path: Path, number: int | None) -> None:
    """Measure the champion, or the version by that number; print and record what came of it.

    Raises:
        RegraftError: If there is no such version.
    """
    from regraft.tuning.finals import quietly

    experiment = Experiment.load(path)
    dataset = load_dataset(experiment.name, experiment.data)
    with connected(experiment, Workspace(), say) as connection:
        registry = connection.registry
        version = (
            registry.by_alias(experiment.name, CHAMPION)
            if number is None
            else registry.version(experiment.name, number)
        )
        if version is None:
            raise RegraftError(f"{experiment.name} has no champion", "run `regraft sweep`, or name a version")
        dataset = with_registered(experiment, dataset, registry, say)
        with quietly(experiment, connection.tracking_uri, say) as worker:
            report, speed = evaluate_version(experiment, dataset, version, worker)
        run_id = connection.tracker(experiment).log_evaluation(version, report, speed)
        show(experiment, version, report, speed)
        console.print(f"kept as run {run_id}", markup=False)
