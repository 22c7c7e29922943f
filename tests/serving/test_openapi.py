"""What the endpoint answers is what its document declares, whatever is sent to it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import hypothesis
import jsonschema
import openai
import pytest
import schemathesis
from pydantic import BaseModel
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from serving.endpoint import create_app
from serving.engines.base import EngineLimits
from serving.exchange import CaptureLog
from serving.loading import load_engine
from serving.openai_api import ChatRequest, CompletionRequest, FeedbackRequest
from serving.router import VersionTable
from serving.shelf import Shelf, in_process

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
]
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/feedback": FeedbackRequest,
}


class Here(NamedTuple):
    url: str
    document: Any


@pytest.fixture(scope="module")
def here(
    base_folder: Path,
    make_version: Any,
    make_registry: Any,
    serve_app: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Here]:
    """The endpoint over a real engine, and its document as schemathesis reads it."""
    registry = make_registry(make_version(1, base_folder), folders={1: base_folder})
    registry.champion = 1

    def load(version: Any, folder: Path) -> Any:
        return load_engine(version, folder, dtype="float32", device="cpu", limits=EngineLimits())

    folder = tmp_path_factory.mktemp("spools")
    app = create_app(
        VersionTable(registry, Shelf(in_process(registry, load)), name="support", poll_seconds=0.05),
        CaptureLog(CaptureStore(folder / "captures")),
        max_new_tokens=4,
        feedback=FeedbackStore(folder / "feedback"),
    )
    with serve_app(app) as url:
        first = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=50, timeout=60)
        first.completions.create(model="support", prompt="x", max_tokens=1)
        yield Here(url, schemathesis.openapi.from_url(f"{url}/openapi.json"))


def test_every_operation_is_tried(here: Here) -> None:
    paths = here.document.raw_schema["paths"]
    declared = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert declared == set(OPERATIONS)


def sent(case: Any, statuses: Counter[int]) -> None:
    response = case.call(timeout=60)
    statuses[response.status_code] += 1
    case.validate_response(response, checks=CHECKS)


def examples(number: int) -> Any:
    return hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((*operation, schemathesis.GenerationMode.POSITIVE) for operation in OPERATIONS),
        *(("POST", path, schemathesis.GenerationMode.NEGATIVE) for path in BODIES),
    ],
)
def test_no_input_brings_an_answer_that_is_not_declared(
    here: Here, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = here.document[path][method]
    statuses: Counter[int] = Counter()

    @examples(30 if operation.body else 5)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def tried(case: Any) -> None:
        sent(case, statuses)

    tried()
    assert statuses


@pytest.mark.parametrize(("path", "body"), BODIES.items())
def test_valid_requests_are_answered_as_declared(here: Here, path: str, body: type[BaseModel]) -> None:
    """What is generated from the document alone names models that are not here and fields that mean nothing."""
    operation = here.document[path]["POST"]
    statuses: Counter[int] = Counter()

    @examples(30)
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
    def tried(case: Any) -> None:
        case.body = {field: value for field, value in case.body.items() if field in body.model_fields}
        if "model" in body.model_fields:
            case.body["model"] = "support"
            limits = {"max_tokens", "max_completion_tokens"} & set(case.body)
            case.body.update(dict.fromkeys(limits, 3))
        else:  # that it has to say something, a schema cannot tell
            case.body["score"] = case.body.get("score") or 0.5
        sent(case, statuses)

    tried()
    assert statuses[201 if path == "/v1/feedback" else 200] >= 5


@pytest.mark.parametrize(
    ("path", "asked", "event"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
            "ChatCompletionChunk",
        ),
        ("/v1/completions", {"prompt": ["x", "y"], "logprobs": 2}, "Completion"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_events_of_a_stream_are_as_declared(
    here: Here, path: str, asked: dict[str, Any], event: str, plain: bool
) -> None:
    if plain:
        asked = {name: value for name, value in asked.items() if "logprobs" not in name}
    body = {"model": "support", **asked, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{here.url}{path}", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    document = here.document.raw_schema
    schema = {"$ref": f"#/components/schemas/{event}", "components": document["components"]}
    for text in events:
        jsonschema.validate(json.loads(text), schema)
    assert [json.loads(text)["usage"] is not None for text in events] == [False] * (len(events) - 1) + [True]


def test_a_bug_is_an_error_without_a_traceback(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("where the secret is")

    monkeypatch.setattr("serving.endpoint.read_prompts", broken)
    answer = httpx.post(f"{here.url}/v1/completions", json={"model": "support", "prompt": "x"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text and "Traceback" not in answer.text
    health = httpx.get(f"{here.url}/health").json()
    assert all(version["requests"] == 0 for version in health["loaded"])
