"""One prompt and its answer, from acceptance to capture."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from regraft.data.captures import CaptureStore
from regraft.records import CapturedExchange, Message, ModelVersion
from serving.engines.base import Engine, EngineError, Finished, GenerationRequest, TextDelta

logger = logging.getLogger(__name__)


class CaptureLog:
    """The capture store as the endpoint uses it: a full disk is counted, and never fails an answer."""

    def __init__(self, store: CaptureStore) -> None:
        self._store = store
        self.written = 0
        self.dropped = 0
        self.last_error: str | None = None

    def append(self, exchange: CapturedExchange) -> None:
        """Keep an exchange if at all possible."""
        try:
            self._store.append(exchange)
            self.written += 1
        except OSError as error:
            self.dropped += 1
            self.last_error = str(error)
            logger.exception("exchange %s could not be captured", exchange.id)

    def close(self) -> None:
        """Close the file being written."""
        self._store.close()


@dataclass(frozen=True)
class Asked:
    """What was asked, as the capture keeps it."""

    id: str
    version: ModelVersion
    messages: Sequence[Message]
    parameters: dict[str, Any]
    session: str | None
    stream: bool


class Exchange:
    """Follows one answer. Iterating gives its text; it is captured once, however it ends.

    Raises:
        QueueFullError: If the engine takes no more requests.
        EngineClosedError: If the engine is closed.
    """

    def __init__(self, asked: Asked, request: GenerationRequest, engine: Engine, log: CaptureLog) -> None:
        self.finish_reason: str | None = None
        self.prompt_tokens = len(request.prompt_ids)
        self.completion_tokens = 0
        self._asked = asked
        self._log = log
        self._texts: list[str] = []
        self._pending: str | None = None
        self._created = datetime.now(UTC)
        self._begun = time.perf_counter()
        self._first: float | None = None
        self._captured = False
        self._events = engine.submit(request)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts)

    async def ready(self) -> None:
        """Wait for the first text, or for the end if there is none.

        Raises:
            EngineError: If generation fails before that; there is still time for an HTTP status then.
        """
        self._pending = await self._next()

    async def __aiter__(self) -> AsyncIterator[str]:
        if self._pending is not None:
            text, self._pending = self._pending, None
            yield text
        while (text_or_end := await self._next()) is not None:
            yield text_or_end

    async def rest(self) -> None:
        """Wait for the end of the answer."""
        async for _ in self:
            pass

    def close(self) -> None:
        """End the exchange; one that has not come to its end is captured as aborted."""
        self._events.cancel()
        self._capture("aborted")

    def withdraw(self) -> None:
        """Cancel without a trace: the request as a whole was refused."""
        self._captured = True
        self._events.cancel()

    async def _next(self) -> str | None:
        if self._captured:
            return None
        try:
            event = await anext(self._events)
        except EngineError as error:
            self._capture("error", str(error))
            raise
        if isinstance(event, TextDelta):
            if self._first is None:
                self._first = time.perf_counter() - self._begun
            self.completion_tokens += 1  # an estimate, in case the exact count never comes
            self._texts.append(event.text)
            return event.text
        assert isinstance(event, Finished)
        self.completion_tokens = event.completion_tokens
        self._capture(event.reason)
        return None

    def _capture(self, reason: str, error: str | None = None) -> None:
        if self._captured:
            return
        self._captured = True
        self.finish_reason = reason
        asked = self._asked
        self._log.append(
            CapturedExchange(
                id=asked.id,
                created=self._created.isoformat(timespec="microseconds"),
                model=asked.version.name,
                model_version=asked.version.version,
                messages=tuple(asked.messages),
                output=self.text,
                finish_reason=reason,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self.completion_tokens,
                latency_ms=1000 * (time.perf_counter() - self._begun),
                first_token_ms=None if self._first is None else 1000 * self._first,
                stream=asked.stream,
                session=asked.session,
                parameters=asked.parameters,
                error=error,
            )
        )
