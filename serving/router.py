"""Which version answers a request.

A follower looks up the aliases. What an alias newly names is loaded and warmed beside the old, then one
assignment switches; the old one answers what it has begun. A request resolves its version once, by taking a
reference, and keeps it to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from regraft.config import NAME_PATTERN
from regraft.data.captures import sampled
from regraft.errors import ModelError
from regraft.records import ModelVersion
from serving.shelf import Loaded, Shelf, UnavailableError, brief

logger = logging.getLogger(__name__)

CHAMPION, CHALLENGER, SHADOW = "champion", "challenger", "shadow"
_ALIASES = (CHAMPION, CHALLENGER, SHADOW)
_MODEL = re.compile(rf"({NAME_PATTERN[1:-1]})(?:@({'|'.join(_ALIASES)})|/([1-9][0-9]{{0,8}}))?")


class VersionSource(Protocol):
    """The part of the registry that says which version is which."""

    def aliases(self, name: str, /) -> Mapping[str, int]:
        """The aliases of a model and the versions they name."""

    def version(self, name: str, version: int, /) -> ModelVersion:
        """One version; a ModelError if there is none."""


class UnknownModelError(Exception):
    """There is no such model or version here."""


class VersionTable:
    """The versions of one registered model by the names clients use. All methods run on one event loop.

    Args:
        source: The registry.
        shelf: Where versions are loaded.
        name: The registered model.
        poll_seconds: How often the aliases are looked up.
        canary: Share of those who ask for no version that the challenger answers, from 0 to 1.
        shadow: Whether the shadow is loaded.
        pinned: Versions that are loaded from the beginning, and stay.
    """

    def __init__(
        self,
        source: VersionSource,
        shelf: Shelf,
        *,
        name: str,
        poll_seconds: float = 1.0,
        canary: float = 0.0,
        shadow: bool = False,
        pinned: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._source = source
        self._shelf = shelf
        self._poll_seconds = poll_seconds
        self._canary = canary
        self._pinned = tuple(pinned)
        followed = {CHAMPION: True, CHALLENGER: canary > 0, SHADOW: shadow}
        self._followed = tuple(alias for alias in _ALIASES if followed[alias])
        self._named: dict[str, Loaded] = {}
        self._registry_error: str | None = None
        self._registry_down = False
        self._follower: asyncio.Task[None] | None = None

    @property
    def champion(self) -> ModelVersion | None:
        """The version that answers those who ask for no version."""
        return self._named[CHAMPION].version if CHAMPION in self._named else None

    @property
    def shadow(self) -> Loaded | None:
        """The version that answers beside the others, for the captures alone."""
        return self._named.get(SHADOW)

    @property
    def versions(self) -> list[ModelVersion]:
        """All loaded versions, by number."""
        return [loaded.version for loaded in self._shelf.loaded]

    @property
    def requests(self) -> int:
        """Requests under way."""
        return sum(loaded.references for loaded in self._shelf.loaded)

    @property
    def names(self) -> list[str]:
        """All that a client may ask for without a load."""
        named = [f"{self.name}@{alias}" for alias in self._followed if alias in self._named]
        return [*([self.name] if self.champion else []), *named, *(v.served_id for v in self.versions)]

    def start(self) -> None:
        """Begin to follow the aliases."""
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Stop following and unload everything."""
        if self._follower:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        self._named = {}
        await self._shelf.close()

    @asynccontextmanager
    async def held(self, loaded: Loaded) -> AsyncIterator[None]:
        """Hold a loaded version for as long as the context lasts."""
        self._shelf.hold(loaded)
        try:
            yield
        finally:
            self._shelf.release(loaded)

    @asynccontextmanager
    async def lease(self, model: str, who: str | None = None) -> AsyncIterator[Loaded]:
        """Hold the version that `model` names for as long as the context lasts; see `acquire`."""
        loaded = await self.acquire(model, who)
        try:
            yield loaded
        finally:
            self.release(loaded)

    async def acquire(self, model: str, who: str | None = None) -> Loaded:
        """Resolve what a client asks for and take a reference on it.

        Args:
            model: `name`, `name@champion` (or another alias that is followed), or `name/3`.
            who: Whose request it is; the same is answered by the same version for as long as the aliases
                stay, and nobody's by chance.

        Raises:
            UnknownModelError: If that names nothing here.
            UnavailableError: If there is no champion yet, or the version cannot be loaded now.
        """
        alias, number = self.parse(model)
        if number is not None:
            loaded = await self._shelf.ensure(await self._look_up(number))
        else:
            found = self._named.get(alias or self._drawn(who))
            if found is None:
                raise UnavailableError(self.why_not(alias or CHAMPION))
            loaded = found
        return self._shelf.hold(loaded)

    def release(self, loaded: Loaded) -> None:
        """Give a reference back."""
        self._shelf.release(loaded)

    def role_of(self, version: ModelVersion) -> str:
        """What a version is at the moment: its alias, or `pinned`."""
        named = self._named.items()
        return next((alias for alias, one in named if one.version.version == version.version), "pinned")

    def parse(self, model: str) -> tuple[str | None, int | None]:
        """The alias or the number of the version that a client asks for; neither if any will do.

        Raises:
            UnknownModelError: If it is not a name of this endpoint's.
        """
        match = _MODEL.fullmatch(model)
        if match is None or match[1] != self.name or (match[2] and match[2] not in self._followed):
            aliases = ", ".join(f"'{self.name}@{alias}'" for alias in self._followed)
            raise UnknownModelError(
                f"there is no model {model[:80]!r}; this endpoint serves {self.name!r}, also as "
                f"{aliases} or '{self.name}/<version>'"
            )
        return match[2], int(match[3]) if match[3] else None

    async def find(self, model: str) -> ModelVersion:
        """The version that `model` names, whether loaded or not.

        Raises:
            UnknownModelError: If there is none.
            UnavailableError: If there is no champion yet, or the registry does not answer.
        """
        alias, number = self.parse(model)
        if number is not None:
            return await self._look_up(number)
        if (alias or CHAMPION) not in self._named:
            raise UnavailableError(self.why_not(alias or CHAMPION))
        return self._named[alias or CHAMPION].version

    def why_not(self, alias: str = CHAMPION) -> str:
        """Why nothing is loaded for an alias."""
        if self._registry_error:
            return f"no {alias} is loaded: {self._registry_error}"
        if self._shelf.failures:
            number, message = max(self._shelf.failures.items())
            return f"no {alias} is loaded: version {number} failed to load: {message}"
        return f"no {alias} is loaded: no version of {self.name!r} is loaded yet"

    def health(self) -> dict[str, Any]:
        """What is loaded, who is champion, and what went wrong last."""
        return {
            "model": self.name,
            **{
                alias: self._named[alias].version.served_id if alias in self._named else None
                for alias in self._followed
            },
            "loaded": [
                {
                    "id": loaded.version.served_id,
                    "method": loaded.version.method.get("name"),
                    "role": self.role_of(loaded.version),
                    "requests": loaded.references,
                }
                for loaded in self._shelf.loaded
            ],
            "load_errors": {f"{self.name}/{n}": why for n, why in self._shelf.failures.items()},
            "registry_error": self._registry_error,
        }

    async def poll(self) -> None:
        """Look the aliases up once and switch to what they name."""
        try:
            aliases = await asyncio.to_thread(self._source.aliases, self.name)
        except Exception as error:  # whatever the registry's trouble is, what is loaded goes on serving
            self._registry_error = f"the registry does not answer: {brief(error)}"
            self._registry_down = True
            return
        self._registry_down = False
        wanted = {alias: aliases[alias] for alias in self._followed if alias in aliases}
        self._registry_error = (
            None if CHAMPION in wanted else f"{self.name!r} has no champion in the registry"
        )
        # What is about to be loaded has a role already: it needs none of the places of those without.
        self._keep(*wanted.values())
        for alias in self._followed:
            if alias in wanted:
                await self._switch(alias, wanted[alias])
            elif alias != CHAMPION:  # the last champion goes on answering
                self._named.pop(alias, None)
        self._keep()

    async def _switch(self, alias: str, number: int) -> None:
        named = self._named.get(alias)
        if named and named.version.version == number:
            return
        try:
            self._named[alias] = await self._shelf.ensure(await self._look_up(number))
        except UnknownModelError as error:  # an alias of a version that Regraft did not register
            self._registry_error = f"{self.name}@{alias}: {error}"
        except UnavailableError as error:
            logger.debug("%s of %s is not switched yet: %s", alias, self.name, error)
        else:
            logger.info("%s of %s is now version %d", alias, self.name, number)

    def _keep(self, *more: int) -> None:
        self._shelf.keep({*self._pinned, *(named.version.version for named in self._named.values()), *more})

    def _drawn(self, who: str | None) -> str:
        """The alias that answers somebody who asks for no version."""
        challenger = self._named.get(CHALLENGER)
        if challenger is None or not self._canary:
            return CHAMPION
        # Another challenger is tried on others: nobody is always the one who tries.
        drawn = f"{challenger.version.version}:{who or secrets.token_hex(8)}"
        return CHALLENGER if sampled(drawn, self._canary) else CHAMPION

    async def _follow(self) -> None:
        await self._load_pinned()
        while True:
            try:
                await self.poll()
            except Exception:
                logger.exception("following the aliases of %s failed; trying again", self.name)
            await asyncio.sleep(self._poll_seconds)

    async def _load_pinned(self) -> None:
        self._keep()
        for number in self._pinned:
            try:
                await self._shelf.ensure(await self._look_up(number))
            except (UnknownModelError, UnavailableError) as error:
                logger.error("version %d of %s, pinned, is not served: %s", number, self.name, error)  # noqa: TRY400

    async def _look_up(self, number: int) -> ModelVersion:
        if loaded := self._shelf.get(number):
            return loaded.version
        if self._registry_down:  # MLflow's client would go on trying for minutes
            raise UnavailableError(str(self._registry_error))
        try:
            return await asyncio.to_thread(self._source.version, self.name, number)
        except ModelError as error:
            raise UnknownModelError(error.problem) from error
        except Exception as error:
            raise UnavailableError(f"the registry does not answer: {brief(error)}") from error
