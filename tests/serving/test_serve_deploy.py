"""The endpoint put up with `serve deploy` on a cluster of its own, and what befalls it there.

The tests run in their order: the first deploys, the last shuts down.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from regraft.cluster.local import start_local_ray, stop_local_ray
from regraft.processes import free_port
from regraft.records import DatasetVersion, Example, Message, TrialResult
from regraft.tracking.registry import CHAMPION, Registry
from regraft.tracking.runs import Tracker
from regraft.tracking.server import start_server, stop_server
from serving.app import EndpointSettings

CHAT: Any = [{"role": "user", "content": "Hello"}]
TURNS = (Message(role="user", content="q"), Message(role="assistant", content="a"))
SECONDS = 120
YAML = """\
name: support
model: {{source: {base}, dtype: float32, device: cpu}}
data: {{train: data.jsonl, evaluation: data.jsonl}}
sweep: {{methods: [{{name: zero_shot}}, {{name: lora}}]}}
{tracking}
serve:
  {serve}
"""


def write(folder: Path, base: Path | str, tracking: str, serve: str) -> Path:
    folder.mkdir(exist_ok=True)
    line = json.dumps({"messages": [{"role": t.role, "content": t.content} for t in TURNS]})
    (folder / "data.jsonl").write_text(line + "\n")
    file = folder / "regraft.yaml"
    file.write_text(YAML.format(base=base, tracking=f"tracking: {{uri: {tracking}}}" if tracking else "", serve=serve))  # fmt: skip
    return file


def regraft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "REGRAFT_"))}
    environment |= {"REGRAFT_HOME": str(folder / "home"), "REGRAFT_WORKSPACE": str(folder / "work")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


def test_the_config_is_what_the_endpoint_takes(tmp_path: Path) -> None:
    write(tmp_path, "/m", "https://mlflow.example:5000", "{port: 8123, max_replicas: 3, keys: keys.json}")
    printed = regraft(tmp_path, "serve", ".", "--config", "-")
    assert printed.returncode == 0 and printed.stdout.startswith("# "), printed.stderr
    config = yaml.safe_load(printed.stdout)
    assert config["proxy_location"] == "Disabled"
    (application,) = config["applications"]
    assert application["route_prefix"] is None
    settings = EndpointSettings.model_validate(application["args"])
    assert (settings.serve.host, settings.serve.port) == ("127.0.0.1", 8123)
    assert settings.tracking_uri == "https://mlflow.example:5000" and settings.dtype == "float32"
    assert settings.captures == tmp_path / "work/captures/support"
    assert (settings.serve.max_replicas, settings.serve.keys) == (3, tmp_path / "keys.json")
    written = regraft(tmp_path, "serve", ".", "--config", "serve.yaml")
    assert written.returncode == 0 and yaml.safe_load((tmp_path / "serve.yaml").read_text()) == config
    unwritten = regraft(tmp_path, "serve", ".", "--config", "nowhere/serve.yaml")
    assert unwritten.returncode == 2 and "--config" in unwritten.stderr


@pytest.mark.parametrize(
    ("tracking", "serve", "names"),
    [
        ("", "{port: 8123}", "tracking.uri"),
        ("sqlite:///mlflow.db", "{port: 8123}", "tracking.uri"),
        ("https://me:secret@mlflow.example", "{port: 8123}", "tracking.uri"),
        ("https://mlflow.example", "{port: 0}", "serve.port"),
        ("https://mlflow.example", "{host: 0.0.0.0}", "serve.keys"),
    ],
)
def test_a_config_that_would_not_work_elsewhere_is_not_written(
    tmp_path: Path, tracking: str, serve: str, names: str
) -> None:
    from jobs.serve import write_config
    from regraft.errors import ConfigError

    file = write(tmp_path, "/m", tracking, serve)
    with pytest.raises(ConfigError, match=names) as error:
        write_config(file, tmp_path / "serve.yaml")
    assert "secret" not in str(error.value) and not (tmp_path / "serve.yaml").exists()


class Deployed:
    """A cluster, an MLflow server that can be stopped and started, and the endpoint's config."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.mlflow = start_server(folder / "mlflow", "127.0.0.1", 0)
        self.ray = start_local_ray(
            folder / "ray",
            num_cpus=2,
            num_gpus=0,
            dashboard_port=0,
            environment={
                "RAY_memory_monitor_refresh_ms": "0",
                # Ten seconds by default: how often gateways tell how busy they are.
                "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
            },
        )
        self.port = free_port(0, "serve.port")
        self.url = f"http://127.0.0.1:{self.port}"
        self.registry = Registry(self.mlflow.url, folder / "cache")

    def close(self) -> None:
        stop_local_ray(self.ray.pid)
        stop_server(self.mlflow.pid)

    def serve_cli(self, *arguments: str) -> subprocess.Popen[str]:
        """Ray's own command line, at work."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("serve"), *arguments, "--address", self.ray.dashboard_url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=retries, timeout=60)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=30).json()
        return found

    def deployment(self, name: str) -> dict[str, Any]:
        """What Serve says of a deployment."""
        answer = httpx.get(f"{self.ray.dashboard_url}/api/serve/applications/", timeout=30).json()
        found: dict[str, Any] = answer["applications"].get("regraft", {}).get("deployments", {}).get(name, {})
        return {"status": None, "message": "", "replicas": [], **found}

    def replicas(self, state: str | None = None) -> list[dict[str, Any]]:
        """Engine replicas, or those in a state."""
        return [r for r in self.deployment("Engines")["replicas"] if state in (None, r["state"])]

    def states(self) -> list[dict[str, Any]]:
        """What each engine replica says of itself, to a process that joins the cluster for that."""
        code = (
            "import json, ray; from ray import serve; ray.init(log_to_driver=False); "
            "handle = serve.get_deployment_handle('Engines', 'regraft'); "
            "print(json.dumps(handle.broadcast('state').results()))"
        )
        asked = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=SECONDS,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self.ray.address},
        )  # fmt: skip
        found: list[dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
        return found

    def process(self, title: str) -> psutil.Process:
        """A process of the cluster by what it calls itself."""
        for child in psutil.Process(self.ray.pid).children(recursive=True):
            try:
                if child.cmdline()[:1] and child.cmdline()[0].startswith(title):
                    return child
            except psutil.NoSuchProcess:
                continue
        raise LookupError(title)

    def register(self, key: str, settings: dict[str, Any], adapter: Path) -> int:
        """Log an adapter as a trial does and register it; gives the version."""
        from regraft.models import resolve

        data = DatasetVersion(id="d", name="d", splits={"train": (Example(id="e", messages=TURNS),)})
        tracker = Tracker(self.mlflow.url, "support")
        sweep = tracker.start_sweep("s", params={}, dataset=data)
        trial = tracker.start_trial(sweep, sweep_id="s", key=key, label=key, params={}, dataset=data)
        base = resolve(str(self.base))
        result = TrialResult(
            key=key, sweep_id="s", run_id=trial.run_id, label=key, method=settings, base_model=base.source,
            base_revision=base.revision, dataset_id="d", status="completed",
            logged_model_id=trial.log_adapter(adapter, name=key, params={"base_model": base.source}, step=1),
        )  # fmt: skip
        return self.registry.register("support", result).version


def until(found: Callable[[], Any], what: Callable[[], Any] | None = None) -> Any:
    """Ask until the answer is something; what it is."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if answer := found():
                return answer
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, what() if what else "nothing"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def deployed(
    tiny_model: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployed]:
    """Two versions, the first of which is champion. Their base can take long chats, and is not there yet."""
    folder = tmp_path_factory.mktemp("deployed")
    base = folder / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    found = Deployed(folder, base)
    try:
        for kind in ("lora", "prompt_tuning"):
            found.register(kind, method_settings[kind], adapters[kind])
        found.registry.set_alias("support", CHAMPION, 1)
        base.rename(folder / "elsewhere")
        yield found
    finally:
        found.close()


class Crowd:
    """Clients that ask again and again, in a thread, until the context ends. `errors` has what went wrong."""

    def __init__(self, deployed: Deployed, clients: int, retries: int = 0) -> None:
        self._deployed, self._clients, self._retries = deployed, clients, retries
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.answers: list[tuple[str, str]] = []
        self.errors: list[str] = []

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def go_on(self, more: int = 20) -> None:
        """Wait until so many more have got their answers."""
        wanted = len(self.answers) + more
        until(lambda: len(self.answers) >= wanted or self.errors, lambda: len(self.answers))
        assert not self.errors, self.errors[:3]

    async def _run(self) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{self._deployed.url}/v1", api_key="unused", max_retries=self._retries, timeout=60
        ) as http:
            await asyncio.gather(*(self._one(http) for _ in range(self._clients)))

    async def _one(self, http: openai.AsyncOpenAI) -> None:
        while not self._over.is_set():
            try:
                whole = await http.chat.completions.create(model="support", messages=CHAT, max_tokens=32)
                self.answers.append((whole.model, whole.choices[0].message.content or ""))
            except openai.APIError as error:
                self.errors.append(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_a_base_that_is_missing_is_named_until_it_is_there(deployed: Deployed) -> None:
    serve = (
        f"{{port: {deployed.port}, max_batch: 2, max_queued: 16, max_new_tokens: 4000, poll_seconds: 0.2, "
        "num_cpus: 0.5, max_replicas: 2, upscale_seconds: 0.5, downscale_seconds: 1}"
    )
    write(deployed.folder, deployed.base, deployed.mlflow.url, serve)
    written = regraft(deployed.folder, "serve", ".", "--config", "serve.yaml")
    assert written.returncode == 0, written.stderr
    deploying = deployed.serve_cli("deploy", str(deployed.folder / "serve.yaml"))
    assert deploying.wait(SECONDS) == 0, deploying.communicate()
    until(
        lambda: deployed.deployment("Engines")["status"] == "HEALTHY", lambda: deployed.deployment("Engines")
    )
    missing = str(deployed.base)
    until(lambda: missing in (deployed.health()["reason"] or ""), deployed.health)
    with pytest.raises(openai.InternalServerError, match=missing) as refused:
        deployed.client().chat.completions.create(model="support", messages=CHAT)
    assert refused.value.status_code == 503
    (deployed.folder / "elsewhere").rename(deployed.base)
    answer = deployed.client(60).chat.completions.create(model="support", messages=CHAT, max_tokens=4)
    assert answer.model == "support/1" and deployed.health()["status"] == "ok"


@pytest.mark.slow
def test_replicas_come_warm_when_many_ask_and_go_without_failing_anybody(deployed: Deployed) -> None:
    assert len(deployed.replicas("RUNNING")) == 1
    with Crowd(deployed, 8) as many:
        until(
            lambda: len(deployed.replicas("RUNNING")) == 2 or many.errors,
            lambda: deployed.deployment("Engines"),
        )
        many.go_on()
    states = deployed.states()
    # The first replica came before its base; the other had loaded all before anybody could ask it.
    assert sorted(state["loaded_first"] for state in states) == [[], ["support/1"]]
    with Crowd(deployed, 1) as one:
        until(lambda: len(deployed.replicas()) == 1 or one.errors, lambda: deployed.deployment("Engines"))
        one.go_on()
    assert not many.errors and not one.errors
    assert len({*many.answers, *one.answers}) == 1


@pytest.mark.slow
def test_answers_go_on_without_mlflow_and_no_replica_comes_that_could_not_give_them(
    deployed: Deployed,
) -> None:
    with Crowd(deployed, 8) as crowd:
        stop_server(deployed.mlflow.pid)
        until(lambda: deployed.health()["registry_error"])
        crowd.go_on()
        # More replicas are wanted now, but cannot learn what to load.
        until(lambda: len(deployed.replicas()) == 2 or crowd.errors, lambda: deployed.deployment("Engines"))
        refused = "which this one could not load"
        until(lambda: refused in deployed.deployment("Engines")["message"] or crowd.errors, lambda: deployed.deployment("Engines"))  # fmt: skip
        crowd.go_on()
        port = int(deployed.mlflow.url.rpartition(":")[2])
        deployed.mlflow = start_server(deployed.folder / "mlflow", "127.0.0.1", port)
        until(
            lambda: len(deployed.replicas("RUNNING")) == 2 or crowd.errors,
            lambda: deployed.deployment("Engines"),
        )
        deployed.registry.set_alias("support", CHAMPION, 2)
        until(lambda: deployed.health()["champion"] == "support/2")
        crowd.go_on()
    assert not crowd.errors
    assert {served for served, _ in crowd.answers} == {"support/1", "support/2"} and len(
        set(crowd.answers)
    ) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gateway", "Engines"])
def test_a_gateway_or_a_replica_that_is_killed_is_replaced(deployed: Deployed, name: str) -> None:
    title = f"ray::ServeReplica:regraft:{name}"
    with Crowd(deployed, 2, retries=60) as crowd:
        crowd.go_on(5)
        victim = deployed.process(title)
        victim.kill()
        psutil.wait_procs([victim], SECONDS)
        until(lambda: deployed.health()["status"] == "ok")
        crowd.go_on()
    assert deployed.process(title).pid != victim.pid
    assert {served for served, _ in crowd.answers} == {"support/2"} and len(set(crowd.answers)) == 1
    with Crowd(deployed, 2) as after:
        after.go_on()


@pytest.mark.slow
def test_another_config_takes_over_and_its_replicas_are_asked_directly(deployed: Deployed) -> None:
    serve = f"{{port: {deployed.port}, max_new_tokens: 4000, poll_seconds: 0.2, num_cpus: 0.5}}"
    write(deployed.folder, deployed.base, deployed.mlflow.url, serve)
    assert regraft(deployed.folder, "serve", ".", "--config", "serve.yaml").returncode == 0
    old = deployed.process("ray::ServeReplica:regraft:Gateway")

    def directly() -> bool:
        try:
            return any(state["asked_directly"] > 5 for state in deployed.states())
        except subprocess.CalledProcessError:  # there is no replica yet
            return False

    with Crowd(deployed, 2, retries=60) as crowd:
        crowd.go_on(5)
        deploying = deployed.serve_cli("deploy", str(deployed.folder / "serve.yaml"))
        assert deploying.wait(SECONDS) == 0, deploying.communicate()
        psutil.wait_procs([old], SECONDS)
        assert not old.is_running()
        until(lambda: directly() or crowd.errors, lambda: deployed.deployment("Engines"))
        crowd.go_on()
    assert len(set(crowd.answers)) == 1
    until(lambda: len(deployed.replicas()) == 1, lambda: deployed.deployment("Engines"))


@pytest.mark.slow
def test_a_stream_that_has_begun_ends_whole_while_the_endpoint_is_taken_down(deployed: Deployed) -> None:
    # Of the two versions the one whose answer has no end of its own.
    asked: Any = {"model": "support/1", "messages": CHAT, "max_tokens": 3900}
    whole = deployed.client().chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "length"
    config = yaml.safe_load((deployed.folder / "serve.yaml").read_text()) | {"applications": []}
    going = threading.Event()

    def take_down() -> None:
        httpx.put(f"{deployed.ray.dashboard_url}/api/serve/applications/", json=config).raise_for_status()
        until(lambda: not deployed.replicas("RUNNING"))
        going.set()

    with deployed.client().chat.completions.create(**asked, stream=True) as stream:
        chunks = [next(stream)]
        other = threading.Thread(target=take_down)
        other.start()
        came_after = 0
        for chunk in stream:
            chunks.append(chunk)
            came_after += going.is_set()
        other.join()
    assert came_after, "the stream was over before the endpoint began to go"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    until(lambda: deployed.deployment("Gateway")["status"] is None)
    with pytest.raises(openai.APIConnectionError):  # nobody listens any more
        deployed.client().chat.completions.create(**asked)
