"""Examples and the sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from regraft.records.base import Record

Role = Literal["system", "user", "assistant"]


class Message(Record):
    """One turn of a chat."""

    role: Role
    content: str = Field(min_length=1)


class Example(Record):
    """One chat to train on or to be evaluated with; the last turn is the assistant's."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=2)
    tags: dict[str, str] = {}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns but the last."""
        return self.messages[:-1]

    def after(self, shown: Sequence[Message]) -> Example:
        """The same example with turns shown before its own; a system turn stays first."""
        if not shown:
            return self
        own = 1 if self.messages[0].role == "system" else 0
        turns = (*self.messages[:own], *shown, *self.messages[own:])
        return self.model_copy(update={"messages": turns})

    @property
    def reference(self) -> str:
        """The last turn: the answer to learn, or to be compared with."""
        return self.messages[-1].content


class DatasetVersion(Record):
    """An immutable set of examples by split.

    `id` is the content hash over the examples of all splits: the same rows give the same id wherever the
    files lie.
    """

    id: str
    name: str
    splits: dict[str, tuple[Example, ...]]
    sources: dict[str, str] = {}
    checks: dict[str, int] = {}
    parent_id: str | None = None

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of one split.

        Raises:
            KeyError: If there is no such split; the message names those there are.
        """
        if name not in self.splits:
            raise KeyError(
                f"dataset {self.name} ({self.id}) has no split {name!r}; it has {sorted(self.splits)}"
            )
        return self.splits[name]
