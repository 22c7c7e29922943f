"""Put the endpoint up on a Ray cluster, and wait until it answers; or write the config that does so."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import yaml

from jobs.console import Say, say
from jobs.workspace import Connection, Workspace, captures_of, connected
from regraft.config import Experiment
from regraft.errors import ConfigError, ServiceError
from regraft.models import home

if TYPE_CHECKING:
    from serving.settings import EndpointSettings

_READY_SECONDS = 180.0

_HEAD = """\
# The endpoint of {name}, for Ray Serve. On a cluster whose nodes have Regraft installed:
#
#     serve deploy {file} --address http://HEAD:8265     (and again after a change)
#     serve status --address http://HEAD:8265
#
# To take it down, deploy it with `applications: []`: what is being answered is answered to its end.
# (`serve shutdown` breaks it off.)
#
# Each node must reach MLflow at `tracking_uri` and the base model where it was trained from, and may write to
# `cache` and `captures`.
"""


def serve(experiment: Experiment, connection: Connection, say: Say = say) -> str:
    """Deploy the endpoint of an experiment; returns its base URL once a version answers.

    Raises:
        ServiceError: If the port is in use, there is no champion, or it does not come up.
    """
    from regraft.processes import free_port
    from serving.app import deploy

    if connection.registry.by_alias(experiment.name, "champion") is None:
        raise ServiceError(f"{experiment.name} has no champion to serve", "run `regraft sweep` first")
    section = experiment.serve
    base = f"http://{section.host}:{section.port}"
    if not _healthy(base, experiment.name):
        port = free_port(section.port, "serve.port", section.host)
        base = f"http://{section.host}:{port}"
        settings = settings_of(experiment, connection.tracking_uri, connection.captures(experiment))
        say("deploying the endpoint on Ray Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deploy(settings, host=section.host, port=port, say=say)
    wait_for_champion(base, experiment.name)
    return base


def settings_of(experiment: Experiment, tracking_uri: str, captures: Path) -> EndpointSettings:
    """All that the processes of an experiment's endpoint need to know.

    Args:
        experiment: What to serve.
        tracking_uri: Where MLflow is.
        captures: Where the endpoint's exchanges are kept.
    """
    from serving.settings import EndpointSettings

    return EndpointSettings(
        name=experiment.name,
        tracking_uri=tracking_uri,
        cache=home() / "adapters",
        captures=captures,
        dtype=experiment.model.dtype,
        device=experiment.model.device,
        serve=experiment.serve,
    )


def config_text(experiment: Experiment, workspace: Workspace, file: str = "FILE") -> str:
    """The endpoint of an experiment as YAML for `serve deploy`. Nothing has to run for it.

    Args:
        experiment: What to serve.
        workspace: Where the endpoint's exchanges are kept.
        file: What the text is written to, for the comment on its top.

    Raises:
        ConfigError: If the YAML leaves open what other machines could not find out: where MLflow is, on which
            port to listen.
    """
    from serving.app import serve_config
    from serving.auth import check_exposure

    uri, section = experiment.tracking.uri, experiment.serve
    check_exposure(section.host, section.keys, open=section.open)
    if uri is None:
        raise ConfigError(
            "tracking.uri: is not set, and the cluster would not know where MLflow is",
            "set it to the URL of an MLflow server that the cluster's nodes reach",
        )
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"tracking.uri: {parts.scheme or uri!r} is no address of a server that other machines reach",
            "set it to the http(s) URL of an MLflow server",
        )
    if parts.username or parts.password:  # the URL itself stays out of the message
        raise ConfigError(
            "tracking.uri: has a user or a password in it, which would stand in the config",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of the nodes",
        )
    if section.port == 0:
        raise ConfigError("serve.port: is 0, any that is free, and nobody would know which", "set it")
    settings = settings_of(experiment, uri, captures_of(workspace.root, experiment.name))
    config = serve_config(settings, host=section.host, port=section.port)
    return _HEAD.format(name=experiment.name, file=file) + yaml.safe_dump(config, sort_keys=False)


def write_config(path: Path, target: Path) -> None:
    """Write the config of an experiment's endpoint to a file; `-` is the standard output."""
    experiment = Experiment.load(path)
    if str(target) == "-":
        sys.stdout.write(config_text(experiment, Workspace()))
        return
    text = config_text(experiment, Workspace(), target.name)
    try:
        target.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"--config: cannot write {target}: {error.strerror}", "name another file"
        ) from error
    say(f"wrote {target}: deploy it with `serve deploy {target}`")


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
