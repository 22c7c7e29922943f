"""A version that answers beside the others without anybody seeing it: its answers are only captured."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from regraft.data.captures import sampled
from serving.exchange import Exchange
from serving.router import VersionTable
from serving.shelf import Loaded

logger = logging.getLogger(__name__)


@dataclass
class Shadow:
    """Mirrors requests. It gives way: what it has no room for is dropped and counted.

    Attributes:
        table: Has the version.
        share: Of the requests, or of the sessions where there are some, from 0 to 1.
        max_running: Requests that it answers at once.
        room: Requests of all under way from which on it has no room: those who wait for their answers come
            first.
    """

    table: VersionTable
    share: float
    max_running: int
    room: int
    dropped: int = 0
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    def mirror(self, who: str, exchange: Callable[[Loaded], Exchange]) -> None:
        """Have a request answered in the background, if it is drawn.

        Args:
            who: The session, or the id of the request.
            exchange: Makes the exchange with the version that it is given.
        """
        loaded = self.table.shadow
        if loaded is None or not sampled(f"shadow:{who}", self.share):
            return
        if len(self._running) >= self.max_running or self.table.requests > self.room:
            self.dropped += 1
            return
        task = asyncio.get_running_loop().create_task(self._answer(loaded, exchange))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Stop answering."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _answer(self, loaded: Loaded, make: Callable[[Loaded], Exchange]) -> None:
        async with self.table.held(loaded):
            exchange = None
            try:
                exchange = make(loaded)
                async for _ in exchange:
                    pass
            except Exception as error:  # nobody waits for it: it is captured, if it has begun, and counted
                self.dropped += 1
                logger.info("the shadow %s did not answer: %s", loaded.version.served_id, error)
            finally:
                if exchange:
                    exchange.close()
