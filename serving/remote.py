"""The engines of another deployment, as the gateway sees them.

A replica that is lost takes with it what it was saying; where it had said nothing yet, another is asked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from regraft.config import ServeSection
from regraft.records import ModelVersion
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    Event,
    GenerationRequest,
    QueueFullError,
    Stream,
    TextDelta,
)
from serving.engines.rows import OwnEngine
from serving.intake import Address
from serving.lines import LineLostError, Lines
from serving.replica import Prepared
from serving.shelf import UnavailableError
from serving.wire import VERSION, Failed, Said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: How often a request that has said nothing yet is asked of another replica.
_TRIES = 4
#: A replica that Ray ends for its memory is no RayActorError.
_LOST = (
    *(RayActorError, ReplicaUnavailableError, OutOfMemoryError, NodeDiedError, WorkerCrashedError),
    LineLostError,
)
#: How often new replicas are looked for, and how often while one is missing.
_LOOK_SECONDS, _LOOK_SOON_SECONDS = 2.0, 0.2


class RemoteStream(Stream):
    """One request to whichever replica takes it.

    Args:
        ask: Begins to ask; gives what comes.
        who: The version, for messages.
    """

    def __init__(self, ask: Callable[[], Any], who: str) -> None:
        self._ask, self._who = ask, who
        self._response: Any = None
        self._here: deque[Event | Failed] = deque()
        self._tries = 0
        self._said = self._over = False

    async def __anext__(self) -> Event:
        while not self._here:
            if self._over:
                raise StopAsyncIteration
            self._here.extend(await self._more())
        event = self._here.popleft()
        if isinstance(event, Failed):
            if event.kind == "closed" and not self._said and self._tries < _TRIES:
                logger.warning("%s: %s; asking again", self._who, event.message)
                self._response = None  # an engine that ended is loaded again by those who ask for it
                return await anext(self)
            self._over = True
            raise _error(event)
        self._said = True
        self._over = not isinstance(event, TextDelta) and not self._here
        return event

    def cancel(self) -> None:
        """Want no more of it."""
        self._here.clear()
        if self._response is not None and not self._over:
            self._response.cancel()
        self._over = True

    async def _more(self) -> Said:
        while True:
            try:
                if self._response is None:
                    self._tries += 1
                    self._response = self._ask()
                said: Said = await anext(self._response)
            except StopAsyncIteration:
                raise EngineError(f"{self._who}: the answer ended before its end") from None
            except QueueFullError:
                self._over = True
                raise
            except BackPressureError as error:
                self._over = True
                raise QueueFullError("as many requests wait as may wait; try again later") from error
            except RequestCancelledError as error:
                self._over = True
                raise EngineClosedError("the request was cancelled") from error
            except _LOST as error:
                if self._said or self._tries >= _TRIES or self._over:
                    self._over = True
                    raise EngineClosedError(f"{self._who}: the replica that answered was lost") from error
                logger.warning("%s: a replica was lost before it said anything; asking another", self._who)
                self._response = None
            except (DeploymentUnavailableError, RayTaskError) as error:
                self._over = True
                logger.exception("%s: no answer", self._who)
                raise EngineClosedError(f"{self._who} cannot answer now") from error
            else:
                return said


class RemoteEngine(OwnEngine):
    """A version that the replicas have loaded. Chats become token ids here, which spares the replicas that.

    Args:
        version: The version.
        prepared: What the replicas say of it.
        tokenizer: Its base's.
        ask: Begins to ask a replica for an answer with a version.
    """

    def __init__(
        self,
        version: ModelVersion,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase,
        ask: Callable[[int, GenerationRequest], Any],
    ) -> None:
        super().__init__(tokenizer, threading.Lock())
        self.context_length, self.vocabulary = prepared.context_length, prepared.vocabulary
        self._version, self._ask = version, ask

    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request; that as many wait as may wait shows when the stream is read."""
        return RemoteStream(lambda: self._ask(self._version.version, request), self._version.served_id)

    def close(self) -> None:
        """Do nothing: the replicas let a version go when they want its place."""


class RemoteEngines:
    """Loads versions on all replicas of the engine deployment, and asks them.

    Replicas of this machine are asked over sockets of their own, as long as all of them can be.

    Args:
        handle: Of the deployment.
        section: Of the endpoint; without it all goes through the handle.
    """

    def __init__(self, handle: DeploymentHandle[Any], section: ServeSection | None = None) -> None:
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._kept: tuple[int, ...] = ()
        self._telling: set[asyncio.Task[None]] = set()
        self._lines: Lines | None = None
        if section is not None and section.direct:
            self._lines = Lines(section.max_batch, section.max_queued, self._missed)
            self._wanted = section.min_replicas
        self._all_direct = False
        self._why_not = ""
        self._missing = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def ask(self, number: int, request: GenerationRequest) -> Any:
        """Begin to ask a replica.

        Raises:
            QueueFullError: If as many requests wait as may wait.
        """
        if self._lines is not None and self._all_direct and self._lines.open:
            return self._lines.ask(number, request, self._kept)
        return self._generate.remote(number, request, self._kept)

    async def load(self, version: ModelVersion) -> RemoteEngine:
        """Have a version loaded on every replica that runs; those that come later load it by themselves.

        Raises:
            UnavailableError: If a replica cannot load it, with its reason.
        """
        from regraft.models import load_tokenizer, resolve_trained_on

        base = await asyncio.to_thread(
            resolve_trained_on, version.base_model, version.base_revision, version.served_id
        )
        tokenizer = await asyncio.to_thread(load_tokenizer, base.path)
        kept = tuple(sorted({*self._kept, version.version}))
        found: list[Any] = []
        while not found:
            # One of them first: this waits until there is one, while all of none would be an error.
            found = [await self._asked(version, self._handle.prepare.remote(version.version, kept))]
            everyone = self._handle.broadcast("prepare", version.version, kept)
            results = await everyone.results_async(return_exceptions=True)
            for result in results:
                if isinstance(result, _LOST):
                    continue
                if isinstance(result, BaseException):
                    raise _unavailable(version, result)
                found.append(result)
        if self._lines is not None and self._looking is None:
            await self._look(self._lines)
            self._looking = asyncio.get_running_loop().create_task(self._look_on(self._lines))
        return RemoteEngine(version, found[-1], tokenizer, self.ask)

    def keep(self, numbers: Collection[int]) -> None:
        """Tell all replicas, in the background, which versions have a role."""
        kept = tuple(sorted(numbers))
        if kept != self._kept:
            self._kept = kept
            task = asyncio.get_running_loop().create_task(self._tell(kept))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def _missed(self) -> None:
        self._missing.set()

    async def _look_on(self, lines: Lines) -> None:
        """Look for new replicas, for as long as this process lives."""
        while True:
            pause = _LOOK_SECONDS if lines.open >= self._wanted else _LOOK_SOON_SECONDS
            with suppress(TimeoutError):
                await asyncio.wait_for(self._missing.wait(), pause)
                await asyncio.sleep(_LOOK_SOON_SECONDS)  # Ray has to find it out, too
            self._missing.clear()
            try:
                await self._look(lines)
            except Exception:
                logger.exception("looking for replicas failed; trying again")

    async def _look(self, lines: Lines) -> None:
        """Lay lines to all replicas; if there is one that has none, all are asked through the handle."""
        from ray import get_runtime_context

        try:
            found = await self._handle.broadcast("address").results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return
        here, why_not = get_runtime_context().get_node_id(), ""
        for address in found:
            if isinstance(address, _LOST):
                continue
            if not isinstance(address, Address) or address.version != VERSION:
                why_not = "a replica has no socket for gateways, or is of another release"
            elif address.node != here:
                why_not = "a replica is on another machine"
            else:
                try:
                    await lines.connect(address)
                except OSError as error:
                    why_not = f"the socket of a replica cannot be reached: {error}"
        if why_not != self._why_not:
            logger.info("replicas are asked %s", f"through Ray Serve: {why_not}" if why_not else "directly")
        self._why_not, self._all_direct = why_not, not why_not

    async def _tell(self, kept: tuple[int, ...]) -> None:
        try:
            await self._handle.broadcast("keep", kept).results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            logger.debug("there is no replica to tell which versions have a role")

    async def _asked(self, version: ModelVersion, response: Any) -> Prepared:
        for _ in range(_TRIES):
            try:
                found: Prepared = await response
            except _LOST:
                response = self._handle.prepare.remote(version.version, (*self._kept, version.version))
            except (RayTaskError, BackPressureError, DeploymentUnavailableError) as error:
                raise _unavailable(version, error) from error
            else:
                return found
        raise UnavailableError(f"{version.served_id}: replicas were lost while they loaded it")


def _unavailable(version: ModelVersion, error: BaseException) -> UnavailableError:
    cause = getattr(error, "cause", None) or error
    said = str(cause) if isinstance(cause, UnavailableError) else f"{type(cause).__name__}: {cause}"
    return UnavailableError(said.splitlines()[0] if said else f"{version.served_id} failed to load")


def _error(failed: Failed) -> Exception:
    if failed.kind == "full":
        return QueueFullError(failed.message)
    return EngineError(failed.message) if failed.kind == "engine" else EngineClosedError(failed.message)
