"""What clients think of answers, kept on disk: written by the endpoint, read by whoever learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from regraft.data import capture_files
from regraft.data.spool import SpoolWriter, aware, records
from regraft.records import Feedback


class FeedbackStore:
    """The feedback in one folder, a spool like that of the captures.

    Args:
        folder: Where it is; made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = SpoolWriter(folder, "feedback")

    def append(self, feedback: Feedback) -> None:
        """Write one judgement. When this returns, it outlives the process.

        Raises:
            OSError: If it could not be written whole, for instance because the disk is full.
        """
        self._writer.append(feedback)

    def close(self) -> None:
        """Close the file being written; a later append opens another."""
        self._writer.close()

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
                for feedback in records(file, stream, Feedback, "feedback", "feedback"):
                    if feedback is not None:
                        yield feedback


def _merge(before: Feedback, after: Feedback) -> Feedback:
    said = after.model_dump(exclude_none=True)
    return before.model_copy(update=said)


def _within(feedback: Feedback, start: datetime | None, end: datetime | None) -> bool:
    when = aware(datetime.fromisoformat(feedback.created))
    return (start is None or when >= aware(start)) and (end is None or when < aware(end))
