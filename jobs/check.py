"""Validate an experiment whole and print its plan."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from jobs.console import console, say
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset
from regraft.models import resolve


def run(path: Path) -> None:
    """Check configuration, data and base model; start nothing."""
    from regraft.tuning.plan import describe

    experiment = Experiment.load(path)
    dataset = load_dataset(experiment.name, experiment.data)
    for file in (experiment.retrain.reviewed, *experiment.retrain.evaluation.values()):
        if file is not None:
            read_chats(file)
    base = resolve(experiment.model.source, experiment.model.revision, say)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in dataset.splits.items())
    console.print(
        f"{experiment.name}: base {base.source} ({base.revision}); dataset {dataset.id}: {counts}",
        markup=False,
    )
    table = Table(title="Trials")
    for name in ("trial", "runs", "memory"):
        table.add_column(name)
    for row in describe(experiment, base.path):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"chosen by {experiment.select.maximise}; served at {experiment.serve.host}:{experiment.serve.port}"
    )
