"""Which versions are loaded, and which of them answers.

A follower looks up the champion alias. A new champion is loaded and warmed beside the old one, then one
assignment switches; the old one answers what it has begun and is unloaded when nothing refers to it.
A request resolves its version once, by taking a lease, and keeps it to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from regraft.config import NAME_PATTERN
from regraft.errors import ModelError
from regraft.records import ModelVersion
from serving.engines.base import Engine, GenerationRequest

logger = logging.getLogger(__name__)

CHAMPION = "champion"
_MODEL = re.compile(rf"({NAME_PATTERN[1:-1]})(?:@({CHAMPION})|/([1-9][0-9]{{0,8}}))?")


class VersionSource(Protocol):
    """The part of the registry that serving needs."""

    def by_alias(self, name: str, alias: str, /) -> ModelVersion | None:
        """The version an alias names."""

    def version(self, name: str, version: int, /) -> ModelVersion:
        """One version; a ModelError if there is none."""

    def fetch(self, logged_model_id: str, /) -> Path:
        """A local folder with the files of a logged model."""


class UnknownModelError(Exception):
    """There is no such model or version here."""


class UnavailableError(Exception):
    """The model exists but cannot answer now; the message says why."""


class PinnedBusyError(UnavailableError):
    """All places for pinned versions are in use."""


@dataclass(eq=False)
class Loaded:
    """A loaded version. `references` counts the requests that hold it."""

    version: ModelVersion
    engine: Engine
    references: int = 0
    used: float = field(default_factory=time.monotonic)
    pinned: bool = False


@dataclass
class _Failure:
    message: str
    count: int
    retry_at: float


class VersionTable:
    """The loaded versions of one registered model. All methods run on one event loop.

    Args:
        source: The registry.
        load: Makes an engine of a version and the folder with its files; runs in a thread.
        name: The registered model.
        poll_seconds: How often the champion alias is looked up.
        max_pinned: Versions kept beside the champion for clients that ask for them by number.
    """

    def __init__(
        self,
        source: VersionSource,
        load: Callable[[ModelVersion, Path], Engine],
        *,
        name: str,
        poll_seconds: float = 1.0,
        max_pinned: int = 2,
    ) -> None:
        self.name = name
        self._source = source
        self._load = load
        self._poll_seconds = poll_seconds
        self._max_pinned = max_pinned
        self._loaded: dict[int, Loaded] = {}
        self._champion: Loaded | None = None
        self._failures: dict[int, _Failure] = {}
        self._registry_error: str | None = None
        self._registry_down = False
        self._loading = asyncio.Lock()
        self._loads: set[asyncio.Task[Loaded]] = set()
        self._unloading: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None

    @property
    def champion(self) -> ModelVersion | None:
        """The version that answers those who ask for no version."""
        return self._champion.version if self._champion else None

    @property
    def versions(self) -> list[ModelVersion]:
        """All loaded versions, by number."""
        return [self._loaded[number].version for number in sorted(self._loaded)]

    def start(self) -> None:
        """Begin to follow the alias."""
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Stop following and unload everything."""
        if self._follower:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await asyncio.gather(*self._loads, return_exceptions=True)
        self._champion = None
        for loaded in list(self._loaded.values()):
            self._retire(loaded)
        await asyncio.gather(*self._unloading)

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Loaded]:
        """Hold the version that `model` names for as long as the context lasts; see `acquire`."""
        loaded = await self.acquire(model)
        try:
            yield loaded
        finally:
            self.release(loaded)

    async def acquire(self, model: str) -> Loaded:
        """Resolve what a client asks for and take a reference on it.

        Args:
            model: `name`, `name@champion`, or `name/3`.

        Raises:
            UnknownModelError: If that names nothing here.
            UnavailableError: If there is no champion yet, or the version cannot be loaded now.
        """
        number = self.parse(model)
        if number is None:
            if self._champion is None:
                raise UnavailableError(self.why_not())
            loaded = self._champion
        else:
            loaded = self._loaded.get(number) or await self._pin(number)
            # Also a former champion that still drains: whoever asks for it by number keeps it here.
            loaded.pinned = loaded is not self._champion
        loaded.references += 1
        loaded.used = time.monotonic()
        if number is not None:
            self._trim()
        return loaded

    def release(self, loaded: Loaded) -> None:
        """Give a reference back."""
        loaded.references -= 1
        self._retire_if_idle(loaded)
        self._trim()

    def parse(self, model: str) -> int | None:
        """The version number a client asks for; None for the champion.

        Raises:
            UnknownModelError: If it is not a name of this endpoint's.
        """
        match = _MODEL.fullmatch(model)
        if match is None or match[1] != self.name:
            raise UnknownModelError(
                f"there is no model {model[:80]!r}; this endpoint serves {self.name!r}, also as "
                f"'{self.name}@{CHAMPION}' or '{self.name}/<version>'"
            )
        return int(match[3]) if match[3] else None

    async def find(self, model: str) -> ModelVersion:
        """The version that `model` names, whether loaded or not.

        Raises:
            UnknownModelError: If there is none.
            UnavailableError: If there is no champion yet, or the registry does not answer.
        """
        number = self.parse(model)
        if number is None:
            if self._champion is None:
                raise UnavailableError(self.why_not())
            return self._champion.version
        if number in self._loaded:
            return self._loaded[number].version
        if self._registry_down:  # MLflow's client would go on trying for minutes
            raise UnavailableError(str(self._registry_error))
        try:
            return await asyncio.to_thread(self._source.version, self.name, number)
        except ModelError as error:
            raise UnknownModelError(error.problem) from error
        except Exception as error:
            raise UnavailableError(f"the registry does not answer: {_brief(error)}") from error

    def why_not(self) -> str:
        """Why there is no champion."""
        if self._registry_error:
            return f"no champion is loaded: {self._registry_error}"
        if self._failures:
            number, failure = max(self._failures.items())
            return f"no champion is loaded: version {number} failed to load: {failure.message}"
        return f"no champion is loaded: no version of {self.name!r} is loaded yet"

    def health(self) -> dict[str, Any]:
        """What is loaded, who is champion, and what went wrong last."""
        return {
            "model": self.name,
            "champion": self._champion.version.served_id if self._champion else None,
            "loaded": [
                {
                    "id": loaded.version.served_id,
                    "method": loaded.version.method.get("name"),
                    "role": self._role(loaded),
                    "requests": loaded.references,
                }
                for _, loaded in sorted(self._loaded.items())
            ],
            "load_errors": {f"{self.name}/{n}": f.message for n, f in sorted(self._failures.items())},
            "registry_error": self._registry_error,
        }

    async def poll(self) -> None:
        """Look the champion up once and switch to it if it is another one."""
        try:
            wanted = await asyncio.to_thread(self._source.by_alias, self.name, CHAMPION)
        except Exception as error:  # whatever the registry's trouble is, what is loaded goes on serving
            self._registry_error = f"the registry does not answer: {_brief(error)}"
            self._registry_down = True
            return
        self._registry_down = False
        if wanted is None:
            self._registry_error = f"{self.name!r} has no champion in the registry"
            return
        self._registry_error = None
        if self._champion and wanted.version == self._champion.version.version:
            return
        try:
            loaded = await self._ensure(wanted, pinned=False)
        except UnavailableError:
            return  # already kept in `_failures`
        previous, self._champion = self._champion, loaded
        loaded.pinned = False
        logger.info("champion of %s is now version %d", self.name, wanted.version)
        if previous:
            self._retire_if_idle(previous)

    async def _follow(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception:
                logger.exception("following the champion of %s failed; trying again", self.name)
            await asyncio.sleep(self._poll_seconds)

    async def _pin(self, number: int) -> Loaded:
        return await self._ensure(await self.find(f"{self.name}/{number}"), pinned=True)

    async def _ensure(self, version: ModelVersion, *, pinned: bool) -> Loaded:
        """The loaded version; loads and warms it first if need be.

        A caller that goes away does not stop a load half-way: the version would be neither in the table nor
        unloaded.
        """
        task = asyncio.get_running_loop().create_task(self._ensure_alone(version, pinned))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        return await asyncio.shield(task)

    async def _ensure_alone(self, version: ModelVersion, pinned: bool) -> Loaded:
        async with self._loading:
            loaded = self._loaded.get(version.version)
            if loaded:
                return loaded
            failure = self._failures.get(version.version)
            if failure and time.monotonic() < failure.retry_at:
                raise UnavailableError(f"{version.served_id} failed to load: {failure.message}")
            if pinned:
                self._make_room()
            try:
                engine = await self._load_and_warm(version)
            except Exception as error:
                count = failure.count + 1 if failure else 1
                # A broken version would otherwise be loaded again at every poll, and slow the healthy one.
                retry_at = time.monotonic() + min(60.0, self._poll_seconds * 2**count)
                self._failures[version.version] = _Failure(_brief(error), count, retry_at)
                logger.exception("%s failed to load", version.served_id)
                raise UnavailableError(f"{version.served_id} failed to load: {_brief(error)}") from error
            self._failures.pop(version.version, None)
            loaded = self._loaded[version.version] = Loaded(version, engine, pinned=pinned)
            return loaded

    def _make_room(self) -> None:
        pinned = [entry for entry in self._loaded.values() if entry.pinned]
        if len(pinned) >= self._max_pinned:
            idle = [entry for entry in pinned if not entry.references]
            if not idle:
                raise PinnedBusyError(
                    f"{len(pinned)} versions besides the champion are in use; try again later"
                )
            self._retire(min(idle, key=lambda entry: entry.used))

    async def _load_and_warm(self, version: ModelVersion) -> Engine:
        def load() -> Engine:
            return self._load(version, self._source.fetch(version.logged_model_id))

        engine = await asyncio.to_thread(load)
        try:
            ids = engine.encode_text("Hello")
            async for _ in engine.submit(GenerationRequest(tuple(ids), max_new_tokens=1)):
                pass
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        return engine

    def _role(self, loaded: Loaded) -> str:
        if loaded is self._champion:
            return CHAMPION
        return "pinned" if loaded.pinned else "draining"

    def _trim(self) -> None:
        pinned = [entry for entry in self._loaded.values() if entry.pinned]
        idle = sorted((entry for entry in pinned if not entry.references), key=lambda entry: entry.used)
        for entry in idle[: max(0, len(pinned) - self._max_pinned)]:
            self._retire(entry)

    def _retire_if_idle(self, loaded: Loaded) -> None:
        if not loaded.references and not loaded.pinned and loaded is not self._champion:
            self._retire(loaded)

    def _retire(self, loaded: Loaded) -> None:
        """Take a version out of the table and unload it in a thread."""
        if self._loaded.get(loaded.version.version) is loaded:
            del self._loaded[loaded.version.version]
            task = asyncio.get_running_loop().create_task(asyncio.to_thread(loaded.engine.close))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
