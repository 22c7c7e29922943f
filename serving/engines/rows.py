"""A request while it is answered, and how its next token is drawn: what all engines of this project share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    TokenLogprob,
)
from serving.engines.text import Detokenizer, Spelling, StopScanner

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
        self._spelling = None if request.logprobs is None else Spelling(tokenizer)
        self._count = 0
        self._untold: deque[TokenLogprob] = deque()
        self._known = 0  # characters that the detokenizer has given
        self._given = 0  # characters that were given out
        self._ended = False
        # What nobody looks at before its end is not read token by token.
        self._unseen = request.whole and not request.stop and request.logprobs is None
        self._ids: list[int] = []
        self._begun = self._joined = time.perf_counter()
        self._first: float | None = None
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

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.request.max_new_tokens - self._count

    def begin(self) -> None:
        """Note that it waits no longer."""
        self._joined = time.perf_counter()

    def take(self, token: int, eos: frozenset[int], logits: torch.Tensor | None = None) -> None:
        """Add one generated token, on the worker thread.

        Args:
            token: Its id.
            eos: The ids that end an answer.
            logits: From which it came, of shape (vocabulary,); needed if the request asks for
                log-probabilities.
        """
        if not self._count:
            self._first = time.perf_counter() - self._begun
        self._count += 1
        if token in eos:
            self.finish("stop")
            return
        if self._unseen:
            self._ids.append(token)
            if self._count >= self.request.max_new_tokens:
                self.finish("length")
            return
        if self._spelling is not None:
            assert logits is not None and self.request.logprobs is not None
            told = _logprob(token, logits, self.request.logprobs, self._spelling)
            self._untold.append(replace(told, offset=self._known))
        text = self._detokenizer.push(token)
        self._known += len(text)
        text, stopped = self._scanner.push(text)
        self._give(text)
        if stopped:
            self._end("stop")
        elif self._count >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the answer, giving out what was held back."""
        if self._unseen:
            self._give(self._detokenizer.whole(self._ids))
            self._end(reason)
            return
        text, stopped = self._scanner.push(self._detokenizer.flush())
        if stopped:
            self._give(text)
        else:
            self._give(text + self._scanner.flush(), last=True)
        self._end("stop" if stopped else reason)

    def fail(self, error: EngineError) -> None:
        """End the request with an error."""
        if not self.done:
            self.done = True
            self._post(error)

    def _end(self, reason: FinishReason) -> None:
        self.done = True
        busy = time.perf_counter() - self._joined
        self._post(Finished(reason, len(self.request.prompt_ids), self._count, self._first, busy))

    def _give(self, text: str, *, last: bool = False) -> None:
        self._given += len(text)
        tokens = []
        while self._untold and (last or self._untold[0].offset < self._given):
            tokens.append(self._untold.popleft())
        if text or tokens:
            self._post(TextDelta(text, tuple(tokens)))

    def _post(self, event: Event | EngineError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has closed: nobody is left to read
            self.done = True


class OwnEngine(Engine):
    """What an engine of this project knows of chats and prompts.

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

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of a prompt that was given as token ids, special tokens included."""
        with self._encoding:
            return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _logprob(token: int, logits: torch.Tensor, likeliest: int, spelling: Spelling) -> TokenLogprob:
    scores = torch.log_softmax(logits.float(), dim=-1)
    top: tuple[TokenLogprob, ...] = ()
    if likeliest:
        best = scores.topk(min(likeliest, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(TokenLogprob(id, spelling(id), value) for id, value in pairs)
    return TokenLogprob(token, spelling(token), float(scores[token]), top)


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
