"""Starts the process that holds a replica's models, and talks to it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from regraft.processes import with_large_pages
from serving.engines.base import EngineError, GenerationRequest
from serving.lines import Call, Line, asking
from serving.settings import EndpointSettings
from serving.shelf import UnavailableError

logger = logging.getLogger(__name__)

#: How long the process may take to end once it has nothing left to do.
_END_SECONDS = 5.0


class _Control(Line):
    """The line to it: over this one it can also be called."""

    def __init__(self, lost: Callable[[], None]) -> None:
        super().__init__(lambda: None, lambda _: self._hung_up(lost))
        self.welcome.set_result(None)  # both ends were made by one process
        self._called: dict[int, asyncio.Future[Any]] = {}

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call one of `serving.holder.Holder`'s; gives what it gives.

        Raises:
            UnavailableError: If it raises one.
            EngineError: If it raises something else.
            ConnectionResetError: If the process has ended.
        """
        if not self.wire.open:
            raise ConnectionResetError("the process that holds the models has ended")
        self._numbers += 1
        number = self._numbers
        answer = self._called[number] = asyncio.get_running_loop().create_future()
        try:
            self.wire.say({"call": number, "name": name, "arguments": arguments})
            return await answer
        finally:
            del self._called[number]

    def _told(self, frame: dict[str, Any]) -> None:
        answer = self._called.get(frame.get("of", 0))
        if answer is None or answer.done():
            return  # who called has gone
        if "gave" in frame:
            answer.set_result(frame["gave"])
        else:
            kind = UnavailableError if frame["failed"] == "unavailable" else EngineError
            answer.set_exception(kind(frame["why"]))

    def _hung_up(self, lost: Callable[[], None]) -> None:
        for answer in self._called.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError("the process that holds the models ended"))
        lost()


class HolderProcess:
    """A running `serving.holder`; made by `start`.

    Args:
        process: The process.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._cut = asyncio.Event()
        self._line = _Control(self._cut.set)
        self.call = self._line.call

    @classmethod
    async def start(cls, settings: EndpointSettings) -> HolderProcess:
        """Start one. It ends with this process, however that ends.

        Args:
            settings: Of the endpoint.
        """
        here, there = socket.socketpair()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serving.holder", str(there.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[there.fileno()],
                env=with_large_pages(
                    # A Ray job may have brought its own packages along.
                    {**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}
                ),
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin:  # one that has ended already shows on the line
            process.stdin.write(settings.model_dump_json().encode())
        found = cls(process)
        await asyncio.get_running_loop().create_unix_connection(lambda: found._line.wire, sock=here)
        return found

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def ask(self, number: int, request: GenerationRequest, kept: Sequence[int]) -> Call:
        """Begin to ask for an answer; see `serving.holder.Holder.generate`."""
        call = Call(asking(number, request, kept), lambda call: self._line.cancel(call))
        if self._line.wire.open:
            self._line.ask(call)
        else:
            call.lose()
        return call

    async def ended(self) -> int:
        """Wait until it has ended; gives its exit status, or a signal's number below zero."""
        await self._cut.wait()
        try:
            return await asyncio.to_thread(self._process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.exception("the process that holds the models has hung up, and does not end: killing it")
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)

    async def end(self) -> None:
        """Let it answer what has begun, and end it."""
        with suppress(ConnectionResetError):
            await self.call("drain")
        self._line.wire.close()
        await self.ended()
