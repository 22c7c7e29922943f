"""The endpoint's captured exchanges: ship them to the archive, delete old ones, count them."""

from __future__ import annotations

from rich.table import Table

from jobs.console import console, say
from jobs.workspace import Workspace
from regraft.config import Experiment
from regraft.data import capture_files, capture_shipping
from regraft.data.capture_archive import Archive
from regraft.data.captures import CaptureStore
from regraft.errors import ConfigError, DataError


def ship(experiment: Experiment) -> None:
    """Ship the finished files of the spool.

    Raises:
        ConfigError: If no archive is configured.
        DataError: If a file of the spool cannot be read; the others are shipped before.
        ServiceError: If the archive does not take them.
    """
    store = _store(experiment)
    if store.archive is None:
        raise ConfigError(
            "serve.capture.ship: is not set, so the exchanges stay in the spool",
            "name a folder or a URL there",
        )
    done = capture_shipping.ship(store, store.archive)
    say(f"{done.exchanges} exchanges of {experiment.name} in {done.files} files shipped to {store.archive}")
    for count, what in (
        (done.torn, "lines were cut short by their writers' death and never acknowledged: dropped"),
        (done.live, "files left: they are being written"),
        (done.foreign, "files left: the spool did not name them"),
    ):
        if count:
            say(f"{count} {what}")
    if done.failed:
        raise DataError("\n".join(done.failed))


def prune(experiment: Experiment) -> None:
    """Delete what is older than `serve.capture.keep_days`.

    Raises:
        ConfigError: If it is not set.
        ServiceError: If the archive does not let it.
    """
    store = _store(experiment)
    keep_days = experiment.serve.capture.keep_days
    if keep_days is None:
        raise ConfigError(
            "serve.capture.keep_days: is not set, so exchanges are kept for ever", "say there how many days"
        )
    deleted = capture_shipping.prune(store, keep_days)
    say(f"{deleted} files of {experiment.name} deleted, finished more than {keep_days} days ago")


def stats(experiment: Experiment) -> None:
    """Print how many exchanges there are, of which versions, and where.

    Raises:
        DataError: If a file of the spool cannot be read.
        ServiceError: If the archive cannot be read.
    """
    store = _store(experiment)
    spool = capture_files.spool_files(store.folder)
    live = 0
    for file in spool:
        with capture_files.claimed(file) as stream:
            live += stream is None
    size = sum(file.stat().st_size for file in spool if file.exists())
    say(f"spool    {len(spool)} files, {live} being written, {size / 2**20:.1f} MiB: {store.folder}")
    if store.archive is not None:
        sizes = Archive(store.archive).files().values()
        say(f"archive  {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB: {store.archive}")
    found = store.table(columns=["created", "model", "model_version", "finish_reason", "session"])
    shown = Table(title=f"{len(found)} exchanges of {experiment.name}")
    for name in ("version", "exchanges", "sessions", "aborted", "errors", "first (UTC)", "last (UTC)"):
        shown.add_column(name, justify="left" if name == "version" else "right")
    for (model, version), rows in found.groupby(["model", "model_version"], sort=True):
        ends = rows["finish_reason"].value_counts()
        shown.add_row(
            f"{model}/{version}",
            str(len(rows)),
            str(rows["session"].nunique()),
            str(ends.get("aborted", 0)),
            str(ends.get("error", 0)),
            f"{rows['created'].min():%Y-%m-%d %H:%M:%S}",
            f"{rows['created'].max():%Y-%m-%d %H:%M:%S}",
        )
    console.print(shown)


def _store(experiment: Experiment) -> CaptureStore:
    return CaptureStore.of(Workspace().root / "captures" / experiment.name, experiment.serve.capture)
