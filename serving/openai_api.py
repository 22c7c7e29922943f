"""The shapes of the OpenAI API: what may be asked, and how an error looks.

Nothing here knows models or HTTP routes. Two defaults are not OpenAI's: the temperature is 0, because that
is how the served version was evaluated, and a chat may be as long as the endpoint allows.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from regraft.records import Message

#: Bytes that a body may have.
MAX_BODY = 1 << 20

#: Fields we do not support, with the values that change nothing and are therefore accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
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


#: More choices than this may not be asked for at once, prompts times `n`.
MAX_CHOICES = 32
_UNION_MEMBER = re.compile(r"(constrained-)?str|list\[.*\]")
_Stop = Annotated[str, Field(min_length=1, max_length=256)]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]  # 5.0 is the same number as 5, in JSON as in its schemas
_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class _Request(BaseModel):
    """What both operations take."""

    # Strict, as OpenAI is: "5" is no number and 1 no truth value.
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    default_max_tokens: ClassVar[int | None] = None

    model: str
    max_tokens: _Whole | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 (greedy) if not given.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: _Whole | None = Field(None, ge=1, le=8, description="How many answers to a prompt; 1 if not given.")
    seed: _Whole | None = Field(
        None, ge=-(2**63), lt=2**63, description="Of the first answer; the next one has the next number."
    )
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(
        None, max_length=256, description="Kept as the session of the captured exchange."
    )

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
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None if no log-probabilities are asked for."""
        raise NotImplementedError

    def seed_of(self, choice: int) -> int | None:
        """The seed of one of a prompt's answers: they differ, and each can be repeated."""
        return None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63

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
        names = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop")
        return {n: v for n in names if (v := getattr(self, n, None)) is not None}


class UnsupportedError(Exception):
    """A field that this endpoint does not support, with a value that matters.

    No ValueError, so that pydantic lets it pass as it is.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class FieldError(Exception):
    """A field whose value does not go with another's; passes pydantic as it is, too."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(problem)
        self.name = name


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn as a client writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

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

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: _Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: _Whole | None = Field(None, ge=0, le=20, description="Needs `logprobs`.")

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs", True):
            raise ValueError("only together with logprobs: true")
        return value

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None if no log-probabilities are asked for."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def limit(self) -> tuple[str, int] | None:
        """The field with which the client bounds the answer, and its value; the newer name wins."""
        newer = self.max_completion_tokens
        return super().limit if newer is None else ("max_completion_tokens", newer)


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    ) = Field(description="A text, token ids, or several of one kind, each of which is answered on its own.")
    logprobs: _Whole | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise FieldError("n", f"{len(self.prompts)} prompts times n are more than {MAX_CHOICES} choices")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each answered on its own."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell; None if no log-probabilities are asked for."""
        return self.logprobs


class FeedbackRequest(BaseModel):
    """The body of `POST /v1/feedback`: what a client thinks of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(
        pattern=r"^(chatcmpl|cmpl)-[0-9a-f]{32}(-[0-9]{1,2})?$",
        description="Of the answer; of one of several choices with `-` and its index.",
    )
    score: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="From -1, useless, to 1, perfect."
    )
    correction: str | None = Field(
        None, min_length=1, description="The answer as it should have been, made from the one given."
    )
    reference: str | None = Field(
        None, min_length=1, description="A right answer that was known without the one given."
    )
    comment: str | None = Field(None, min_length=1, description="Anything else.")

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.score is None and self.correction is None and self.reference is None:
            raise FieldError("score", "give at least one of score, correction and reference")
        return self


Body = TypeVar("Body", bound=BaseModel)


def parse_request(kind: type[Body], raw: bytes) -> Body:
    """Read the body of a request.

    Raises:
        ApiError: If it is not valid; 400, naming the field.
    """
    try:
        return kind.model_validate_json(raw)
    except UnsupportedError as error:
        name = error.name[:64]
        message = f"{name} is not supported by this endpoint"
        raise ApiError(400, message, code="unsupported_parameter", param=name) from error
    except FieldError as error:
        raise ApiError(400, f"{error.name}: {error}", code="invalid_value", param=error.name) from error
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        # Of the members of a union, the one that understood most tells what is wrong.
        first = problems[0]["loc"][:1]
        problem = max((p for p in problems if p["loc"][:1] == first), key=_progress)
        param = ".".join(str(part)[:64] for part in _fields(problem["loc"])) or None
        message = problem["msg"].removeprefix("Value error, ")
        raise ApiError(
            400, f"{param}: {message}" if param else message, code="invalid_value", param=param
        ) from error


def _fields(where: tuple[int | str, ...]) -> list[int | str]:
    """Where a problem is, without the members of unions, which pydantic names on the way."""
    return [part for part in where if isinstance(part, int) or not _UNION_MEMBER.fullmatch(part)]


def _progress(problem: ErrorDetails) -> tuple[tuple[int, ...], int, bool]:
    where = problem["loc"]
    places = tuple(part for part in where if isinstance(part, int))
    return places, len(_fields(where)), not problem["type"].endswith("_type")
