"""The way from a gateway to the replicas of its machine: over real sockets, with replicas that say what they are told."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from serving.engines.base import (
    EngineClosedError,
    Event,
    Finished,
    GenerationRequest,
    QueueFullError,
    TextDelta,
    TokenLogprob,
)
from serving.intake import Address, Intake
from serving.lines import LineLostError, Lines
from serving.remote import RemoteStream
from serving.wire import MAX_FRAME, Said

#: Ray's actors run on uvloop's.
LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)
REQUEST = GenerationRequest((1, 2, 3), 8, stop=("end",), seed=4, logprobs=1, whole=False)
#: A token may hold half a character, and a certain one has a rival that is impossible.
TOKEN = TokenLogprob(7, b"\xe2\x82", -0.25, (TokenLogprob(8, b"\xff", float("-inf")),), 3)
SAID: tuple[Event, ...] = (TextDelta("yes", (TOKEN,)), Finished("stop", 3, 2, 0.1, 0.2))


class Replica:
    """Says the first event, and the rest when it may go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.asked: list[tuple[int, GenerationRequest, Sequence[int]]] = []
        self.ongoing = self.most = 0
        self.intake = Intake(self.answer)

    async def answer(
        self, version: int, request: GenerationRequest, kept: Sequence[int]
    ) -> AsyncGenerator[Said, None]:
        self.asked.append((version, request, kept))
        self.ongoing += 1
        self.most = max(self.most, self.ongoing)
        try:
            yield [SAID[0]]
            await self.go_on.wait()
            yield [SAID[1]]
        finally:
            self.ongoing -= 1


Told = Callable[..., Coroutine[Any, Any, None]]


def told(replicas: int = 1, each: int = 4, waiting: int = 4) -> Callable[[Told], Callable[[], None]]:
    """Run a test with so many replicas and the lines to them."""

    def of(test: Told) -> Callable[[], None]:
        async def run() -> None:
            there = [Replica() for _ in range(replicas)]
            lost: list[None] = []
            lines = Lines(each, waiting, lambda: lost.append(None))
            for one in there:
                await lines.connect(await one.intake.open("here"))
            async with asyncio.timeout(30):
                await test(lines, *there)
            lines.close()
            for one in there:
                one.go_on.set()
                await one.intake.drain()

        def called() -> None:
            for loop in LOOPS:
                with asyncio.Runner(loop_factory=loop) as runner:
                    runner.run(run())

        called.__name__ = test.__name__
        return called

    return of


def ask(lines: Lines) -> RemoteStream:
    return RemoteStream(lambda: lines.ask(5, REQUEST, (5, 6)), "support/5")


async def until(found: Callable[[], bool]) -> None:
    while not found():
        await asyncio.sleep(0.001)


@told()
async def test_what_is_asked_and_said_arrives_as_it_was(lines: Lines, replica: Replica) -> None:
    replica.go_on.set()
    heard = [event async for event in ask(lines)]
    assert heard == list(SAID) and heard[1].busy_seconds == 0.2  # type: ignore[union-attr]
    assert replica.asked == [(5, REQUEST, [5, 6])]
    whole = replace(REQUEST, logprobs=None, seed=None, stop=(), whole=True)
    assert [said async for said in lines.ask(5, whole, ())] == [[event] for event in SAID]
    assert replica.asked[1] == (5, whole, [])


@told(replicas=2)
async def test_the_least_busy_is_asked(lines: Lines, one: Replica, two: Replica) -> None:
    streams = [ask(lines) for _ in range(6)]
    for stream in streams:
        await anext(stream)
    assert one.ongoing == two.ongoing == 3


@told(each=1, waiting=1)
async def test_more_than_may_wait_are_refused_and_the_first_goes_on_first(
    lines: Lines, replica: Replica
) -> None:
    first, second = ask(lines), ask(lines)
    await anext(first)
    waits = asyncio.ensure_future(anext(second))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await anext(ask(lines))
    assert len(replica.asked) == 1
    replica.go_on.set()
    assert await anext(first) == SAID[1]
    assert await waits == SAID[0] and replica.most == 1


@told(each=1, waiting=1)
async def test_who_hangs_up_frees_the_place(lines: Lines, replica: Replica) -> None:
    begun, waiting = ask(lines), ask(lines)
    await anext(begun)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(waiting)
    waiting.cancel()
    begun.cancel()
    await until(lambda: replica.ongoing == 0)
    assert len(replica.asked) == 1  # what waited was not asked any more
    assert await anext(ask(lines)) == SAID[0]


@told(replicas=2, each=1)
async def test_a_replica_that_is_lost_costs_only_what_it_had_begun_to_say(
    lines: Lines, one: Replica, two: Replica
) -> None:
    begun = [ask(lines), ask(lines)]
    for stream in begun:
        await anext(stream)
    waiting = asyncio.ensure_future(anext(ask(lines)))
    await asyncio.sleep(0)
    for wire in list(one.intake._wires):
        wire._transport.abort()  # type: ignore[union-attr]
    ends = [asyncio.ensure_future(anext(stream)) for stream in begun]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    two.go_on.set()
    found = await asyncio.gather(*ends, return_exceptions=True)
    assert sorted(type(end) for end in found if end != SAID[1]) == [EngineClosedError] and SAID[1] in found
    assert await waiting == SAID[0] and lines.open == 1
    await until(lambda: one.ongoing == 0)  # a gateway that is gone wants nothing


@told(each=1)
async def test_when_none_is_left_those_who_wait_hear_of_it(lines: Lines, replica: Replica) -> None:
    begun, waiting = (lines.ask(5, REQUEST, ()) for _ in range(2))
    await anext(begun)
    for wire in list(replica.intake._wires):
        wire._transport.abort()  # type: ignore[union-attr]
    for call in (begun, waiting, lines.ask(5, REQUEST, ())):
        with pytest.raises(LineLostError):
            await anext(call)


@told(replicas=2)
async def test_one_that_drains_ends_its_answers_and_begins_none(
    lines: Lines, one: Replica, two: Replica
) -> None:
    begun = [ask(lines) for _ in range(2)]
    for stream in begun:
        await anext(stream)
    draining = asyncio.create_task(one.intake.drain())
    await asyncio.sleep(0)
    crossed = [ask(lines) for _ in range(3)]  # before its goodbye is read here
    for stream in crossed:
        assert await anext(stream) == SAID[0]
    assert (one.ongoing, two.ongoing) == (1, 4) and lines.open == 1 and not draining.done()
    one.go_on.set()
    two.go_on.set()
    for stream in (*begun, *crossed):
        assert await anext(stream) == SAID[1]
    await draining


@told()
async def test_an_answer_that_fails_is_told_without_its_words(lines: Lines, replica: Replica) -> None:
    async def fail(*_: Any) -> AsyncGenerator[Said, None]:
        if _:
            raise RuntimeError("the prompt was: hello")
        yield []

    replica.intake._answer = fail
    with pytest.raises(EngineClosedError, match=r"^RuntimeError$"):
        await anext(ask(lines))


def framed(said: object) -> bytes:
    data = json.dumps(said).encode()
    return struct.pack(">I", len(data)) + data


ASK = {"ask": 1, "version": 5, "request": {**vars(REQUEST)}, "kept": []}


@pytest.mark.parametrize(
    "said",
    [
        framed({"secret": "wrong"}) + framed(ASK),
        framed({"secret": None}) + framed(ASK),
        framed(ASK),
        framed(["secret"]),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack(">I", MAX_FRAME + 1),
    ],
    ids=["wrong secret", "no secret", "no greeting", "no object", "HTTP", "too long"],
)
def test_who_does_not_know_the_secret_hears_nothing(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        replica = Replica()
        address = await replica.intake.open("here")
        assert Path(address.path).parent.stat().st_mode & 0o077 == 0
        reader, writer = await asyncio.open_unix_connection(address.path)
        writer.write(said)
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
        assert not replica.asked
        writer.close()
        with pytest.raises((OSError, TimeoutError)):
            await Lines(1, 1, lambda: None).connect(replace(address, secret="wrong"))
        assert address.secret not in repr(address) + caplog.text
        await replica.intake.drain()
        assert not Path(address.path).parent.exists()

    caplog.set_level(logging.DEBUG)
    asyncio.run(run())


@pytest.mark.parametrize(
    "frame",
    [
        {**ASK, "ask": "1"},
        {**ASK, "request": {}},
        {**ASK, "request": {**vars(REQUEST), "more": 1}},
        {**ASK, "kept": None},
        {"cancel": []},
        {"else": 1},
    ],
    ids=str,
)
def test_a_frame_that_is_none_of_ours_ends_the_connection_and_nothing_else(frame: dict[str, Any]) -> None:
    async def run() -> None:
        replica = Replica()
        address = await replica.intake.open("here")
        lines = Lines(1, 1, lambda: None)
        await lines.connect(address)
        reader, writer = await asyncio.open_unix_connection(address.path)
        writer.write(framed({"secret": address.secret}) + framed(frame))
        with suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert not replica.asked and await anext(ask(lines)) == SAID[0]
        lines.close()
        replica.go_on.set()
        await replica.intake.drain()

    asyncio.run(run())


def test_a_socket_that_is_no_more_is_an_error() -> None:
    async def run() -> None:
        with pytest.raises(OSError):
            await Lines(1, 1, lambda: None).connect(Address("here", "/nonexistent/replica", "secret"))

    asyncio.run(run())
