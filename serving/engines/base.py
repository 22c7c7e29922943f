"""The interface between the API and whatever generates.

The API knows requests, events and the errors below; an engine knows one loaded model version.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from regraft.records import Message

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it.

    Attributes:
        prompt_ids: Token ids of the prompt.
        max_new_tokens: Upper bound on generated tokens.
        temperature: 0 is greedy.
        top_p: Sample from the smallest set of tokens with at least this probability.
        seed: Makes sampling repeatable; None draws afresh.
        stop: The answer ends before the first of these.
        logprobs: How many of the likeliest tokens to tell beside each generated one, with their
            log-probabilities; 0 tells the generated ones alone, None tells nothing.
        whole: Nobody looks at the answer before its end, so that it may come in one piece.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely the model held it to be, before temperature and top-p.

    Attributes:
        id: In the vocabulary.
        spelling: Its bytes; a token may hold a part of a character only.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens in its place, likeliest first; theirs are empty.
        offset: Where its text begins in the answer, in characters.
    """

    id: int
    spelling: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class TextDelta:
    """More of the answer.

    Attributes:
        text: What may be shown now; empty if there are only tokens to tell.
        tokens: Those whose text begins in it, if the request asked for log-probabilities. The
            end-of-sequence token and what comes after a stop string are never told.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of the answer. Completion tokens count the end-of-sequence token too.

    Attributes:
        first_token_seconds: How long after it was submitted its first token was there, as the engine saw it.
        busy_seconds: How long the engine worked for it; what is missing to the whole, it waited.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float | None = field(default=None, compare=False)
    busy_seconds: float | None = field(default=None, compare=False)


Event: TypeAlias = TextDelta | Finished


class EngineError(Exception):
    """Generation failed; the message may be shown to the client."""


class EngineClosedError(EngineError):
    """The engine was closed while, or before, this request was answered."""


class EngineTimeoutError(EngineError):
    """The answer took longer than it may."""


class QueueFullError(Exception):
    """As many requests are waiting as may wait."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stream(AsyncIterator[Event]):
    """The events of one request; closing it cancels the request."""

    @abstractmethod
    def cancel(self) -> None:
        """Stop generating for this request. Safe to call at any time, any number of times."""

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self.cancel()


@dataclass(frozen=True)
class EngineLimits:
    """How much one engine takes on.

    Attributes:
        max_batch: Requests answered together.
        max_queued: Requests that may wait beyond those.
        threads: CPU threads of the engine.
        gather_seconds: How long the first of a batch waits for company.
    """

    max_batch: int = 16
    max_queued: int = 64
    threads: int = 1
    gather_seconds: float = 0.01


class Engine(ABC):
    """One loaded model version that answers requests."""

    #: Tokens that prompt and answer may have together.
    context_length: int
    #: Token ids are from 0 to below this.
    vocabulary: int

    @property
    def alive(self) -> bool:
        """Whether it can still answer; one that cannot has to be loaded again."""
        return True

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant's turn begins."""

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was given as token ids, special tokens included."""

    @abstractmethod
    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request; call from a running event loop.

        Returns:
            Its events: text deltas, then one `Finished`. An `EngineError` is raised from the iterator, and
            a `QueueFullError` before the first event if only then it shows that too many wait.

        Raises:
            QueueFullError: If too many requests are waiting.
            EngineClosedError: If the engine is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Fail what is waiting, cancel what runs, free the model. Blocks until the worker has ended."""
