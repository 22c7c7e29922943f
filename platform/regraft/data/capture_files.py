"""The files of the capture spool: who writes one, and how another process knows that nobody does any more.

A file is locked (`flock`) before it gets its name and until its writer closes it or dies, so one that can
be locked is finished. The spool must lie on a disk whose locks the kernel keeps: a local one, or NFS
between different processes.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import BinaryIO

_NAME = re.compile(r"^(\d{4}-\d{2}-\d{2})-\d+-(?:[0-9a-f]{8}){1,2}$")


def create(folder: Path, day: date) -> int:
    """Make a spool file that nobody else takes for finished.

    Args:
        folder: The spool; made if it is not there.
        day: The day on which the file is written (UTC).

    Returns:
        Its descriptor, for appending. Closing it, in whatever way, says that the file is finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Names are told apart over all machines that ship to one archive, where process ids repeat.
    stem = f"{day.isoformat()}-{os.getpid()}-{secrets.token_hex(8)}"
    scratch = folder / f".{stem}.part"
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        scratch.rename(folder / f"{stem}.jsonl")
    except BaseException:
        os.close(file)
        scratch.unlink(missing_ok=True)
        raise
    return file


def day_of(stem: str) -> date | None:
    """The day on which a file was written, by its name without ending; None if the spool did not name it."""
    named = _NAME.match(stem)
    return date.fromisoformat(named[1]) if named else None


def spool_files(folder: Path, start: date | None = None) -> list[Path]:
    """The files of a spool, oldest first.

    Args:
        folder: The spool.
        start: Leave out files that have nothing begun on this day or later. A file holds what was
            *finished* on its day, so it may reach back but never forward.
    """
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        day = day_of(file.stem)
        if day is None or start is None or day >= start:
            found.append(file)
    return found


@contextmanager
def claimed(file: Path) -> Iterator[BinaryIO | None]:
    """Hold a finished file, open for reading; None if somebody writes it or it is gone."""
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        yield None
        return
    with stream:
        yield stream if _locked(stream) else None


def lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """The lines of a file that are not empty: number, bytes, and whether the end of the file cut it short.

    Such a line's writer was killed in the middle of it, or is writing it now, and never acknowledged it.
    """
    for number, line in enumerate(stream, start=1):
        text = line.rstrip(b"\n")
        if text:
            yield number, text, not line.endswith(b"\n")


def _locked(stream: BinaryIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(stream.fileno()).st_nlink > 0  # if none, another has shipped it in between
