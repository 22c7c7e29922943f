"""HTTP in the gateway's own process: with whom it shares its port, and how it stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from regraft.errors import ConfigError, ServiceError
from regraft.processes import free_port
from serving.app import EndpointSettings, build_app
from serving.listener import Listener


class Slow:
    """An application whose stream waits in its middle until it may go on."""

    def __init__(self, name: str = "support", who: str = "") -> None:
        self.go_on, self.ended = asyncio.Event(), False
        self.app = FastAPI(lifespan=self._lifespan)

        @self.app.get("/health")
        async def health() -> dict[str, str]:
            return {"model": name, "who": who}

        @self.app.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._parts())

    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.ended = True

    async def _parts(self) -> AsyncIterator[bytes]:
        yield b"one "
        await self.go_on.wait()
        yield b"two"


def listener(slow: Slow, port: int, drain_seconds: float = 30, host: str = "127.0.0.1") -> Listener:
    return Listener(slow.app, host, port, name="support", drain_seconds=drain_seconds)


async def refused(url: str) -> None:
    """Wait until nobody listens there; a connection that is just being made may be broken off."""
    while True:
        try:
            async with httpx.AsyncClient() as http:
                await http.get(f"{url}/health")
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            continue


def test_a_stream_ends_whole_while_nothing_new_is_taken_on() -> None:
    async def run() -> None:
        slow, port = Slow(), free_port(0, "serve.port")
        own = listener(slow, port)
        await own.start()
        own.check()
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(timeout=30) as http, http.stream("GET", f"{url}/stream") as reply:
            parts = reply.aiter_bytes()
            assert await anext(parts) == b"one "
            draining = asyncio.create_task(own.drain())
            await refused(url)
            assert not draining.done() and not slow.ended
            slow.go_on.set()
            assert [part async for part in parts] == [b"two"]
        await draining
        assert slow.ended
        with pytest.raises(RuntimeError, match="does not listen"):
            own.check()

    asyncio.run(run())


def test_what_does_not_end_in_its_time_is_broken_off() -> None:
    async def run() -> None:
        slow, port = Slow(), free_port(0, "serve.port")
        own = listener(slow, port, drain_seconds=0.1)
        await own.start()
        async with (
            httpx.AsyncClient() as http,
            http.stream("GET", f"http://127.0.0.1:{port}/stream") as reply,
        ):
            parts = reply.aiter_bytes()
            await anext(parts)
            await own.drain()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(parts)

    asyncio.run(run())


def test_gateways_of_a_model_share_a_port_and_one_takes_over_from_the_other() -> None:
    async def run() -> None:
        port = free_port(0, "serve.port")
        one, two = (listener(Slow(who=who), port) for who in ("one", "two"))
        await one.start()
        await two.start()

        async def whose() -> str:
            async with httpx.AsyncClient() as http:
                said: str = (await http.get(f"http://127.0.0.1:{port}/health")).json()["who"]
                return said

        seen = {await whose() for _ in range(64)}
        assert seen == {"one", "two"}
        await one.drain()
        assert {await whose() for _ in range(16)} == {"two"}
        await two.drain()

    asyncio.run(run())


@contextmanager
def silent(port: int, *, shared: bool) -> Iterator[None]:
    """Somebody who takes connections and ends them, without a word or after HTTP that is not ours."""
    with socket.socket() as sock:
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()

        async def answer() -> None:
            loop = asyncio.get_running_loop()
            while True:
                met, _ = await loop.sock_accept(sock)
                await loop.sock_recv(met, 1000)
                if shared:
                    await loop.sock_sendall(met, b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnone")
                met.close()

        sock.setblocking(False)
        task = asyncio.get_running_loop().create_task(answer())
        try:
            yield
        finally:
            task.cancel()


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_is_not_shared_with_strangers(shared: bool) -> None:
    async def run() -> None:
        port = free_port(0, "serve.port")
        with silent(port, shared=shared), pytest.raises(ServiceError, match=r"serve\.port"):
            await listener(Slow(), port).start()

    asyncio.run(run())


def test_a_port_is_not_shared_with_another_model() -> None:
    async def run() -> None:
        port = free_port(0, "serve.port")
        other = Listener(Slow("other").app, "127.0.0.1", port, name="other", drain_seconds=1)
        await other.start()
        with pytest.raises(ServiceError, match="something else listens"):
            await listener(Slow(), port).start()
        await other.drain()

    asyncio.run(run())


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ServiceError, match=r"serve\.host"):
        asyncio.run(listener(Slow(), free_port(0, "serve.port"), host="192.0.2.1").start())


def test_nobody_is_let_in_from_elsewhere_without_a_key() -> None:
    given = {"name": "support", "tracking_uri": "http://127.0.0.1:1", "cache": "/c", "captures": "/d"}
    with pytest.raises(ConfigError, match=r"serve\.keys"):
        build_app(EndpointSettings.model_validate({**given, "serve": {"host": "0.0.0.0"}}))
