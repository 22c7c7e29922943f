"""HTTP in the gateway's own process: Ray's proxy before it would take five milliseconds of every answer.

Gateways of one endpoint on one machine share their port (SO_REUSEPORT), so that a new one can take over from
an old one. Ray's proxies do so too, and another endpoint of the same user: who shared a port with those would
get a part of their requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regraft.errors import ServiceError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

#: How long a sibling may take to say who it is.
_SIBLING_SECONDS = 5.0
_TRIES = 3
#: How long the system holds connections that are not taken on yet, in number; uvicorn's own.
_BACKLOG = 2048
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Listener:
    """An application on a port of this process.

    Args:
        app: What answers; its lifespan is that of the listener.
        host: Address to listen on.
        port: Port to listen on.
        name: The model that is served; gateways of the same one may share the port.
        drain_seconds: How long requests that have begun may take when it stops.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, name: str, drain_seconds: float) -> None:
        self._app, self._host, self._port = app, host, port
        self._name, self._drain_seconds = name, drain_seconds
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; returns when connections are taken on.

        Raises:
            ServiceError: If the port is somebody else's, or the address none of this machine's.
        """
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are Ray's

        await self._refuse_strangers()
        sock = self._bound()
        config = uvicorn.Config(
            self._app,
            backlog=_BACKLOG,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(self._drain_seconds)),
        )
        self._server = Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([sock]))
        while not self._server.started:
            if self._serving.done():
                sock.close()
                self._serving.result()
                raise ServiceError("the endpoint's HTTP server ended as it began", "see the gateway's log")
            await asyncio.sleep(0.01)
        logger.info("listening on %s:%d", self._host, self._port)

    def check(self) -> None:
        """See that it still listens.

        Raises:
            RuntimeError: If it does not.
        """
        if self._serving is None or self._serving.done():
            raise RuntimeError(f"the gateway does not listen on {self._host}:{self._port} any more")

    async def drain(self) -> None:
        """Take nothing more on, and return when what has begun has ended, or has had its time."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def _bound(self) -> socket.socket:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = socket.socket(family, kind)
        except OSError as error:
            raise self._cannot(error) from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise self._cannot(error) from error
        return sock

    def _cannot(self, error: OSError) -> ServiceError:
        return ServiceError(
            f"cannot listen on {self._host}:{self._port}: {error.strerror}",
            "set serve.port to another port, or serve.host to an address of this machine",
        )

    async def _refuse_strangers(self) -> None:
        """See that whoever listens there already is a gateway of the same model.

        Raises:
            ServiceError: If it is somebody else.
        """
        import httpx

        host = _EVERYWHERE.get(self._host, self._host)
        url = f"http://[{host}]" if ":" in host else f"http://{host}"
        for _ in range(_TRIES):
            try:
                async with httpx.AsyncClient(timeout=_SIBLING_SECONDS, trust_env=False) as http:
                    said: Any = (await http.get(f"{url}:{self._port}/health")).json()
            except httpx.ConnectError:
                return  # nobody
            except httpx.HTTPError:  # a sibling may be about to go
                said = None
                continue
            except ValueError:
                said = None
            break
        if not isinstance(said, dict) or said.get("model") != self._name:
            raise ServiceError(
                f"something else listens on {self._host}:{self._port} already",
                "set serve.port to another port; if it is Ray's proxy, serve.ingress: proxy goes through it",
            )
