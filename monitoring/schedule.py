"""When checks are due, which windows close then, and the loop that runs them.

Checks are due at whole multiples of the interval since the Unix epoch, and windows close at those times
alone. So two schedulers agree on the windows without a word to each other, and it does not matter when one
was started, how often it ran, or how long it was away. Nothing here knows what a check does.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple, overload

from regraft.config import ServeSection
from regraft.errors import RegraftError

logger = logging.getLogger(__name__)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: A failed round is tried again after so many seconds, then after twice as many, and so on.
RETRY_SECONDS = 10.0
_LONGEST_RETRY = 300.0
#: A clock that is put forward, or a laptop that was asleep, is noticed within so many seconds.
_LONGEST_WAIT = 60.0

Span = tuple[datetime, datetime]


class Ticks(Sequence[datetime]):
    """Times at even distances, worked out when they are asked for: years of seconds take no memory.

    Args:
        first: Number of the first, counted from the Unix epoch.
        count: How many there are.
        every: From one to the next.
    """

    def __init__(self, first: int, count: int, every: timedelta) -> None:
        self._numbers, self._every = range(first, first + count), every

    @overload
    def __getitem__(self, index: int) -> datetime: ...
    @overload
    def __getitem__(self, index: slice) -> list[datetime]: ...
    def __getitem__(self, index: int | slice) -> datetime | list[datetime]:
        """The time of an index."""
        if isinstance(index, slice):
            return [EPOCH + number * self._every for number in self._numbers[index]]
        return EPOCH + self._numbers[index] * self._every

    def __len__(self) -> int:
        """How many there are."""
        return len(self._numbers)


class Windows(NamedTuple):
    """What became of the time between `covered` and the last tick.

    Attributes:
        closed: From and until when each window reaches; it ends just before the latter.
        rest: The stretch up to the last tick that is still open, for want of sessions; None if there is none.
        sessions: How many sessions the rest has.
    """

    closed: list[Span]
    rest: Span | None
    sessions: int


def due(
    covered: datetime, now: datetime, every: timedelta, *, settle: timedelta = timedelta(0)
) -> Sequence[datetime]:
    """The times after `covered` and up to `now` at which windows may close, oldest first.

    Args:
        covered: Up to here everything was checked.
        now: The present.
        every: From one such time to the next.
        settle: How long exchanges may take to be on record, counted from when they began: a window is due
            that much after its end. One that is checked before it is whole is never looked at again.

    Raises:
        ValueError: If `every` is not positive, or a time has no zone.
    """
    first = _number(covered, every) + 1
    return Ticks(first, max(0, _number(now - settle, every) + 1 - first), every)


def settling(serve: ServeSection) -> timedelta:
    """How long after it began an exchange is on record at the latest: once answered, and once shipped."""
    shipped = serve.capture.ship_every_seconds if serve.capture.ship is not None else 0.0
    return timedelta(seconds=serve.request_timeout_seconds + shipped)


def next_tick(now: datetime, every: timedelta) -> datetime:
    """The first grid time after `now`.

    Raises:
        ValueError: If `every` is not positive, or `now` has no zone.
    """
    return EPOCH + (_number(now, every) + 1) * every


def close_windows(
    exchanges: Sequence[tuple[datetime, str | None]],
    covered: datetime,
    ticks: Sequence[datetime],
    min_sessions: int,
) -> Windows:
    """Cut what was captured into windows, each of which has enough sessions.

    A window with too few sessions at a tick stays open and takes the next interval too. Windows follow one
    upon the other without a gap, and the first ones are the same however much comes after them.

    Args:
        exchanges: When each began, oldest first, and its session; one without is a session of its own. Those
            before `covered` and after the last tick are left out.
        covered: Where the first window begins.
        ticks: Where windows may close, from `due`.
        min_sessions: Sessions that a window needs to close.

    Raises:
        ValueError: If `exchanges` or `ticks` are out of order, or `min_sessions` is not positive.
    """
    if min_sessions < 1:
        raise ValueError(f"min_sessions must be positive, not {min_sessions}")
    if any(later < earlier for (earlier, _), (later, _) in pairwise(exchanges)):
        raise ValueError("exchanges must be given oldest first")
    if ticks and ticks[0] <= covered:
        raise ValueError(f"the first tick, {ticks[0]}, must be after what is covered, {covered}")
    time = itemgetter(0)
    closed: list[Span] = []
    start = covered
    at = bisect_left(exchanges, covered, key=time)
    last = bisect_left(exchanges, ticks[-1], key=time) if ticks else at
    seen: set[str] = set()
    alone = 0
    while at < last:
        when, session = exchanges[at]
        at += 1
        if session is None:
            alone += 1
        else:
            seen.add(session)
        if len(seen) + alone < min_sessions:
            continue
        # The rest of the interval belongs to it as well, however much that is.
        end = ticks[bisect_right(ticks, when)]
        closed.append((start, end))
        start = end
        at = bisect_left(exchanges, end, lo=at, key=time)
        seen, alone = set(), 0
    rest = (start, ticks[-1]) if ticks and start < ticks[-1] else None
    return Windows(closed, rest, len(seen) + alone)


def run_forever(
    round: Callable[[], object],
    every_seconds: float,
    stop: threading.Event,
    *,
    settle_seconds: float = 0.0,
    planned: Callable[[datetime, Exception | None], None] | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    """Run a round now and then at each tick, until `stop` is set.

    A round that fails is logged and the next one runs: soon, then less and less soon, at the next tick at
    the latest. After a round that took longer than the interval the next one runs at once, and only one:
    it catches up by itself on what has become due.

    Args:
        round: What to run.
        every_seconds: From one tick to the next.
        stop: Set it to end the loop; a round under way is finished first.
        settle_seconds: How long after a tick its round runs.
        planned: Told after each round when the next is due, and what went wrong if it failed.
        clock: Says what time it is, with a zone.

    Raises:
        ValueError: If `every_seconds` is not positive.
    """
    every, settle = timedelta(seconds=every_seconds), timedelta(seconds=settle_seconds)
    failures = 0
    while not stop.is_set():
        tick = next_tick(clock() - settle, every) + settle
        failure: Exception | None = None
        try:
            round()
            failures = 0
        except Exception as error:
            failure = error
            failures += 1
        now = clock()
        if failure is not None:
            pause = min(RETRY_SECONDS * 2 ** min(failures - 1, 20), _LONGEST_RETRY, every_seconds)
            again = now + timedelta(seconds=pause)
            tick = min(tick, again) if tick > now else again
            # What a user can mend has said all in its message.
            logger.error(
                "a monitoring round failed: %s; the next is due at %s",
                failure,
                f"{tick:%Y-%m-%d %H:%M:%S %Z}",
                exc_info=None if isinstance(failure, RegraftError) else failure,
            )
        elif tick <= now:
            logger.warning("a monitoring round took longer than %g s; the next catches up", every_seconds)
        if planned is not None:
            planned(max(tick, now), failure)
        while not stop.is_set() and (left := (tick - clock()).total_seconds()) > 0:
            stop.wait(min(left, _LONGEST_WAIT))


def _number(time: datetime, every: timedelta) -> int:
    """How many whole intervals there are from the epoch to a time."""
    if every <= timedelta(0):
        raise ValueError(f"the interval between checks must be positive, not {every.total_seconds():g} s")
    if time.tzinfo is None:
        raise ValueError(f"{time} has no time zone")
    return (time - EPOCH) // every
