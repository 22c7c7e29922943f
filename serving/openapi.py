"""The OpenAPI document: the shape of each answer, and which errors an operation may give.

The endpoint builds its answers without these classes; the tests hold the one against the other.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from serving.openai_api import ChatRequest, CompletionRequest, FeedbackRequest

_REFERENCE = "#/components/schemas/{model}"
FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class Error(BaseModel):
    """An error."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Always 0 here."""

    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(BaseModel):
    """Always 0 here."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Token counts over all prompts, each counted once, and all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(BaseModel):
    """A token and its log-probability under the model, before temperature and top-p."""

    token: str
    logprob: float = Field(le=0)
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A generated token and what was likely in its place."""

    top_logprobs: list[TopLogprob] = Field(max_length=20)


class ChatLogprobs(BaseModel):
    """The tokens of a choice, or of a chunk of it."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str = Field(description="The version that answered, as `name/3`.")
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """More of the assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(BaseModel):
    """More of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Logprobs(BaseModel):
    """The tokens of a choice, or of a chunk of it; lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="Where each token begins in the choice's text.")


class CompletionChoice(BaseModel):
    """One continuation of a prompt."""

    index: int = Field(description="Place of the prompt times n, plus place among its answers.")
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None = Field(description="Null in chunks before the last.")


class Completion(BaseModel):
    """The continuations of prompts, or one event of a stream of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, description="Null in chunks before the last.")


class Model(BaseModel):
    """What can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["regraft"]


class ModelList(BaseModel):
    """All that can be asked for now."""

    object: Literal["list"]
    data: list[Model]


class LoadedVersion(BaseModel):
    """A version in memory."""

    id: str
    method: str | None
    role: str
    requests: int = Field(description="That hold it.")


class CaptureState(BaseModel):
    """How capturing goes."""

    written: int
    dropped: int
    last_error: str | None


class Health(BaseModel):
    """What is loaded, and what went wrong last; where there are keys, only an admin's tells it all."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None
    model: str
    champion: str | None
    loaded: list[LoadedVersion] = []
    load_errors: dict[str, str] = {}
    registry_error: str | None = None
    captures: CaptureState | None = None


class StoredFeedback(BaseModel):
    """That feedback was stored."""

    id: str
    object: Literal["feedback"]
    created: str = Field(description="UTC, ISO 8601.")
    answer_id: str


_PROBLEMS = {
    400: "The request is not valid; `param` names the field.",
    401: "No API key was given, or an unknown one.",
    403: "The key may not do this.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests; try again after `Retry-After` seconds.",
    500: "The endpoint has failed; its log says why.",
    503: "No model can answer now; try again after `Retry-After` seconds.",
    504: "The answer took too long.",
}
_BODIED = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)


def responses(
    answer: type[BaseModel], *, status: int = 200, problems: tuple[int, ...] = _BODIED
) -> dict[int | str, Any]:
    """What an operation may answer.

    Args:
        answer: The body if all is well.
        status: Its status.
        problems: Statuses of the errors that it may give.
    """
    told: dict[int | str, Any] = {code: {"model": Error, "description": _PROBLEMS[code]} for code in problems}
    return {status: {"model": answer, "description": (answer.__doc__ or "").strip()}, **told}


def streamed(answer: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, Any]:
    """What an operation may answer that can stream."""
    text = f"With `stream: true`: events whose data is a {chunk.__name__}, then one whose data is `[DONE]`."
    found = responses(answer)
    # Without a type: some readers of the document take this for the whole stream, others for one event.
    found[200]["content"] = {"text/event-stream": {"schema": {"description": text}}}
    return found


def request_body(body: type[BaseModel]) -> dict[str, Any]:
    """The declaration of a body that is read by hand."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=body.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def path_parameter(name: str, description: str) -> dict[str, Any]:
    """The declaration of a part of the path that is read by hand."""
    told = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {"parameters": [{**told, "description": description}]}


def describe(app: FastAPI) -> None:
    """Let an application show the document, completed by the shapes that FastAPI does not see itself."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=version("regraft"), routes=app.routes)
            by_hand = (ChatRequest, CompletionRequest, FeedbackRequest, ChatCompletionChunk)
            _, schemas = models_json_schema([(m, "validation") for m in by_hand], ref_template=_REFERENCE)
            known = made.setdefault("components", {}).setdefault("schemas", {})
            made["components"]["schemas"] = {**schemas["$defs"], **known}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
