"""Records in a spool: how one is written so that it outlives the process, and how they are read back.

A record is a line and one `write` call: the kernel has it when the call returns, and killing the process
afterwards loses nothing. Every writing process has files of its own (`capture_files`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from regraft.data import capture_files
from regraft.errors import DataError
from regraft.records import Record

R = TypeVar("R", bound=Record)


class SpoolWriter:
    """Appends records to files of its own in a folder.

    Args:
        folder: The spool; made at the first write.
        what: What a record is called, for messages.
        max_bytes: Size that a file does not pass, unless a single record does; None for any.
    """

    def __init__(self, folder: Path, what: str, max_bytes: int | None = None) -> None:
        self._folder, self._what, self._max_bytes = folder, what, max_bytes
        self._lock = threading.Lock()
        self._file: int | None = None
        self._size = 0
        self._owner: tuple[int, date] | None = None

    def append(self, record: Record) -> None:
        """Write one record.

        Raises:
            OSError: If it could not be written whole, for instance because the disk is full.
        """
        line = record.model_dump_json().encode() + b"\n"
        with self._lock:
            file = self._current(len(line))
            written = 0
            try:
                written = os.write(file, line)
            finally:
                self._size += written
                if written != len(line):
                    # The file may end in a torn line now, which is tolerable only as its last.
                    self._release()
        if written != len(line):
            raise OSError(f"{self._folder}: only {written} of {len(line)} bytes of {self._what} were written")

    def close(self) -> None:
        """Finish the file being written; a later append begins another."""
        with self._lock:
            self._release()

    def _current(self, more: int) -> int:
        # A forked child inherits the descriptor: it must not write into its parent's file.
        owner = (os.getpid(), datetime.now(UTC).date())
        full = self._max_bytes is not None and self._size > 0 and self._size + more > self._max_bytes
        if self._file is None or self._owner != owner or full:
            self._release()
            self._file = capture_files.create(self._folder, owner[1])
            self._owner, self._size = owner, 0
        return self._file

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def records(file: Path, stream: BinaryIO, kind: type[R], what: str, folder: str) -> Iterator[R | None]:
    """The records of a spool file, and None for a last line that is cut short.

    Args:
        file: Its path, for messages.
        stream: The file, open for reading.
        kind: The record.
        what: What one is called, for messages.
        folder: What its folder is called, for messages.

    Raises:
        DataError: If a line is not such a record.
    """
    for number, line, last in capture_files.lines(stream):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            if last:
                yield None
                return
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise DataError(
                f"{file}:{number}: not {what}: {where}{': ' if where else ''}{problem['msg']}",
                f"move the file out of the {folder} folder, or repair that line",
            ) from error


def aware(when: datetime) -> datetime:
    """Times without a zone are UTC."""
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when
