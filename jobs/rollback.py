"""Promotion and rollback are the same act: an alias moves, and serving follows it."""

from __future__ import annotations

from pathlib import Path

from jobs.console import say
from jobs.workspace import Workspace
from regraft.config import Experiment


def run(path: Path, version: int) -> None:
    """Point the champion alias to a version.

    Raises:
        RegraftError: If there is no such version or MLflow cannot be reached.
    """
    experiment = Experiment.load(path)
    connection = Workspace().connect(experiment)
    target = connection.registry.version(experiment.name, version)
    before = connection.registry.by_alias(experiment.name, "champion")
    connection.registry.set_alias(experiment.name, "champion", target.version)
    say(f"champion: {before.served_id if before else 'none'} → {target.served_id}")
