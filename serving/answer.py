"""The answer to one HTTP request: its version, an exchange for each choice, and how they are sent."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineTimeoutError,
    QueueFullError,
    TextDelta,
)
from serving.exchange import Exchange
from serving.openai_api import ApiError, ChatRequest, CompletionRequest
from serving.replies import Choice, Counts, Reply, sse
from serving.router import VersionTable
from serving.shelf import Loaded

VERSION_HEADER = "x-regraft-version"


class EventStream(StreamingResponse):
    """A stream of server-sent events that cleans up even if it is never started."""

    def __init__(
        self, content: AsyncIterator[bytes], done: Callable[[], None], headers: dict[str, str]
    ) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache", **headers}
        )
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class Answer:
    """Everything one HTTP request holds. Whoever makes one closes it.

    Args:
        table: Where the version is given back.
        loaded: The version that answers.
        body: What was asked.
        scope: Of the HTTP request; is told how many tokens it took.
    """

    def __init__(
        self, table: VersionTable, loaded: Loaded, body: ChatRequest | CompletionRequest, scope: Scope
    ) -> None:
        chat = isinstance(body, ChatRequest)
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(16)
        self.exchanges: list[Exchange] = []
        self.version = loaded.version
        self._table, self._scope = table, scope
        self._loaded: Loaded | None = loaded
        self._each = body.choices
        self._usage = body.stream and body.stream_options is not None and body.stream_options.include_usage
        self._reply = Reply(
            self.id,
            int(time.time()),
            loaded.version.served_id,
            chat=chat,
            logprobs=body.likeliest,
            usage=self._usage,
        )

    @property
    def headers(self) -> dict[str, str]:
        """What is told beside the body."""
        return {VERSION_HEADER: self.version.served_id, "x-request-id": self.id}

    def close(self) -> None:
        """End what has not ended and give the version back; only the first call does anything."""
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            for exchange in self.exchanges:
                exchange.close()
            counts = self._counts()
            self._scope["regraft.used"] = counts.prompt + counts.completion
            self._table.release(loaded)

    def withdraw(self) -> None:
        """Cancel all of it without a capture: the request was refused."""
        for exchange in self.exchanges:
            exchange.withdraw()

    async def whole(self) -> Response:
        """The answer in one piece, when all of it is there.

        Raises:
            EngineError: If a choice fails.
            QueueFullError: If the engine does not take one on.
        """
        async for _ in _merged(self.exchanges):
            pass
        choices = [Choice(e.text, str(e.finish_reason), e.tokens) for e in self.exchanges]
        return JSONResponse(self._reply.whole(choices, self._counts()), headers=self.headers)

    async def ready(self) -> None:
        """Wait for the first text; until then a failure can still be told by the status.

        Raises:
            EngineError: If generation fails before.
            QueueFullError: If the engine does not take it on.
        """
        await self.exchanges[0].ready()

    async def streamed(self) -> AsyncIterator[bytes]:
        """The answer in events, choices as they come."""
        try:
            for index in range(len(self.exchanges)):
                if opening := self._reply.opening(index):
                    yield sse(opening)
            async for index, delta in _merged(self.exchanges):
                if delta is not None:
                    yield sse(self._reply.delta(index, delta.text, delta.tokens))
                else:
                    yield sse(self._reply.end(index, str(self.exchanges[index].finish_reason)))
        except (EngineError, QueueFullError) as error:  # too late for a status: the stream says it
            yield sse(engine_error(error).body)
            return
        if self._usage:
            yield sse(self._reply.usage(self._counts()))
        yield sse("[DONE]")

    def _counts(self) -> Counts:
        prompts = self.exchanges[:: self._each]  # choices share their prompt
        return Counts(sum(e.prompt_tokens for e in prompts), sum(e.completion_tokens for e in self.exchanges))


async def _merged(exchanges: Sequence[Exchange]) -> AsyncIterator[tuple[int, TextDelta | None]]:
    """What comes of exchanges, each with its index; None says that one has ended."""
    if len(exchanges) == 1:  # the usual case, without a task for each token
        async for delta in exchanges[0]:
            yield 0, delta
        yield 0, None
        return
    waiting = {asyncio.ensure_future(e.next()): index for index, e in enumerate(exchanges)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                more, index = task.result(), waiting.pop(task)
                yield index, more
                if more is not None:
                    waiting[asyncio.ensure_future(exchanges[index].next())] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def engine_error(error: EngineError | QueueFullError) -> ApiError:
    """How the failure of an engine is told."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineTimeoutError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="model_unavailable", retry_after=1)
    return ApiError(500, str(error), code="engine_error")
