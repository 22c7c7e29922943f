"""What the endpoint answered, kept on disk: written by the replicas, read by the monitor.

A spool of append-only JSONL files (`regraft.data.spool`). Every writing process has files of its own, so
writers need no lock between them, and killing one loses nothing that was written. (A power cut may: the files
are not synced for every answer.) Finished files may be shipped to an archive; a reader sees both as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from pydantic_core import from_json

from regraft.data import capture_files
from regraft.data.capture_archive import JSON, Archive, Wanted, begun, from_arrow, to_arrow
from regraft.data.capture_streams import Begun, Seen, Sessions, microseconds
from regraft.data.redaction import Redactor
from regraft.data.spool import SpoolWriter, aware, records
from regraft.errors import ConfigError
from regraft.records import CapturedExchange
from regraft.serve_sections import CaptureSection

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

E = TypeVar("E", CapturedExchange, Begun)
#: Lines of the spool that are looked at together.
_SOME = 1000
#: Exchanges of the archive that are made at once.
_FEW = 250
#: Bytes after which a spool file is finished and another begun.
MAX_BYTES = 64 * 2**20


class CaptureStore:
    """The captured exchanges of one model.

    Args:
        folder: Where the spool is; made at the first write.
        archive: Where its finished files are shipped: a folder or a URL that fsspec takes; None if nowhere.
        redactor: What takes personal data out before anything is written; None to write all as it is.
        rate: Share of the traffic that is kept, by session where there is one.
        max_bytes: Size that a spool file does not pass, unless a single exchange does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        archive: str | None = None,
        redactor: Redactor | None = None,
        rate: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folder = folder
        self.archive = archive
        self._redactor = redactor
        self._rate = rate
        self._writer = SpoolWriter(folder, "a capture", max_bytes)

    @classmethod
    def of(cls, folder: Path, section: CaptureSection) -> CaptureStore:
        """The store that a configuration asks for."""
        return cls(folder, archive=section.ship, redactor=Redactor.of(section), rate=section.rate)

    def append(self, exchange: CapturedExchange) -> bool:
        """Write one exchange. When this returns, the record outlives the process.

        Returns:
            Whether it was written, and not left out by sampling.

        Raises:
            OSError: If it could not be written whole, for instance because the disk is full.
        """
        if not sampled(exchange.session or exchange.id, self._rate):
            return False
        if self._redactor is not None:
            exchange = self._redactor.apply(exchange)
        self._writer.append(exchange)
        return True

    def close(self) -> None:
        """Finish the file being written, so that it can be shipped; a later append begins another."""
        self._writer.close()

    def read(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> list[CapturedExchange]:
        """Read exchanges from spool and archive, oldest first, each id once.

        Args:
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.

        Raises:
            DataError: If a line is not an exchange. The last line of a file may be cut short: its writer
                was killed in the middle of it, or is writing it now, and never acknowledged it.
            ServiceError: If the archive cannot be read.
        """
        wanted = Wanted(start and aware(start), end and aware(end), model, version)
        # The spool first: what is shipped in between is found twice, and not missed.
        found = {
            exchange.id: exchange for exchange in reversed(list(self._spooled(CapturedExchange, wanted)))
        }
        if self.archive is not None:
            table = Archive(self.archive).table(wanted, list(CapturedExchange.model_fields))
            for exchange in from_arrow(table):
                found.setdefault(exchange.id, exchange)
        return sorted(found.values(), key=lambda exchange: (begun(exchange), exchange.id))

    def table(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The same exchanges as a table: a row each, a column a field, and `prompt_text` beside them.

        Args:
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.
            columns: Only these; the fewer, the quicker.

        Raises:
            DataError: If a line of the spool is not an exchange.
            ServiceError: If the archive cannot be read.
        """
        import pyarrow as pa

        wanted = Wanted(start and aware(start), end and aware(end), model, version)
        columns = [*CapturedExchange.model_fields, "prompt_text"] if columns is None else list(columns)
        needed = [*{"id", "created", *columns, *(["messages"] if "prompt_text" in columns else [])}]
        needed = [name for name in needed if name != "prompt_text"]
        found = to_arrow(self._spooled(CapturedExchange, wanted)).select(needed)
        if self.archive is not None:
            found = pa.concat_tables([found, Archive(self.archive).table(wanted, needed)])
        table: pd.DataFrame = found.to_pandas()
        table = table.drop_duplicates("id").sort_values(["created", "id"], ignore_index=True)
        for name in JSON:
            if name in table:
                table[name] = [from_json(value, cache_strings="keys") for value in table[name]]
        if "prompt_text" in columns:
            table["prompt_text"] = [_prompt_text(messages) for messages in table["messages"]]
        return table[columns]

    def stream(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> Iterator[CapturedExchange]:
        """The exchanges that `read` gives, one after the other and in no promised order.

        Of the archive a few thousand are in memory at a time, and of the spool the ids: 8 bytes each. An
        exchange that was appended twice is given twice if both had been shipped; the endpoint never does so.

        Args:
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.

        Raises:
            DataError: If a line of the spool is not an exchange.
            ServiceError: If the archive cannot be read.
        """
        for part in self.parts(start=start, end=end, model=model, version=version):
            # Few at a time: those that live long, Python's garbage collector goes through again and again.
            for at in range(0, len(part), _FEW):
                yield from from_arrow(part.slice(at, _FEW))

    def parts(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> Iterator[pa.Table]:
        """The exchanges that `stream` gives as tables of some thousand, for `from_arrow`.

        To look through all and make records of few takes a twentieth of the time that records of all take.

        Args:
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.

        Raises:
            DataError: If a line of the spool is not an exchange.
            ServiceError: If the archive cannot be read.
        """
        import pyarrow as pa

        wanted = Wanted(start and aware(start), end and aware(end), model, version)
        seen, files = Seen(), set[str]()
        spooled = self._spooled(CapturedExchange, wanted, files)
        while some := list(islice(spooled, _SOME)):
            ids = [exchange.id for exchange in some]
            yield to_arrow(compress(some, seen.fresh(ids)))
            seen.add(ids)
        if self.archive is None:
            return
        # What was read in the spool, and shipped since, is left out whole.
        for part in Archive(self.archive).parts(wanted, list(CapturedExchange.model_fields), without=files):
            fresh = pa.array(seen.fresh(part["id"].to_pylist())) if seen else None
            yield part if fresh is None else part.filter(fresh)

    def times(
        self,
        *,
        every: timedelta,
        most: int,
        start: datetime | None = None,
        end: datetime | None = None,
        model: str | None = None,
        version: int | None = None,
    ) -> list[tuple[datetime, str | None]]:
        """When the first sessions of every interval began, oldest first: enough to close windows by.

        A window that needs `most` sessions and closes at the end of an interval closes at the same one as if
        it had been shown every exchange. Texts are not read, and no more is in memory than is returned. What
        a shadow answered is left out, for nobody saw it.

        Args:
            every: The intervals begin at whole multiples of this since the Unix epoch.
            most: Sessions that are kept of each interval.
            start: Leave out exchanges begun before this.
            end: Leave out exchanges begun at this time or later.
            model: Only this registered name.
            version: Only this version.

        Returns:
            The time of a session's first exchange in an interval, and the session; one without has None.

        Raises:
            ConfigError: If `every` or `most` is not positive.
            DataError: If a line of the spool is not an exchange.
            ServiceError: If the archive cannot be read.
        """
        import numpy as np

        if every <= timedelta(0) or most < 1:
            raise ConfigError(f"every and most must be positive, not {every} and {most}", "give larger ones")
        wanted = Wanted(start and aware(start), end and aware(end), model, version)
        sessions, files = Sessions(every, most), set[str]()
        spooled = (one for one in self._spooled(Begun, wanted, files) if one.variant != "shadow")
        while some := list(islice(spooled, _SOME)):
            began = np.array([microseconds(begun(one)) for one in some], dtype=np.int64)
            sessions.add(began, [one.session for one in some])
        if self.archive is not None:
            columns = ["created", "session"]
            for part in Archive(self.archive).parts(wanted, columns, without=files, shadows=False):
                sessions.add(
                    part["created"].to_numpy().astype("datetime64[us]").astype(np.int64),
                    part["session"].to_pylist(),
                )
        return sessions.listed()

    def _spooled(self, kind: type[E], wanted: Wanted, files: set[str] | None = None) -> Iterator[E]:
        """The wanted lines of the spool; the names of the files read, without their ending, go to `files`."""
        first = wanted.start.astimezone(UTC).date() if wanted.start else None
        for file in capture_files.spool_files(self.folder, first):
            try:
                stream = file.open("rb")
            except FileNotFoundError:  # shipped after it was listed
                continue
            with stream:
                for one in records(file, stream, kind, "a captured exchange", "capture"):
                    if one is not None and wanted.takes(one, begun(one)):
                        yield one
            if files is not None:
                files.add(file.stem)


def sampled(key: str, rate: float) -> bool:
    """Whether traffic of a key, such as a session, belongs to a share of all; always the same answer.

    Args:
        key: What stays together.
        rate: The share, from 0 to 1. What belongs to a share belongs to every larger one.
    """
    if rate >= 1:
        return True
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


def exchanges(file: Path, stream: BinaryIO) -> Iterator[CapturedExchange | None]:
    """The exchanges of a spool file, and None for a last line that is cut short.

    Args:
        file: Its path, for messages.
        stream: The file, open for reading.

    Raises:
        DataError: If a line is not an exchange.
    """
    yield from records(file, stream, CapturedExchange, "a captured exchange", "capture")


def _prompt_text(messages: Sequence[dict[str, str]]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
