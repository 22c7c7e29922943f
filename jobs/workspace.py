"""The workspace: `.regraft/` in the current folder, and the services that run for it.

It knows what is running (`services.json`) and what was finished (the journal); everything that must survive
a lost workspace lives in MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from regraft.cluster import local
from regraft.config import Experiment
from regraft.errors import ServiceError
from regraft.models import home
from regraft.processes import end_process
from regraft.records import Record
from regraft.tracking.registry import Registry
from regraft.tracking.runs import Tracker
from regraft.tracking.server import check_server, start_server


class Service(Record):
    """A process that Regraft started."""

    pid: int
    started: float
    url: str

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


class Services(Record):
    """Processes of this workspace. `ray_address` is the GCS, `ray.url` the job server."""

    mlflow: Service | None = None
    ray: Service | None = None
    ray_address: str | None = None
    monitor: Service | None = None


class Connection(Record):
    """Where things are: all that a stage needs to reach the others."""

    tracking_uri: str
    ray_address: str
    jobs_url: str | None
    workspace: Path

    @property
    def registry(self) -> Registry:
        """The model registry."""
        return Registry(self.tracking_uri, home() / "adapters")

    def tracker(self, experiment: Experiment) -> Tracker:
        """The runs of an experiment."""
        return Tracker(self.tracking_uri, experiment.name)

    @property
    def storage(self) -> str:
        """Where Ray keeps its state on a local cluster."""
        return str((self.workspace / "ray").resolve())

    @property
    def promotion_lock(self) -> Path:
        """Held while an alias moves."""
        return self.workspace / "promotion.lock"

    def captures(self, experiment: Experiment) -> Path:
        """Where the endpoint's exchanges are kept."""
        return captures_of(self.workspace, experiment.name)


class Workspace:
    """The folder of this project's state."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or Path(os.environ.get("REGRAFT_WORKSPACE", ".regraft"))).resolve()

    def services(self) -> Services:
        """What is running; dead processes are left out."""
        file = self.root / "services.json"
        if not file.exists():
            return Services()
        found = Services.model_validate_json(file.read_text())
        gone = {
            name: None for name in ("mlflow", "ray", "monitor") if (s := getattr(found, name)) and not s.alive
        }
        return found.model_copy(update=gone)

    def save(self, services: Services) -> None:
        """Write down what is running."""
        self.root.mkdir(parents=True, exist_ok=True)
        scratch = self.root / ".services.json.part"
        scratch.write_text(services.model_dump_json(indent=1))
        scratch.replace(self.root / "services.json")

    def found(self, stage: str, key: str) -> dict[str, Any] | None:
        """What a finished stage gave, if it was finished with the same inputs."""
        file = self.root / "journal" / f"{stage}-{key}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finished(self, stage: str, key: str, gave: dict[str, Any]) -> None:
        """Write down that a stage is finished."""
        folder = self.root / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{stage}-{key}.part"
        scratch.write_text(json.dumps(gave, indent=1))
        scratch.replace(folder / f"{stage}-{key}.json")

    def start(self, experiment: Experiment, say: Any) -> Services:
        """Start what the experiment does not say is elsewhere and is not running yet.

        Raises:
            ServiceError: If something cannot be started; what this call started is ended again.
        """
        services = self.services()
        started: list[str] = []
        try:
            if self.start_tracking(experiment, say):
                services = self.services()
                started.append("mlflow")
            if experiment.cluster.address is None and services.ray is None:
                say("starting a local Ray cluster")
                (self.root / "ray").mkdir(parents=True, exist_ok=True)
                uri = experiment.tracking.uri or services.mlflow.url  # type: ignore[union-attr]
                ray = local.start_local_ray(
                    self.root / "ray",
                    num_cpus=experiment.cluster.num_cpus,
                    num_gpus=experiment.cluster.num_gpus,
                    dashboard_port=experiment.cluster.dashboard_port,
                    environment={"MLFLOW_TRACKING_URI": uri, "REGRAFT_WORKSPACE": str(self.root)},
                )
                update = {"ray": _service(ray.pid, ray.dashboard_url), "ray_address": ray.address}
                services = services.model_copy(update=update)
                started.append("ray")
                self.save(services)
        except BaseException:
            self.stop(tuple(started))
            raise
        return services

    def start_tracking(self, experiment: Experiment, say: Any) -> bool:
        """Start the embedded MLflow if the experiment names no other and it does not run; whether it did.

        Raises:
            ServiceError: If it cannot be started.
        """
        services = self.services()
        if experiment.tracking.uri is not None or services.mlflow is not None:
            return False
        say("starting MLflow (SQLite)")
        server = start_server(self.root / "mlflow", experiment.tracking.host, experiment.tracking.port)
        self.save(services.model_copy(update={"mlflow": _service(server.pid, server.url)}))
        return True

    def stop(self, names: tuple[str, ...] = ("monitor", "ray", "mlflow")) -> list[str]:
        """End services of this workspace; returns which were running."""
        services = self.services()
        ended = []
        for name in names:
            service: Service | None = getattr(services, name)
            if service is None:
                continue
            end_process(service.pid)
            ended.append(name)
            services = services.model_copy(update={name: None})
            self.save(services)
        return ended

    def tracking_uri(self, experiment: Experiment) -> str:
        """Where MLflow is: by configuration, in this workspace, or by environment.

        Raises:
            ServiceError: If none is known, or it cannot be reached.
        """
        own = self.services().mlflow
        uri = experiment.tracking.uri or (own.url if own else None) or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            raise ServiceError(
                "tracking.uri: no MLflow server is known",
                "set tracking.uri or MLFLOW_TRACKING_URI, or start the embedded one with `regraft up`",
            )
        check_server(uri)
        return uri

    def connect(self, experiment: Experiment) -> Connection:
        """Where the services are that run already, by configuration, environment or this workspace.

        Raises:
            ServiceError: If MLflow or Ray cannot be reached.
        """
        services = self.services()
        uri = self.tracking_uri(experiment)
        address = experiment.cluster.address or services.ray_address or os.environ.get("RAY_ADDRESS")
        if address is None or (
            experiment.cluster.address is None and services.ray_address and services.ray is None
        ):
            raise ServiceError(
                "cluster.address: no Ray cluster is known", "set cluster.address, or run `regraft up`"
            )
        jobs = experiment.cluster.jobs or (services.ray.url if services.ray else None)
        return Connection(tracking_uri=uri, ray_address=address, jobs_url=jobs, workspace=self.root)


def captures_of(workspace: Path, name: str) -> Path:
    """Where the exchanges of an experiment's endpoint are kept."""
    return (workspace / "captures" / name).resolve()


def _service(pid: int, url: str) -> Service:
    return Service(pid=pid, started=psutil.Process(pid).create_time(), url=url)


@contextlib.contextmanager
def connected(
    experiment: Experiment, workspace: Workspace, say: Any, *, keep: bool = False
) -> Iterator[Connection]:
    """Reach the services; start those that are missing, and end those again afterwards unless `keep`."""
    before = workspace.services()
    on_cluster = bool(os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_ADDRESS"))
    if not on_cluster:
        workspace.start(experiment, say)
    try:
        connection = workspace.connect(experiment)
        local.join(connection.ray_address)
        yield connection
    finally:
        import ray

        ray.shutdown()
        if not keep and not on_cluster:
            mine = tuple(n for n in ("monitor", "ray", "mlflow") if getattr(before, n) is None)
            workspace.stop(mine)


@contextlib.contextmanager
def tracked(experiment: Experiment, workspace: Workspace, say: Any) -> Iterator[Tracker]:
    """Reach MLflow alone; where none is known the embedded one is started, and ended again afterwards."""
    mine = "MLFLOW_TRACKING_URI" not in os.environ and workspace.start_tracking(experiment, say)
    try:
        yield Tracker(workspace.tracking_uri(experiment), experiment.name)
    finally:
        if mine:
            workspace.stop(("mlflow",))
