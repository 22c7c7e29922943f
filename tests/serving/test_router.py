from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from regraft.data.captures import CaptureStore
from regraft.records import Message, ModelVersion
from serving.endpoint import create_app
from serving.engines.base import Engine, Event, Finished, GenerationRequest, Stream, TextDelta
from serving.exchange import CaptureLog
from serving.router import UnknownModelError, VersionTable
from serving.shelf import PinnedBusyError, Shelf, UnavailableError, in_process


class _Words(Stream):
    def __init__(self, engine: FakeEngine, request: GenerationRequest) -> None:
        self._engine = engine
        words = [f"v{engine.number} "] * request.max_new_tokens
        self._events: list[Event] = [*map(TextDelta, words), Finished("length", 1, len(words))]

    async def __anext__(self) -> Event:
        if self._engine.silent.is_set():
            await asyncio.Event().wait()
        await asyncio.sleep(0)  # let others in between any two tokens
        assert not self._engine.closed, "an engine in use was closed"
        if not self._events:
            raise StopAsyncIteration
        return self._events.pop(0)

    def cancel(self) -> None:
        self._events = []
        self._engine.cancelled = True


class FakeEngine(Engine):
    """Says its own version number, word by word."""

    context_length = 1000
    vocabulary = 2

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = self.cancelled = False
        self.submitted = 0
        self.silent = asyncio.Event()

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return [1]

    def encode_text(self, text: str) -> list[int]:
        return [1]

    def decode_text(self, ids: Sequence[int]) -> str:
        return "text"

    def submit(self, request: GenerationRequest) -> Stream:
        self.submitted += 1
        return _Words(self, request)

    def close(self) -> None:
        self.closed = True


class Bench:
    """A table over a fake registry and fake engines."""

    def __init__(self, registry: Any, **options: Any) -> None:
        self.registry = registry
        self.engines: dict[int, FakeEngine] = {}
        self.loads: Counter[int] = Counter()
        self.broken: set[int] = set()
        shelf = {k: options.pop(k) for k in ("spare", "retry_seconds") if k in options}
        self.shelf = Shelf(in_process(registry, self.load), **shelf)
        self.table = VersionTable(registry, self.shelf, name="support", **{"poll_seconds": 0.01, **options})

    def load(self, version: ModelVersion, folder: Path) -> Engine:
        self.loads[version.version] += 1
        if version.version in self.broken:
            raise RuntimeError("bad weights")
        self.engines[version.version] = FakeEngine(version.version)
        return self.engines[version.version]

    async def unloaded(self) -> None:
        await self.shelf.unloaded()


@pytest.fixture
def bench(make_registry: Any, make_version: Any) -> Callable[..., Bench]:
    def make(**options: Any) -> Bench:
        return Bench(make_registry(*(make_version(n) for n in range(1, 8))), **options)

    return make


def test_switch_under_load_fails_nothing_and_mixes_nothing(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(spare=0)
    b.registry.champion = 1
    store = CaptureStore(tmp_path)
    app = create_app(b.table, CaptureLog(store), max_new_tokens=50)
    answers: list[tuple[str, str]] = []
    old_in_flight = asyncio.Event()

    async def client(http: httpx.AsyncClient, stream: bool) -> None:
        """Ask until the second version has answered three times."""
        seen = 0
        while seen < 3:
            body = {"model": "support", "messages": [{"role": "user", "content": "x"}], "stream": stream}
            reply = await http.post("/v1/chat/completions", json={**body, "max_tokens": 40})
            assert reply.status_code == 200, reply.text
            served = reply.headers["x-regraft-version"]
            answers.append((served, reply.text))
            old_in_flight.set()
            seen += served == "support/2"

    async def run() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                await b.table.poll()
                clients = [asyncio.create_task(client(http, n % 2 == 0)) for n in range(8)]
                await old_in_flight.wait()
                b.registry.champion = 2
                await asyncio.gather(*clients)
                await b.unloaded()
                assert b.engines[1].closed
                assert [v.version for v in b.table.versions] == [2]

    asyncio.run(run())
    assert {served for served, _ in answers} == {"support/1", "support/2"}
    for served, text in answers:
        mine, other = ("v1", "v2") if served == "support/1" else ("v2", "v1")
        assert text.count(mine) == 40 and other not in text and f'"{served}"' in text
    captured = store.read()
    assert len(captured) == len(answers)
    assert all(set(e.output.split()) == {f"v{e.model_version}"} for e in captured)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(
    bench: Callable[..., Bench], tmp_path: Path, stream: bool
) -> None:
    b = bench()
    b.registry.champion = 1
    store = CaptureStore(tmp_path)
    app = create_app(b.table, CaptureLog(store), max_new_tokens=50, timeout_seconds=0.05)

    async def run() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                await b.table.poll()
                b.engines[1].silent.set()
                body = {"model": "support", "messages": [{"role": "user", "content": "x"}], "stream": stream}
                reply = await http.post("/v1/chat/completions", json=body)
                (loaded,) = b.table.health()["loaded"]
                assert loaded["requests"] == 0 and b.engines[1].cancelled
                return reply

    reply = asyncio.run(run())
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    (kept,) = store.read()
    assert kept.finish_reason == "error" and kept.error is not None and "0.05 seconds" in kept.error


def test_a_version_that_does_not_load_takes_no_traffic(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench(retry_seconds=30)
        b.registry.champion = 1
        await b.table.poll()
        b.broken = {2}
        b.registry.champion = 2
        await b.table.poll()
        await b.table.poll()
        assert b.loads[2] == 1  # not tried again at once
        assert b.table.champion is not None and b.table.champion.version == 1
        assert "bad weights" in b.table.health()["load_errors"]["support/2"]
        with pytest.raises(UnavailableError, match="bad weights"):
            await b.table.acquire("support/2")
        b.registry.champion = 3
        await b.table.poll()
        assert b.table.champion.version == 3

    asyncio.run(run())


def test_a_dead_registry_keeps_what_is_loaded(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench()
        await b.table.poll()
        with pytest.raises(UnavailableError, match="no champion in the registry"):
            await b.table.acquire("support")
        b.registry.champion = 1
        await b.table.poll()
        b.registry.down = True
        await b.table.poll()
        loaded = await b.table.acquire("support@champion")
        assert loaded.version.version == 1
        assert "registry down" in b.table.health()["registry_error"]
        assert (await b.table.acquire("support/1")) is loaded
        with pytest.raises(UnavailableError, match="registry down"):
            await b.table.acquire("support/2")
        b.registry.down = False
        await b.table.poll()
        assert b.table.health()["registry_error"] is None

    asyncio.run(run())


def test_old_champion_drains_before_it_is_unloaded(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench(spare=0)
        b.registry.champion = 1
        await b.table.poll()
        first, second = await b.table.acquire("support"), await b.table.acquire("support")
        b.registry.champion = 2
        await b.table.poll()
        assert {e["id"]: e["role"] for e in b.table.health()["loaded"]} == {
            "support/1": "pinned",
            "support/2": "champion",
        }
        b.table.release(first)
        await b.unloaded()
        assert not b.engines[1].closed
        b.table.release(second)
        await b.unloaded()
        assert b.engines[1].closed
        assert b.engines[2].submitted == 1  # warmed

    asyncio.run(run())


def test_a_former_champion_is_called_back_without_a_load(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench(spare=1)
        for number in (1, 2, 1, 3):
            b.registry.champion = number
            await b.table.poll()
        await b.unloaded()
        assert b.loads == {1: 1, 2: 1, 3: 1}
        assert [v.version for v in b.table.versions] == [1, 3]  # the one that was used last stays

    asyncio.run(run())


def test_the_challenger_answers_its_share_of_sessions_and_always_the_same(
    bench: Callable[..., Bench],
) -> None:
    async def run() -> None:
        b = bench(canary=0.25)
        b.registry.champion = 1
        b.registry.named = {"challenger": 2, "shadow": 3}
        await b.table.poll()

        async def served(who: str | None) -> int:
            async with b.table.lease("support", who) as loaded:
                return loaded.version.version

        first = {f"session-{n}": await served(f"session-{n}") for n in range(400)}
        assert first == {who: await served(who) for who in first}
        counts = Counter(first.values())
        assert set(counts) == {1, 2} and 60 < counts[2] < 140
        assert {await served(None) for _ in range(100)} == {1, 2}
        async with b.table.lease("support@challenger") as asked, b.table.lease("support/1") as other:
            assert (b.table.role_of(asked.version), b.table.role_of(other.version)) == (
                "challenger",
                "champion",
            )
        with pytest.raises(UnknownModelError, match="support@challenger"):
            await b.table.acquire("support@shadow")  # it is not followed here
        b.registry.named = {"challenger": 4}
        await b.table.poll()
        others = {who for who, number in first.items() if number == 2}
        now = {who for who in first if await served(who) == 4}
        assert now and now != others  # another challenger is tried on others
        b.registry.named = {}
        await b.table.poll()
        assert {await served(who) for who in first} == {1}
        with pytest.raises(UnavailableError, match="no challenger"):
            await b.table.acquire("support@challenger")

    asyncio.run(run())


def test_a_challenger_that_is_none_of_ours_stops_nothing(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench(canary=0.5)
        b.registry.champion = 1
        b.registry.named = {"challenger": 99}
        await b.table.poll()
        assert b.table.champion is not None
        assert "no version 99" in b.table.health()["registry_error"]

    asyncio.run(run())


def test_pinned_versions_are_loaded_from_the_beginning_and_stay(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench(spare=1, pinned=(4, 99))
        b.registry.champion = 1
        b.table.start()
        while b.table.champion is None:
            await asyncio.sleep(0.01)
        for number in (5, 6):
            async with b.table.lease(f"support/{number}"):
                pass
        assert [v.version for v in b.table.versions] == [1, 4, 6]
        await b.table.stop()

    asyncio.run(run())


def test_two_pinned_versions_stay_and_the_idle_one_leaves(bench: Callable[..., Bench]) -> None:
    async def run() -> None:
        b = bench()
        b.registry.champion = 1
        await b.table.poll()
        held = await b.table.acquire("support/2")
        async with b.table.lease("support/3"):
            with pytest.raises(PinnedBusyError):
                await b.table.acquire("support/4")
        async with b.table.lease("support/4"):
            await b.unloaded()
            assert b.engines[3].closed and not b.engines[2].closed
        b.table.release(held)
        assert [v.version for v in b.table.versions] == [1, 2, 4]
        several = await asyncio.gather(*(b.table.acquire("support/5") for _ in range(5)))
        assert len(set(map(id, several))) == 1 and b.loads[5] == 1
        assert several[0].references == 5
        await b.table.stop()
        assert all(engine.closed for engine in b.engines.values())

    asyncio.run(run())


@pytest.mark.parametrize(
    "model",
    [
        "other",
        "support/0",
        "support/99",
        "support/../x",
        "support@challenger",
        "../support",
        "",
        "support/1/2",
    ],
)
def test_unknown_names_are_refused(bench: Callable[..., Bench], model: str) -> None:
    async def run() -> None:
        b = bench()
        b.registry.champion = 1
        await b.table.poll()
        with pytest.raises(UnknownModelError):
            await b.table.acquire(model)

    asyncio.run(run())
