"""The endpoint on Ray Serve: gateways, which take requests in, before replicas, which hold the models.

`build_app` is what a Serve config names: `import_path: serving.app:build_app`, with `EndpointSettings` as its
arguments. Files of that kind come from `regraft serve --config`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from regraft.errors import ServiceError
from serving.gateway import create_gateway
from serving.remote import RemoteEngines
from serving.replica import EngineReplica
from serving.settings import EndpointSettings

__all__ = ["APP_NAME", "EndpointSettings", "build_app", "delete", "deploy", "serve_config"]

logger = logging.getLogger(__name__)

APP_NAME = "regraft"

#: Requests a gateway takes beyond those that replicas answer or that wait: Ray would let them wait at its
#: proxy without a bound, while here they get their 429, and /health still gets through.
_HEADROOM = 64

#: How often gateways tell Ray how many requests they have, as Ray sets it.
_TOLD_SECONDS = 10.0

#: Ray runs the code of a deployment and its routing in threads of their own, so that code that blocks does no
#: harm. Ours does not block, and changing threads took a third of an answer's time without a model.
#: Between gateway and replicas answers go by gRPC, which takes a quarter less time than calls of actors do.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}


@serve.ingress()
class Gateway:
    """A replica of the gateway.

    Args:
        settings: As `EndpointSettings` dumps itself.
        engines: The deployment that holds the models.
    """

    def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any]) -> None:
        self._settings = EndpointSettings.model_validate(settings)
        self._engines = engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray (the name is its own) after the constructor, in the replica."""
        from regraft.tracking.registry import Registry

        engines = RemoteEngines(self._engines)
        registry = Registry(self._settings.tracking_uri, self._settings.cache)
        return create_gateway(self._settings, registry, engines.load, engines.keep)


def build_app(settings: EndpointSettings | dict[str, Any]) -> Application:
    """Describe the endpoint for Ray Serve, without running it.

    Args:
        settings: What to serve; from a config file Ray passes them as it reads them.
    """
    settings = EndpointSettings.model_validate(settings)
    section = settings.serve
    arguments = settings.model_dump(mode="json")
    replicas: dict[str, Any] = {"num_replicas": section.min_replicas}
    if section.max_replicas > section.min_replicas:
        replicas = {
            "num_replicas": None,
            "autoscaling_config": {
                "min_replicas": section.min_replicas,
                "max_replicas": section.max_replicas,
                # A replica is as fast as it gets when its batch is full: beyond that they wait.
                "target_ongoing_requests": section.max_batch,
                "upscale_delay_s": section.upscale_seconds,
                "downscale_delay_s": section.downscale_seconds,
                # Ray's 30 s, but no longer than what is asked for: a mean is late by half of it.
                "look_back_period_s": min(30.0, max(1.5 * _TOLD_SECONDS, section.upscale_seconds)),
            },
        }
    engines = serve.deployment(
        EngineReplica,
        name="Engines",
        max_ongoing_requests=section.max_batch,
        max_queued_requests=section.max_queued,
        ray_actor_options={
            "num_cpus": section.num_cpus,
            "num_gpus": section.num_gpus,
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=section.request_timeout_seconds,
        **replicas,
    )
    gateway = serve.deployment(
        Gateway,
        num_replicas=section.gateways,
        max_ongoing_requests=section.max_batch * section.max_replicas + section.max_queued + _HEADROOM,
        # It waits for others most of the time: it takes no core of a small machine away from them.
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _ENVIRONMENT}},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=section.request_timeout_seconds,
    )
    application: Application = gateway.bind(arguments, engines.bind(arguments))
    return application


def serve_config(settings: EndpointSettings, *, host: str, port: int) -> dict[str, Any]:
    """The endpoint as a config for `serve deploy`.

    Args:
        settings: What to serve.
        host: Address to listen on.
        port: Port to listen on.
    """
    return {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "serving.app:build_app",
                "args": settings.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def deploy(
    settings: EndpointSettings, *, host: str, port: int, say: Callable[[str], None] = logger.warning
) -> None:
    """Run the endpoint on the Ray that this process is connected to.

    Returns when it answers HTTP, which may be before the first version is loaded: see `/health`. A large
    model may take long, and so may a cluster that has to grow first: it waits for as long as there is hope.

    Args:
        settings: What to serve.
        host: Address to listen on.
        port: Port to listen on.
        say: Is told why it takes long, where Ray says so.

    Raises:
        ServiceError: If Ray has given up.
    """
    serve.start(http_options={"host": host, "port": port})
    target = serve.RunTarget(build_app(settings), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    said: set[str] = set()
    while True:
        application = serve.status().applications[APP_NAME]
        if application.status == "RUNNING":
            return
        messages = {_ends(d.message) for d in application.deployments.values() if d.message}
        if application.status == "DEPLOY_FAILED":
            why = "; ".join(sorted(messages)) or application.message
            raise ServiceError(f"the endpoint does not come up: {why}", "see Ray's dashboard and logs")
        for message in sorted(messages - said):
            say(message)
        said |= messages
        time.sleep(0.1)


def _ends(message: str) -> str:
    """What Ray says before a traceback, and the error after it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines if len(lines) < 3 else (lines[0], lines[-1]))


def delete() -> None:
    """Take the endpoint down, letting it answer what it has begun."""
    serve.delete(APP_NAME)
