"""Keys over real HTTP, before a small application that streams: the guard knows nothing of models."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from regraft.errors import ConfigError
from regraft.serve_sections import LimitsSection
from serving.auth import Keyring, KeysError, check_exposure
from serving.guard import Guard, estimate, sees_details
from serving.limits import Limiter

Serve = Callable[[object], AbstractContextManager[str]]


class Guarded(NamedTuple):
    client: httpx.Client
    ring: Keyring
    more: threading.Event
    refused: list[str]

    def ask(self, key: str | None, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.client.post(path, json=body, headers=headers)


def application(more: threading.Event) -> FastAPI:
    app = FastAPI()

    async def chat(request: Request) -> Any:
        body = json.loads(await request.body())
        if body.get("fail"):
            return JSONResponse({}, body["fail"])
        if "used" in body:
            request.scope["regraft.used"] = body["used"]
        caller = request.scope["regraft.caller"]
        if body.get("stream"):

            async def parts() -> AsyncIterator[bytes]:
                yield b"first"
                await asyncio.to_thread(more.wait, 20)
                yield b"second"

            return StreamingResponse(parts())
        seen = [f"{k}: {v}" for k, v in request.headers.items()]
        return {"caller": caller and [caller.key, caller.name, sorted(caller.scopes)], "headers": seen}

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    for path in ("/v1/feedback", "/metrics", "/admin/load"):
        app.add_api_route(path, lambda: "ok", methods=["POST"])

    async def health(request: Request) -> bool:
        return sees_details(request.scope)

    app.add_api_route("/health", health, methods=["GET"])
    return app


@pytest.fixture
def guarded(tmp_path: Path, serve_app: Serve) -> Iterator[Guarded]:
    ring, more, refused = Keyring(tmp_path / "keys.json"), threading.Event(), list[str]()
    guard = Guard(
        application(more), ring, max_new_tokens=100, limiter=Limiter(lambda: 0.0), refused=refused.append
    )
    with serve_app(guard) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield Guarded(client, ring, more, refused)
        more.set()


def code(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def test_nobody_gets_in_without_a_key_that_counts(guarded: Guarded) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    key, kept = guarded.ring.create("shop", ["use"])
    old, _ = guarded.ring.create("old", ["use"], expires=past)
    missing = guarded.ask(None)
    assert code(missing) == (401, "missing_api_key")
    assert missing.headers["www-authenticate"] == "Bearer"
    assert code(guarded.ask(key[:-1] + ("A" if key[-1] != "A" else "B"))) == (401, "invalid_api_key")
    assert code(guarded.ask(kept.sha256)) == (401, "invalid_api_key")
    assert "expired" in guarded.ask(old).text
    assert guarded.ask(key).json()["caller"] == [kept.id, "shop", ["use"]]
    by_name = guarded.client.post("/v1/chat/completions", json={}, headers={"api-key": key})
    assert by_name.json()["caller"][0] == kept.id


def test_scopes_open_their_routes_alone(guarded: Guarded) -> None:
    use, feedback, admin = (guarded.ring.create(s, [s])[0] for s in ("use", "feedback", "admin"))
    routes = {"/v1/chat/completions": use, "/v1/feedback": feedback, "/metrics": admin, "/admin/load": admin}
    for path, right in routes.items():
        for key in (use, feedback, admin):
            answer = guarded.ask(key, path)
            assert answer.status_code == 200 if key == right else code(answer) == (403, "insufficient_scope")
    assert guarded.ask(use, "/nowhere").status_code == 403  # what is not known needs the most


def test_health_is_free_and_gives_its_details_to_admins(guarded: Guarded) -> None:
    use, admin = (guarded.ring.create(s, [s])[0] for s in ("use", "admin"))

    def health(key: str | None) -> Any:
        answer = guarded.client.get("/health", headers={"Authorization": f"Bearer {key}"} if key else {})
        assert answer.status_code == 200
        return answer.json()

    assert [health(None), health("rg-no"), health(use), health(admin)] == [False, False, False, True]


def test_a_running_endpoint_heeds_new_and_revoked_keys_and_ends_what_it_began(guarded: Guarded) -> None:
    key, kept = guarded.ring.create("shop", ["use"])
    with guarded.client.stream(
        "POST", "/v1/chat/completions", json={"stream": True}, headers={"Authorization": f"Bearer {key}"}
    ) as stream:
        parts = stream.iter_raw()
        assert next(parts) == b"first"  # not held back until the end
        other = Keyring(guarded.ring.path)  # as another process would
        other.revoke(kept.id)
        late, _ = other.create("late", ["use"])
        answer = guarded.ask(key)
        assert code(answer) == (401, "invalid_api_key")
        assert "revoked" in answer.text
        assert guarded.ask(late).status_code == 200
        guarded.more.set()
        assert b"".join(parts) == b"second"


def test_of_a_burst_as_many_get_in_as_the_limit_says(guarded: Guarded) -> None:
    key, _ = guarded.ring.create("shop", ["use"], limits=LimitsSection(requests_per_minute=7))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: guarded.ask(key), range(24)))
    assert sorted(a.status_code for a in answers) == [200] * 7 + [429] * 17
    assert guarded.refused == ["requests"] * 17
    last = next(a for a in answers if a.status_code == 429)
    assert code(last) == (429, "rate_limit_exceeded")
    assert last.json()["error"]["type"] == "rate_limit_error"
    assert last.headers["retry-after"] == "9"
    assert last.headers["x-ratelimit-remaining-requests"] == "0"


def test_tokens_are_reserved_before_and_charged_by_use(guarded: Guarded) -> None:
    key, _ = guarded.ring.create("shop", ["use"], limits=LimitsSection(tokens_per_minute=1000))

    def left() -> int:
        answer = guarded.ask(key, max_tokens=1, used=0)
        size = estimate(answer.request.content, "/v1/chat/completions", 100)
        return int(answer.headers["x-ratelimit-remaining-tokens"]) + size

    guarded.ask(key, max_tokens=90, used=40)
    assert left() == 960
    assert guarded.ask(key, max_tokens=90, fail=400).status_code == 400
    assert left() == 960
    unknown = guarded.ask(key, n=2, max_tokens=90)  # the endpoint does not say: the reservation counts
    reserved = estimate(unknown.request.content, "/v1/chat/completions", 100)
    assert left() == 960 - reserved < 960 - 180
    gone = guarded.ask(key, max_tokens=90, fail=499)
    assert left() == 960 - reserved - estimate(gone.request.content, "/v1/chat/completions", 100)
    too_much = guarded.ask(key, n=20)
    assert code(too_much) == (429, "rate_limit_exceeded")
    assert too_much.headers["x-should-retry"] == "false"


def test_limits_of_the_endpoint_count_where_a_key_has_none(tmp_path: Path, serve_app: Serve) -> None:
    limits = LimitsSection(requests_per_minute=1)
    ring = Keyring(tmp_path / "keys.json")
    own, _ = ring.create("own", ["use"], limits=LimitsSection(requests_per_minute=2))
    plain, _ = ring.create("plain", ["use"])
    for keys, tokens, passing in ((ring, (own, plain), 3), (None, ("EMPTY",), 1)):
        guard = Guard(
            application(threading.Event()),
            keys,
            limits=limits,
            max_new_tokens=9,
            limiter=Limiter(lambda: 0.0),
        )
        with serve_app(guard) as url, httpx.Client(base_url=url) as client:
            statuses = [
                client.post(
                    "/v1/chat/completions", json={}, headers={"Authorization": f"Bearer {t}"}
                ).status_code
                for t in tokens
                for _ in range(3)
            ]
            assert statuses.count(200) == passing
            assert statuses.count(429) == len(statuses) - passing
            assert client.get("/health").json() is (keys is None)


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/v1/chat/completions", {"max_tokens": 5}, 5),
        ("/v1/chat/completions", {"max_tokens": 5, "max_completion_tokens": 7, "n": 3}, 21),
        ("/v1/chat/completions", {}, 100),
        ("/v1/chat/completions", {"max_tokens": 10**9}, 100),
        ("/v1/completions", {"prompt": "a"}, 16),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 4}, 16),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4}, 4),
        ("/v1/chat/completions", {"max_tokens": True, "n": "x"}, 100),
    ],
)
def test_estimate_counts_every_answer(path: str, body: dict[str, Any], tokens: int) -> None:
    raw = json.dumps(body).encode()
    assert estimate(raw, path, 100) == -(-len(raw) // 4) + tokens


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_estimate_of_no_request_is_its_bytes(raw: bytes) -> None:
    assert estimate(raw, "/v1/chat/completions", 100) == -(-len(raw) // 4)


def test_a_large_body_reaches_the_application_whole(guarded: Guarded) -> None:
    key, _ = guarded.ring.create("shop", ["use"], limits=LimitsSection(tokens_per_minute=10**7))
    assert guarded.ask(key, used=1, text="x" * (3 << 20)).status_code == 200


def test_no_key_in_files_logs_or_the_application(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        key, kept = guarded.ring.create("shop", ["use"])
        seen = guarded.ask(key).json()["headers"]
        guarded.ask(key, "/metrics")
        guarded.ring.revoke(kept.id)
        guarded.ask(key)
        guarded.ring.path.write_text("{")
        broken = guarded.ask(key)
    assert code(broken) == (503, "keys_unreadable")
    assert seen and not [line for line in seen if "rg-" in line]
    files = list(guarded.ring.path.parent.iterdir())
    assert len(files) == 2  # the keys and their lock: no leftovers
    for text in [caplog.text, *(f.read_text() for f in files)]:
        assert key not in text and key[3:20] not in text
    assert "nobody is let in" in caplog.text


def test_keys_file_is_its_owners_and_refused_where_others_may_write(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "deep" / "keys.json")
    with pytest.raises(KeysError, match="regraft keys create"):
        ring.find("rg-x")
    key, kept = ring.create("a", ["use"])
    assert ring.path.stat().st_mode & 0o777 == 0o600
    assert (len(key), key[:3]) == (46, "rg-")
    ring.path.chmod(0o622)
    with pytest.raises(KeysError, match="others may write"):
        ring.find(key)
    ring.path.chmod(0o600)
    assert ring.find(key) == kept


def test_keys_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: Keyring(path).create(f"k{i}", ["use"])[0], range(24)))
    ring = Keyring(path)
    assert sorted(k.name for k in map(ring.find, made) if k) == sorted(f"k{i}" for i in range(24))


def test_an_open_endpoint_stays_on_this_machine_unless_told() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_exposure(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match=r"serve\.keys"):
            check_exposure(host, None)
        check_exposure(host, Path("keys.json"))
        check_exposure(host, None, open=True)
    with pytest.raises(ConfigError, match=r"serve\.open"):
        check_exposure("127.0.0.1", Path("keys.json"), open=True)
