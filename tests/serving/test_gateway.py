"""The gateway as it is put together: keys, limits, metrics, captures and feedback around real engines."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from regraft.config import ServeSection
from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from regraft.serve_sections import CaptureSection, LimitsSection
from serving.auth import Keyring
from serving.gateway import create_gateway
from serving.loading import make_loader
from serving.settings import EndpointSettings

CHAT: Any = [{"role": "user", "content": "I am jane.doe@example.org, hello"}]


class Here(NamedTuple):
    url: str
    settings: EndpointSettings
    keys: dict[str, str]

    def client(self, who: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[who], max_retries=0, timeout=60)

    def get(self, path: str, who: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}"} if who else {}
        return httpx.get(self.url + path, headers=headers, timeout=60)


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
    folder = tmp_path_factory.mktemp("gateway")
    ring = Keyring(folder / "keys.json")
    keys = {
        "user": ring.create("user", ("use",))[0],
        "rater": ring.create("rater", ("use", "feedback"))[0],
        "admin": ring.create("admin", ("admin",))[0],
        "poor": ring.create("poor", ("use",), limits=LimitsSection(tokens_per_minute=120))[0],
    }
    section = ServeSection(
        keys=folder / "keys.json",
        max_new_tokens=32,
        poll_seconds=0.05,
        capture=CaptureSection(ship=str(folder / "archive"), ship_every_seconds=3600),
    )
    settings = EndpointSettings(
        name="support",
        tracking_uri="http://127.0.0.1:1",
        cache=folder / "cache",
        captures=folder / "captures",
        dtype="float32",
        device="cpu",
        serve=section,
    )
    registry = make_registry(
        make_version(1, base_folder, method_settings["lora"]), folders={1: adapters["lora"]}
    )
    registry.champion = 1
    app = create_gateway(settings, registry, make_loader(settings, registry))
    with serve_app(app) as url:
        found = Here(url, settings, keys)
        patient = openai.OpenAI(base_url=f"{url}/v1", api_key=keys["user"], max_retries=60, timeout=60)
        patient.chat.completions.create(model="support", messages=CHAT, max_tokens=1)
        yield found


def test_only_those_with_the_scope_get_in(here: Here) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{here.url}/v1", api_key="rg-wrong", max_retries=0).models.list()
    with pytest.raises(openai.PermissionDeniedError):
        here.client("admin").models.list()
    assert next(m.id for m in here.client("user").models.list()) == "support"
    assert here.get("/metrics", "user").status_code == 403
    assert here.get("/metrics").status_code == 401
    plain, full = here.get("/health"), here.get("/health", "admin")
    assert plain.status_code == full.status_code == 200
    assert plain.json() == {"status": "ok", "model": "support", "champion": "support/1"}
    assert full.json()["loaded"][0]["id"] == "support/1" and "shipping" in full.json()


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_count_what_was_answered(here: Here, stream: bool) -> None:
    def figure(name: str) -> float:
        lines = here.get("/metrics/", "admin").text.splitlines()
        found = [line for line in lines if line.startswith(f"regraft_{name}{{")]
        assert found and all('variant="champion"' in line and 'version="1"' in line for line in found)
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    names = (
        *("generation_tokens_total", "request_success_total"),
        *("time_to_first_token_seconds_count", "request_queue_time_seconds_count"),
    )
    before = [figure(name) for name in names]
    answer = here.client("user").chat.completions.create(
        model="support", messages=CHAT, max_tokens=7, stream=stream
    )
    for _ in answer if stream else ():
        pass
    after = [figure(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [7, 1, 1, 1]
    assert figure("num_requests_running") == 0


def test_who_has_used_up_the_tokens_of_a_minute_waits(here: Here) -> None:
    client = here.client("poor")
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(10):
            client.chat.completions.create(model="support", messages=CHAT, max_tokens=32)
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert refused.value.response.headers["x-ratelimit-limit-tokens"] == "120"
    here.client("user").chat.completions.create(model="support", messages=CHAT, max_tokens=1)


def test_exchanges_are_kept_by_key_without_personal_data_and_rated(here: Here) -> None:
    started = datetime.now(UTC)
    answer = here.client("rater").chat.completions.create(model="support", messages=CHAT, max_tokens=4)
    (kept,) = CaptureStore(here.settings.captures).read(start=started)
    assert kept.id == answer.id and kept.variant == "champion"
    assert kept.messages[0].content == "I am <EMAIL>, hello"
    assert kept.key is not None and kept.key not in here.keys["rater"] and len(kept.key) == 8
    body = {"id": answer.id, "score": 1.0, "correction": "Hello, Jane."}
    rate = {"url": f"{here.url}/v1/feedback", "json": body, "timeout": 60}
    refused = httpx.post(**rate, headers={"Authorization": f"Bearer {here.keys['user']}"})
    assert refused.status_code == 403
    taken = httpx.post(**rate, headers={"Authorization": f"Bearer {here.keys['rater']}"})
    assert taken.status_code == 201
    (stored,) = FeedbackStore(here.settings.feedback).read()
    assert (stored.answer_id, stored.score, stored.key) == (answer.id, 1.0, kept.key)
    spool = b"".join(f.read_bytes() for f in here.settings.captures.rglob("*") if f.is_file())
    assert b"jane" not in spool.lower() and not any(key.encode() in spool for key in here.keys.values())
