"""Put the endpoint up on a Ray cluster, and wait until it answers."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import httpx

from jobs.console import Say, say
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.errors import ServiceError
from regraft.models import home

_READY_SECONDS = 180.0


def serve(experiment: Experiment, connection: Connection, say: Say = say) -> str:
    """Deploy the endpoint of an experiment; returns its base URL once a version answers.

    Raises:
        ServiceError: If the port is in use, there is no champion, or it does not come up.
    """
    from regraft.processes import free_port
    from serving.app import EndpointSettings, deploy

    if connection.registry.by_alias(experiment.name, "champion") is None:
        raise ServiceError(f"{experiment.name} has no champion to serve", "run `regraft sweep` first")
    section = experiment.serve
    base = f"http://{section.host}:{section.port}"
    if not _healthy(base, experiment.name):
        port = free_port(section.port, "serve.port", section.host)
        base = f"http://{section.host}:{port}"
        settings = EndpointSettings(
            name=experiment.name,
            tracking_uri=connection.tracking_uri,
            cache=home() / "adapters",
            captures=connection.captures(experiment),
            dtype=experiment.model.dtype,
            device=experiment.model.device,
            serve=section,
        )
        say("deploying the endpoint on Ray Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deploy(settings, host=section.host, port=port)
    wait_for_champion(base, experiment.name)
    return base


def wait_for_champion(base: str, name: str, version: int | None = None) -> dict[str, object]:
    """Wait until the endpoint answers with a champion, or with that very version; gives its health.

    Raises:
        ServiceError: If it does not within three minutes; the message carries what it last said.
    """
    deadline = time.monotonic() + _READY_SECONDS
    last = "nothing"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{base}/health", timeout=10)
            last = answer.text[:500]
            champion = answer.json().get("champion") if answer.status_code == httpx.codes.OK else None
            if champion is not None and (version is None or champion == f"{name}/{version}"):
                health: dict[str, object] = answer.json()
                return health
        except (httpx.HTTPError, ValueError) as error:
            last = str(error)
        time.sleep(0.2)
    raise ServiceError(
        f"the endpoint at {base} is not ready; it last said: {last}", "see Ray's dashboard and logs"
    )


def _healthy(base: str, name: str) -> bool:
    try:
        answer = httpx.get(f"{base}/health", timeout=2)
        return str(answer.json().get("champion", "")).startswith(f"{name}/")
    except (httpx.HTTPError, ValueError):
        return False


def run(path: Path) -> None:
    """Serve until interrupted."""
    experiment = Experiment.load(path)
    with connected(experiment, Workspace(), say) as connection:
        base = serve(experiment, connection)
        say(f"serving {experiment.name} at {base}/v1 (interrupt to end)")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            from serving.app import delete

            delete()


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(lambda: run(Path(sys.argv[1])), "python jobs/serve.py EXPERIMENT.yaml", arguments=1)
