from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from monitoring.measures import marks
from monitoring.sampling import Sampled
from monitoring.sampling import sampled_exchanges as sampled_tables
from monitoring.schedule import EPOCH, close_windows, due
from regraft.data.capture_archive import to_arrow
from regraft.data.captures import CaptureStore
from regraft.records import CapturedExchange, Message

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def exchange(number: int, session: str | None = None, **changes: object) -> CapturedExchange:
    fields = {
        "id": f"e-{number}",
        "created": (NOW + timedelta(seconds=number)).isoformat(timespec="microseconds"),
        "model": "shop",
        "model_version": 1,
        "messages": (Message(role="user", content=f"question {number}"),),
        "output": "An answer.",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "latency_ms": 1.0,
        "session": session,
        **changes,
    }
    return CapturedExchange.model_validate(fields)


def sampled_exchanges(given: Iterable[CapturedExchange], most: int, rows: int = 30, **more: Any) -> Sampled:
    """The sample of exchanges that come as tables of so many rows."""
    return sampled_tables(map(to_arrow, batched(given, rows)), most, **more)


def batched(given: Iterable[CapturedExchange], rows: int) -> Iterator[list[CapturedExchange]]:
    source = iter(given)
    while some := list(islice(source, rows)):
        yield some


def mixed(count: int) -> list[CapturedExchange]:
    draw = random.Random(1)
    bad: list[dict[str, object]] = [
        {"error": "OutOfMemory", "output": ""},
        {"finish_reason": "error"},
        {"finish_reason": "aborted", "output": ""},
        {"output": " "},
        {"output": "I'm sorry, but I cannot help with that."},
        {"finish_reason": "length"},
        {"variant": "challenger"},
    ]
    sessions = [None, *(f"s-{n}" for n in range(count // 4))]
    return [exchange(n, draw.choice(sessions), **draw.choice([{}, {}, *bad])) for n in range(count)]


def test_whole_sessions_are_kept_whatever_the_order() -> None:
    given = mixed(400)
    first = sampled_exchanges(given, 20)
    kept = {e.session for e in first.exchanges if e.session}
    assert {e.id for e in given if e.session in kept} <= {e.id for e in first.exchanges}
    assert len({e.session or e.id for e in first.exchanges}) == 20
    assert [e.created for e in first.exchanges] == sorted(e.created for e in first.exchanges)
    for seed in range(3):
        assert sampled_exchanges(random.Random(seed).sample(given, 400), 20) == first
    larger = sampled_exchanges(given, 40)
    assert {e.id for e in first.exchanges} < {e.id for e in larger.exchanges}
    other = sampled_exchanges(given, 20, salt="2026-03-04T13:00")
    assert {e.id for e in other.exchanges} != {e.id for e in first.exchanges}


def test_counts_are_of_all_and_as_the_quality_of_a_window_has_them() -> None:
    given = mixed(300)
    found = sampled_exchanges(iter(given), 3)
    assert len(found.exchanges) < 60
    assert found.total == 300
    expected = {name: sum(bad.values()) for name, (bad, _) in marks(given).items() if name in found.counts}
    assert found.counts == expected
    assert min(expected.values()) > 0
    for name, (bad, _) in marks(given).items():
        if name in found.rates:
            assert found.rates[name] == pytest.approx(sum(bad.values()) / len(bad))
    assert found.variants["challenger"] + found.variants["champion"] == 300


def test_a_shadow_counts_among_the_variants_alone() -> None:
    found = sampled_exchanges([exchange(1), exchange(2, variant="shadow", output="")], 5)
    assert [e.id for e in found.exchanges] == ["e-1"]
    assert (found.total, found.counts["empty_rate"], found.variants) == (1, 0, {"champion": 1, "shadow": 1})


def test_nothing_at_all_and_limits_that_are_none() -> None:
    found = sampled_exchanges([], 5)
    assert (found.exchanges, found.total, found.rates, found.sessions) == ((), 0, {}, 0)
    with pytest.raises(ValueError, match="most"):
        sampled_exchanges([], 0)
    with pytest.raises(ValueError, match="most_turns"):
        sampled_exchanges([], 5, most_turns=0)


def test_a_session_without_an_end_keeps_some_turns_whatever_the_order() -> None:
    given = [exchange(n, "endless") for n in range(50)] + [exchange(99, "short")]
    found = sampled_exchanges(given, 5, most_turns=7)
    assert len(found.exchanges) == 8
    assert found.total == 51
    assert sampled_exchanges(given[::-1], 5, most_turns=7) == found


def test_choices_of_one_request_stay_together() -> None:
    given = [exchange(n, None, id=f"r{n}-{c}", choice=c) for n in range(40) for c in range(3)]
    found = sampled_exchanges(given, 4)
    assert len(found.exchanges) == 12
    assert len({e.id.rpartition("-")[0] for e in found.exchanges}) == 4


def test_sessions_are_counted_while_they_fit_and_estimated_beyond() -> None:
    given = [exchange(n, f"s-{n % 2000}") for n in range(4000)]
    few = sampled_exchanges(given[:300], 400)
    assert (few.sessions, few.sessions_exact) == (300, True)
    many = sampled_exchanges(given, 400)
    assert not many.sessions_exact
    assert many.sessions == pytest.approx(2000, rel=0.2)  # four standard errors of 400


@pytest.mark.parametrize(
    "output",
    [
        "I'm sorry, but I can\u2019t do that.",
        "\u00e9i can't help",
        "As an A\u0130",
        "i cannot help\u00e9",
        "We are very afraid that it is\nnot allowed",
        "As an artificial intelligence",
        "AS AN AI, \u212anow",
        "x" * 199 + "We must decline",
        "x" * 150 + " We must decline",
        "violates our policies",
        "\x1c\u3000\x85",
        "\u200b",
        "\u597d",
        "",
    ],
)
def test_a_column_is_counted_as_single_texts_are(output: str) -> None:
    given = [exchange(1, output=output), exchange(2)]
    found = sampled_exchanges(given, 5)
    expected = {name: sum(bad.values()) for name, (bad, _) in marks(given).items() if name in found.counts}
    assert found.counts == expected


def test_memory_does_not_grow_with_the_traffic() -> None:
    def peak(count: int) -> int:
        before, most = pa.total_allocated_bytes(), 0

        def traffic() -> Iterator[pa.Table]:
            nonlocal most
            for n in range(0, count, 50):
                yield to_arrow([exchange(n + i, f"s-{n + i}", output="x" * 2000) for i in range(50)])
                most = max(most, pa.total_allocated_bytes() - before)

        tracemalloc.start()
        try:
            assert sampled_tables(traffic(), 20).total == count
            return tracemalloc.get_traced_memory()[1] + most
        finally:
            tracemalloc.stop()

    peak(50)  # what is loaded once
    assert peak(3000) < 1.5 * peak(200)


@pytest.mark.parametrize("seed", range(4))
def test_windows_close_alike_by_the_times_that_the_store_gives(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    every, most = timedelta(minutes=10), draw.randint(2, 12)
    store = CaptureStore(tmp_path)
    shown = []
    for number in range(150):
        when = NOW + timedelta(minutes=draw.randint(0, 40) * draw.random() * 4, microseconds=number)
        one = exchange(
            number,
            draw.choice([None, *(f"s-{n}" for n in range(15))]),
            created=when.isoformat(timespec="microseconds"),
        )
        store.append(one)
        shown.append((when, one.session))
    covered = NOW + timedelta(minutes=3)
    ticks = due(covered, NOW + timedelta(hours=4), every)
    whole = close_windows(sorted(shown, key=lambda one: one[0]), covered, ticks, most)
    times = store.times(every=every, most=most, start=covered)
    assert close_windows(times, covered, ticks, most) == whole
    assert len(whole.closed) > 1
    assert len(times) <= most * len({(when - EPOCH) // every for when, _ in times})
