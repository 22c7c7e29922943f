"""Rows of numbers that were computed of texts, kept in a folder so that each is computed once.

One SQLite file with a table for each kind and version of numbers; a row is found by a hash, never by the text
itself. Several processes may share the folder, and whoever deletes it loses nothing but time.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.errors import DataError

Floats = NDArray[np.float64]
FILE = "descriptors.sqlite"
#: SQLite takes at least 999 parameters in a statement.
_AT_ONCE = 900
#: How long another process may hold the file.
_WAIT_SECONDS = 60.0


def key_of(*texts: str) -> bytes:
    """The hash of one or more texts, by which their row is found."""
    whole = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.digest()


def kept(
    folder: Path | None,
    table: str,
    columns: int,
    keys: Sequence[bytes],
    make: Callable[[list[int]], Floats],
) -> Floats:
    """Rows for keys, in their order, each distinct one made once.

    Args:
        folder: Where they are kept between processes; made if missing. None keeps nothing.
        table: Kind and version of the rows, such as `form_1`; another version is another table.
        columns: Numbers in a row.
        keys: From `key_of`.
        make: Makes the rows of the places (indices of `keys`) that it is given, in their order.

    Raises:
        DataError: If the file in the folder is no such file.
    """
    first: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    found: dict[bytes, Floats] = {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(folder / FILE, table) as database:
            found = _read(database, table, list(first), columns)
    missing = [key for key in first if key not in found]
    if missing:
        made = np.asarray(make([first[key] for key in missing]), dtype=np.float64)
        if made.shape != (len(missing), columns):
            raise ValueError(f"{table}: {made.shape} numbers for {len(missing)} rows of {columns}")
        found |= dict(zip(missing, made, strict=True))
        if folder is not None:
            rows = [(key, row.tobytes()) for key, row in zip(missing, made, strict=True)]
            with _opened(folder / FILE, table) as database, database:
                database.executemany(f'INSERT OR REPLACE INTO "{table}" VALUES (?, ?)', rows)
    if not keys:
        return np.zeros((0, columns))
    return np.stack([found[key] for key in keys])


def _read(database: sqlite3.Connection, table: str, keys: list[bytes], columns: int) -> dict[bytes, Floats]:
    found = {}
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        marks = ",".join("?" * len(part))
        for key, data in database.execute(f'SELECT key, row FROM "{table}" WHERE key IN ({marks})', part):
            row = np.frombuffer(data, dtype=np.float64)
            if len(row) == columns:  # else of another shape under the same name: made anew
                found[key] = row
    return found


@contextmanager
def _opened(file: Path, table: str) -> Iterator[sqlite3.Connection]:
    if not table.replace("_", "").isalnum():
        raise ValueError(f"{table!r} is no name of a table")
    try:
        with closing(sqlite3.connect(file, timeout=_WAIT_SECONDS)) as database:
            with database:
                database.execute(
                    f'CREATE TABLE IF NOT EXISTS "{table}" (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID'
                )
            yield database
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"{file}: cannot be used for descriptors: {error}",
            "delete it, it is made anew; or give another folder",
        ) from error
