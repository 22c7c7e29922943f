"""Where a replica takes requests from the gateways of its machine: a Unix socket.

The socket lies in a folder that only this user may enter, and goes nowhere else. The replica itself asks over
a line of its own, and may also call what it needs to.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serving.engines.base import GenerationRequest
from serving.shelf import UnavailableError, brief
from serving.wire import VERSION, Failed, Said, Wire, WireError, pack_said, unpack_request

logger = logging.getLogger(__name__)

#: How long a connection may take to show its secret.
_HELLO_SECONDS = 5.0
#: Answers with a version, given its number, what is asked, and the versions that have a role.
Answering = Callable[[int, GenerationRequest, Sequence[int]], AsyncGenerator[Said, None]]
#: What the replica may call; takes and gives what JSON can say.
Callables = Mapping[str, Callable[..., Awaitable[Any]]]


@dataclass(frozen=True)
class Address:
    """Where a replica takes requests.

    Attributes:
        node: Ray's name for its machine.
        path: The socket.
        secret: What to say first.
        version: Of the protocol.
    """

    node: str
    path: str
    secret: str = field(repr=False)
    version: int = VERSION


class Intake:
    """Takes requests and answers them, many at a time over one connection.

    Args:
        answer: What to answer with.
        calls: What the replica may call.
    """

    def __init__(self, answer: Answering, calls: Callables = MappingProxyType({})) -> None:
        self._answer, self._calls = answer, calls
        self._calling: set[asyncio.Task[None]] = set()
        self._replica: Wire | None = None
        self._secret = secrets.token_urlsafe(32)
        self._wires: set[Wire] = set()
        self._running: dict[tuple[Wire, int], asyncio.Task[None]] = {}
        self._strangers: dict[Wire, asyncio.TimerHandle] = {}
        self._server: asyncio.Server | None = None
        self._folder: Path | None = None
        self._draining = False
        #: Requests that have come from gateways.
        self.taken = 0

    @property
    def ongoing(self) -> int:
        """Requests that are answered or wait here."""
        return len(self._running)

    async def open(self, node: str) -> Address:
        """Take requests on.

        Args:
            node: Ray's name for this machine.

        Raises:
            OSError: If the folder for temporary files cannot hold a socket: its path may be too long.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="regraft-"))  # for this user alone
        path = self._folder / "replica"
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(self._met, str(path))
        except OSError:
            self._clear()
            raise
        return Address(node, str(path), self._secret)

    async def attend(self, end: socket.socket) -> None:
        """Take requests and calls from the replica until it hangs up.

        Args:
            end: Of a pair of which it has the other.
        """
        over = asyncio.Event()

        def left(wire: Wire) -> None:
            self._lost(wire)
            over.set()

        wire = self._replica = Wire(self._heard, left)
        await asyncio.get_running_loop().create_unix_connection(lambda: wire, sock=end)
        await over.wait()

    async def drain(self) -> None:
        """Take nothing more on, and return when all that has begun has ended."""
        self._draining = True
        for wire in self._wires:
            wire.say({"goodbye": True})
        if self._server is not None:
            self._server.close()
        while self._running:
            await asyncio.wait(list(self._running.values()))
        for wire in [*self._wires, *self._strangers]:
            wire.close()
        self._clear()

    def _clear(self) -> None:
        if self._folder is not None:
            with suppress(FileNotFoundError):
                (self._folder / "replica").unlink()
            with suppress(FileNotFoundError):
                self._folder.rmdir()

    def _met(self) -> Wire:
        wire = Wire(self._heard, self._lost)
        timer = asyncio.get_running_loop().call_later(_HELLO_SECONDS, wire.close)
        self._strangers[wire] = timer
        return wire

    def _heard(self, wire: Wire, frame: dict[str, Any]) -> None:
        if wire is self._replica and "call" in frame:
            called = asyncio.get_running_loop().create_task(self._call(wire, **frame))
            self._calling.add(called)
            called.add_done_callback(self._calling.discard)
        elif wire not in self._wires and wire is not self._replica:
            self._greet(wire, frame)
        elif "ask" in frame:
            self._ask(wire, frame)
        elif isinstance(frame.get("cancel"), int):
            task = self._running.get((wire, frame["cancel"]))
            if task is not None:
                task.cancel()
        else:
            raise WireError("a frame that asks nothing")

    def _greet(self, wire: Wire, frame: dict[str, Any]) -> None:
        if wire not in self._strangers:
            raise WireError("a frame after the end")
        self._strangers.pop(wire).cancel()
        said = frame.get("secret")
        if not isinstance(said, str) or not secrets.compare_digest(said.encode(), self._secret.encode()):
            logger.warning("somebody without the secret tried to ask this replica")
            raise WireError("a wrong secret")
        self._wires.add(wire)
        wire.say({"welcome": VERSION})
        if self._draining:
            wire.say({"goodbye": True})

    def _ask(self, wire: Wire, frame: dict[str, Any]) -> None:
        number, version, kept = frame["ask"], frame.get("version"), frame.get("kept")
        if not isinstance(number, int) or not isinstance(version, int) or not isinstance(kept, list):
            raise WireError("a request without a number")
        if (wire, number) in self._running:
            raise WireError("two requests of one number")
        if self._draining:
            wire.say({"of": number, "gone": True})
            return
        request = unpack_request(frame.get("request"))
        self.taken += wire is not self._replica
        saying = self._say(wire, number, self._answer(version, request, kept))
        task = asyncio.get_running_loop().create_task(saying)
        self._running[wire, number] = task
        task.add_done_callback(lambda _: self._ended(wire, number))

    async def _call(self, wire: Wire, call: int, name: str, arguments: Sequence[Any]) -> None:
        try:
            wire.say({"of": call, "gave": await self._calls[name](*arguments)})
        except UnavailableError as error:
            wire.say({"of": call, "failed": "unavailable", "why": str(error)})
        except Exception as error:
            logger.exception("%s failed", name)
            wire.say({"of": call, "failed": "error", "why": brief(error)})

    async def _say(self, wire: Wire, number: int, saying: AsyncGenerator[Said, None]) -> None:
        try:
            async with aclosing(saying):
                async for said in saying:
                    wire.say({"of": number, "said": pack_said(said)})
                    await wire.room()
        except Exception as error:
            logger.exception("an answer failed")
            wire.say({"of": number, "said": pack_said([Failed("closed", f"{type(error).__name__}")])})

    def _ended(self, wire: Wire, number: int) -> None:
        del self._running[wire, number]
        wire.say({"of": number, "end": True, "ongoing": self.ongoing})

    def _lost(self, wire: Wire) -> None:
        timer = self._strangers.pop(wire, None)
        if timer is not None:
            timer.cancel()
        self._wires.discard(wire)
        for (of, _), task in self._running.items():
            if of is wire:
                task.cancel()
