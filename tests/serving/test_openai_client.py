from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from serving.endpoint import MAX_BODY, create_app
from serving.engines.base import EngineLimits
from serving.exchange import CaptureLog
from serving.loading import load_engine
from serving.router import VersionTable
from serving.shelf import Shelf, in_process

CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


class Ends(CaptureLog):
    """A capture log that tells when something was captured."""

    def __init__(self, store: CaptureStore) -> None:
        super().__init__(store)
        self.happened = threading.Semaphore(0)

    def append(self, exchange: Any) -> None:
        super().append(exchange)
        self.happened.release()


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda version, *figures: self.told.append((name, version.served_id, *figures))


def keyed(app: Any) -> Any:
    """Middleware that knows a caller by a header."""

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        key = dict(scope.get("headers", ())).get(b"x-key")
        scope["regraft.caller"] = SimpleNamespace(key=key.decode()) if key else None
        await app(scope, receive, send)

    return handle


class Here(NamedTuple):
    url: str
    client: openai.OpenAI
    store: CaptureStore
    registry: Any
    log: Ends
    gate: threading.Event
    seen: Seen
    feedback: FeedbackStore


@pytest.fixture(scope="module")
def here(
    base_folder: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    make_version: Any,
    make_registry: Any,
    serve_app: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Here]:
    """The endpoint over real engines: version 1 is prompt tuning and the champion, version 2 LoRA."""
    kinds = {1: "prompt_tuning", 2: "lora"}
    versions = [make_version(n, base_folder, method_settings[kind]) for n, kind in kinds.items()]
    registry = make_registry(*versions, folders={n: adapters[kind] for n, kind in kinds.items()})
    gate = threading.Event()
    gate.set()

    def held(*_: Any) -> None:
        gate.wait(60)

    def load(version: Any, folder: Path) -> Any:
        limits = EngineLimits(max_batch=4, max_queued=2)
        engine = load_engine(version, folder, dtype="float32", device="cpu", limits=limits)
        engine._shared.base.register_forward_pre_hook(held)  # type: ignore[attr-defined]
        return engine

    store = CaptureStore(tmp_path_factory.mktemp("captures"))
    log = Ends(store)
    table = VersionTable(registry, Shelf(in_process(registry, load)), name="support", poll_seconds=0.05)
    seen, feedback = Seen(), FeedbackStore(tmp_path_factory.mktemp("feedback"))
    app = create_app(table, log, max_new_tokens=64, observer=seen, feedback=feedback)
    server: AbstractContextManager[str] = serve_app(keyed(app))
    with server as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and "no champion" in health.json()["reason"]
        with pytest.raises(openai.InternalServerError) as unavailable:
            client.chat.completions.create(model="support", messages=CHAT)
        assert unavailable.value.status_code == 503
        assert client.models.list().data == []
        registry.champion = 1
        waiting = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=50, timeout=60)
        waiting.chat.completions.create(model="support", messages=CHAT, max_tokens=1)
        assert log.happened.acquire(timeout=30)
        yield Here(url, client, store, registry, log, gate, seen, feedback)
        gate.set()


@pytest.fixture(autouse=True)
def _afresh(here: Here) -> Iterator[None]:
    while here.log.happened.acquire(blocking=False):
        pass
    here.seen.told.clear()
    yield
    here.gate.set()


def test_chat_and_stream_say_the_same_and_are_captured(here: Here) -> None:
    raw = here.client.chat.completions.with_raw_response.create(
        model="support", messages=CHAT, max_tokens=20, user="session-1"
    )
    whole = raw.parse()
    text = whole.choices[0].message.content
    assert whole.model == raw.headers["x-regraft-version"] == "support/1"
    assert whole.usage is not None and whole.usage.completion_tokens == 20
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        here.client.chat.completions.create(
            model="support@champion",
            messages=CHAT,
            max_completion_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({c.id for c in chunks}) == 1 and {c.model for c in chunks} == {"support/1"}
    captured = {e.id: e for e in here.store.read()}
    one, two = captured[whole.id], captured[chunks[0].id]
    assert (one.output, one.session, one.stream, one.model, one.model_version) == (
        text,
        "session-1",
        False,
        "support",
        1,
    )
    assert (two.output, two.stream, two.finish_reason, two.completion_tokens) == (text, True, "length", 20)
    assert one.prompt_text == "Hello" and one.first_token_ms is not None
    assert one.first_token_ms <= one.latency_ms
    assert one.parameters == {"max_tokens": 20}


def test_content_parts_seed_and_stop(here: Here) -> None:
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
    ]
    plain: Any = [{"role": "user", "content": "Hello"}]
    create = here.client.chat.completions.create
    one = create(model="support", messages=parts, max_tokens=12).choices[0].message.content
    two = create(model="support", messages=plain, max_tokens=12).choices[0].message.content
    assert one == two
    draws = [create(model="support", messages=plain, max_tokens=12, temperature=1, seed=4) for _ in range(2)]
    assert draws[0].choices[0].message.content == draws[1].choices[0].message.content
    assert one is not None
    cut = create(model="support", messages=plain, max_tokens=12, stop=[one[3:5]])
    assert cut.choices[0].message.content == one[: one.find(one[3:5])]
    assert cut.choices[0].finish_reason == "stop"


def test_completions_of_one_prompt_and_of_several(here: Here) -> None:
    single = here.client.completions.create(model="support", prompt="The meter")
    assert single.object == "text_completion"
    assert single.usage is not None and single.usage.completion_tokens == 16
    several = here.client.completions.create(model="support", prompt=["The meter", "a"], max_tokens=5)
    assert [c.index for c in several.choices] == [0, 1]
    assert single.choices[0].text.startswith(several.choices[0].text)
    streamed = list(
        here.client.completions.create(model="support", prompt=["The meter", "a"], max_tokens=5, stream=True)
    )
    for index in (0, 1):
        text = "".join(c.choices[0].text for c in streamed if c.choices[0].index == index)
        assert text == several.choices[index].text


def test_pinned_version_and_models(here: Here) -> None:
    pinned = here.client.chat.completions.create(model="support/2", messages=CHAT, max_tokens=12)
    champion = here.client.chat.completions.create(model="support", messages=CHAT, max_tokens=12)
    assert (pinned.model, champion.model) == ("support/2", "support/1")
    assert pinned.choices[0].message.content != champion.choices[0].message.content
    ids = [m.id for m in here.client.models.list().data]
    assert ids == ["support", "support@champion", "support/1", "support/2"]
    assert here.client.models.retrieve("support/2").id == "support/2"
    with pytest.raises(openai.NotFoundError):
        here.client.models.retrieve("support/77")
    health = httpx.get(f"{here.url}/health")
    assert health.status_code == 200
    assert {e["id"]: e["role"] for e in health.json()["loaded"]} == {
        "support/1": "champion",
        "support/2": "pinned",
    }


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"n": 9}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"prompt_embeds": "AAAA"}}, "prompt_embeds"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(here: Here, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        here.client.chat.completions.create(**{"model": "support", "messages": CHAT, **extra})
    assert error.value.param == param
    assert param.split(".", maxsplit=1)[0] in error.value.message


def test_neutral_values_are_accepted(here: Here) -> None:
    answer = here.client.chat.completions.create(
        model="support", messages=CHAT, max_tokens=1, n=1, presence_penalty=0, logprobs=False, logit_bias=None
    )
    assert answer.choices


def test_unknown_model_bad_json_large_body(here: Here) -> None:
    for model in ("nope", "support/99", "support/../../etc"):
        with pytest.raises(openai.NotFoundError) as error:
            here.client.chat.completions.create(model=model, messages=CHAT)
        assert error.value.code == "model_not_found"
    url = f"{here.url}/v1/chat/completions"
    assert httpx.post(url, content=b"{not json").json()["error"]["type"] == "invalid_request_error"
    large = httpx.post(url, content=b" " * (MAX_BODY + 1))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    assert "error" in httpx.get(f"{here.url}/nothing").json()
    assert httpx.get(f"{here.url}/openapi.json").status_code == 200


def test_full_queue_is_429_and_a_client_that_leaves_is_captured(here: Here) -> None:
    before = {e.id for e in here.store.read()}
    here.gate.clear()
    body = {"model": "support", "messages": CHAT, "max_tokens": 30}
    left = threading.Barrier(7)

    def leave() -> None:
        try:
            httpx.post(f"{here.url}/v1/chat/completions", json=body, timeout=2)
        except httpx.TimeoutException:
            left.wait(60)

    threads = [threading.Thread(target=leave) for _ in range(6)]
    for thread in threads:
        thread.start()
    left.wait(60)
    for _ in range(6):
        assert here.log.happened.acquire(timeout=30)
    gone = [e for e in here.store.read() if e.id not in before]
    assert [e.finish_reason for e in gone] == ["aborted"] * 6
    assert all(e.output == "" and e.first_token_ms is None for e in gone)
    here.seen.told.clear()
    with pytest.raises(openai.RateLimitError) as full:
        here.client.completions.create(model="support", prompt=["x"] * 7)
    told = [event[0] for event in here.seen.told]
    assert told == ["began"] * 6 + ["ended"] * 6
    assert {event[2] for event in here.seen.told if event[0] == "ended"} == {"withdrawn"}
    assert full.value.response.headers["retry-after"] == "1"
    here.gate.set()
    assert here.client.completions.create(model="support", prompt="x", max_tokens=2).choices
    assert all(e["requests"] == 0 for e in httpx.get(f"{here.url}/health").json()["loaded"])


def test_a_stream_that_is_left_is_captured_as_aborted(here: Here) -> None:
    before = {e.id for e in here.store.read()}
    with here.client.chat.completions.create(
        model="support", messages=CHAT, max_tokens=64, stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                here.gate.clear()
                break
    assert here.log.happened.acquire(timeout=30)
    here.gate.set()
    (gone,) = [e for e in here.store.read() if e.id not in before]
    assert gone.finish_reason == "aborted" and gone.stream and gone.output


def test_choices_differ_by_seed_and_repeat(here: Here) -> None:
    asked: Any = {"model": "support", "messages": CHAT, "max_tokens": 8, "temperature": 1, "stop": ["#"]}
    create = here.client.chat.completions.create
    three = create(**asked, n=3, seed=5)
    texts = [c.message.content for c in three.choices]
    assert [c.index for c in three.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [create(**asked, seed=seed).choices[0].message.content for seed in (5, 6, 7)] == texts
    assert three.usage is not None
    captured = {e.id: e for e in here.store.read()}
    parts = [captured[f"{three.id}-{index}"] for index in range(3)]
    assert [(e.output, e.choice, e.variant) for e in parts] == [
        (t, i, "champion") for i, t in enumerate(texts)
    ]
    assert three.usage.prompt_tokens == parts[0].prompt_tokens  # the choices share it
    assert three.usage.completion_tokens == sum(e.completion_tokens for e in parts)
    assert three.usage.completion_tokens_details and three.usage.prompt_tokens_details
    assert three.usage.completion_tokens_details.reasoning_tokens == 0
    chunks = [c for chunk in create(**asked, n=3, seed=5, stream=True) for c in chunk.choices]
    for index, text in enumerate(texts):
        mine = [c for c in chunks if c.index == index]
        assert "".join(c.delta.content or "" for c in mine) == text
        assert mine[-1].finish_reason == three.choices[index].finish_reason
    first_end = next(i for i, c in enumerate(chunks) if c.finish_reason)
    assert {c.index for c in chunks[:first_end] if c.delta.content} == {0, 1, 2}  # they come side by side


def test_chat_logprobs_whole_and_streamed(here: Here) -> None:
    asked: Any = {"model": "support", "messages": CHAT, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    create = here.client.chat.completions.create
    whole = create(**asked).choices[0]
    assert whole.logprobs and whole.logprobs.content and len(whole.logprobs.content) == 12
    for token in whole.logprobs.content:
        best = [t.logprob for t in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert (token.token, token.logprob, token.bytes) == (
            token.top_logprobs[0].token,
            best[0],
            token.top_logprobs[0].bytes,
        )
    spelled = b"".join(bytes(t.bytes or []) for t in whole.logprobs.content)
    assert spelled.decode(errors="replace") == whole.message.content
    streamed = [c for chunk in create(**asked, stream=True) for c in chunk.choices if c.logprobs]
    told = [t for c in streamed if c.logprobs for t in c.logprobs.content or []]
    assert told == whole.logprobs.content
    plain = create(**{**asked, "top_logprobs": 0}).choices[0]
    assert plain.logprobs and plain.logprobs.content
    assert [(t.logprob, t.top_logprobs) for t in plain.logprobs.content] == [
        (t.logprob, []) for t in whole.logprobs.content
    ]
    assert create(**{**asked, "logprobs": False, "top_logprobs": None}).choices[0].logprobs is None


def test_completion_logprobs_and_prompts_of_tokens(here: Here, tiny_tokenizer: Any) -> None:
    create = here.client.completions.create
    ids = tiny_tokenizer("The meter")["input_ids"]
    text = create(model="support", prompt="The meter", max_tokens=8, logprobs=2)
    tokens = create(model="support", prompt=ids, max_tokens=8, logprobs=2)
    both = create(model="support", prompt=[ids, ids[:1]], max_tokens=8)
    assert text.choices == tokens.choices and both.choices[0].text == text.choices[0].text
    captured = {e.id: e for e in here.store.read()}
    assert captured[tokens.id].prompt_text == "The meter"
    found = text.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 8
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == value == max(top.values()) and 2 <= len(top) <= 3
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    alone = create(model="support", prompt="The meter", max_tokens=8, logprobs=0).choices[0].logprobs
    assert alone and alone.token_logprobs == found.token_logprobs and alone.top_logprobs is None
    with pytest.raises(openai.BadRequestError) as error:
        create(model="support", prompt=[1, len(tiny_tokenizer)])
    assert error.value.param == "prompt" and "no token" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        create(model="support", prompt=["a"] * 5, n=8)
    assert error.value.param == "n"


def test_feedback_is_stored_under_the_key_that_gave_it(here: Here) -> None:
    url = f"{here.url}/v1/feedback"
    headers = {"x-key": "hash-of-key"}
    answer = httpx.post(
        f"{here.url}/v1/completions", json={"model": "support", "prompt": "a"}, headers=headers
    ).json()
    assert {e.id: e.key for e in here.store.read()}[answer["id"]] == "hash-of-key"
    stored = httpx.post(url, json={"id": answer["id"], "score": -0.5, "comment": "short"}, headers=headers)
    assert stored.status_code == 201
    httpx.post(url, json={"id": answer["id"], "correction": "Yes."}).raise_for_status()
    (one,) = here.feedback.read()
    assert (one.answer_id, one.score, one.correction, one.comment) == (answer["id"], -0.5, "Yes.", "short")
    assert one.key == "hash-of-key" and one.id != stored.json()["id"]
    for body, param in (
        ({"id": answer["id"]}, "score"),
        ({"id": answer["id"], "score": None, "comment": "x"}, "score"),
        ({"id": answer["id"], "score": 1.5}, "score"),
        ({"id": answer["id"], "score": 1, "stars": 5}, "stars"),
        ({"id": "e-1", "score": 1}, "id"),
        ({"score": 1}, "id"),
    ):
        refused = httpx.post(url, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert len(here.feedback.read()) == 1


def test_an_observer_sees_each_exchange_from_beginning_to_end(here: Here) -> None:
    answer = here.client.completions.create(model="support", prompt="The meter", max_tokens=6)
    assert answer.usage is not None
    names = [event[0] for event in here.seen.told]
    assert names[:2] == ["began", "first_token"] and names[-1] == "ended"
    assert set(names[2:-1]) <= {"token", "queued"} and names[-2] == "queued"
    began, ended = here.seen.told[0], here.seen.told[-1]
    assert began[1:] == ("support/1", answer.usage.prompt_tokens)
    assert ended[1:5] == ("support/1", "length", answer.usage.prompt_tokens, 6)
    assert ended[5] >= sum(event[2] for event in here.seen.told[1:-1])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": "support", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "support", "seed": 1' + b"0" * 6000 + b"}",
        b'{"model": "support", "messages": [' + b"0," * 100_000 + b"0]}",
        b'{"model": "support", "' + b"x" * 100_000 + b'": 1, "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_malformed_bodies_are_refused_briefly(here: Here, body: bytes) -> None:
    for path in ("chat/completions", "completions", "feedback"):
        answer = httpx.post(
            f"{here.url}/v1/{path}", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        assert len(answer.content) < 1000


def test_wrong_media_types_routes_and_methods_have_the_same_shape(here: Here) -> None:
    chat = {"model": "support", "messages": CHAT, "max_tokens": 1}
    url = f"{here.url}/v1/chat/completions"
    for answer, status in (
        (httpx.post(url, data={"model": "support"}), 415),
        (httpx.post(f"{here.url}/v1/embeddings", json=chat), 404),
        (httpx.get(url), 405),
        (httpx.delete(f"{here.url}/v1/models"), 405),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    patched = {"content-type": "application/vnd.api+json; charset=utf-8"}
    assert httpx.post(url, json=chat, headers=patched).status_code == 200
