"""Promotion and rollback are the same act: an alias moves under one lock, and serving follows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.console import Say, say
from jobs.workspace import Connection, Workspace
from regraft.cluster import local
from regraft.cluster.locks import cluster_lock
from regraft.config import Experiment
from regraft.records import ModelVersion


@contextmanager
def promoting(name: str, connection: Connection) -> Iterator[None]:
    """Hold the cluster's lock on a model's champion; Ray is joined for it, if this process has not yet.

    Raises:
        ServiceError: If the cluster cannot be reached, or another holds the lock for minutes.
    """
    local.join(connection.ray_address)
    with cluster_lock(f"promotion:{name}"):
        yield


def roll_back(
    experiment: Experiment,
    connection: Connection,
    version: int,
    say: Say = say,
    *,
    instead_of: ModelVersion | None = None,
) -> None:
    """Point the champion alias to a version; a promotion that is under way is waited for.

    Args:
        experiment: Whose model.
        connection: Where things are.
        version: Of the new champion.
        say: Where lines go.
        instead_of: The champion that is gone back from; None: whichever it is then.

    Raises:
        PromotionConflictError: If the champion is another than `instead_of`.
        RegraftError: If there is no such version, or MLflow or Ray cannot be reached.
    """
    registry = connection.registry
    target = registry.version(experiment.name, version)
    with promoting(experiment.name, connection):
        before = registry.return_to(target, instead_of=instead_of, promotion_lock=connection.promotion_lock)
    say(f"champion: {before.served_id if before else 'none'} → {target.served_id}")


def run(path: Path, version: int) -> None:
    """The same, as the command line runs it."""
    experiment = Experiment.load(path)
    roll_back(experiment, Workspace().connect(experiment), version)
