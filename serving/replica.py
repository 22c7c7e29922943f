"""What holds the models: replicas that answer for any version, and load what they are asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.errors import ServiceError
from serving.engines.base import GenerationRequest
from serving.holder_process import HolderProcess
from serving.intake import Address
from serving.settings import EndpointSettings
from serving.shelf import UnavailableError
from serving.wire import EVERYTHING, Said

logger = logging.getLogger(__name__)

#: How long a new replica that lacks something looks for others that have it.
_LOOK_SECONDS = 3.0


@dataclass(frozen=True)
class Prepared:
    """What a gateway has to know of a version that is loaded here."""

    context_length: int
    vocabulary: int


class EngineReplica:
    """A replica. Before it counts as ready it has loaded what has a role.

    The models are in a process of its own (`serving.holder`), which ends with it, and it with that process.

    One that cannot load comes up all the same, to say why; but not where others have what it lacks: it would
    be less busy than they are, and take their requests only to refuse them. Ray then tries again.

    Args:
        settings: As `EndpointSettings` dumps itself.

    Raises:
        UnavailableError: If others have what this one could not load.
        ServiceError: If the process does not come up.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        given = EndpointSettings.model_validate(settings)
        self._holder = await HolderProcess.start(given)
        try:
            wrong = await self._holder.call("load_those_with_a_role")
        except ConnectionResetError as error:
            status = await self._holder.ended()
            raise ServiceError(
                f"the process that holds the models ended with status {status} while it loaded them",
                "see the log of this replica; the system ends with -9 what takes more memory than there is",
            ) from error
        if wrong:
            logger.warning("loading what has a role: %s", wrong)
            others = await _loaded_by_others()
            lacking = others if EVERYTHING in wrong else others.intersection(wrong)
            if lacking:
                named, why = ", ".join(sorted(lacking)), "; ".join(wrong.values())
                raise UnavailableError(f"other replicas have {named}, which this one could not load: {why}")
        self._address = await self._open() if given.serve.direct else None
        self._asked_to_end = False
        self._watching = asyncio.get_running_loop().create_task(self._end_with_it())

    async def address(self) -> Address | None:
        """Where the gateways of this machine may ask without Ray between them, if they may."""
        return self._address

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that does not answer here."""
        await self._holder.call("state")

    async def __del__(self) -> None:
        """Called by Ray before it ends the replica; answers what has begun."""
        self._asked_to_end = True
        await self._holder.end()

    async def prepare(self, number: int, kept: Sequence[int]) -> Prepared:
        """Load a version, if it is not loaded.

        Args:
            number: The version.
            kept: Versions that have a role, this one perhaps among them.

        Raises:
            UnavailableError: If it does not load.
        """
        return Prepared(**await self._holder.call("prepare", number, kept))

    async def keep(self, numbers: Sequence[int]) -> None:
        """Hear which versions have a role."""
        await self._holder.call("keep", numbers)

    async def generate(
        self, number: int, request: GenerationRequest, kept: Sequence[int]
    ) -> AsyncGenerator[Said, None]:
        """Answer with a version, for gateways that ask through Ray; see `serving.holder.Holder.generate`."""
        call = self._holder.ask(number, request, kept)
        try:
            async for said in call:
                yield said
        finally:
            call.cancel()

    async def state(self) -> dict[str, Any]:
        """What is loaded here, what was before the first request could come, and how many came directly."""
        found: dict[str, Any] = await self._holder.call("state")
        return found

    async def _open(self) -> Address | None:
        from ray import get_runtime_context

        found = await self._holder.call("open", get_runtime_context().get_node_id())
        return Address(**found) if found else None

    async def _end_with_it(self) -> None:
        """End as a process does that is killed: who waits for this replica asks another at once."""
        status = await self._holder.ended()
        if not self._asked_to_end:
            logger.critical("the process that holds the models ended with status %s", status)
            logging.shutdown()
            os._exit(1)


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
