"""What takes requests in: keys and limits, which version answers, captures. It holds no model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from regraft.data.capture_shipping import Shipper
from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from regraft.records import ModelVersion
from serving.auth import Keyring
from serving.endpoint import create_app
from serving.engines.base import Engine
from serving.exchange import CaptureLog
from serving.guard import Guard
from serving.metrics import Metrics
from serving.router import VersionSource, VersionTable
from serving.settings import EndpointSettings
from serving.shadow import Shadow
from serving.shelf import Loader, Shelf


def create_gateway(
    settings: EndpointSettings,
    source: VersionSource,
    load: Loader,
    told: Callable[[frozenset[int]], None] | None = None,
) -> FastAPI:
    """Make the application that a gateway runs.

    Args:
        settings: Of the endpoint.
        source: The registry.
        load: Makes an engine of a version, here or elsewhere.
        told: Is told which versions have a role.
    """
    section, capture = settings.serve, settings.serve.capture

    async def timed(version: ModelVersion) -> Engine:
        started = time.perf_counter()
        engine = await load(version)
        metrics.loaded(version, time.perf_counter() - started)
        return engine

    shelf = Shelf(
        timed,
        told=told,
        gone=lambda version: metrics.forget(version),
        spare=section.keep_versions,
        retry_seconds=section.poll_seconds,
    )
    table = VersionTable(
        source,
        shelf,
        name=settings.name,
        poll_seconds=section.poll_seconds,
        canary=section.canary,
        shadow=section.shadow > 0,
        pinned=section.pinned,
    )
    metrics = Metrics(table.role_of)
    store = CaptureStore.of(settings.captures, capture)
    log = CaptureLog(store)
    metrics.watch_dropped("capture_dropped", lambda: log.dropped)
    shadow = None
    if section.shadow:
        room = section.max_batch * section.min_replicas
        shadow = Shadow(table, section.shadow, section.shadow_max_running, room)
        metrics.watch_dropped("shadow_dropped", lambda: shadow.dropped if shadow else 0)
    shipper = Shipper(store, every_seconds=capture.ship_every_seconds, keep_days=capture.keep_days)
    app = create_app(
        table,
        log,
        max_new_tokens=section.max_new_tokens,
        observer=metrics,
        feedback=FeedbackStore(settings.feedback),
        shadow=shadow,
        timeout_seconds=section.request_timeout_seconds,
        state=lambda: {"shipping": shipper.state()},
    )
    app.mount("/metrics", metrics.app())
    app.add_middleware(
        Guard,
        keys=Keyring(section.keys) if section.keys else None,
        limits=section.limits,
        max_new_tokens=section.max_new_tokens,
        refused=metrics.rate_limited,
    )
    _ship_beside(app, shipper)
    return app


def _ship_beside(app: FastAPI, shipper: Shipper) -> None:
    """Ship captures for as long as the application runs."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(of: FastAPI) -> AsyncIterator[Any]:
        shipper.start()
        try:
            async with inner(of) as state:
                yield state
        finally:
            shipper.stop()

    app.router.lifespan_context = lifespan
