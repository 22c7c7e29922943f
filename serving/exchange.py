"""One prompt and its answer, from acceptance to capture."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from regraft.data.captures import CaptureStore
from regraft.records import CapturedExchange, Message, ModelVersion
from serving.engines.base import (
    Engine,
    EngineError,
    EngineTimeoutError,
    Event,
    Finished,
    GenerationRequest,
    QueueFullError,
    TextDelta,
    TokenLogprob,
)

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
            self.written += self._store.append(exchange)
        except OSError as error:
            self.dropped += 1
            self.last_error = str(error)
            logger.exception("exchange %s could not be captured", exchange.id)

    def close(self) -> None:
        """Close the file being written."""
        self._store.close()


@dataclass(frozen=True)
class Asked:
    """What was asked, as the capture keeps it.

    Attributes:
        key: Hash of the API key that asked.
        choice: Place among the choices of the HTTP request.
        variant: In which role the version answers: champion, challenger, shadow or pinned.
    """

    id: str
    version: ModelVersion
    messages: Sequence[Message]
    parameters: dict[str, Any]
    session: str | None
    stream: bool
    key: str | None = None
    choice: int = 0
    variant: str = "champion"


class Observer(Protocol):
    """Is told of each exchange as it goes; its methods must be quick. Every `began` has its `ended`."""

    def began(self, version: ModelVersion, prompt_tokens: int, /) -> None:
        """The engine has taken the request on."""

    def queued(self, version: ModelVersion, seconds: float, /) -> None:
        """It waited so long until an engine worked for it; told at its end."""

    def first_token(self, version: ModelVersion, seconds: float, /) -> None:
        """The first text is there, so long after `began`."""

    def token(self, version: ModelVersion, seconds_since_last: float, /) -> None:
        """More text is there, so long after the text before it."""

    def ended(
        self,
        version: ModelVersion,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        /,
    ) -> None:
        """It is over, so long after `began`.

        The reason is stop, length, error, aborted (nobody waited any more) or withdrawn (the HTTP request
        as a whole was refused).
        """


class Exchange:
    """Follows one answer. Iterating gives its text and tokens; it is captured once, however it ends.

    Raises:
        QueueFullError: If the engine takes no more requests.
        EngineClosedError: If the engine is closed.
    """

    def __init__(
        self,
        asked: Asked,
        request: GenerationRequest,
        engine: Engine,
        log: CaptureLog,
        observer: Observer | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        self.finish_reason: str | None = None
        self.prompt_tokens = len(request.prompt_ids)
        self.completion_tokens = 0
        self._asked = asked
        self._log = log
        self._observer = observer
        self._texts: list[str] = []
        self._tokens: list[TokenLogprob] = []
        self._pending: TextDelta | None = None
        self._created = datetime.now(UTC)
        self._begun = time.perf_counter()
        self._whole = request.whole
        self._timeout_seconds = timeout_seconds
        self._deadline = timeout_seconds and asyncio.get_running_loop().time() + timeout_seconds
        self._first: float | None = None
        self._last = self._begun
        self._ended = False
        self._events = engine.submit(request)
        if observer:
            observer.began(asked.version, self.prompt_tokens)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts)

    @property
    def tokens(self) -> list[TokenLogprob]:
        """The tokens of the answer so far, if the request asked for log-probabilities."""
        return self._tokens

    async def ready(self) -> None:
        """Wait for the first text, or for the end if there is none.

        Raises:
            EngineError: If generation fails before that; there is still time for an HTTP status then.
        """
        self._pending = await self._receive()

    async def next(self) -> TextDelta | None:
        """More of the answer, or None at its end.

        Raises:
            EngineError: If generation fails or takes too long.
            QueueFullError: If the engine takes no more requests.
        """
        pending, self._pending = self._pending, None
        return pending or await self._receive()

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        while (delta := await self.next()) is not None:
            yield delta

    def close(self) -> None:
        """End the exchange; one that has not come to its end is captured as aborted."""
        self._events.cancel()
        self._end("aborted")

    def withdraw(self) -> None:
        """Cancel without a capture: the HTTP request as a whole was refused."""
        self._events.cancel()
        self._end("withdrawn", captured=False)

    async def _receive(self) -> TextDelta | None:
        if self._ended:
            return None
        try:
            event = await self._event()
        except QueueFullError:
            self._end("withdrawn", captured=False)
            raise
        except EngineError as error:
            self._end("error", str(error))
            raise
        if isinstance(event, TextDelta):
            if not self._whole:
                self._measure()
            self.completion_tokens += 1  # an estimate, in case the exact count never comes
            self._texts.append(event.text)
            self._tokens += event.tokens
            return event
        assert isinstance(event, Finished)
        self.completion_tokens = event.completion_tokens
        if self._whole and event.first_token_seconds is not None:
            self._first = event.first_token_seconds
            if self._observer:
                self._observer.first_token(self._asked.version, self._first)
        if self._observer and event.busy_seconds is not None:
            waited = time.perf_counter() - self._begun - event.busy_seconds
            self._observer.queued(self._asked.version, max(0.0, waited))
        self._end(event.reason)
        return None

    async def _event(self) -> Event:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._events)
        except TimeoutError as error:
            self._events.cancel()
            raise EngineTimeoutError(
                f"the answer took more than {self._timeout_seconds:g} seconds"
            ) from error

    def _measure(self) -> None:
        now, version = time.perf_counter(), self._asked.version
        if self._first is None:
            self._first = now - self._begun
            if self._observer:
                self._observer.first_token(version, self._first)
        elif self._observer:
            self._observer.token(version, now - self._last)
        self._last = now

    def _end(self, reason: str, error: str | None = None, *, captured: bool = True) -> None:
        if self._ended:
            return
        self._ended = True
        self.finish_reason = reason
        asked, seconds = self._asked, time.perf_counter() - self._begun
        if self._observer:
            counts = (self.prompt_tokens, self.completion_tokens)
            self._observer.ended(asked.version, reason, *counts, seconds)
        if not captured:
            return
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
                latency_ms=1000 * seconds,
                first_token_ms=None if self._first is None else 1000 * self._first,
                stream=asked.stream,
                session=asked.session,
                parameters=asked.parameters,
                error=error,
                key=asked.key,
                choice=asked.choice,
                variant=asked.variant,
            )
        )
