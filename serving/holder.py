"""The process that holds the models of a replica: loads versions, and answers with them.

It is no Ray worker. A thread of one wakes a hundred times a second and takes Python's lock to look for
signals, which cost SmolLM2's short answers some milliseconds each while the engine was in that process.

    python -P -m serving.holder DESCRIPTOR < SETTINGS.json

The descriptor is a socket of the replica that started it (`serving.holder_process`). When that closes, this
process ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from regraft.records import ModelVersion
from regraft.tracking.registry import Registry
from serving.engines.base import EngineClosedError, EngineError, GenerationRequest, QueueFullError
from serving.intake import Intake
from serving.loading import make_loader
from serving.settings import EndpointSettings
from serving.shelf import Loaded, Shelf, UnavailableError, brief
from serving.wire import EVERYTHING, Failed, Said

logger = logging.getLogger(__name__)


class Holder:
    """What is loaded, and who may ask.

    Args:
        settings: Of the endpoint.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self._settings = settings
        section = settings.serve
        self._registry = Registry(settings.tracking_uri, settings.cache)
        self._shelf = Shelf(
            make_loader(settings, self._registry),
            spare=section.keep_versions,
            retry_seconds=section.poll_seconds,
        )
        self._known: dict[int, ModelVersion] = {}
        #: Takes requests.
        self.intake = Intake(
            self.generate,
            {
                "load_those_with_a_role": self.load_those_with_a_role,
                "prepare": self.prepare,
                "keep": self.keep,
                "state": self.state,
                "open": self.open,
                "drain": self.drain,
            },
        )
        self._loaded_first: list[str] = []

    async def load_those_with_a_role(self) -> dict[str, str]:
        """Load them; gives what is lacking now, and why."""
        section = self._settings.serve
        try:
            aliases = await asyncio.to_thread(self._registry.aliases, self._settings.name)
        except Exception as error:
            return {EVERYTHING: brief(error)}
        numbers = [*section.pinned, *(aliases[a] for a in section.followed if a in aliases)]
        wrong = {}
        for number in numbers:
            try:
                await self._ensure(number, numbers)
            except UnavailableError as error:
                wrong[f"{self._settings.name}/{number}"] = str(error)
        self._loaded_first = [loaded.version.served_id for loaded in self._shelf.loaded]
        return wrong

    async def prepare(self, number: int, kept: Sequence[int]) -> dict[str, int]:
        """Load a version, if it is not loaded; gives the attributes of `serving.replica.Prepared`."""
        self._shelf.keep(kept)
        engine = (await self._ensure(number, kept)).engine
        return {"context_length": engine.context_length, "vocabulary": engine.vocabulary}

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
            kept: Versions that have a role; one that has got it since this process started may be missing.
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
            "load_errors": {f"{self._settings.name}/{n}": why for n, why in self._shelf.failures.items()},
            "asked_directly": self.intake.taken,
        }

    async def open(self, node: str) -> dict[str, Any] | None:
        """Take requests from the gateways of this machine, if they can be taken.

        Args:
            node: Ray's name for this machine.

        Returns:
            The attributes of an `Address`.
        """
        try:
            return dict(vars(await self.intake.open(node)))
        except OSError as error:
            logger.warning("gateways ask through Ray Serve, as there is no socket for them: %s", error)
            return None

    async def drain(self) -> None:
        """Answer what has begun."""
        await self.intake.drain()

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


async def hold(settings: EndpointSettings, end: socket.socket) -> None:
    """Hold models until the replica lets go.

    Args:
        settings: Of the endpoint.
        end: This process's end of its socket.
    """
    holder = Holder(settings)
    await holder.intake.attend(end)
    # Nobody hears any more what is on its way, and waiting for it would keep its memory from the next one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    given = EndpointSettings.model_validate_json(sys.stdin.read())
    asyncio.run(hold(given, socket.socket(fileno=int(sys.argv[1]))))
