"""What a gateway makes of replicas that are lost, full, or have nothing to answer with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError
from ray.serve.exceptions import BackPressureError

from regraft.config import ServeSection
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    Event,
    Finished,
    GenerationRequest,
    QueueFullError,
    TextDelta,
)
from serving.intake import Address, Intake
from serving.remote import RemoteEngines, RemoteStream
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


class Handle:
    """A deployment's handle, of which only what a gateway asks of it is there."""

    def __init__(self, addresses: Callable[[], list[Any]]) -> None:
        self._addresses = addresses
        self.asked = 0

    def options(self, **_: Any) -> Handle:
        return self

    def broadcast(self, method: str) -> Handle:
        assert method == "address"
        return self

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        return self._addresses()

    async def remote(self, *_: Any) -> AsyncIterator[Said]:
        self.asked += 1
        yield SAID


@pytest.mark.parametrize(
    ("second", "direct"),
    [
        (lambda one: one, True),
        (lambda _: LOST, True),
        (lambda one: replace(one, node="there"), False),
        (lambda one: replace(one, version=0), False),
        (lambda one: replace(one, path="/nonexistent/replica"), False),
        (lambda _: None, False),
    ],
    ids=["the same", "lost", "elsewhere", "another release", "out of reach", "without a socket"],
)
def test_replicas_are_asked_directly_where_all_of_them_can_be(
    second: Callable[[Address], Any], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))

    async def answer(*_: Any) -> AsyncGenerator[Said, None]:
        yield SAID

    async def run() -> None:
        intake = Intake(answer)
        one = await intake.open("here")
        found = [one, one]
        handle: Any = Handle(lambda: found)
        engines = RemoteEngines(handle, ServeSection())
        lines = engines._lines
        assert lines is not None

        async def ask() -> list[Event]:
            request = GenerationRequest((1,), 1)
            return [event async for event in RemoteStream(lambda: engines.ask(1, request), "support/1")]

        assert await ask() == list(SAID) and handle.asked == 1  # before it knows of any
        await engines._look(lines)
        assert await ask() == list(SAID) and (handle.asked, intake.taken) == (1, 1)
        found[1] = second(one)
        await engines._look(lines)
        assert await ask() == list(SAID) and (handle.asked, intake.taken) == ((1, 2) if direct else (2, 1))
        await intake.drain()
        assert await ask() == list(SAID) and handle.asked == (2 if direct else 3)  # when none is left

    asyncio.run(run())


@pytest.mark.parametrize("serve", [{"link": "handle"}, {"max_replicas": 2}])
def test_all_goes_through_ray_where_it_is_told_so_or_has_to_count(serve: dict[str, Any]) -> None:
    handle: Any = Handle(list)
    assert RemoteEngines(handle, ServeSection.model_validate(serve))._lines is None
