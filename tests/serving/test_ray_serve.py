from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from regraft.config import ServeSection
from regraft.data.captures import CaptureStore
from regraft.records import DatasetVersion, Example, Message, TrialResult
from regraft.tracking.registry import CHAMPION, Registry
from regraft.tracking.runs import Tracker
from serving.app import EndpointSettings, delete, deploy

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_memory_monitor_refresh_ms="0")
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


def test_the_endpoint_on_ray_serve_follows_the_alias(
    local_ray: None,
    mlflow_url: str,
    base_folder: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    tmp_path: Path,
) -> None:
    one, two = (
        register(
            mlflow_url,
            tmp_path / "cache",
            key=kind,
            settings=method_settings[kind],
            folder=adapters[kind],
            base=base_folder,
        )
        for kind in ("lora", "prompt_tuning")
    )
    registry = Registry(mlflow_url, tmp_path / "cache")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = EndpointSettings(
        name="support",
        tracking_uri=mlflow_url,
        cache=tmp_path / "replica-cache",
        captures=tmp_path / "captures",
        dtype="float32",
        device="cpu",
        serve=ServeSection(port=port, max_batch=2, max_queued=2, max_new_tokens=32, poll_seconds=0.1),
    )
    assert EndpointSettings.model_validate_json(settings.model_dump_json()) == settings
    deploy(settings, host="127.0.0.1", port=port)
    url = f"http://127.0.0.1:{port}"
    try:
        first = httpx.get(f"{url}/health", timeout=30)
        assert first.status_code == 503 and "no champion" in first.json()["reason"]
        registry.set_alias("support", CHAMPION, one)
        # The client's own retries on 503 wait for the champion.
        patient = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=60, timeout=60)
        chat: Any = [{"role": "user", "content": "Hello"}]
        whole = patient.chat.completions.create(model="support", messages=chat, max_tokens=8)
        assert whole.model == "support/1"
        stream = patient.chat.completions.create(model="support", messages=chat, max_tokens=8, stream=True)
        deltas = [c.choices[0].delta.content or "" for c in stream]
        assert "".join(deltas) == whole.choices[0].message.content

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="support", prompt=["x"] * 5)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="support/9", messages=chat)

        registry.set_alias("support", CHAMPION, two)
        deadline = time.monotonic() + 60
        served: list[str] = []
        while "support/2" not in served:
            assert time.monotonic() < deadline, served
            answer = client.chat.completions.create(model="support", messages=chat, max_tokens=8)
            served.append(answer.model)
        assert answer.choices[0].message.content != whole.choices[0].message.content
    finally:
        delete()
    captured = CaptureStore(settings.captures).read()
    assert len(captured) == 2 + len(served)
    assert [f"{e.model}/{e.model_version}" for e in captured][2:] == served
