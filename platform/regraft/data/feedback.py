"""What clients think of answers, kept on disk: written by the endpoint, read by whoever learns from it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import ValidationError

from regraft.data import capture_files
from regraft.errors import DataError
from regraft.records import Feedback


class FeedbackStore:
    """The feedback in one folder, a spool like that of the captures.

    Args:
        folder: Where it is; made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._file: int | None = None
        self._owner: tuple[int, date] | None = None

    def append(self, feedback: Feedback) -> None:
        """Write one judgement. When this returns, it outlives the process.

        Raises:
            OSError: If it could not be written whole, for instance because the disk is full.
        """
        line = feedback.model_dump_json().encode() + b"\n"
        with self._lock:
            file = self._current()
            written = 0
            try:
                written = os.write(file, line)
            finally:
                if written != len(line):
                    # The file may end in a torn line now, which is tolerable only as its last.
                    self._release()
        if written != len(line):
            raise OSError(f"{self.folder}: only {written} of {len(line)} bytes of feedback were written")

    def close(self) -> None:
        """Close the file being written; a later append opens another."""
        with self._lock:
            self._release()

    def read(self, *, start: datetime | None = None, end: datetime | None = None) -> list[Feedback]:
        """The feedback on each answer, last judged first.

        Of several judgements of one answer the latest counts, and what it leaves open is taken from the one
        before: a score may come first and a correction later.

        Args:
            start: Leave out what was said before this; without a zone it is UTC.
            end: Leave out what was said at this time or later.

        Raises:
            DataError: If a line is not feedback. The last line of a file may be cut short: its writer was
                killed in the middle of it, or is writing it now, and never acknowledged it.
        """
        records = [f for f in self._all() if _within(f, start, end)]
        merged: dict[str, Feedback] = {}
        for feedback in sorted(records, key=lambda f: (datetime.fromisoformat(f.created), f.id)):
            before = merged.pop(feedback.answer_id, None)  # so that the last judged comes last
            merged[feedback.answer_id] = feedback if before is None else _merge(before, feedback)
        return list(reversed(merged.values()))

    def _all(self) -> Iterator[Feedback]:
        for file in capture_files.spool_files(self.folder):
            with file.open("rb") as stream:
                for number, line, last in capture_files.lines(stream):
                    try:
                        yield Feedback.model_validate_json(line)
                    except ValidationError as error:
                        if last:
                            break
                        raise _broken(file, number, error) from error

    def _current(self) -> int:
        # A forked child inherits the descriptor: it must not write into its parent's file.
        owner = (os.getpid(), datetime.now(UTC).date())
        if self._file is None or self._owner != owner:
            self._release()
            self._file = capture_files.create(self.folder, owner[1])
            self._owner = owner
        return self._file

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _broken(file: Path, number: int, error: ValidationError) -> DataError:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return DataError(
        f"{file}:{number}: not feedback: {where}{': ' if where else ''}{problem['msg']}",
        "move the file out of the feedback folder, or repair that line",
    )


def _merge(before: Feedback, after: Feedback) -> Feedback:
    said = after.model_dump(exclude_none=True)
    return before.model_copy(update=said)


def _within(feedback: Feedback, start: datetime | None, end: datetime | None) -> bool:
    when = _aware(datetime.fromisoformat(feedback.created))
    return (start is None or when >= _aware(start)) and (end is None or when < _aware(end))


def _aware(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when
