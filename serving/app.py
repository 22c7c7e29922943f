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
from serving.auth import check_exposure
from serving.gateway import create_gateway
from serving.listener import Listener
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

#: Beyond what answers may take: to write the last captures down and unload.
_LEAVE_SECONDS = 5.0

#: Ray's name for its head node, as a resource.
_HEAD = "node:__internal_head__"

#: Ray runs the code of a deployment and its routing in threads of their own, so that code that blocks does no
#: harm. Ours does not block, and changing threads took a third of an answer's time without a model.
#: Between gateway and replicas answers go by gRPC, which takes a quarter less time than calls of actors do.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}


def _application(settings: EndpointSettings, handle: DeploymentHandle[Any]) -> FastAPI:
    from regraft.tracking.registry import Registry

    engines = RemoteEngines(handle, settings.serve)
    registry = Registry(settings.tracking_uri, settings.cache)
    return create_gateway(settings, registry, engines.load, engines.keep)


class Gateway:
    """A replica of the gateway, which listens by itself.

    Args:
        settings: As `EndpointSettings` dumps itself.
        engines: The deployment that holds the models.

    Raises:
        ServiceError: If it cannot listen where it should.
    """

    async def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        given = EndpointSettings.model_validate(settings)
        section = given.serve
        self._listener = Listener(
            _application(given, engines), section.host, section.port,
            name=given.name, drain_seconds=section.request_timeout_seconds,
        )  # fmt: skip
        await self._listener.start()

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises here."""
        self._listener.check()

    async def __del__(self) -> None:
        """Called by Ray before it ends the replica; answers what has begun."""
        await self._listener.drain()


@serve.ingress()
class GatewayBehindProxy:
    """A replica of the gateway that Ray's proxy calls.

    Args:
        settings: As `EndpointSettings` dumps itself.
        engines: The deployment that holds the models.
    """

    def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any]) -> None:
        self._settings = EndpointSettings.model_validate(settings)
        self._engines = engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray (the name is its own) after the constructor, in the replica."""
        return _application(self._settings, self._engines)


def build_app(settings: EndpointSettings | dict[str, Any]) -> Application:
    """Describe the endpoint for Ray Serve, without running it.

    Args:
        settings: What to serve; from a config file Ray passes them as it reads them.

    Raises:
        ConfigError: If others would reach the gateways without a key.
    """
    settings = EndpointSettings.model_validate(settings)
    section = settings.serve
    check_exposure(section.host, section.keys, open=section.open)
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
        graceful_shutdown_timeout_s=section.request_timeout_seconds + _LEAVE_SECONDS,
        **replicas,
    )
    listens = section.ingress == "gateway"
    gateway = serve.deployment(
        Gateway if listens else GatewayBehindProxy,
        name="Gateway",
        num_replicas=section.gateways,
        max_ongoing_requests=section.max_batch * section.max_replicas + section.max_queued + _HEADROOM,
        ray_actor_options={
            # It waits for others most of the time: it takes no core of a small machine away from them.
            "num_cpus": 0,
            # One address, which is known.
            **({"resources": {_HEAD: 0.001}} if listens else {}),
            "runtime_env": {"env_vars": _ENVIRONMENT},
        },
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=section.request_timeout_seconds + _LEAVE_SECONDS,
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
    settings = _listening(settings, host, port)
    return {
        # EveryNode is Ray's own.
        "proxy_location": "EveryNode" if settings.serve.ingress == "proxy" else "Disabled",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": _route(settings),
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
    settings = _listening(settings, host, port)
    proxies = {} if settings.serve.ingress == "proxy" else {"proxy_location": "Disabled"}
    serve.start(http_options={"host": host, "port": port}, **proxies)
    target = serve.RunTarget(build_app(settings), name=APP_NAME, route_prefix=_route(settings))
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


def _listening(settings: EndpointSettings, host: str, port: int) -> EndpointSettings:
    """The same on an address that is decided."""
    section = settings.serve.model_copy(update={"host": host, "port": port})
    return settings.model_copy(update={"serve": section})


def _route(settings: EndpointSettings) -> str | None:
    """Where Ray's proxies find the application, if they should."""
    return "/" if settings.serve.ingress == "proxy" else None


def _ends(message: str) -> str:
    """What Ray says before a traceback, and the error after it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    last = 2 if lines and lines[-1].startswith("mend: ") else 1
    return " ".join(lines if len(lines) < 3 else (lines[0], *lines[-last:]))


def delete() -> None:
    """Take the endpoint down, letting it answer what it has begun."""
    serve.delete(APP_NAME)
