from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from regraft.data.captures import CaptureStore
from regraft.records import Message
from serving.engines.base import EngineLimits, GenerationRequest
from serving.exchange import Asked, CaptureLog, Exchange, Observer
from serving.loading import load_engine
from serving.metrics import Metrics

ONE = {"model": "support", "version": "1", "variant": "champion"}


def figures(text: str) -> Callable[..., float | None]:
    """Looks figures up in what was scraped."""
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return lambda name, **labels: found.get((f"regraft_{name}", frozenset(labels.items())))


def test_answers_of_a_real_engine_are_counted_and_scraped(
    base_folder: Path, tmp_path: Path, make_version: Any, serve_app: Any
) -> None:
    version, log = make_version(1, base_folder), CaptureLog(CaptureStore(tmp_path))
    metrics = Metrics(lambda _: "champion")
    observer: Observer = metrics
    metrics.watch_dropped("capture_dropped", lambda: log.dropped)
    limits = EngineLimits(4, 8, threads=1)
    engine = load_engine(version, tmp_path, dtype="float32", device="cpu", limits=limits)
    messages = [Message(role="user", content="Hello")]
    ids = tuple(engine.encode_chat(messages))

    async def answer(number: int) -> Exchange:
        asked = Asked(f"e-{number}", version, messages, {}, None, stream=True)
        exchange = Exchange(asked, GenerationRequest(ids, 5), engine, log, observer)
        async for _ in exchange:
            pass
        return exchange

    async def two() -> list[Exchange]:
        return list(await asyncio.gather(answer(1), answer(2)))

    try:
        done = asyncio.run(two())
    finally:
        engine.close()
        log.close()
    serving: AbstractContextManager[str] = serve_app(metrics.app())
    with serving as url:
        scraped = httpx.get(f"{url}/metrics").raise_for_status()
    assert scraped.headers["content-type"].startswith("text/plain")
    value = figures(scraped.text)
    generated = sum(e.completion_tokens for e in done)
    assert value("prompt_tokens_total", **ONE) == 2 * len(ids)
    assert value("generation_tokens_total", **ONE) == generated > 0
    first, between = (
        value(f"{name}_count", **ONE)
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
    )
    assert first == sum(bool(e.text) for e in done)
    assert between is not None and between <= generated - (first or 0)
    assert value("e2e_request_latency_seconds_count", **ONE) == 2
    assert value("num_requests_running", **ONE) == 0
    reasons = [value("request_success_total", **ONE, finished_reason=r) or 0 for r in ("stop", "length")]
    assert sum(reasons) == 2
    assert value("capture_dropped_total") == 0


def test_failures_are_no_successes_and_running_follows_the_variant(make_version: Any) -> None:
    variants = {1: "champion"}
    metrics, version = Metrics(lambda v: variants[v.version]), make_version(1)
    for _ in range(3):
        metrics.began(version, 7)
    variants[1] = "pinned"  # another champion came while it answered
    value = figures(metrics.render()[0].decode())
    assert value("num_requests_running", **ONE | {"variant": "pinned"}) == 3
    assert value("num_requests_running", **ONE) is None
    for reason in ("error", "withdrawn", "aborted"):
        metrics.ended(version, reason, 7, 2, 1.0)
    value = figures(metrics.render()[0].decode())
    pinned = ONE | {"variant": "pinned"}
    assert value("num_requests_running", **pinned) == 0
    assert value("e2e_request_latency_seconds_count", **pinned) == 1
    assert value("request_success_total", **pinned, finished_reason="aborted") == 1
    assert value("request_success_total", **pinned, finished_reason="error") is None
    assert value("prompt_tokens_total", **ONE) == 21


def test_what_others_tell_is_shown_and_a_forgotten_version_is_not(make_version: Any) -> None:
    metrics, version, other = Metrics(), make_version(1), make_version(2)
    dropped = [2]
    metrics.watch_dropped("shadow_dropped", lambda: dropped[0])
    metrics.queued(version, 0.4)
    metrics.loaded(version, 2.2)
    metrics.loaded(other, 2.2)
    metrics.rate_limited("tokens")
    metrics.began(version, 1)
    dropped[0] = 3
    labels = ONE | {"variant": ""}
    value = figures(metrics.render()[0].decode())
    assert value("shadow_dropped_total") == 3
    assert value("request_queue_time_seconds_sum", **labels) == 0.4
    assert value("adapter_load_seconds_bucket", **labels, le="2.5") == 1
    assert value("adapter_load_seconds_bucket", **labels, le="2.0") == 0
    assert value("rate_limited_total", limit="tokens") == 1
    metrics.forget(version)
    left = metrics.render()[0].decode()
    assert 'version="1"' not in left and 'version="2"' in left
    metrics.began(version, 1)  # it may come back
    assert figures(metrics.render()[0].decode())("num_requests_running", **labels) == 1


def test_two_applications_have_figures_of_their_own(make_version: Any) -> None:
    one, two = Metrics(), Metrics()
    one.began(make_version(1), 7)
    assert b'version="1"' in one.render()[0] and b'version="1"' not in two.render()[0]
