"""What holds the models: replicas that answer for any version, and load what they are asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from regraft.records import ModelVersion
from serving.engines.base import EngineClosedError, EngineError, GenerationRequest, QueueFullError
from serving.intake import Address, Intake
from serving.loading import make_loader
from serving.settings import EndpointSettings
from serving.shelf import Loaded, Shelf, UnavailableError, brief
from serving.wire import Failed, Said

logger = logging.getLogger(__name__)

#: How long a new replica that lacks something looks for others that have it.
_LOOK_SECONDS = 3.0
#: Lacks a replica that could not ask which versions have a role.
_EVERYTHING = "whatever has a role"


@dataclass(frozen=True)
class Prepared:
    """What a gateway has to know of a version that is loaded here."""

    context_length: int
    vocabulary: int


class EngineReplica:
    """A replica. Before it counts as ready it has loaded what has a role.

    One that cannot do so comes up all the same, to say why; but not where others have what it lacks: it would
    be less busy than they are, and take their requests only to refuse them. Ray then tries again.

    Args:
        settings: As `EndpointSettings` dumps itself.

    Raises:
        UnavailableError: If others have what this one could not load.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        from regraft.tracking.registry import Registry

        self._settings = EndpointSettings.model_validate(settings)
        section = self._settings.serve
        self._registry = Registry(self._settings.tracking_uri, self._settings.cache)
        self._shelf = Shelf(
            make_loader(self._settings, self._registry),
            spare=section.keep_versions,
            retry_seconds=section.poll_seconds,
        )
        self._known: dict[int, ModelVersion] = {}
        self._intake = Intake(self.generate)
        wrong = await self._load_those_with_a_role()
        self._loaded_first = [loaded.version.served_id for loaded in self._shelf.loaded]
        if wrong:
            logger.warning("loading what has a role: %s", wrong)
            others = await _loaded_by_others()
            lacking = others if _EVERYTHING in wrong else others.intersection(wrong)
            if lacking:
                named, why = ", ".join(sorted(lacking)), "; ".join(wrong.values())
                raise UnavailableError(f"other replicas have {named}, which this one could not load: {why}")
        self._address = await self._open() if section.direct else None

    async def address(self) -> Address | None:
        """Where the gateways of this machine may ask without Ray between them, if they may."""
        return self._address

    async def __del__(self) -> None:
        """Called by Ray before it ends the replica; answers what has begun."""
        await self._intake.drain()

    async def prepare(self, number: int, kept: Sequence[int]) -> Prepared:
        """Load a version, if it is not loaded.

        Args:
            number: The version.
            kept: Versions that have a role, this one perhaps among them.

        Raises:
            UnavailableError: If it does not load.
        """
        self._shelf.keep(kept)
        loaded = await self._ensure(number, kept)
        return Prepared(loaded.engine.context_length, loaded.engine.vocabulary)

    async def keep(self, numbers: Sequence[int]) -> None:
        """Hear which versions have a role."""
        self._shelf.keep(numbers)

    async def generate(
        self, number: int, request: GenerationRequest, kept: Sequence[int]
    ) -> AsyncGenerator[Said, None]:
        """Answer with a version; a request that nobody watches is answered in one piece.

        Args:
            number: The version.
            request: What is asked.
            kept: Versions that have a role; one that has got it since this replica started may be missing.
        """
        try:
            loaded = self._shelf.hold(await self._ensure(number, kept))
        except Exception as error:
            yield [Failed("unavailable", str(error))]
            return
        try:
            async with aclosing(loaded.engine.submit(request)) as events:
                if request.whole:
                    yield [event async for event in events]
                else:
                    async for event in events:
                        yield [event]
        except QueueFullError as error:
            yield [Failed("full", str(error))]
        except EngineClosedError as error:
            yield [Failed("closed", str(error))]
        except EngineError as error:
            yield [Failed("engine", str(error))]
        finally:
            self._shelf.release(loaded)

    async def state(self) -> dict[str, Any]:
        """What is loaded here, what was before the first request could come, and how many came directly."""
        return {
            "loaded_first": self._loaded_first,
            "loaded": {loaded.version.served_id: loaded.references for loaded in self._shelf.loaded},
            "load_errors": self._shelf.failures,
            "asked_directly": self._intake.taken,
        }

    async def _open(self) -> Address | None:
        from ray import get_runtime_context

        try:
            return await self._intake.open(get_runtime_context().get_node_id())
        except OSError as error:
            logger.warning("gateways ask through Ray Serve, as there is no socket for them: %s", error)
            return None

    async def _load_those_with_a_role(self) -> dict[str, str]:
        """Load them; gives what is lacking now, and why."""
        section = self._settings.serve
        try:
            aliases = await asyncio.to_thread(self._registry.aliases, self._settings.name)
        except Exception as error:
            return {_EVERYTHING: brief(error)}
        numbers = [*section.pinned, *(aliases[a] for a in section.followed if a in aliases)]
        wrong = {}
        for number in numbers:
            try:
                await self._ensure(number, numbers)
            except UnavailableError as error:
                wrong[f"{self._settings.name}/{number}"] = str(error)
        return wrong

    async def _ensure(self, number: int, kept: Sequence[int]) -> Loaded:
        loaded = self._shelf.get(number)
        if loaded is not None:
            return loaded
        self._shelf.keep(kept)
        if number not in self._known:  # versions never change
            try:
                found = await asyncio.to_thread(self._registry.version, self._settings.name, number)
            except Exception as error:
                raise UnavailableError(f"version {number} is not known here: {brief(error)}") from error
            self._known[number] = found
        return await self._shelf.ensure(self._known[number])


async def _loaded_by_others() -> set[str]:
    """What the other replicas of this deployment have loaded; none if there are none yet."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    deadline = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < deadline:
        try:
            states = await handle.broadcast("state").results_async(return_exceptions=True)
        except DeploymentUnavailableError:  # there is none, or it is not known here yet
            await asyncio.sleep(0.1)
            continue
        except (RayError, ReplicaUnavailableError):
            return set()
        return {served for state in states if isinstance(state, dict) for served in state["loaded"]}
    return set()
