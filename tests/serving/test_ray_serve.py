from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest

from regraft.config import ServeSection
from regraft.data.captures import CaptureStore
from regraft.records import CapturedExchange, DatasetVersion, Example, Message, TrialResult
from regraft.tracking.registry import CHAMPION, Registry
from regraft.tracking.runs import Tracker
from serving.app import EndpointSettings, delete, deploy

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_memory_monitor_refresh_ms="0")
CHAT: Any = [{"role": "user", "content": "Hello"}]
TURNS = (Message(role="user", content="q"), Message(role="assistant", content="a"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray
    from ray import serve

    # Its own cluster, whatever else runs on this machine.
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    yield
    serve.shutdown()
    ray.shutdown()


def register(url: str, cache: Path, *, key: str, settings: dict[str, Any], folder: Path, base: Path) -> int:
    """Log an adapter as a trial does and register it; gives the version."""
    from regraft.models import resolve

    example = Example(id="e", messages=TURNS)
    data = DatasetVersion(id="d", name="d", splits={"train": (example,)})
    tracker = Tracker(url, "support")
    sweep = tracker.start_sweep("s", params={}, dataset=data)
    trial = tracker.start_trial(sweep, sweep_id="s", key=key, label=key, params={}, dataset=data)
    found = resolve(str(base))
    model_id = trial.log_adapter(folder, name=key, params={"base_model": found.source}, step=1)
    result = TrialResult(
        key=key,
        sweep_id="s",
        run_id=trial.run_id,
        label=key,
        method=settings,
        base_model=found.source,
        base_revision=found.revision,
        dataset_id="d",
        status="completed",
        logged_model_id=model_id,
    )
    return Registry(url, cache).register("support", result).version


class Here(NamedTuple):
    url: str
    settings: EndpointSettings
    registry: Registry
    #: Version 1 is LoRA, 2 prompt tuning.
    versions: tuple[int, int]

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=retries, timeout=60)

    def captured(self) -> list[CapturedExchange]:
        return CaptureStore(self.settings.captures).read()


@pytest.fixture(scope="module")
def here(
    local_ray: None,
    mlflow_url: str,
    base_folder: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Here]:
    """A gateway and two engine replicas; the first version is the champion."""
    folder = tmp_path_factory.mktemp("serve")
    one, two = (
        register(
            mlflow_url,
            folder / "cache",
            key=kind,
            settings=method_settings[kind],
            folder=adapters[kind],
            base=base_folder,
        )
        for kind in ("lora", "prompt_tuning")
    )
    registry = Registry(mlflow_url, folder / "cache")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    section = ServeSection(
        port=port, max_batch=2, max_queued=8, max_new_tokens=32, poll_seconds=0.1, num_cpus=0.5,
        min_replicas=2, max_replicas=2, shadow=1.0,
    )  # fmt: skip
    settings = EndpointSettings(
        name="support",
        tracking_uri=mlflow_url,
        cache=folder / "replica-cache",
        captures=folder / "captures",
        dtype="float32",
        device="cpu",
        serve=section,
    )
    assert EndpointSettings.model_validate_json(settings.model_dump_json()) == settings
    deploy(settings, host="127.0.0.1", port=port)
    found = Here(f"http://127.0.0.1:{port}", settings, registry, (one, two))
    first = httpx.get(f"{found.url}/health", timeout=30)
    assert first.status_code == 503 and "no champion" in first.json()["reason"]
    registry.set_alias("support", CHAMPION, one)
    # The client's own retries on 503 wait for the champion.
    found.client(60).chat.completions.create(model="support", messages=CHAT, max_tokens=1)
    yield found
    delete()


def loads(here: Here) -> dict[str, int]:
    """Requests that each loaded version answers."""
    health = httpx.get(f"{here.url}/health", timeout=30).json()
    return {entry["id"]: entry["requests"] for entry in health["loaded"]}


async def crowd(here: Here, over: asyncio.Event, *, streams: bool, clients: int = 6) -> list[tuple[str, str]]:
    """Ask again and again; gives the version and what became of each request: its text, or an error."""
    found: list[tuple[str, str]] = []

    async def one(http: openai.AsyncOpenAI) -> None:
        while not over.is_set():
            try:
                if streams:
                    raw = await http.chat.completions.create(
                        model="support", messages=CHAT, max_tokens=32, stream=True
                    )
                    chunks = [c async for c in raw]
                    who = {c.model for c in chunks}
                    assert len(who) == 1
                    text = "".join(c.choices[0].delta.content or "" for c in chunks)
                    found.append((who.pop(), text))
                else:
                    whole = await http.chat.completions.create(model="support", messages=CHAT, max_tokens=32)
                    found.append((whole.model, whole.choices[0].message.content or ""))
            except openai.APIError as error:
                found.append(("", f"{type(error).__name__}: {error}"))

    async with openai.AsyncOpenAI(
        base_url=f"{here.url}/v1", api_key="unused", max_retries=0, timeout=60
    ) as http:
        await asyncio.gather(*(one(http) for _ in range(clients)))
    return found


def test_whole_and_stream_say_the_same_and_too_many_are_refused(here: Here) -> None:
    client = here.client()
    whole = client.chat.completions.create(model="support", messages=CHAT, max_tokens=8)
    assert whole.model == f"support/{here.versions[0]}"
    stream = client.chat.completions.create(model="support", messages=CHAT, max_tokens=8, stream=True)
    deltas = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(deltas) == whole.choices[0].message.content
    with pytest.raises(openai.RateLimitError) as refused:  # two replicas take two each, and eight wait
        client.completions.create(model="support", prompt=["x"] * 24)
    assert refused.value.response.headers["retry-after"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="support/9", messages=CHAT)
    client.chat.completions.create(model="support", messages=CHAT, max_tokens=1)  # and it goes on


def test_a_client_that_hangs_up_frees_its_place(here: Here) -> None:
    served = f"support/{here.versions[0]}"
    body = {"model": "support", "messages": CHAT, "max_tokens": 32, "stream": True}
    with httpx.stream("POST", f"{here.url}/v1/chat/completions", json=body, timeout=60) as reply:
        next(reply.iter_bytes())
    deadline = time.monotonic() + 60
    while loads(here)[served]:
        assert time.monotonic() < deadline
    assert here.captured()[-1].finish_reason in {"aborted", "length", "stop"}


def test_an_alias_that_moves_under_load_fails_and_mixes_nothing(here: Here) -> None:
    one, two = (f"support/{n}" for n in here.versions)

    async def run() -> list[tuple[str, str]]:
        over = asyncio.Event()
        task = asyncio.gather(
            crowd(here, over, streams=True, clients=2), crowd(here, over, streams=False, clients=2)
        )
        for alias_of, served in ((1, two), (0, one)):  # there, and back again
            await asyncio.to_thread(here.registry.set_alias, "support", CHAMPION, here.versions[alias_of])
            while (await asyncio.to_thread(loads_champion, here)) != served:
                pass
            await asyncio.to_thread(
                here.client().chat.completions.create, model="support", messages=CHAT, max_tokens=4
            )
        over.set()
        both = await task
        return [*both[0], *both[1]]

    found = asyncio.run(run())
    assert {who for who, _ in found} == {one, two}, [text for who, text in found if not who][:3]
    texts = {who: {text for served, text in found if served == who} for who in (one, two)}
    # Greedy answers of a version are all the same, and none is half of another's.
    assert [len(own) for own in texts.values()] == [1, 1] and texts[one] != texts[two]


def loads_champion(here: Here) -> str | None:
    champion: str | None = httpx.get(f"{here.url}/health", timeout=30).json()["champion"]
    return champion


def asked_directly() -> list[int]:
    """How many requests have come to each replica without Ray; one that was killed may be listed yet."""
    from ray import serve
    from ray.exceptions import RayActorError

    handle = serve.get_deployment_handle("Engines", "regraft")
    states = handle.broadcast("state").results(return_exceptions=True)
    assert all(isinstance(state, dict | RayActorError) for state in states), states
    return sorted(state["asked_directly"] for state in states if isinstance(state, dict))


def test_replicas_are_asked_without_ray(here: Here) -> None:
    async def run() -> None:
        over = asyncio.Event()
        task = asyncio.create_task(crowd(here, over, streams=True, clients=4))
        before = await asyncio.to_thread(asked_directly)
        assert len(before) == 2
        while (await asyncio.to_thread(asked_directly))[0] <= before[-1]:
            pass
        over.set()
        assert {who for who, _ in await task} == {f"support/{here.versions[0]}"}

    asyncio.run(run())


def holders() -> list[psutil.Process]:
    """The processes of the replicas that hold models."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "serving.holder" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.parametrize(
    "whole",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["the replica", "its process alone"],
)
def test_a_replica_that_is_killed_costs_nobody_an_answer_that_had_not_begun(here: Here, whole: bool) -> None:
    import ray
    from ray.util import list_named_actors

    served = f"support/{here.versions[0]}"

    def engines() -> list[str]:
        names = [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == "serve"]
        return [name for name in names if "Engines" in name]

    async def run() -> list[tuple[str, str]]:
        over = asyncio.Event()
        task = asyncio.create_task(crowd(here, over, streams=False, clients=5))
        while sum((await asyncio.to_thread(loads, here)).values()) < 3:
            pass
        victims, held = engines(), holders()
        assert len(victims) == len(held) == 2
        if whole:
            ray.kill(ray.get_actor(victims[0], namespace="serve"))
        else:
            held[0].kill()
        async with asyncio.timeout(60):
            while all(process.is_running() for process in held):
                await asyncio.sleep(0.05)
        for _ in range(20):  # answers of the one that is left
            await asyncio.to_thread(
                here.client(60).chat.completions.create, model="support", messages=CHAT, max_tokens=4
            )
        over.set()
        return await task

    found = asyncio.run(run())
    assert {who for who, _ in found} == {served}, [text for who, text in found if not who][:3]
    assert len({text for _, text in found}) == 1
    # The one that comes in its place is found, and asked as the others are.
    deadline = time.monotonic() + 120
    while len(found_now := asked_directly()) < 2 or not found_now[0]:
        assert time.monotonic() < deadline, found_now
        here.client(60).chat.completions.create(model="support", messages=CHAT, max_tokens=1)


def test_the_shadow_answers_unseen(here: Here) -> None:
    one, two = here.versions
    here.registry.set_alias("support", "shadow", two)
    deadline = time.monotonic() + 60
    client = here.client()
    shadowed: list[CapturedExchange] = []
    while not shadowed:
        assert time.monotonic() < deadline
        answer = client.chat.completions.create(model="support", messages=CHAT, max_tokens=8)
        assert answer.model == f"support/{one}"
        shadowed = [e for e in here.captured() if e.variant == "shadow"]
    seen = {e.id: e for e in here.captured() if e.variant == CHAMPION}
    assert shadowed[0].model_version == two
    assert seen[shadowed[0].id.removesuffix("-shadow")].messages == shadowed[0].messages
