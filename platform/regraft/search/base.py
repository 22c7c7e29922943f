"""What every search offers: settings, and a proposer that is asked what is next and told what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from regraft.methods import Method
from regraft.records import TrialStatus, content_hash
from regraft.search.space import Arm


class Outcome(NamedTuple):
    """What came of a trial: its figures by name, as constraints know them, and how far it came."""

    status: TrialStatus
    figures: dict[str, float] = {}
    point: int = 0


class Proposer(ABC):
    """Proposes methods, none of them twice. It knows no Ray, and nothing of how trials are run."""

    @abstractmethod
    def ask(self) -> Method | None:
        """The next method to try; None where there is no more."""

    @property
    def left(self) -> int | None:
        """How many methods are still to come, as far as is known."""
        return None

    def tell(self, method: Method, outcome: Outcome) -> None:  # noqa: B027 what does not learn need not listen
        """Learn what came of a method that was asked for."""

    def recall(self, method: Method, outcome: Outcome, *, counts: bool) -> None:  # noqa: B027
        """Learn what came of a method before; if it `counts`, it is one of the trials asked for."""


class Search(BaseModel, ABC):
    """How the space is searched: its settings, and the proposer they make."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    #: Whether proposals follow from earlier outcomes.
    learns: ClassVar[bool] = False
    name: str

    @abstractmethod
    def proposer(self, arms: Sequence[Arm], *, samples: int, seed: int) -> Proposer:
        """A proposer over the arms.

        Args:
            arms: The space.
            samples: `sweep.samples`: draws for each point of a grid.
            seed: Of all that is drawn.
        """

    def preview(self, arms: Sequence[Arm], *, samples: int, seed: int) -> tuple[Method, ...]:
        """What would be tried if nothing were learned on the way."""
        proposer, found = self.proposer(arms, samples=samples, seed=seed), []
        while (method := proposer.ask()) is not None:
            found.append(method)
        return tuple(found)


class Fixed(Proposer):
    """Proposes a list, each method once."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._left = list({key(m): m for m in methods}.values())[::-1]

    def ask(self) -> Method | None:
        """The next of the list."""
        return self._left.pop() if self._left else None

    @property
    def left(self) -> int:
        """Those not asked for yet."""
        return len(self._left)


def key(method: Method) -> str:
    """What tells methods apart: the content of their settings."""
    return content_hash(method.model_dump(mode="json"))
