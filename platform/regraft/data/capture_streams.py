"""What keeps a pass over many exchanges in little memory: ids seen before, and the sessions of intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import ConfigDict

from regraft.records import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Begun(Record):
    """When an exchange began and whose it was, of a line of the spool; its texts are passed over."""

    model_config = ConfigDict(extra="ignore")

    created: str
    model: str
    model_version: int
    session: str | None = None
    variant: str = "champion"


class Seen:
    """Ids, as hashes of 8 bytes each: sorted runs, each at least twice as long as the next one.

    Two of ten million ids have one hash with a chance of 3 in a million; the later would be missing.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def __bool__(self) -> bool:
        """Whether any id is known."""
        return bool(self._runs)

    def fresh(self, ids: Sequence[str]) -> list[bool]:
        """Which of the ids are neither known nor given twice here (the first is fresh)."""
        import numpy as np

        given = _hashes(ids)
        first = np.zeros(len(given), dtype=bool)
        first[np.unique(given, return_index=True)[1]] = True
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, given), len(run) - 1)
            first &= run[at] != given
        found: list[bool] = first.tolist()
        return found

    def add(self, ids: Sequence[str]) -> None:
        """Know these ids from now on."""
        import numpy as np

        if not ids:
            return
        run = np.unique(_hashes(ids))
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.union1d(self._runs.pop(), run)
        self._runs.append(run)


class Sessions:
    """The first sessions of every interval of a grid, however many exchanges are shown.

    Args:
        every: The intervals begin at whole multiples of this since the Unix epoch.
        most: Sessions that are kept of each: those that began first.
    """

    def __init__(self, every: timedelta, most: int) -> None:
        self._every, self._most = every // _MICROSECOND, most
        #: By interval: the time of each kept session's first exchange. A number stands for no session.
        self._kept: dict[int, dict[str | int, int]] = {}
        #: By interval that is full: what began then or later is not kept.
        self._limit: dict[int, int] = {}
        self._alone = 0

    def add(self, began: NDArray[np.int64], sessions: Sequence[str | None]) -> None:
        """Take exchanges in any order.

        Args:
            began: Microseconds since the epoch.
            sessions: Whose; an exchange with None is a session of its own.
        """
        import numpy as np

        numbers = began // self._every
        for number in np.unique(numbers).tolist():
            inside = np.flatnonzero(numbers == number)
            if (limit := self._limit.get(number)) is not None:
                inside = inside[began[inside] < limit]
            self._fill(number, began[inside], [sessions[i] for i in inside.tolist()])

    def listed(self) -> list[tuple[datetime, str | None]]:
        """The time of each kept session's first exchange in each interval, oldest first."""
        found = [(when, name) for kept in self._kept.values() for name, when in kept.items()]
        found.sort(key=lambda one: one[0])
        return [
            (_EPOCH + when * _MICROSECOND, name if isinstance(name, str) else None) for when, name in found
        ]

    def _fill(self, number: int, began: NDArray[np.int64], sessions: Sequence[str | None]) -> None:
        import numpy as np

        kept = self._kept.setdefault(number, {})
        taken: set[str | int] = set()
        for i in np.argsort(began, kind="stable").tolist():
            # Sorted, what comes after so many sessions cannot be among the first ones.
            if len(taken) >= self._most:
                break
            name: str | int | None = sessions[i]
            if name is None:
                self._alone += 1
                name = self._alone
            taken.add(name)
            kept[name] = min(int(began[i]), kept.get(name, int(began[i])))
        if len(kept) >= self._most:
            first = sorted(kept.items(), key=lambda one: one[1])[: self._most]
            self._kept[number] = dict(first)
            self._limit[number] = first[-1][1]


def microseconds(when: datetime) -> int:
    """From the Unix epoch to a time with a zone."""
    return (when - _EPOCH) // _MICROSECOND


def _hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    import numpy as np

    digests = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in ids
    )
    return np.frombuffer(digests, dtype=np.uint64)
