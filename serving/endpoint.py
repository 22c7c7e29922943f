"""The HTTP endpoint: an ASGI application over a version table, without Ray."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from regraft.records import Message
from serving.engines.base import EngineClosedError, EngineError, GenerationRequest, QueueFullError
from serving.exchange import Asked, CaptureLog, Exchange
from serving.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Reply,
    model_card,
    parse_request,
    sse,
)
from serving.router import (
    CHAMPION,
    Loaded,
    PinnedBusyError,
    UnavailableError,
    UnknownModelError,
    VersionTable,
)

MAX_BODY = 1 << 20
VERSION_HEADER = "x-regraft-version"
T = TypeVar("T")


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class _EventStream(StreamingResponse):
    """A stream of server-sent events that cleans up even if it is never started."""

    def __init__(
        self, content: AsyncIterator[bytes], done: Callable[[], None], headers: dict[str, str]
    ) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache", **headers}
        )
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class _Answer:
    """Everything one HTTP request holds: its version, and an exchange for each prompt."""

    def __init__(self, table: VersionTable, loaded: Loaded, *, chat: bool) -> None:
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(16)
        self.exchanges: list[Exchange] = []
        self.version = loaded.version
        self._table = table
        self._loaded: Loaded | None = loaded
        self._reply = Reply(self.id, int(time.time()), loaded.version.served_id, chat=chat)

    @property
    def headers(self) -> dict[str, str]:
        return {VERSION_HEADER: self.version.served_id, "x-request-id": self.id}

    def close(self) -> None:
        """End what has not ended and give the version back; only the first call does anything."""
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            for exchange in self.exchanges:
                exchange.close()
            self._table.release(loaded)

    async def whole(self) -> Response:
        for exchange in self.exchanges:
            async for _ in exchange:
                pass
        answers = [(e.text, str(e.finish_reason)) for e in self.exchanges]
        return JSONResponse(self._reply.whole(answers, *self._tokens()), headers=self.headers)

    async def streamed(self, usage: bool) -> AsyncIterator[bytes]:
        try:
            for index, exchange in enumerate(self.exchanges):
                opening = self._reply.opening(index)
                if opening:
                    yield sse(opening)
                async for delta in exchange:
                    yield sse(self._reply.delta(index, delta.text))
                yield sse(self._reply.delta(index, "", exchange.finish_reason))
        except EngineError as error:  # too late for a status: the stream says it
            yield sse(_engine_error(error).body)
            return
        if usage:
            yield sse(self._reply.usage(*self._tokens()))
        yield sse("[DONE]")

    def _tokens(self) -> tuple[int, int]:
        return sum(e.prompt_tokens for e in self.exchanges), sum(e.completion_tokens for e in self.exchanges)


class _Endpoint:
    def __init__(self, table: VersionTable, log: CaptureLog, max_new_tokens: int) -> None:
        self._table = table
        self._log = log
        self._max_new_tokens = max_new_tokens
        self._started = int(time.time())

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        body = parse_request(ChatRequest, await _read(request))
        return await self._answer(request, body, [[m.message for m in body.messages]])

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        body = parse_request(CompletionRequest, await _read(request))
        return await self._answer(request, body, [[Message(role="user", content=p)] for p in body.prompts])

    async def models(self) -> dict[str, Any]:
        """List what can be asked for now."""
        names = [self._table.name, f"{self._table.name}@{CHAMPION}"] if self._table.champion else []
        names += [version.served_id for version in self._table.versions]
        return {"object": "list", "data": [model_card(name, self._started) for name in names]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """Tell whether a model can be asked for."""
        await _api_errors(self._table.find(model_id))
        return model_card(model_id, self._started)

    async def health(self) -> Response:
        """What is loaded, and what went wrong last."""
        up = self._table.champion is not None
        state = {
            "status": "ok" if up else "unavailable",
            "reason": None if up else self._table.why_not(),
            **self._table.health(),
            "captures": {
                "written": self._log.written,
                "dropped": self._log.dropped,
                "last_error": self._log.last_error,
            },
        }
        return JSONResponse(state, status_code=200 if up else 503)

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[Message]]
    ) -> Response:
        loaded = await _api_errors(self._table.acquire(body.model))
        answer = _Answer(self._table, loaded, chat=isinstance(body, ChatRequest))
        streaming = False
        try:
            await self._submit(answer, loaded, body, prompts)
            if not body.stream:
                return await _while_connected(request, answer.whole())
            # Until the first text is there, a failure can still be told by the status.
            await _while_connected(request, answer.exchanges[0].ready())
            streaming = True
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(answer.streamed(usage), answer.close, answer.headers)
        except EngineError as error:
            raise _engine_error(error) from error
        except _ClientGoneError:
            return Response(status_code=499)
        finally:
            if not streaming:
                answer.close()

    async def _submit(
        self,
        answer: _Answer,
        loaded: Loaded,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[Message]],
    ) -> None:
        requests = [await self._request(loaded, body, messages) for messages in prompts]
        try:
            for index, (messages, request) in enumerate(zip(prompts, requests, strict=True)):
                asked = Asked(
                    id=answer.id if len(prompts) == 1 else f"{answer.id}-{index}",
                    version=loaded.version,
                    messages=messages,
                    parameters=body.parameters,
                    session=body.user,
                    stream=body.stream,
                )
                answer.exchanges.append(Exchange(asked, request, loaded.engine, self._log))
        except QueueFullError as error:
            for exchange in answer.exchanges:
                exchange.withdraw()
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error

    async def _request(
        self, loaded: Loaded, body: ChatRequest | CompletionRequest, messages: Sequence[Message]
    ) -> GenerationRequest:
        if body.limit is None:
            wanted = min(body.default_max_tokens or self._max_new_tokens, self._max_new_tokens)
        else:
            field, wanted = body.limit
            if wanted > self._max_new_tokens:
                raise ApiError(
                    400,
                    f"{field} is {wanted}; this endpoint answers with at most {self._max_new_tokens} tokens",
                    code="invalid_value",
                    param=field,
                )
        field = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            if isinstance(body, ChatRequest):
                ids = await asyncio.to_thread(loaded.engine.encode_chat, messages)
            else:
                ids = await asyncio.to_thread(loaded.engine.encode_text, messages[0].content)
        except Exception as error:  # chat templates refuse what they do not like in ways of their own
            raise ApiError(400, f"{field}: {error}", code="invalid_value", param=field) from error
        room = loaded.engine.context_length - len(ids)
        if not ids or room < 1:
            raise ApiError(
                400,
                f"{field}: {len(ids)} tokens, but the model's context holds {loaded.engine.context_length}, "
                "answer included",
                code="context_length_exceeded",
                param=field,
            )
        return GenerationRequest(
            prompt_ids=tuple(ids),
            max_new_tokens=min(wanted, room),
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stops,
        )


def create_app(table: VersionTable, log: CaptureLog, *, max_new_tokens: int) -> FastAPI:
    """Make the application. Its lifespan starts and stops the table.

    Args:
        table: The versions that answer.
        log: Where exchanges are captured.
        max_new_tokens: Upper bound on what one request may ask for.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        table.start()
        try:
            yield
        finally:
            await table.stop()
            log.close()

    app = FastAPI(title="Regraft endpoint", lifespan=lifespan)
    endpoint = _Endpoint(table, log, max_new_tokens)
    for path, post, body in (
        ("/v1/chat/completions", endpoint.chat, ChatRequest),
        ("/v1/completions", endpoint.completions, CompletionRequest),
    ):
        # Bodies are read by hand, for the size limit and the shape of errors; the document shows them still.
        schema = {
            "requestBody": {"content": {"application/json": {"schema": _inline(body.model_json_schema())}}}
        }
        app.add_api_route(path, post, methods=["POST"], response_model=None, openapi_extra=schema)
    app.add_api_route("/v1/models", endpoint.models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", endpoint.model, methods=["GET"])
    app.add_api_route("/health", endpoint.health, methods=["GET"], response_model=None)

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "internal error; see the endpoint's log").body, 500)

    return app


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(413, f"the body has more than {MAX_BODY} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, but give it up when the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGoneError
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()


async def _api_errors(work: Awaitable[T]) -> T:
    try:
        return await work
    except UnknownModelError as error:
        raise ApiError(404, str(error), code="model_not_found", param="model") from error
    except PinnedBusyError as error:
        raise ApiError(429, str(error), code="versions_busy", retry_after=1) from error
    except UnavailableError as error:
        raise ApiError(503, str(error), code="model_unavailable", retry_after=1) from error


def _engine_error(error: EngineError) -> ApiError:
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="model_unavailable", retry_after=1)
    return ApiError(500, str(error), code="engine_error")


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, which would point nowhere inside an OpenAPI document."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
