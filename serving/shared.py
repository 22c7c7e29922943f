"""What versions share in a process: held as long as one of them is on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeAlias, TypeVar

Key: TypeAlias = tuple[str, ...]


class Shareable(Protocol):
    """Something large that several use at once."""

    @property
    def alive(self) -> bool:
        """Whether it can still be used."""

    def close(self) -> None:
        """Free it."""


Held = TypeVar("Held", bound=Shareable)


class Shared(Generic[Held]):
    """Large things by what they were made as."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Key, Held] = {}
        self._users: dict[int, int] = {}

    def use(self, key: Key, make: Callable[[], Held]) -> tuple[Held, Callable[[], None]]:
        """One of them, made if it is not here or no longer alive.

        Args:
            key: What it is made as.
            make: Makes it; of two that want the same one waits.

        Returns:
            It, and what gives it back; the last to do so frees it.
        """
        with self._lock:
            held = self._held.get(key)
            if held is None or not held.alive:
                held = self._held[key] = make()
                self._users[id(held)] = 0
            self._users[id(held)] += 1
            return held, lambda: self._release(key, held)

    def _release(self, key: Key, held: Held) -> None:
        with self._lock:
            self._users[id(held)] -= 1
            unused = not self._users[id(held)]
            if unused:
                del self._users[id(held)]
                if self._held.get(key) is held:
                    del self._held[key]
        if unused:
            held.close()
