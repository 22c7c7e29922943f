"""What gateways and replicas say to each other over a socket of their own.

Frames of JSON, each after its length in four bytes: nothing that comes from a socket is unpickled. The first
one of a connection has a secret, which the replica made and handed over through Ray; until it is there
nothing else is read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from serving.engines.base import Event, Finished, GenerationRequest, TextDelta, TokenLogprob

#: Said by both ends, which may be of different releases while one replaces the other.
VERSION = 1
#: A request is some tokens' numbers, and stop strings; its HTTP body has a bound of a mebibyte.
MAX_FRAME = 16 << 20
#: What a replica lacks that could not ask which versions have a role.
EVERYTHING = "whatever has a role"
logger = logging.getLogger(__name__)
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Failed:
    """Why an answer ends early. Travels as a value: an exception would carry a traceback along."""

    kind: Literal["engine", "closed", "full", "unavailable"]
    message: str


#: What a replica says at a time.
Said: TypeAlias = Sequence[Event | Failed]


class WireError(Exception):
    """What came is none of our frames."""


class Wire(asyncio.Protocol):
    """One end of a connection.

    Args:
        heard: Called with each frame.
        lost: Called once, when nothing more will come.
    """

    def __init__(self, heard: Callable[[Wire, dict[str, Any]], None], lost: Callable[[Wire], None]) -> None:
        self._heard, self._lost = heard, lost
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def open(self) -> bool:
        """Whether something can be said."""
        return self._transport is not None and not self._transport.is_closing()

    def say(self, frame: dict[str, Any]) -> None:
        """Send a frame; to nobody, if the other end has gone."""
        if self._transport is not None and not self._transport.is_closing():
            data = json.dumps(frame, separators=(",", ":")).encode()
            self._transport.write(_LENGTH.pack(len(data)) + data)

    async def room(self) -> None:
        """Wait until the other end has read most of what was said."""
        await self._room.wait()

    def close(self) -> None:
        """Hang up when all is sent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's, which Ray runs on, is no such class

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        try:
            while (frame := self._next()) is not None:
                self._heard(self, frame)
        except WireError as error:
            logger.warning("hanging up on %s", error)
            self._buffer.clear()
            assert self._transport is not None
            self._transport.abort()

    def pause_writing(self) -> None:
        """Called by asyncio."""
        self._room.clear()

    def resume_writing(self) -> None:
        """Called by asyncio."""
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._room.set()
        self._lost(self)

    def _next(self) -> dict[str, Any] | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME:
            raise WireError(f"a frame of {length} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            frame = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise WireError("a frame that is no JSON") from error
        if not isinstance(frame, dict):
            raise WireError("a frame that is no object")
        return frame


def pack_request(request: GenerationRequest) -> dict[str, Any]:
    """A request as JSON has it."""
    return dict(vars(request))


def unpack_request(packed: Any) -> GenerationRequest:
    """The same again.

    Raises:
        WireError: If it is none.
    """
    try:
        ids, stop = tuple(packed["prompt_ids"]), tuple(packed["stop"])
        return GenerationRequest(**{**packed, "prompt_ids": ids, "stop": stop})
    except (KeyError, TypeError) as error:
        raise WireError("a request that is none") from error


def pack_said(said: Said) -> list[list[Any]]:
    """What a replica says at a time, as JSON has it."""
    return [_pack(one) for one in said]


def unpack_said(packed: Sequence[Sequence[Any]]) -> Said:
    """The same again.

    Raises:
        WireError: If it is nothing that a replica says.
    """
    try:
        return [_unpack(*one) for one in packed]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError("an event that is none") from error


def _pack(one: Event | Failed) -> list[Any]:
    if isinstance(one, TextDelta):
        return ["text", one.text, [_pack_token(token) for token in one.tokens]]
    return ["end" if isinstance(one, Finished) else "failed", vars(one)]


def _unpack(kind: str, *rest: Any) -> Event | Failed:
    if kind == "text":
        text, tokens = rest
        return TextDelta(text, tuple(_unpack_token(token) for token in tokens))
    if kind == "end":
        return Finished(**rest[0])
    if kind == "failed":
        return Failed(**rest[0])
    raise WireError(f"an event {kind!r}")


def _pack_token(token: TokenLogprob) -> list[Any]:
    # Latin-1 has a character for every byte.
    top = [_pack_token(other) for other in token.top]
    return [token.id, token.spelling.decode("latin-1"), token.logprob, top, token.offset]


def _unpack_token(packed: Sequence[Any]) -> TokenLogprob:
    number, spelling, logprob, top, offset = packed
    return TokenLogprob(
        number, spelling.encode("latin-1"), logprob, tuple(_unpack_token(other) for other in top), offset
    )
