"""The HTTP endpoint: an ASGI application over a version table, without Ray."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from regraft.data.feedback import FeedbackStore
from regraft.records import Feedback
from serving import openapi
from serving.answer import Answer, EventStream, engine_error
from serving.engines.base import EngineError, GenerationRequest, QueueFullError
from serving.exchange import Asked, CaptureLog, Exchange, Observer
from serving.guard import sees_details
from serving.openai_api import (
    MAX_BODY,
    ApiError,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    parse_request,
)
from serving.prompts import read_prompts
from serving.replies import model_card
from serving.router import SHADOW, UnknownModelError, VersionTable
from serving.shadow import Shadow
from serving.shelf import Loaded, PinnedBusyError, UnavailableError

T = TypeVar("T")


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class _Endpoint:
    def __init__(
        self,
        table: VersionTable,
        log: CaptureLog,
        max_new_tokens: int,
        observer: Observer | None,
        feedback: FeedbackStore | None,
        shadow: Shadow | None,
        timeout_seconds: float | None,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self._table = table
        self._log = log
        self._max_new_tokens = max_new_tokens
        self._observer = observer
        self._feedback = feedback
        self._shadow = shadow
        self._timeout_seconds = timeout_seconds
        self._state = state
        self._started = int(time.time())

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(request, parse_request(ChatRequest, await _read_json(request)))

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        return await self._answer(request, parse_request(CompletionRequest, await _read_json(request)))

    async def feedback(self, request: Request) -> Response:
        """Keep what a client thinks of an answer."""
        assert self._feedback is not None
        body = parse_request(FeedbackRequest, await _read_json(request))
        record = Feedback(
            id=f"feedback-{secrets.token_hex(16)}",
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            answer_id=body.id,
            key=_key(request),
            **body.model_dump(exclude={"id"}),
        )
        try:
            self._feedback.append(record)
        except OSError as error:
            message = f"the feedback could not be stored: {error.strerror or 'the disk may be full'}"
            raise ApiError(503, message, code="feedback_unavailable", retry_after=1) from error
        stored = {"id": record.id, "object": "feedback", "created": record.created, "answer_id": body.id}
        return JSONResponse(stored, status_code=201)

    async def models(self) -> dict[str, Any]:
        """List what can be asked for now."""
        return {"object": "list", "data": [model_card(name, self._started) for name in self._table.names]}

    async def model(self, request: Request) -> dict[str, Any]:
        """Tell whether a model can be asked for."""
        model_id = request.path_params["model_id"]
        await _api_errors(self._table.find(model_id))
        return model_card(model_id, self._started)

    async def health(self, request: Request) -> Response:
        """What is loaded, and what went wrong last; where there are keys, in full for an admin alone."""
        champion = self._table.champion
        state: dict[str, Any] = {
            "status": "ok" if champion else "unavailable",
            "model": self._table.name,
            "champion": champion.served_id if champion else None,
        }
        if not sees_details(request.scope):
            return JSONResponse(state, status_code=200 if champion else 503)
        state = {
            **state,
            "reason": None if champion else self._table.why_not(),
            **self._table.health(),
            "captures": {
                "written": self._log.written,
                "dropped": self._log.dropped,
                "last_error": self._log.last_error,
            },
            **({"shadow_dropped": self._shadow.dropped} if self._shadow else {}),
            **self._state(),
        }
        return JSONResponse(state, status_code=200 if champion else 503)

    async def _answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        key = _key(request)
        loaded = await _api_errors(self._table.acquire(body.model, body.user or key))
        answer = Answer(self._table, loaded, body, request.scope)
        streaming = False
        try:
            await self._submit(answer, loaded, body, key)
            if not body.stream:
                return await _while_connected(request, answer.whole())
            await _while_connected(request, answer.ready())
            streaming = True
            return EventStream(answer.streamed(), answer.close, answer.headers)
        except (EngineError, QueueFullError) as error:
            if isinstance(error, QueueFullError):
                answer.withdraw()
            raise engine_error(error) from error
        except _ClientGoneError:
            return Response(status_code=499)
        finally:
            if not streaming:
                answer.close()

    async def _submit(
        self, answer: Answer, loaded: Loaded, body: ChatRequest | CompletionRequest, key: str | None
    ) -> None:
        wanted = self._wanted(body)
        prompts = await read_prompts(loaded.engine, body)
        several = len(prompts) * body.choices > 1
        for index in range(len(prompts) * body.choices):
            prompt, choice = prompts[index // body.choices], index % body.choices
            asked = Asked(
                id=f"{answer.id}-{index}" if several else answer.id,
                version=loaded.version,
                messages=prompt.messages,
                parameters=body.parameters,
                session=body.user,
                stream=body.stream,
                key=key,
                choice=index,
                variant=self._table.role_of(loaded.version),
            )
            request = GenerationRequest(
                prompt_ids=prompt.ids,
                max_new_tokens=min(wanted, loaded.engine.context_length - len(prompt.ids)),
                temperature=body.temperature or 0.0,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=body.seed_of(choice),
                stop=body.stops,
                logprobs=body.likeliest,
                whole=not body.stream,
            )
            answer.exchanges.append(self._exchange(asked, request, loaded))
            if self._shadow:
                self._shadow.mirror(body.user or asked.id, partial(self._shadowed, asked, request))

    def _exchange(self, asked: Asked, request: GenerationRequest, loaded: Loaded) -> Exchange:
        return Exchange(asked, request, loaded.engine, self._log, self._observer, self._timeout_seconds)

    def _shadowed(self, asked: Asked, request: GenerationRequest, loaded: Loaded) -> Exchange:
        """The same for a version that nobody sees."""
        engine, ids = loaded.engine, request.prompt_ids
        if loaded.version.base_revision != asked.version.base_revision:  # its tokens are others
            texts = [m.content for m in asked.messages]
            plain = asked.id.startswith("cmpl-")
            ids = tuple(engine.encode_text(texts[0]) if plain else engine.encode_chat(asked.messages))
        room = engine.context_length - len(ids)
        if room < 1:
            raise EngineError("the prompt is too long for it")
        asked = replace(asked, id=f"{asked.id}-shadow", version=loaded.version, variant=SHADOW, stream=False)
        most = min(request.max_new_tokens, room)
        return self._exchange(
            asked, replace(request, prompt_ids=ids, max_new_tokens=most, whole=True), loaded
        )

    def _wanted(self, body: ChatRequest | CompletionRequest) -> int:
        """How long an answer may be, in tokens."""
        if body.limit is None:
            return min(body.default_max_tokens or self._max_new_tokens, self._max_new_tokens)
        field, wanted = body.limit
        if wanted > self._max_new_tokens:
            raise ApiError(
                400,
                f"{field} is {wanted}; this endpoint answers with at most {self._max_new_tokens} tokens",
                code="invalid_value",
                param=field,
            )
        return wanted


def create_app(
    table: VersionTable,
    log: CaptureLog,
    *,
    max_new_tokens: int,
    observer: Observer | None = None,
    feedback: FeedbackStore | None = None,
    shadow: Shadow | None = None,
    timeout_seconds: float | None = None,
    state: Callable[[], dict[str, Any]] = dict,
) -> FastAPI:
    """Make the application. Its lifespan starts and stops the table.

    Args:
        table: The versions that answer.
        log: Where exchanges are captured.
        max_new_tokens: Upper bound on what one request may ask for.
        observer: Is told of each exchange as it goes.
        feedback: Where feedback is kept; without it there is no `/v1/feedback`.
        shadow: Mirrors requests to a version that nobody sees.
        timeout_seconds: How long an answer may take.
        state: More for `/health` to tell.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        table.start()
        try:
            yield
        finally:
            if shadow:
                await shadow.close()
            await table.stop()
            log.close()
            if feedback:
                feedback.close()

    app = FastAPI(title="Regraft endpoint", lifespan=lifespan)
    endpoint = _Endpoint(table, log, max_new_tokens, observer, feedback, shadow, timeout_seconds, state)
    # Bodies are read by hand, for the size limit and the shape of errors; the document shows them still.
    app.add_api_route(
        "/v1/chat/completions",
        endpoint.chat,
        methods=["POST"],
        response_model=None,
        responses=openapi.streamed(openapi.ChatCompletion, openapi.ChatCompletionChunk),
        openapi_extra=openapi.request_body(ChatRequest),
    )
    app.add_api_route(
        "/v1/completions",
        endpoint.completions,
        methods=["POST"],
        response_model=None,
        responses=openapi.streamed(openapi.Completion, openapi.Completion),
        openapi_extra=openapi.request_body(CompletionRequest),
    )
    if feedback:
        app.add_api_route(
            "/v1/feedback",
            endpoint.feedback,
            methods=["POST"],
            status_code=201,
            response_model=None,
            responses=openapi.responses(
                openapi.StoredFeedback, status=201, problems=(400, 401, 403, 413, 415, 429, 500, 503)
            ),
            openapi_extra=openapi.request_body(FeedbackRequest),
        )
    app.add_api_route(
        "/v1/models",
        endpoint.models,
        methods=["GET"],
        response_model=None,
        responses=openapi.responses(openapi.ModelList, problems=(401, 403, 429, 500)),
    )
    app.add_api_route(
        "/v1/models/{model_id:path}",
        endpoint.model,
        methods=["GET"],
        response_model=None,
        responses=openapi.responses(openapi.Model, problems=(401, 403, 404, 429, 500, 503)),
        openapi_extra=openapi.path_parameter("model_id", "As in `model` of a request."),
    )
    unwell: dict[int | str, Any] = {503: {"model": openapi.Health, "description": "No model can answer now."}}
    app.add_api_route(
        "/health",
        endpoint.health,
        methods=["GET"],
        response_model=None,
        responses={**openapi.responses(openapi.Health, problems=(500,)), **unwell},
    )
    openapi.describe(app)

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


def _key(request: Request) -> str | None:
    """The hash of the API key, which the middleware that checks keys leaves in the scope."""
    caller = request.scope.get("regraft.caller")
    return None if caller is None else caller.key


async def _read_json(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 415 if it is declared as something else than JSON, 413 if it is too large.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared and not declared.endswith(("/json", "+json")):
        raise ApiError(
            415, f"the body is {declared[:64]}; send application/json", code="unsupported_media_type"
        )
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
