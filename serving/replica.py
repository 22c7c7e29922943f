"""What holds the models: replicas that answer for any version, and load what they are asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from regraft.records import ModelVersion
from serving.engines.base import EngineClosedError, EngineError, Event, GenerationRequest, QueueFullError
from serving.loading import make_loader
from serving.settings import EndpointSettings
from serving.shelf import Loaded, Shelf, UnavailableError, brief

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a gateway has to know of a version that is loaded here."""

    context_length: int
    vocabulary: int


@dataclass(frozen=True)
class Failed:
    """Why an answer ends early. Travels as a value: an exception would carry a traceback along."""

    kind: Literal["engine", "closed", "full"]
    message: str


#: What a replica says at a time.
Said: TypeAlias = Sequence[Event | Failed]


class EngineReplica:
    """A replica. Before it counts as ready it has loaded what has a role.

    Args:
        settings: As `EndpointSettings` dumps itself.
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
        await self._load_those_with_a_role()

    async def prepare(self, number: int, kept: Sequence[int]) -> Prepared:
        """Load a version, if it is not loaded.

        Args:
            number: The version.
            kept: Versions that have a role, this one perhaps among them.

        Raises:
            UnavailableError: If it does not load.
        """
        self._shelf.keep(kept)
        loaded = await self._ensure(number)
        return Prepared(loaded.engine.context_length, loaded.engine.vocabulary)

    async def keep(self, numbers: Sequence[int]) -> None:
        """Hear which versions have a role."""
        self._shelf.keep(numbers)

    async def generate(self, number: int, request: GenerationRequest) -> AsyncIterator[Said]:
        """Answer with a version; a request that nobody watches is answered in one piece."""
        try:
            loaded = self._shelf.hold(await self._ensure(number))
        except Exception as error:
            yield [Failed("closed", str(error))]
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
        """What is loaded here."""
        return {
            "loaded": {loaded.version.served_id: loaded.references for loaded in self._shelf.loaded},
            "load_errors": self._shelf.failures,
        }

    async def _load_those_with_a_role(self) -> None:
        section = self._settings.serve
        try:
            aliases = await asyncio.to_thread(self._registry.aliases, self._settings.name)
        except Exception as error:
            logger.warning("what has a role is loaded when it is asked for: %s", brief(error))
            return
        numbers = [*section.pinned, *(aliases[a] for a in section.followed if a in aliases)]
        self._shelf.keep(numbers)
        for number in numbers:
            try:
                await self._ensure(number)
            except Exception as error:  # it takes no traffic; the others do
                logger.warning("version %d is not loaded: %s", number, brief(error))

    async def _ensure(self, number: int) -> Loaded:
        loaded = self._shelf.get(number)
        if loaded is not None:
            return loaded
        if number not in self._known:  # versions never change
            try:
                found = await asyncio.to_thread(self._registry.version, self._settings.name, number)
            except Exception as error:
                raise UnavailableError(f"version {number} is not known here: {brief(error)}") from error
            self._known[number] = found
        return await self._shelf.ensure(self._known[number])
