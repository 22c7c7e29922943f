"""The endpoint on Ray Serve.

A thin wrapper: the application itself (`serving.endpoint`) knows no Ray. Each replica follows the champion
alias on its own and holds its own engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from regraft.config import NAME_PATTERN, ServeSection
from regraft.data.captures import CaptureStore
from regraft.methods.base import DTypeName
from regraft.records import ModelVersion
from serving.endpoint import create_app
from serving.engines.base import Engine, EngineLimits
from serving.exchange import CaptureLog
from serving.loading import load_engine
from serving.router import VersionTable

APP_NAME = "regraft"

#: Requests a replica takes beyond those it answers or queues: Ray would let them wait at its proxy without
#: a bound, while here they get their 429, and /health still gets through when the queue is full.
_HEADROOM = 64


class EndpointSettings(BaseModel):
    """All that a replica needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN, description="The registered model to serve.")
    tracking_uri: str = Field(description="Where MLflow is.")
    cache: Path = Field(description="Where the files of registered versions are kept.")
    captures: Path = Field(description="The capture spool.")
    dtype: DTypeName = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    serve: ServeSection = ServeSection()


def create_endpoint(settings: EndpointSettings) -> FastAPI:
    """Make the application that a replica runs, on the registry that the settings name."""
    from regraft.tracking.registry import Registry

    section = settings.serve
    limits = EngineLimits(section.max_batch, section.max_queued, threads=max(1, int(section.num_cpus)))

    def load(version: ModelVersion, folder: Path) -> Engine:
        return load_engine(version, folder, dtype=settings.dtype, device=settings.device, limits=limits)

    table = VersionTable(
        Registry(settings.tracking_uri, settings.cache),
        load,
        name=settings.name,
        poll_seconds=section.poll_seconds,
    )
    log = CaptureLog(CaptureStore(settings.captures))
    return create_app(table, log, max_new_tokens=section.max_new_tokens)


@serve.ingress()
class Endpoint:
    """A replica."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = EndpointSettings.model_validate(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray (the name is its own) after the constructor, in the replica."""
        return create_endpoint(self._settings)


def build_app(settings: EndpointSettings) -> Application:
    """Describe the endpoint for Ray Serve, without running it."""
    section = settings.serve
    deployment = serve.deployment(
        Endpoint,
        num_replicas=1,
        max_ongoing_requests=section.max_batch + section.max_queued + _HEADROOM,
        ray_actor_options={"num_cpus": section.num_cpus, "num_gpus": section.num_gpus},
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=60,
    )
    application: Application = deployment.bind(settings.model_dump(mode="json"))
    return application


def deploy(settings: EndpointSettings, *, host: str, port: int) -> None:
    """Run the endpoint on the Ray that this process is connected to.

    Returns when it answers HTTP, which may be before the first version is loaded: see `/health`.

    Args:
        settings: What to serve.
        host: Address to listen on.
        port: Port to listen on.
    """
    serve.start(http_options={"host": host, "port": port})
    serve.run(build_app(settings), name=APP_NAME, route_prefix="/")


def delete() -> None:
    """Take the endpoint down, letting it answer what it has begun."""
    serve.delete(APP_NAME)
