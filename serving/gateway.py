"""What takes requests in: keys and limits, which version answers, captures. It holds no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from regraft.data.capture_shipping import Shipper
from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from serving.endpoint import create_app
from serving.exchange import CaptureLog
from serving.router import VersionTable
from serving.settings import EndpointSettings
from serving.shadow import Shadow
from serving.shelf import Loader, Shelf


def create_gateway(settings: EndpointSettings, source: Any, load: Loader, told: Any = None) -> FastAPI:
    """Make the application that a gateway runs.

    Args:
        settings: Of the endpoint.
        source: The registry.
        load: Makes an engine of a version, here or elsewhere.
        told: Is told which versions have a role.
    """
    section = settings.serve
    shelf = Shelf(load, told=told, spare=section.keep_versions, retry_seconds=section.poll_seconds)
    table = VersionTable(
        source,
        shelf,
        name=settings.name,
        poll_seconds=section.poll_seconds,
        canary=section.canary,
        shadow=section.shadow > 0,
        pinned=section.pinned,
    )
    store = CaptureStore.of(settings.captures, section.capture)
    log = CaptureLog(store)
    capture = section.capture
    shipper = Shipper(store, every_seconds=capture.ship_every_seconds, keep_days=capture.keep_days)
    app = create_app(
        table,
        log,
        max_new_tokens=section.max_new_tokens,
        feedback=FeedbackStore(settings.feedback),
        shadow=Shadow(table, section.shadow, section.shadow_max_running) if section.shadow else None,
        timeout_seconds=section.request_timeout_seconds,
        state=lambda: {"shipping": shipper.state()},
    )
    _beside(app, shipper)
    return app


def _beside(app: FastAPI, shipper: Shipper) -> None:
    """Ship captures for as long as the application runs, and once more when it has ended."""
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
