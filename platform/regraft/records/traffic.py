"""What the endpoint answered."""

from __future__ import annotations

from typing import Any

from regraft.records.base import Record
from regraft.records.data import Message


class CapturedExchange(Record):
    """One request and its answer, as the endpoint gave it. Times are UTC, ISO 8601 with microseconds.

    Attributes:
        key: Hash of the API key that asked; None if none was needed.
        choice: Place among the choices of one request.
        variant: In which role the version answered: champion, challenger, shadow or pinned.
    """

    id: str
    created: str
    model: str
    model_version: int
    messages: tuple[Message, ...]
    output: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    first_token_ms: float | None = None
    stream: bool = False
    session: str | None = None
    parameters: dict[str, Any] = {}
    error: str | None = None
    key: str | None = None
    choice: int = 0
    variant: str = "champion"

    @property
    def prompt_text(self) -> str:
        """The last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")
