from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.schedule import EPOCH, close_windows, due, next_tick, run_forever, settling
from regraft.config import ServeSection
from regraft.errors import ServiceError

HOUR = timedelta(hours=1)
START = datetime(2026, 3, 2, 9, 20, tzinfo=UTC)


def at(hours: float) -> datetime:
    return START.replace(minute=0) + timedelta(hours=hours)


# What happened, in minutes after START, and whose it was; sessions come back.
EVENTS = st.lists(
    st.tuples(st.integers(-120, 3000), st.none() | st.sampled_from("abcdefgh")), max_size=120
).map(lambda events: sorted(((START + timedelta(minutes=m), s) for m, s in events), key=lambda e: e[0]))


def sessions(exchanges, start: datetime, end: datetime) -> int:
    inside = [s for when, s in exchanges if start <= when < end]
    return len({s for s in inside if s is not None}) + inside.count(None)


def test_grid_times_do_not_depend_on_where_one_begins():
    assert list(due(START, at(3.1), HOUR)) == [at(1), at(2), at(3)]
    assert list(due(at(1), at(3), HOUR)) == [at(2), at(3)], "what is covered is not due again, the present is"
    assert list(due(at(1), at(1.9), HOUR)) == []
    assert list(due(at(5), at(1), HOUR)) == [], "a clock that went back"
    assert next_tick(at(1), HOUR) == at(2)
    assert (next_tick(START, timedelta(days=7)) - EPOCH) % timedelta(days=7) == timedelta(0)


def test_a_window_is_due_once_its_exchanges_are_on_record():
    assert list(due(START, at(2), HOUR, settle=timedelta(minutes=1))) == [at(1)]
    assert list(due(START, at(2) + timedelta(minutes=1), HOUR, settle=timedelta(minutes=1))) == [at(1), at(2)]
    here = ServeSection.model_validate({"request_timeout_seconds": 40})
    assert settling(here) == timedelta(seconds=40)
    shipped = ServeSection.model_validate(
        {"request_timeout_seconds": 40, "capture": {"ship": "s3://bucket/x", "ship_every_seconds": 60}}
    )
    assert settling(shipped) == timedelta(seconds=100)


def test_ten_years_of_seconds_are_no_burden():
    ticks = due(START, START + timedelta(days=3650), timedelta(seconds=1))
    assert len(ticks) == 3650 * 86400
    assert ticks[-1] == START + timedelta(days=3650)
    exchanges = [(START + timedelta(days=d), None) for d in range(3650)]
    assert len(close_windows(exchanges, START, ticks, 10).closed) == 365


@given(EVENTS, st.integers(1, 12), st.sampled_from([7, 60, 1440]))
def test_windows_leave_no_gap_do_not_overlap_and_have_enough_sessions(exchanges, least, minutes):
    every = timedelta(minutes=minutes)
    ticks = due(START, START + timedelta(minutes=2500), every)
    found = close_windows(exchanges, START, ticks, least)
    spans = [*found.closed, *([found.rest] if found.rest else [])]
    assert spans[0][0] == START
    assert spans[-1][1] == ticks[-1]
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    for start, end in found.closed:
        assert end in ticks
        assert sessions(exchanges, start, end) >= least
        # Nor could it have closed earlier: a tick before its end would have had too few.
        assert sessions(exchanges, start, max(start, end - every)) < least
    if found.rest:
        assert found.sessions == sessions(exchanges, *found.rest) < least
    else:
        assert found.sessions == 0


@settings(max_examples=60)
@given(EVENTS, st.integers(1, 6), st.lists(st.integers(0, 2600), max_size=20))
def test_windows_are_the_same_however_often_and_whenever_rounds_ran(exchanges, least, rounds):
    every, settle, end = timedelta(minutes=30), timedelta(minutes=10), START + timedelta(minutes=2600)
    once = close_windows(exchanges, START, due(START, end, every, settle=settle), least)
    covered, closed = START, []
    for now in [*(START + timedelta(minutes=m) for m in sorted(rounds)), end]:
        # A round sees what began by then and is on record; the youngest are missing.
        seen = [e for e in exchanges if e[0] <= now - settle]
        found = close_windows(seen, covered, due(covered, now, every, settle=settle), least)
        closed += found.closed
        covered = closed[-1][1] if closed else START
    assert closed == once.closed
    assert found.rest == once.rest


def test_an_exchange_at_a_tick_belongs_to_the_window_that_begins_there():
    exchanges = [(at(1), "a"), (at(1.5), "b")]
    assert close_windows(exchanges, START, due(START, at(2), HOUR), 2).closed == [(START, at(2))]
    assert close_windows(exchanges, START, due(START, at(1), HOUR), 1) == ([], (START, at(1)), 0)


def test_disorder_is_refused():
    ticks = due(START, at(2), HOUR)
    with pytest.raises(ValueError, match="oldest first"):
        close_windows([(at(2), None), (at(1), None)], START, ticks, 1)
    with pytest.raises(ValueError, match="min_sessions"):
        close_windows([], START, ticks, 0)
    with pytest.raises(ValueError, match="first tick"):
        close_windows([], at(1), ticks, 1)
    with pytest.raises(ValueError, match="time zone"):
        due(START.replace(tzinfo=None), at(2), HOUR)


class Clock(threading.Event):
    """Stops the loop, and is the time: it passes only where the loop waits or a round says so."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.rounds: list[datetime] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timedelta(seconds=timeout)
        return self.is_set()

    def read(self) -> datetime:
        return self.now

    def begin(self, last: int) -> int:
        """Note a round; its number."""
        self.rounds.append(self.now)
        if len(self.rounds) == last:
            self.set()
        return len(self.rounds)


def test_rounds_run_at_once_and_then_on_the_grid():
    clock, told = Clock(), []
    run_forever(
        lambda: clock.begin(3),
        3600,
        clock,
        settle_seconds=90,
        planned=lambda *given: told.append(given),
        clock=clock.read,
    )
    late = timedelta(seconds=90)
    assert clock.rounds == [START, at(1) + late, at(2) + late]
    assert told == [(at(n) + late, None) for n in (1, 2, 3)]


def test_after_a_long_round_one_follows_at_once_and_catches_up(caplog):
    clock = Clock()

    def work() -> None:
        if clock.begin(4) == 2:
            clock.now += 2.5 * HOUR

    run_forever(work, 3600, clock, clock=clock.read)
    assert clock.rounds == [START, at(1), at(3.5), at(4)]
    assert "the next catches up" in caplog.text


def test_a_failing_round_is_logged_and_tried_again_less_and_less_soon(caplog):
    clock, told = Clock(), []

    def work() -> None:
        number = clock.begin(9)
        if number == 1:
            raise RuntimeError("the store is away")
        if number < 7:
            raise ServiceError("no MLflow server answers", "start it")

    with caplog.at_level(logging.ERROR):
        run_forever(work, 3600, clock, planned=lambda _, e: told.append(e), clock=clock.read)
    pauses = [(after - before).total_seconds() for before, after in pairwise(clock.rounds)]
    assert pauses == [10, 20, 40, 80, 160, 300, 1790, 3600], "a good round ends the retries"
    assert [type(e) for e in told] == [RuntimeError, *[ServiceError] * 5, *[type(None)] * 3]
    assert caplog.text.count("Traceback") == 1, "what a user can mend is said without one"
    assert (
        "no MLflow server answers\n  mend: start it; the next is due at 2026-03-02 09:20:30 UTC"
        in caplog.text
    )


def test_retries_never_pass_the_tick_nor_leave_out_the_pause():
    clock = Clock()

    def work() -> None:
        if clock.begin(4) == 3:
            clock.now += 7 * timedelta(seconds=1)
        raise ServiceError("away")

    run_forever(work, 3, clock, clock=clock.read)
    pauses = [(after - before).total_seconds() for before, after in pairwise(clock.rounds)]
    assert pauses == [3, 3, 10]


def test_stop_ends_the_wait_at_once():
    stop, waits = threading.Event(), threading.Event()
    loop = threading.Thread(
        target=run_forever, args=(lambda: None, 3600, stop), kwargs={"planned": lambda *_: waits.set()}
    )
    loop.start()
    assert waits.wait(5)
    stop.set()
    loop.join(timeout=5)
    assert not loop.is_alive()


def test_an_interval_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        run_forever(lambda: None, 0, threading.Event())
