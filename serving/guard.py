"""Stands before the endpoint: no key, no answer; too much asked, try later.

Plain ASGI, so that streams pass through as they come. It leaves who asks in `scope["regraft.caller"]` and
takes the tokens that were used from `scope["regraft.used"]`. Keys end here: the application sees no header
that carries one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from regraft.serve_sections import LimitsSection
from serving import auth
from serving.auth import Caller, Key, Keyring, KeysError
from serving.limits import Kind, Limiter, RateLimitedError, Reservation
from serving.openai_api import MAX_BODY, ApiError, CompletionRequest

logger = logging.getLogger(__name__)

#: Asks for the health of an endpoint whose other routes need a key. `None` is for an open endpoint.
ANONYMOUS = Caller("", "anonymous", frozenset())
_CARRIERS = (b"authorization", b"api-key")


def scope_of(path: str) -> auth.Scope | None:
    """What a route needs; None for one that is free. What is not known needs the most."""
    if path == "/health":
        return None
    if path == "/v1/feedback" or path.startswith("/v1/feedback/"):
        return "feedback"
    if path.startswith("/v1/") or path in ("/openapi.json", "/docs", "/redoc"):
        return "use"
    return "admin"


def sees_details(scope: Scope) -> bool:
    """Whether the one who asks may know what goes on inside."""
    caller: Caller | None = scope.get("regraft.caller")
    return caller is None or "admin" in caller.scopes


class Guard:
    """The middleware.

    Args:
        app: The endpoint.
        keys: Who may ask; None lets anybody.
        limits: For keys that have none of their own; without keys, for all callers together.
        max_new_tokens: Upper bound on what one request may ask for.
        limiter: The buckets.
        refused: Is told of each request that asked too much.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keyring | None,
        *,
        limits: LimitsSection | None = None,
        max_new_tokens: int,
        limiter: Limiter | None = None,
        refused: Callable[[Kind], None] | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits or LimitsSection()
        self._max_new_tokens = max_new_tokens
        self._limiter = limiter or Limiter()
        self._refused = refused
        self._broken: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let the endpoint answer it."""
        if scope["type"] == "websocket":  # the endpoint has none, and none gets past
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        try:
            caller, key = self._admit(scope, path)
            reservation, receive = await self._reserve(scope, path, key, receive)
        except ApiError as error:
            await _answer(error, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _CARRIERS]
        inner = {**scope, "headers": headers, "regraft.caller": caller}
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(reservation.headers)
            await send(message)

        try:
            await self._app(inner, receive, sending)
        finally:
            reservation.settle(_used(inner, status))

    def _admit(self, scope: Scope, path: str) -> tuple[Caller | None, Key | None]:
        """Who asks, and by which key.

        Raises:
            ApiError: If the one who asks may not.
        """
        if self._keys is None:
            return None, None
        needed = scope_of(path)
        presented = _presented(scope)
        try:
            key = None if presented is None else self._find(presented)
            caller = _caller(key, presented)
        except ApiError:
            if needed is None:
                return ANONYMOUS, None
            raise
        if needed is not None and needed not in caller.scopes:
            raise ApiError(
                403,
                f"key {caller.key} has not the scope {needed}, which this needs",
                code="insufficient_scope",
            )
        return caller, key

    def _find(self, presented: str) -> Key | None:
        assert self._keys is not None
        try:
            key = self._keys.find(presented)
        except KeysError as error:
            if str(error) != self._broken:  # once, not for every request
                logger.error("nobody is let in: %s", error)  # noqa: TRY400 - the message is enough
            self._broken = str(error)
            raise ApiError(
                503, "the keys cannot be read; see the endpoint's log", code="keys_unreadable", retry_after=5
            ) from error
        self._broken = None
        return key

    async def _reserve(
        self, scope: Scope, path: str, key: Key | None, receive: Receive
    ) -> tuple[Reservation, Receive]:
        """What the request may use, and the receive function that gives its body once more.

        Raises:
            ApiError: If that is too much.
        """
        if (self._keys is not None and key is None) or scope_of(path) not in ("use", "feedback"):
            return Reservation(0, None, {}), receive
        limits = self._limits
        if key is not None:
            given = {name: value for name, value in key.limits if value is not None}
            limits = limits.model_copy(update=given)
        tokens = 0
        if limits.tokens_per_minute is not None and scope["method"] == "POST" and scope_of(path) == "use":
            body, receive = await _read(receive)
            tokens = estimate(body, path, self._max_new_tokens)
        try:
            reservation = self._limiter.reserve("" if key is None else key.id, limits, tokens)
        except RateLimitedError as error:
            if self._refused is not None:
                self._refused(error.kind)
            refusal = ApiError(429, str(error), code="rate_limit_exceeded")
            refusal.headers |= error.headers
            raise refusal from error
        return reservation, receive


def estimate(raw: bytes, path: str, max_new_tokens: int) -> int:
    """Tokens that a request may use: a token for four bytes of it, and all it may get for each answer.

    What is no valid request counts as its bytes alone; the endpoint refuses it.
    """
    prompt = math.ceil(len(raw) / 4)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return prompt
    if not isinstance(body, dict):
        return prompt
    default = max_new_tokens
    if path == "/v1/completions":
        default = min(default, CompletionRequest.default_max_tokens or default)
    limits = (_whole(body.get(name)) for name in ("max_completion_tokens", "max_tokens"))
    answer = min(next((limit for limit in limits if limit is not None), default), max_new_tokens)
    prompts = body.get("prompt")
    answers = _whole(body.get("n")) or 1
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        answers *= len(prompts)
    return prompt + answers * answer


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _used(scope: Scope, status: int) -> int | None:
    used: int | None = scope.get("regraft.used")
    if used is None and status >= 400 and status != 499:
        return 0  # refused or failed; 499 is for clients that went away, who might do so to pay nothing
    return used


def _caller(key: Key | None, presented: str | None) -> Caller:
    if presented is None:
        raise _unauthorised("no API key: send `Authorization: Bearer rg-...`", "missing_api_key")
    if key is None:
        raise _unauthorised("there is no such API key", "invalid_api_key")
    state = key.state(auth.now())
    if state != "valid":
        raise _unauthorised(f"the API key {key.id} is {state}", "invalid_api_key")
    return Caller(key.id, key.name, frozenset(key.scopes))


def _unauthorised(message: str, code: str) -> ApiError:
    error = ApiError(401, message, code=code)
    error.headers["WWW-Authenticate"] = "Bearer"
    return error


def _presented(scope: Scope) -> str | None:
    """The key in a request's headers."""
    found: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), value.decode("latin-1"))
    scheme, _, key = found.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return found.get(b"api-key", "").strip() or None


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The body, as far as it is looked into, and a receive function that begins at its beginning."""
    messages: list[Message] = []
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= MAX_BODY:  # the endpoint refuses larger ones
        message = await receive()
        messages.append(message)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message["type"] == "http.request" and message.get("more_body", False)
    messages.reverse()

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return b"".join(parts), again


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
