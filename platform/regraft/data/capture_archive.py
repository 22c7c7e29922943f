"""Captured exchanges as Parquet files by day, in any store that fsspec knows.

The columns are the fields of `CapturedExchange`: plain ones as they are, `created` as a time, all others as
JSON. A field that came later is read from older files with its default.
"""

from __future__ import annotations

import gc
import os
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic_core import from_json, to_json

from regraft.data import capture_files
from regraft.data.capture_streams import Begun
from regraft.errors import ConfigError, RegraftError, ServiceError
from regraft.records import CapturedExchange

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

#: Rows put together at once: less than a millisecond, in which the threads beside this one wait.
_BATCH = 100
#: Batches in a row group, of which those without wanted rows are not read.
_GROUP = 50


class Wanted(NamedTuple):
    """Which exchanges: begun from `start` on, before `end` (both with a zone), of a model, of a version."""

    start: datetime | None = None
    end: datetime | None = None
    model: str | None = None
    version: int | None = None

    def takes(self, exchange: CapturedExchange | Begun, when: datetime) -> bool:
        """Whether an exchange that began at `when` is among them."""
        return not (
            (self.start is not None and when < self.start)
            or (self.end is not None and when >= self.end)
            or (self.model is not None and exchange.model != self.model)
            or (self.version is not None and exchange.model_version != self.version)
        )


def begun(exchange: CapturedExchange | Begun) -> datetime:
    """When an exchange began; a time without a zone is UTC."""
    when = datetime.fromisoformat(exchange.created)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def schema() -> pa.Schema:
    """The columns, as the record has its fields now."""
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    columns = {name: plain[_plain(name) or str] for name in CapturedExchange.model_fields}
    return pa.schema({**columns, "created": pa.timestamp("us", "UTC")})


def to_arrow(exchanges: Iterable[CapturedExchange]) -> pa.Table:
    """Exchanges as a table with `schema`."""
    import pyarrow as pa

    return pa.Table.from_batches(_batches(exchanges), schema())


def from_arrow(table: pa.Table) -> list[CapturedExchange]:
    """The exchanges of a table with `schema`."""
    import numpy as np

    # Column by column: a third of the time that rows take.
    columns: list[list[Any]] = []
    for name in table.column_names:
        if name == "created":
            when = table[name].to_numpy().astype("datetime64[us]")
            columns.append([f"{text}+00:00" for text in np.datetime_as_string(when).tolist()])
        elif name in JSON:
            columns.append([from_json(value, cache_strings="keys") for value in table[name].to_pylist()])
        else:
            columns.append(table[name].to_pylist())
    rows = zip(*columns, strict=True)
    # Nothing here becomes garbage in a circle, and looking for it again and again takes longer than the rest.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return [
            CapturedExchange.model_validate(dict(zip(table.column_names, row, strict=True))) for row in rows
        ]
    finally:
        if collecting:
            gc.enable()


class Archive:
    """The Parquet files in one place, `day=2026-11-26/<spool file>.parquet`.

    Args:
        url: A folder, or a URL that fsspec takes.

    Raises:
        ConfigError: If there is no such kind of URL, or a package is missing for it.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        self.url = url
        try:
            self._store, root = url_to_fs(url)
        except ImportError as error:
            # fsspec's message names the package, as in "Install s3fs to access S3".
            raise ConfigError(
                f"serve.capture.ship: {url}: {error}", "install that package beside regraft"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"serve.capture.ship: {url}: {error}", "give a folder, or a URL such as s3://bucket/captures"
            ) from error
        self._root = str(root).rstrip("/")
        self._local = isinstance(self._store, LocalFileSystem)

    def write(self, day: date, stem: str, exchanges: Iterable[CapturedExchange]) -> int:
        """Write a file whole, or not at all, over one of the same name; returns its rows.

        Args:
            day: The day on which the exchanges were written.
            stem: The file's name without its ending.
            exchanges: What goes into it; nothing is written if there are none.

        Raises:
            ServiceError: If the store does not take it, or does not hold it afterwards.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, sink, batches = 0, pa.BufferOutputStream(), _batches(exchanges)
        with pq.ParquetWriter(sink, schema(), compression="zstd") as writer:
            while group := list(islice(batches, _GROUP)):
                writer.write_table(pa.Table.from_batches(group))
                rows += sum(batch.num_rows for batch in group)
        if rows == 0:
            return 0
        path = f"{self._root}/day={day.isoformat()}/{stem}.parquet"
        try:
            if self._local:
                _write_synced(Path(path), sink.getvalue())
            else:
                self._store.pipe_file(path, sink.getvalue().to_pybytes())
            held = self._metadata(path).num_rows
        except Exception as error:  # each store has errors of its own
            raise self._away(error) from error
        if held != rows:
            raise ServiceError(f"{self.url}: {stem}.parquet has {held} of {rows} rows", "check that store")
        return rows

    def table(self, wanted: Wanted, columns: Sequence[str]) -> pa.Table:
        """The exchanges that are wanted, in no order; one that was shipped twice is there twice.

        Raises:
            ServiceError: If the store cannot be read.
        """
        try:
            return self._read(wanted, columns)
        except FileNotFoundError:  # pruned after it was listed
            return self._read(wanted, columns)

    def parts(
        self, wanted: Wanted, columns: Sequence[str], *, without: Collection[str] = (), shadows: bool = True
    ) -> Iterator[pa.Table]:
        """The exchanges that are wanted, some thousand at a time, in no order.

        Args:
            wanted: Which.
            columns: The fields of them; the fewer, the quicker.
            without: Names of files to leave out, without their ending.
            shadows: Whether answers of a shadow are among them.

        Raises:
            ServiceError: If the store cannot be read.
        """
        import pyarrow as pa
        import pyarrow.dataset as ds

        condition = _condition(wanted)
        if not shadows:
            variant = ds.field("variant")  # files of before it was recorded have none
            condition &= (variant != "shadow") | variant.is_null()
        for path in self.files(wanted.start.astimezone(UTC).date() if wanted.start else None):
            if Path(path).stem in without:
                continue
            try:
                file = ds.dataset(path, schema=schema(), format="parquet", filesystem=self._store)
                # Read ahead of little: whatever the size of a file, a few row groups are in memory.
                for batch in file.to_batches(
                    columns=list(columns), filter=condition, batch_readahead=1, fragment_readahead=1
                ):
                    if batch.num_rows:
                        yield _defaults(pa.Table.from_batches([batch]))
            except FileNotFoundError:  # pruned after it was listed
                continue
            except Exception as error:
                raise self._away(error) from error

    def files(self, start: date | None = None) -> dict[str, int]:
        """The files by path, with their bytes, without those that have nothing begun on `start` or later.

        Raises:
            ServiceError: If the store cannot be read.
        """
        try:
            self._store.invalidate_cache()
            found = self._store.glob(f"{self._root}/day=*/*.parquet", detail=True)
        except Exception as error:
            raise self._away(error) from error
        sizes = {}
        for path, about in sorted(found.items()):
            day = capture_files.day_of(Path(path).stem)
            if day is not None and (start is None or day >= start):
                sizes[path] = int(about["size"])
        return sizes

    def prune(self, before: date) -> int:
        """Delete the files of days before that one; returns how many.

        Raises:
            ServiceError: If the store does not let it.
        """
        old = [path for path in self.files() if (d := capture_files.day_of(Path(path).stem)) and d < before]
        for path in old:
            try:
                self._store.rm_file(path)
            except FileNotFoundError:  # another was quicker
                continue
            except Exception as error:
                raise self._away(error) from error
        return len(old)

    def _read(self, wanted: Wanted, columns: Sequence[str]) -> pa.Table:
        import pyarrow.dataset as ds

        full = schema()
        paths = list(self.files(wanted.start.astimezone(UTC).date() if wanted.start else None))
        if not paths:
            return full.empty_table().select(list(columns))
        try:
            found = ds.dataset(paths, schema=full, format="parquet", filesystem=self._store)
            return _defaults(found.to_table(columns=list(columns), filter=_condition(wanted)))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._away(error) from error

    def _metadata(self, path: str) -> pq.FileMetaData:
        import pyarrow.parquet as pq

        with self._store.open(path, "rb") as stream:
            return pq.read_metadata(stream)

    def _away(self, error: Exception) -> RegraftError:
        return ServiceError(
            f"serve.capture.ship: {self.url}: {type(error).__name__}: {error}",
            "check that the store can be reached and its credentials",
            away=True,
        )


def _condition(wanted: Wanted) -> ds.Expression:
    import pyarrow as pa
    import pyarrow.dataset as ds

    created = schema().field("created").type
    condition = ds.scalar(True)
    if wanted.start is not None:
        condition &= ds.field("created") >= pa.scalar(wanted.start, created)
    if wanted.end is not None:
        condition &= ds.field("created") < pa.scalar(wanted.end, created)
    if wanted.model is not None:
        condition &= ds.field("model") == wanted.model
    if wanted.version is not None:
        condition &= ds.field("model_version") == wanted.version
    return condition


def _plain(name: str) -> type | None:
    """The type of a field that a column can hold, or None if it is held as JSON."""
    annotation = CapturedExchange.model_fields[name].annotation
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kinds = set()
    for part in parts:
        kinds |= {type(value) for value in get_args(part)} if get_origin(part) is Literal else {part}
    kinds -= {types.NoneType}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind if kind in (str, int, float, bool) else None


#: The fields that are held as JSON.
JSON = tuple(name for name in CapturedExchange.model_fields if _plain(name) is None)


def _batches(exchanges: Iterable[CapturedExchange]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    full, source = schema(), iter(exchanges)
    while some := list(islice(source, _BATCH)):
        columns: dict[str, list[Any]] = {name: [getattr(e, name) for e in some] for name in full.names}
        for name in JSON:
            columns[name] = [to_json(value).decode() for value in columns[name]]
        columns["created"] = [begun(e) for e in some]
        yield pa.RecordBatch.from_pydict(columns, schema=full)


def _defaults(table: pa.Table) -> pa.Table:
    """Give the columns that a file did not have yet the defaults of their fields."""
    import pyarrow as pa

    for place, name in enumerate(table.column_names):
        field = CapturedExchange.model_fields[name]
        if table[name].null_count and not field.is_required():
            default = field.get_default(call_default_factory=True)
            default = to_json(default).decode() if name in JSON else default
            if default is not None:
                filled = table[name].fill_null(pa.scalar(default, table[name].type))
                table = table.set_column(place, name, filled)
    return table


def _write_synced(path: Path, data: Any) -> None:
    """Write a local file so that after a power cut it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)
    for folder in (path.parent, path.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
