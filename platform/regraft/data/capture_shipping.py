"""Finished spool files to the archive, and old exchanges away.

A spool file is deleted after its Parquet file has been read back, and gives it its name: whatever is cut
short between two steps is done again, and loses and doubles nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from regraft.data import capture_files
from regraft.data.capture_archive import Archive
from regraft.data.captures import CaptureStore, exchanges
from regraft.errors import DataError
from regraft.records import CapturedExchange
from regraft.records.base import Record

logger = logging.getLogger(__name__)

#: Exchanges that are read without a rest.
_STRETCH = 50
#: Rests of an endpoint's shipper: half a millisecond of work, two of rest.
_REST_SECONDS = 0.002


class Shipped(Record):
    """What a shipping did.

    Attributes:
        files: Spool files that are in the archive now.
        exchanges: Rows of them.
        torn: Last lines that their dead writers never finished and never acknowledged: dropped.
        live: Spool files left because somebody writes them, or ships them now.
        foreign: Files in the spool's folder that it did not name: left.
        failed: Why a file could not be read: left.
    """

    files: int = 0
    exchanges: int = 0
    torn: int = 0
    live: int = 0
    foreign: int = 0
    failed: tuple[str, ...] = ()


def ship(store: CaptureStore, url: str, *, rest_seconds: float = 0.0) -> Shipped:
    """Write the finished files of a spool as Parquet, and delete them there.

    Args:
        store: Whose spool.
        url: Where to: a folder, or a URL that fsspec takes.
        rest_seconds: How long to rest after every 50 exchanges, for the sake of other threads.

    Raises:
        ConfigError: If the URL cannot be one.
        ServiceError: If the store there does not take them; what is not there stays in the spool.
    """
    archive = Archive(url)
    done = Shipped()
    for file in capture_files.spool_files(store.folder):
        day = capture_files.day_of(file.stem)
        if day is None:
            done = _plus(done, foreign=1)
            continue
        with capture_files.claimed(file) as stream:
            if stream is None:
                done = _plus(done, live=1)
                continue
            source = _Source(file, stream, rest_seconds)
            try:
                rows = archive.write(day, file.stem, source)
            except DataError as error:
                done = done.model_copy(update={"failed": (*done.failed, str(error))})
                continue
            file.unlink()
            done = _plus(done, files=1, exchanges=rows, torn=source.torn)
    return done


def prune(captures: CaptureStore | str, keep_days: int, *, today: date | None = None) -> int:
    """Delete exchanges that were finished more than so many whole days ago.

    Args:
        captures: A store, with spool and archive; or the URL of an archive alone.
        keep_days: Whole days to keep beside today.
        today: What day it is; now, in UTC, if None.

    Returns:
        How many files were deleted. A spool file that somebody writes stays.

    Raises:
        ServiceError: If the archive does not let it.
    """
    before = (today or datetime.now(UTC).date()) - timedelta(days=keep_days)
    deleted = 0
    if isinstance(captures, CaptureStore):
        for file in capture_files.spool_files(captures.folder):
            day = capture_files.day_of(file.stem)
            if day is None or day >= before:
                continue
            with capture_files.claimed(file) as stream:
                if stream is not None:
                    file.unlink()
                    deleted += 1
    url = captures if isinstance(captures, str) else captures.archive
    return deleted + (Archive(url).prune(before) if url is not None else 0)


class Shipper:
    """Ships and prunes beside an endpoint, in a thread that no answer waits for.

    Args:
        store: What the endpoint writes to; with an archive it is shipped there.
        every_seconds: How long to wait between two shippings.
        keep_days: Whole days to keep exchanges; None for ever.
    """

    def __init__(self, store: CaptureStore, *, every_seconds: float, keep_days: int | None = None) -> None:
        self._store = store
        self._every = every_seconds
        self._keep_days = keep_days
        self._pruned: date | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self._totals: dict[str, int] = {"files": 0, "exchanges": 0, "torn": 0, "pruned_files": 0, "errors": 0}
        self._last_error: str | None = None
        self._last_success: str | None = None

    def start(self) -> None:
        """Start the thread.

        Raises:
            ConfigError: If the archive's URL cannot be one, or a package is missing for it.
        """
        # Here and now: imports hold up whatever answers are being given. (pyarrow imports pandas by itself.)
        import pandas  # noqa: F401
        import pyarrow.dataset
        import pyarrow.parquet  # noqa: F401

        if self._store.archive is not None:
            Archive(self._store.archive)
        self._thread = threading.Thread(target=self._run, name="capture-shipper", daemon=True)
        self._thread.start()

    def stop(self, patience_seconds: float = 30.0) -> None:
        """Ship what there is, and end the thread; one that a store holds up is left behind."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(patience_seconds)

    def state(self) -> dict[str, int | str | None]:
        """What was done since the start, and the last error, for /health."""
        return {**self._totals, "last_error": self._last_error, "last_success": self._last_success}

    def turn(self) -> None:
        """Ship and prune once, now. What goes wrong is counted and logged: the next turn tries again."""
        with self._turn:
            try:
                self._ship()
                self._prune()
            except Exception as error:  # whatever a store raises: the endpoint goes on
                self._failed(f"{type(error).__name__}: {error}")
                logger.exception("captured exchanges could not be shipped; they stay in the spool")
            else:
                self._last_success = datetime.now(UTC).isoformat(timespec="seconds")

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.turn()
        self.turn()

    def _ship(self) -> None:
        if self._store.archive is None:
            return
        self._store.close()  # begins another file, so that this one can go
        done = ship(self._store, self._store.archive, rest_seconds=_REST_SECONDS)
        for name in ("files", "exchanges", "torn"):
            self._totals[name] += getattr(done, name)
        for problem in done.failed:
            self._failed(problem)
            logger.error("not shipped: %s", problem)

    def _prune(self) -> None:
        today = datetime.now(UTC).date()
        if self._keep_days is not None and self._pruned != today:
            self._store.close()  # yesterday's may still be the one that is written to
            self._totals["pruned_files"] += prune(self._store, self._keep_days, today=today)
            self._pruned = today

    def _failed(self, problem: str) -> None:
        self._totals["errors"] += 1
        self._last_error = problem


class _Source:
    """The exchanges of a finished file; afterwards, how many lines were torn."""

    def __init__(self, file: Path, stream: BinaryIO, rest_seconds: float) -> None:
        self._file, self._stream, self._rest = file, stream, rest_seconds
        self.torn = 0

    def __iter__(self) -> Iterator[CapturedExchange]:
        for number, exchange in enumerate(exchanges(self._file, self._stream), start=1):
            if self._rest and number % _STRETCH == 0:
                time.sleep(self._rest)
            if exchange is None:
                self.torn += 1
            else:
                yield exchange


def _plus(done: Shipped, **more: int) -> Shipped:
    return done.model_copy(update={name: getattr(done, name) + count for name, count in more.items()})
