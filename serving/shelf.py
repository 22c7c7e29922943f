"""The versions that are loaded: each once, as long as somebody needs it.

Versions with a role are kept. Others come when they are asked for and leave when the place is wanted by one
that was used more lately: so a former champion is still there when it is called back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from regraft.methods.base import DTypeName
from regraft.records import ModelVersion, PromotionDecision
from serving.engines.base import Engine, GenerationRequest
from serving.proof import prove

logger = logging.getLogger(__name__)

#: Makes an engine of a version, ready to answer.
Loader: TypeAlias = Callable[[ModelVersion], Awaitable[Engine]]


class UnavailableError(Exception):
    """The model exists but cannot answer now; the message says why."""


class PinnedBusyError(UnavailableError):
    """All places for versions without a role are in use."""


class VersionFiles(Protocol):
    """The part of the registry that has the files, and what the gate found out about them."""

    def fetch(self, logged_model_id: str, /) -> Path:
        """A local folder with the files of a logged model."""

    def judged(self, version: ModelVersion, /) -> PromotionDecision | None:
        """What the gate said of a version last; None if it was never asked."""


@dataclass(eq=False)
class Loaded:
    """A loaded version. `references` counts the requests that hold it."""

    version: ModelVersion
    engine: Engine
    references: int = 0
    used: float = field(default_factory=time.monotonic)


@dataclass
class _Failure:
    message: str
    count: int
    retry_at: float


class Shelf:
    """Loaded versions of one registered model by their numbers. All methods run on one event loop.

    Args:
        load: Makes an engine.
        told: Is told which versions have a role, whenever that is said.
        gone: Is told of each version that leaves.
        spare: Versions without a role that may be loaded beside those that have one.
        retry_seconds: How long a version that failed to load is left alone at first; twice as long each
            time it fails again, up to a minute.
    """

    def __init__(
        self,
        load: Loader,
        *,
        told: Callable[[frozenset[int]], None] | None = None,
        gone: Callable[[ModelVersion], None] | None = None,
        spare: int = 2,
        retry_seconds: float = 1.0,
    ) -> None:
        self._load = load
        self._told, self._gone = told, gone
        self._spare = spare
        self._retry_seconds = retry_seconds
        self._loaded: dict[int, Loaded] = {}
        self._kept: frozenset[int] = frozenset()
        self._failures: dict[int, _Failure] = {}
        self._loading = asyncio.Lock()
        self._loads: set[asyncio.Task[Loaded]] = set()
        self._unloading: set[asyncio.Task[None]] = set()

    @property
    def loaded(self) -> list[Loaded]:
        """All that is loaded, by number."""
        return [self._loaded[number] for number in sorted(self._loaded)]

    @property
    def failures(self) -> dict[int, str]:
        """Why versions did not load, by number."""
        return {number: failure.message for number, failure in sorted(self._failures.items())}

    def get(self, number: int) -> Loaded | None:
        """A version if it is loaded."""
        loaded = self._loaded.get(number)
        if loaded is not None and not loaded.engine.alive:
            logger.warning("the engine of %s has ended", loaded.version.served_id)
            self._retire(loaded)
            return None
        return loaded

    def keep(self, numbers: Collection[int]) -> None:
        """Say which versions have a role; the others leave, the least recently used first."""
        for number in self._kept.difference(numbers) & self._loaded.keys():
            self._loaded[number].used = time.monotonic()  # what has just lost its role is no old thing
        self._kept = frozenset(numbers)
        if self._told:
            self._told(self._kept)
        self._trim(self._spare)

    def hold(self, loaded: Loaded) -> Loaded:
        """Take a reference."""
        loaded.references += 1
        loaded.used = time.monotonic()
        return loaded

    def release(self, loaded: Loaded) -> None:
        """Give a reference back."""
        loaded.references -= 1
        self._trim(self._spare)

    async def ensure(self, version: ModelVersion) -> Loaded:
        """The loaded version; loads it first if need be. It is not held yet.

        A caller that goes away does not stop a load half-way: the version would be neither on the shelf nor
        unloaded.

        Raises:
            PinnedBusyError: If it has no role and all places for such are in use.
            UnavailableError: If it does not load, or did not a moment ago.
        """
        if loaded := self.get(version.version):
            return loaded
        task = asyncio.get_running_loop().create_task(self._ensure_alone(version))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Unload everything."""
        await asyncio.gather(*self._loads, return_exceptions=True)
        for loaded in self.loaded:
            self._retire(loaded)
        await self.unloaded()

    async def unloaded(self) -> None:
        """Wait until what left is unloaded."""
        await asyncio.gather(*self._unloading)

    async def _ensure_alone(self, version: ModelVersion) -> Loaded:
        number = version.version
        async with self._loading:
            if loaded := self.get(number):
                return loaded
            failure = self._failures.get(number)
            if failure and time.monotonic() < failure.retry_at:
                raise UnavailableError(f"{version.served_id} failed to load: {failure.message}")
            if number not in self._kept:
                self._make_room()
            started = time.monotonic()
            try:
                engine = await self._load(version)
            except Exception as error:
                count = failure.count + 1 if failure else 1
                # A broken version would otherwise be loaded again at every poll, and slow the healthy one.
                retry_at = time.monotonic() + min(60.0, self._retry_seconds * 2**count)
                self._failures[number] = _Failure(brief(error), count, retry_at)
                logger.exception("%s failed to load", version.served_id)
                raise UnavailableError(f"{version.served_id} failed to load: {brief(error)}") from error
            self._failures.pop(number, None)
            logger.info("%s is loaded, in %.2f s", version.served_id, time.monotonic() - started)
            self._loaded[number] = Loaded(version, engine)
            return self._loaded[number]

    def _others(self) -> list[Loaded]:
        return [loaded for number, loaded in self._loaded.items() if number not in self._kept]

    def _make_room(self) -> None:
        self._trim(self._spare - 1)
        others = self._others()
        if len(others) >= self._spare:
            raise PinnedBusyError(
                f"{len(others)} versions besides those with a role are in use; try again later"
            )

    def _trim(self, most: int) -> None:
        others = self._others()
        idle = sorted((entry for entry in others if not entry.references), key=lambda entry: entry.used)
        for entry in idle[: max(0, len(others) - most)]:
            self._retire(entry)

    def _retire(self, loaded: Loaded) -> None:
        """Take a version off the shelf and unload it in a thread."""
        del self._loaded[loaded.version.version]
        if self._gone:
            self._gone(loaded.version)
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(loaded.engine.close))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)


def in_process(
    files: VersionFiles, load: Callable[[ModelVersion, Path], Engine], *, dtype: DTypeName = "float32"
) -> Loader:
    """A loader of engines in this process, which have answered once before they are given out.

    What the gate compared with the adapter on its base is asked again: see `serving.proof`.

    Args:
        files: Where the files of a version are fetched.
        load: Makes an engine of a version and the folder with its files; runs in a thread.
        dtype: Type of the frozen weights.
    """

    async def load_and_warm(version: ModelVersion) -> Engine:
        decision = await asyncio.to_thread(files.judged, version)
        parity = decision.parity if decision else None
        if parity and not parity.ok:
            raise UnavailableError(f"{version.served_id} failed the parity check of the gate")
        engine = await asyncio.to_thread(lambda: load(version, files.fetch(version.logged_model_id)))
        try:
            if parity and parity.probes:
                await prove(engine, parity.probes, dtype)
            else:
                ids = engine.encode_text("Hello")
                async for _ in engine.submit(GenerationRequest(tuple(ids), max_new_tokens=1)):
                    pass
                logger.warning("%s: the gate kept no answers to hold its own against", version.served_id)
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        return engine

    return load_and_warm


def brief(error: BaseException) -> str:
    """An error in a line of 500 characters at most."""
    return f"{type(error).__name__}: {error}"[:500]
