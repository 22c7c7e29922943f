"""A request while it is answered, and how its next token is drawn: what all engines of this project share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from regraft.models import prompt_ids
from regraft.records import Message
from serving.engines.base import (
    Engine,
    EngineError,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Stream,
    TextDelta,
)
from serving.engines.text import Detokenizer, StopScanner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(Stream):
    """One request: filled by the worker thread, read on the event loop that submitted it.

    Args:
        request: What to answer.
        tokenizer: The model's.
        cancelled: Called when nobody wants the rest.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: PreTrainedTokenizerBase,
        cancelled: Callable[[Row], None],
    ) -> None:
        self.request = request
        self.done = False
        self.generator: torch.Generator | None = None
        self._cancelled = cancelled
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(request.stop)
        self._count = 0
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | EngineError] = asyncio.Queue()

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._ended = not isinstance(event, TextDelta)
        if isinstance(event, EngineError):
            raise event
        return event

    def cancel(self) -> None:
        """Want no more of it."""
        self._ended = True
        self._cancelled(self)

    def take(self, token: int, eos: frozenset[int]) -> None:
        """Add one generated token, on the worker thread."""
        self._count += 1
        if token in eos:
            self.finish("stop")
            return
        text, stopped = self._scanner.push(self._detokenizer.push(token))
        self._give(text)
        if stopped:
            self._end("stop")
        elif self._count >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the answer, giving out what was held back."""
        text, stopped = self._scanner.push(self._detokenizer.flush())
        self._give(text if stopped else text + self._scanner.flush())
        self._end("stop" if stopped else reason)

    def fail(self, error: EngineError) -> None:
        """End the request with an error."""
        if not self.done:
            self.done = True
            self._post(error)

    def _end(self, reason: FinishReason) -> None:
        self.done = True
        self._post(Finished(reason, len(self.request.prompt_ids), self._count))

    def _give(self, text: str) -> None:
        if text:
            self._post(TextDelta(text))

    def _post(self, event: Event | EngineError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has closed: nobody is left to read
            self.done = True


class OwnEngine(Engine):
    """What an engine of this project knows of chats.

    Args:
        tokenizer: The model's.
        encoding: Held around its use; of engines that share a tokenizer the same one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: threading.Lock) -> None:
        self._tokenizer, self._encoding = tokenizer, encoding

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the assistant's turn begins."""
        with self._encoding:
            return prompt_ids(self._tokenizer, messages)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a plain prompt."""
        with self._encoding:
            ids: list[int] = self._tokenizer(text)["input_ids"]
            return ids


def draw(row: Row, logits: torch.Tensor) -> int:
    """Draw a sampled row's next token.

    Args:
        row: With a temperature above 0.
        logits: Of shape (vocabulary,).
    """
    request = row.request
    # Drawn on the CPU whatever the device: a seed means the same everywhere.
    probabilities = torch.softmax(logits.float().cpu() / request.temperature, dim=-1)
    if request.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        ordered[ordered.cumsum(0) - ordered >= request.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    if row.generator is None:
        row.generator = torch.Generator()
        if request.seed is None:
            row.generator.seed()
        else:
            row.generator.manual_seed(request.seed)
    return int(torch.multinomial(probabilities, 1, generator=row.generator))
