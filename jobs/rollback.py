"""Promotion and rollback are the same act: an alias moves, and serving follows it."""

from __future__ import annotations

from pathlib import Path

from jobs.console import Say, say
from jobs.workspace import Connection, Workspace
from regraft.config import Experiment


def roll_back(experiment: Experiment, connection: Connection, version: int, say: Say = say) -> None:
    """Point the champion alias to a version.

    Raises:
        RegraftError: If there is no such version or MLflow cannot be reached.
    """
    target = connection.registry.version(experiment.name, version)
    before = connection.registry.by_alias(experiment.name, "champion")
    connection.registry.set_alias(experiment.name, "champion", target.version)
    say(f"champion: {before.served_id if before else 'none'} → {target.served_id}")


def run(path: Path, version: int) -> None:
    """The same, as the command line runs it."""
    experiment = Experiment.load(path)
    roll_back(experiment, Workspace().connect(experiment), version)
