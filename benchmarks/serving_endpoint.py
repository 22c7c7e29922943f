"""What `benchmarks/serving.py` puts up: a registered model, and its endpoint on Ray in a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from serving_models import make_adapter

if TYPE_CHECKING:
    from regraft.tracking.registry import Registry
    from serving.settings import EndpointSettings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Registered:
    """Versions 1, 2, … of one model in a registry."""

    name: str
    tracking_uri: str
    registry: Registry
    versions: tuple[int, ...]
    folder: Path

    def settings(self, serve: Mapping[str, Any] = {}) -> EndpointSettings:
        """Of an endpoint with one engine replica and a spool of its own.

        Args:
            serve: More of its section.
        """
        from regraft.config import ServeSection
        from regraft.processes import free_port
        from serving.settings import EndpointSettings

        port = free_port(0, "serve.port")
        return EndpointSettings(
            name=self.name,
            tracking_uri=self.tracking_uri,
            cache=self.folder / "cache",
            captures=self.folder / f"captures-{port}",
            dtype="float32" if self.name == "tiny" else "bfloat16",
            device="cpu",
            serve=ServeSection.model_validate({"port": port, "max_queued": 1024, **serve}),
        )


@dataclass
class Endpoint:
    """A running endpoint."""

    settings: EndpointSettings
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """Where it takes chats."""
        return f"http://127.0.0.1:{self.settings.serve.port}/v1/chat/completions"

    def health(self) -> dict[str, Any]:
        """What it says of itself; empty while it does not answer."""
        import httpx

        try:
            found: dict[str, Any] = httpx.get(
                f"http://127.0.0.1:{self.settings.serve.port}/health", timeout=10
            ).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return found

    def wait(self, champion: int | None = None, seconds: float = 180.0) -> None:
        """Wait until a champion answers, or that one.

        Raises:
            TimeoutError: If none does.
        """
        deadline = time.monotonic() + seconds
        wanted = None if champion is None else f"{self.settings.name}/{champion}"
        while True:
            found = self.health()
            if found.get("status") == "ok" and wanted in (None, found.get("champion")):
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise TimeoutError(f"the endpoint did not come up; it last said: {found}")
            time.sleep(0.05)

    def actor(self, name: str) -> psutil.Process:
        """The process of Ray's proxy, `ProxyActor`, or of a deployment's only replica: Ray names them so.

        `Holder` is the process that holds the models of an engine replica.

        Raises:
            LookupError: If there is none.
        """
        title = r".* -m serving\.holder " if name == "Holder" else rf"ray::(ServeReplica:regraft:)?{name}"
        for process in self.family():
            try:
                if re.match(title, " ".join(process.cmdline())):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise LookupError(f"no {name} runs")

    def family(self) -> list[psutil.Process]:
        """Every process of it, Ray's too."""
        head = psutil.Process(self.process.pid)
        return [head, *head.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL everything."""
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@contextmanager
def running(settings: EndpointSettings, environment: Mapping[str, str] = {}) -> Iterator[Endpoint]:
    """Put an endpoint up; gives it when a champion answers."""
    from regraft.cluster.local import RAY_ENVIRONMENT

    file = settings.captures.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    process = child(["endpoint", str(file)], {**RAY_ENVIRONMENT, **environment})
    endpoint = Endpoint(settings, process)
    try:
        read(process)
        endpoint.wait()
        yield endpoint
        if process.poll() is None:
            assert process.stdin
            process.stdin.close()
            process.wait(120)
    finally:
        if process.poll() is None:
            endpoint.kill()


def child(arguments: Sequence[str], environment: Mapping[str, str] = {}, core: int | None = None) -> Any:
    """Start `serving_child.py`, on one core if it is named; it logs beside its settings."""
    from regraft.processes import with_large_pages

    # What an endpoint does for its engines, and for nothing else, is done for the bare one here.
    usual = {k: v for k, v in os.environ.items() if k not in {"GLIBC_TUNABLES", "MALLOC_ARENA_MAX"}}
    environment = {**usual, **environment}
    with _log(arguments).open("wb") as log:
        return subprocess.Popen(
            [*_bound(core), sys.executable, "-P", str(HERE / "serving_child.py"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=HERE.parent, env=with_large_pages(environment) if arguments[0] == "bare" else environment,
        )  # fmt: skip


def read(process: Any) -> str:
    """The next line of a child that is JSON or a word of its own.

    Raises:
        ChildProcessError: If it ended; with the end of its log.
    """
    while line := process.stdout.readline():
        if line.strip() in {"deployed", "loaded"} or line.startswith("["):
            return str(line).strip()
    status, arguments = process.wait(), process.args[process.args.index("-P") + 2 :]
    raise ChildProcessError(f"status {status} of {arguments}: {_log(arguments).read_text()[-2000:]}")


def _log(arguments: Sequence[str]) -> Path:
    return Path(arguments[1]).with_suffix(f".{arguments[0]}.log")


def loading(load: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Start a generator of load; see `serving_load.py`."""
    return _generator(json.dumps(load))


def _generator(load: str, core: int | None = None) -> subprocess.Popen[str]:
    command = [*_bound(core), sys.executable, "-P", str(HERE / "serving_load.py"), load]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _bound(core: int | None) -> list[str]:
    """What comes before a command, so that all it starts stays on one core if it is named."""
    return [] if core is None else ["taskset", "-c", str(core)]


class Asker:
    """A generator of load that takes one load after another, so that its start is no part of any.

    Args:
        core: To bind it to.
    """

    def __init__(self, core: int) -> None:
        self._process = _generator("-", core)

    def ask(self, load: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What became of each request of a load."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(load) + "\n")
        stdin.flush()
        told = []
        while line := stdout.readline():
            if line == "\n":
                return told
            told.append(json.loads(line))
        raise ChildProcessError(f"the generator of load ended with status {self._process.wait()}")

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # which closes its input, and so ends it


def answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All that a generator tells, when it has ended."""
    out, _ = process.communicate()
    if process.returncode not in (0, -signal.SIGTERM):
        raise ChildProcessError(f"the generator of load ended with status {process.returncode}")
    return [json.loads(line) for line in out.splitlines() if line]


@contextmanager
def held_to(pid: int, core: int) -> Iterator[None]:
    """Keep a process, and those it has started, on one core for a while."""
    head = psutil.Process(pid)
    family = [head, *head.children(recursive=True)]
    cores = head.cpu_affinity()
    for process in family:
        pin(process, core)
    try:
        yield
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.cpu_affinity(cores)


def pin(process: psutil.Process, core: int) -> None:
    """Bind a running process with all of its threads to one core."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, {core})


def register(
    uri: str, folder: Path, name: str, base: str, methods: Sequence[dict[str, Any]], spread: float
) -> Registered:
    """Make adapters with random weights and register them as a sweep does.

    Args:
        uri: Where MLflow is.
        folder: For their files.
        name: The registered model.
        base: The base model.
        methods: Settings of each.
        spread: Standard deviation of what is added to their weights.
    """
    from regraft.models import resolve
    from regraft.records import DatasetVersion, Example, Message, TrialResult
    from regraft.tracking.registry import Registry
    from regraft.tracking.runs import Tracker

    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    data = DatasetVersion(id="d", name="d", splits={"train": (Example(id="e", messages=turns),)})
    found, tracker, registry = resolve(base), Tracker(uri, name), Registry(uri, folder / "cache")
    sweep = tracker.start_sweep("s", params={}, dataset=data)
    versions = []
    for number, settings in enumerate(methods):
        key, files = f"{number}-{settings['name']}", folder / f"{name}-{number}"
        make_adapter(settings, found.path, files, spread=spread)
        trial = tracker.start_trial(sweep, sweep_id="s", key=key, label=key, params={}, dataset=data)
        logged = trial.log_adapter(files, name=key, params={"base_model": found.source}, step=1)
        result = TrialResult(
            key=key, sweep_id="s", run_id=trial.run_id, label=key, method=settings, status="completed",
            base_model=found.source, base_revision=found.revision, dataset_id="d", logged_model_id=logged,
        )  # fmt: skip
        versions.append(registry.register(name, result).version)
    registry.set_alias(name, "champion", versions[0])
    return Registered(name, uri, registry, tuple(versions), folder)
