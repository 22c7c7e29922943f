"""What the endpoint answered, kept on disk: written by the replicas, read by the monitor.

A spool of append-only JSONL files. Every writing process has files of its own, so writers need no lock
between them, and a record is one `write` call: the kernel has it when the call returns, and killing the
process afterwards loses nothing. (A power cut may: the files are not synced for every answer.)
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from regraft.errors import DataError
from regraft.records import CapturedExchange

if TYPE_CHECKING:
    import pandas as pd

_FILE = re.compile(r"^(\d{4}-\d{2}-\d{2})-\d+-[0-9a-f]{8}\.jsonl$")


class CaptureStore:
    """The captured exchanges in one folder.

    Args:
        folder: Where the spool is; made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._file: int | None = None
        self._owner: tuple[int, date] | None = None

    def append(self, exchange: CapturedExchange) -> None:
        """Write one exchange. When this returns, the record outlives the process.

        Raises:
            OSError: If it could not be written whole, for instance because the disk is full.
        """
        line = exchange.model_dump_json().encode() + b"\n"
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
            raise OSError(f"{self.folder}: only {written} of {len(line)} bytes of a capture were written")

    def close(self) -> None:
        """Close the file being written; a later append opens another."""
        with self._lock:
            self._release()

    def read(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> list[CapturedExchange]:
        """Read exchanges, oldest first, each id once.

        Args:
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.

        Raises:
            DataError: If a line is not an exchange. The last line of a file may be cut short: its writer
                was killed in the middle of it, or is writing it now, and never acknowledged it.
        """
        start, end = _aware(start), _aware(end)
        found: dict[str, tuple[datetime, CapturedExchange]] = {}
        for file in self._files(start):
            for exchange in _lines(file):
                when = _aware(datetime.fromisoformat(exchange.created))
                assert when is not None
                if (start and when < start) or (end and when >= end):
                    continue
                if model is not None and exchange.model != model:
                    continue
                if version is not None and exchange.model_version != version:
                    continue
                found.setdefault(exchange.id, (when, exchange))
        ordered = sorted(found.values(), key=lambda pair: (pair[0], pair[1].id))
        return [exchange for _, exchange in ordered]

    def table(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> pd.DataFrame:
        """The same exchanges as a table: a row each, a column a field, and `prompt_text` beside them."""
        import pandas as pd

        rows = [
            {**exchange.model_dump(mode="json"), "prompt_text": exchange.prompt_text}
            for exchange in self.read(start=start, end=end, model=model, version=version)
        ]
        table = pd.DataFrame(rows, columns=[*CapturedExchange.model_fields, "prompt_text"])
        table["created"] = pd.to_datetime(table["created"], utc=True, format="ISO8601")
        return table

    def _current(self) -> int:
        # A forked child inherits the descriptor: it must not write into its parent's file.
        owner = (os.getpid(), datetime.now(UTC).date())
        if self._file is None or self._owner != owner:
            self._release()
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{owner[1].isoformat()}-{owner[0]}-{secrets.token_hex(4)}.jsonl"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._file = os.open(self.folder / name, flags, 0o600)
            self._owner = owner
        return self._file

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _files(self, start: datetime | None) -> Iterator[Path]:
        for file in sorted(self.folder.glob("*.jsonl")):
            named = _FILE.match(file.name)
            # A file holds what was *finished* on its day, so it may reach back but never forward.
            if named and start and date.fromisoformat(named[1]) < start.astimezone(UTC).date():
                continue
            yield file


def _lines(file: Path) -> Iterator[CapturedExchange]:
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield CapturedExchange.model_validate_json(line)
        except ValidationError as error:
            if number == len(lines):  # nothing after it, not even its own newline
                return
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise DataError(
                f"{file}:{number}: not a captured exchange: {where}{': ' if where else ''}{problem['msg']}",
                "move the file out of the capture folder, or repair that line",
            ) from error


def _aware(when: datetime | None) -> datetime | None:
    """Times without a zone are UTC."""
    return when.replace(tzinfo=UTC) if when is not None and when.tzinfo is None else when
