"""The shapes of the OpenAI API: what may be asked, how it is answered, how an error looks.

Nothing here knows models or HTTP routes. Two defaults are not OpenAI's: the temperature is 0, because that
is how the served version was evaluated, and a chat may be as long as the endpoint allows.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from regraft.records import Message

#: Fields we do not support, with the values that change nothing and are therefore accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}


class ApiError(Exception):
    """An error as the OpenAI API shows it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool = False


class _Request(BaseModel):
    """What both operations take."""

    model_config = ConfigDict(extra="allow", frozen=True)

    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 (greedy) if not given.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(
        None, max_length=256, description="Kept as the session of the captured exchange."
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 0 < len(s) <= 256 for s in stops):
            raise ValueError("at most 4 stop strings of 1 to 256 characters")
        return value

    @field_validator("stream", mode="before")
    @classmethod
    def _stream_may_be_null(cls, value: Any) -> Any:
        return False if value is None else value

    @model_validator(mode="after")
    def _supported(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise UnsupportedError(name)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> tuple[str, int] | None:
        """The field with which the client bounds the answer, and its value."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def parameters(self) -> dict[str, Any]:
        """The sampling parameters that were given, for the capture."""
        names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
        return {n: v for n in names if (v := getattr(self, n, None)) is not None}


class UnsupportedError(Exception):
    """A field that this endpoint does not support, with a value that matters.

    No ValueError, so that pydantic lets it pass as it is.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn as a client writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def message(self) -> Message:
        """The turn as a record."""
        return Message(role="system" if self.role == "developer" else self.role, content=self.text)

    @model_validator(mode="after")
    def _not_empty(self) -> ChatMessage:
        if not self.text:
            raise ValueError("content must not be empty")
        return self


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> tuple[str, int] | None:
        """The field with which the client bounds the answer, and its value; the newer name wins."""
        newer = self.max_completion_tokens
        return super().limit if newer is None else ("max_completion_tokens", newer)


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: str | list[str]

    @field_validator("prompt")
    @classmethod
    def _some_prompts(cls, value: str | list[str]) -> str | list[str]:
        prompts = [value] if isinstance(value, str) else value
        if not 1 <= len(prompts) <= 32 or not all(prompts):
            raise ValueError("1 to 32 prompts, none of them empty")
        return value

    @property
    def prompts(self) -> list[str]:
        """The prompts, each answered on its own."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


Body = TypeVar("Body", bound=_Request)


def parse_request(kind: type[Body], raw: bytes) -> Body:
    """Read the body of a request.

    Raises:
        ApiError: If it is not valid; 400, naming the field.
    """
    try:
        return kind.model_validate_json(raw)
    except UnsupportedError as error:
        raise ApiError(
            400,
            f"{error.name} is not supported by this endpoint",
            code="unsupported_parameter",
            param=error.name,
        ) from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        # A union reports which of its members failed too: the field is what comes before that.
        where = [str(p) for p in problem["loc"] if p not in ("str", "list[str]", "list[TextPart]")]
        param = ".".join(where) or None
        message = problem["msg"].removeprefix("Value error, ")
        raise ApiError(
            400, f"{param}: {message}" if param else message, code="invalid_value", param=param
        ) from error


class Reply:
    """Builds the JSON of one answer, whole or in chunks.

    Args:
        id: Of the answer.
        created: Seconds since the epoch.
        model: The served id of the version that answers.
        chat: Whether this answers a chat.
    """

    def __init__(self, id: str, created: int, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._object = "chat.completion" if chat else "text_completion"
        self._head: dict[str, Any] = {"id": id, "created": created, "model": model}

    def whole(
        self, answers: list[tuple[str, str]], prompt_tokens: int, completion_tokens: int
    ) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            answers: Text and finish reason of each choice.
            prompt_tokens: Over all prompts.
            completion_tokens: Over all choices.
        """
        choices = [self._choice(i, text, reason, whole=True) for i, (text, reason) in enumerate(answers)]
        usage = _usage(prompt_tokens, completion_tokens)
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, which says who speaks; only chats have one."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._chunk([choice]) if self._chat else None

    def delta(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A chunk with more text, or with the finish reason."""
        return self._chunk([self._choice(index, text, reason, whole=False)])

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The last chunk: no choice, only the token counts."""
        return {**self._chunk([]), "usage": _usage(prompt_tokens, completion_tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else self._object
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index: int, text: str, reason: str | None, *, whole: bool) -> dict[str, Any]:
        end = {"index": index, "logprobs": None, "finish_reason": reason}
        if not self._chat:
            return {**end, "text": text}
        if whole:
            return {**end, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**end, "delta": {"content": text} if text else {}}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def sse(data: dict[str, Any] | Literal["[DONE]"]) -> bytes:
    """One server-sent event."""
    return (
        b"data: "
        + (data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)).encode()
        + b"\n\n"
    )


def model_card(id: str, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": id, "object": "model", "created": created, "owned_by": "regraft"}
