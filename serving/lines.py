"""How a gateway reaches the replicas of its own machine: a line to each, and a queue before them.

A request goes to the least busy replica that has room; where none has, it waits here, and the first that
waits goes on first. A replica that is lost takes its answers with it: `LineLostError` tells, and who asked
may ask again.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving.engines.base import GenerationRequest, QueueFullError
from serving.intake import Address
from serving.wire import Said, Wire, WireError, pack_request, unpack_said

#: How long a replica may take to welcome a gateway.
_WELCOME_SECONDS = 5.0


class LineLostError(Exception):
    """The replica that was asked has gone, or is about to."""


class Call(AsyncIterator[Said]):
    """One request, which waits for a line and then for what the replica says.

    Args:
        frame: What is asked.
        given_up: Called when nobody wants the rest.
    """

    def __init__(self, frame: dict[str, Any], given_up: Callable[[Call], None]) -> None:
        self.frame = frame
        #: The line it goes over, and its number there.
        self.line: Line | None = None
        self.number = 0
        self._given_up = given_up
        self._here: deque[Said] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._over = self._lost = False

    async def __anext__(self) -> Said:
        while not self._here:
            if self._lost:
                raise LineLostError("the replica was lost")
            if self._over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._here.popleft()

    def cancel(self) -> None:
        """Want no more of it; safe to call at any time."""
        if not self._over:
            self.end()
            self._given_up(self)

    def hear(self, said: Said) -> None:
        """Take what the replica says."""
        if not self._over:
            self._here.append(said)
            self._wake()

    def end(self) -> None:
        """Hear that nothing more comes."""
        self._over = True
        self._wake()

    def lose(self) -> None:
        """Hear that nothing more comes, too early."""
        if not self._over:
            self._over = self._lost = True
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def asking(version: int, request: GenerationRequest, kept: Sequence[int]) -> dict[str, Any]:
    """What a replica is asked, as a frame says it; see `serving.holder.Holder.generate`."""
    return {"version": version, "request": pack_request(request), "kept": list(kept)}


class Line:
    """A connection to a replica; made by `Lines.connect`.

    Args:
        freed: Called when it has more room.
        lost: Called when it has ended.
    """

    def __init__(self, freed: Callable[[], None], lost: Callable[[Line], None]) -> None:
        self.wire = Wire(self._heard, self._ended)
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: The replica takes nothing new.
        self.leaving = False
        self._freed, self._lost = freed, lost
        self._calls: dict[int, Call] = {}
        self._numbers = 0
        self._others = 0

    @property
    def ongoing(self) -> int:
        """Requests of this gateway at the replica."""
        return len(self._calls)

    @property
    def load(self) -> int:
        """Requests of all gateways there, as far as is known."""
        return len(self._calls) + self._others

    def ask(self, call: Call) -> None:
        """Send a request."""
        self._numbers += 1
        call.line, call.number = self, self._numbers
        self._calls[call.number] = call
        self.wire.say({"ask": call.number, **call.frame})

    def cancel(self, call: Call) -> None:
        """Tell the replica that nobody wants the rest; it holds its place until the replica has stopped."""
        self.wire.say({"cancel": call.number})

    def _heard(self, _: Wire, frame: dict[str, Any]) -> None:
        call = self._calls.get(frame.get("of", 0))
        if call is None:
            self._told(frame)
        elif "said" in frame:
            call.hear(unpack_said(frame["said"]))
        elif "gone" in frame:
            del self._calls[call.number]
            self.leaving = True
            call.lose()
            self._freed()
        else:
            del self._calls[call.number]
            self._others = max(0, int(frame["ongoing"]) - len(self._calls))
            call.end()
            self._freed()

    def _told(self, frame: dict[str, Any]) -> None:
        if "welcome" in frame:
            if not self.welcome.done():
                self.welcome.set_result(None)
        elif "goodbye" in frame:
            self.leaving = True
            self._freed()
        else:
            raise WireError("a frame of no request")

    def _ended(self, _: Wire) -> None:
        self.leaving = True
        calls, self._calls = self._calls, {}
        if not self.welcome.done():
            self.welcome.set_exception(ConnectionResetError("the replica hung up"))
        self._lost(self)
        for call in calls.values():
            call.lose()


class Lines:
    """The replicas that a gateway reaches by itself.

    Args:
        each: Requests that a replica answers for this gateway at once.
        waiting: Requests that may wait for a replica.
        changed: Called when a line is lost.
    """

    def __init__(self, each: int, waiting: int, changed: Callable[[], None]) -> None:
        self._each, self._most, self._changed = each, waiting, changed
        self._lines: dict[str, Line] = {}
        self._waiting: deque[Call] = deque()

    @property
    def open(self) -> int:
        """Replicas that take requests."""
        return sum(not line.leaving for line in self._lines.values())

    def ask(self, version: int, request: GenerationRequest, kept: Sequence[int]) -> Call:
        """Begin to ask one of them.

        Raises:
            QueueFullError: If as many wait as may wait.
        """
        call = Call(asking(version, request, kept), self._given_up)
        line = None if self._waiting else self._free()
        if line is not None:
            line.ask(call)
        elif not self.open:
            call.lose()
        elif len(self._waiting) >= self._most:
            raise QueueFullError("as many requests wait as may wait; try again later")
        else:
            self._waiting.append(call)
        return call

    async def connect(self, address: Address) -> None:
        """Lay a line to a replica, unless there is one.

        Raises:
            OSError: If there is no way to it.
        """
        if address.path in self._lines:
            return
        line = Line(self._go_on, lambda _: self._end(address.path))
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: line.wire, address.path)
        line.wire.say({"secret": address.secret})
        try:
            await asyncio.wait_for(line.welcome, _WELCOME_SECONDS)
        except TimeoutError:
            line.wire.close()
            raise
        self._lines[address.path] = line
        self._go_on()

    def close(self) -> None:
        """Hang up."""
        for line in list(self._lines.values()):
            line.wire.close()

    def _free(self) -> Line | None:
        lines = [line for line in self._lines.values() if not line.leaving and line.ongoing < self._each]
        return min(lines, key=lambda line: (line.load, random.random()), default=None)

    def _go_on(self) -> None:
        while self._waiting and (line := self._free()) is not None:
            line.ask(self._waiting.popleft())
        if not self.open:
            while self._waiting:
                self._waiting.popleft().lose()

    def _end(self, path: str) -> None:
        if self._lines.pop(path, None) is not None:
            _tidy(path)
            self._go_on()
            self._changed()

    def _given_up(self, call: Call) -> None:
        if call.line is not None:
            call.line.cancel(call)
        elif call in self._waiting:
            self._waiting.remove(call)


def _tidy(path: str) -> None:
    """Remove the socket of a replica that was killed, and could not do so."""
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            Path(path).parent.rmdir()
