"""What a gateway makes of replicas that are lost, full, or have nothing to answer with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.serve.exceptions import BackPressureError

from serving.engines.base import EngineClosedError, EngineError, Event, Finished, QueueFullError, TextDelta
from serving.remote import RemoteStream
from serving.wire import Failed, Said

SAID: tuple[Event, ...] = (TextDelta("yes"), Finished("stop", 1, 2))
LOST = ActorUnavailableError("gone", b"0" * 16)


def asked(*replicas: Sequence[Said | Exception]) -> tuple[list[Event], int]:
    """What comes of a request, each try of which meets the next of these replicas; and how many it met."""
    met = 0

    def ask() -> Any:
        nonlocal met
        met += 1
        return speak(replicas[met - 1])

    async def speak(what: Sequence[Said | Exception]) -> AsyncIterator[Said]:
        for one in what:
            if isinstance(one, Exception):
                raise one
            yield one

    async def run() -> list[Event]:
        return [event async for event in RemoteStream(ask, "support/1")]

    return asyncio.run(run()), met


@pytest.mark.parametrize(
    "first", [LOST, OutOfMemoryError("memory"), [Failed("closed", "the engine ended")]], ids=str
)
def test_another_is_asked_where_nothing_was_said(first: Said | Exception) -> None:
    assert asked([first], [first], [SAID]) == (list(SAID), 3)
    with pytest.raises(EngineClosedError):
        asked(*[[first]] * 4)


@pytest.mark.parametrize("then", [LOST, [Failed("closed", "the engine ended")]], ids=str)
def test_what_has_begun_is_not_begun_again(then: Said | Exception) -> None:
    with pytest.raises(EngineClosedError):
        asked([SAID[:1], then], [SAID])


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([Failed("full", "many wait")], QueueFullError),
        (BackPressureError(1, 1), QueueFullError),
        ([Failed("engine", "out of luck")], EngineError),
        ([Failed("unavailable", "it does not load")], EngineClosedError),
    ],
    ids=str,
)
def test_what_another_would_say_too_is_not_asked_again(said: Said | Exception, error: type) -> None:
    with pytest.raises(error):
        asked([said])


def test_an_answer_without_an_end_is_an_error() -> None:
    with pytest.raises(EngineError, match="before its end"):
        asked([SAID[:1]])
