"""Continuous batching: requests of many adapters on one base, joining and leaving between steps.

A base is held once in a process (`SlotsBase`); each served version is a view of it (`SlotEngine`). The keys
and values of requests lie in slots (`regraft.evals.slots`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from regraft.evals.generation import end_ids, make_contiguous
from regraft.evals.slots import Slots
from serving.engines.adapters import Adapter
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    GenerationRequest,
    QueueFullError,
    Stream,
)
from serving.engines.compiled import kernels
from serving.engines.device_layers import fuse_on_device
from serving.engines.layers import fuse
from serving.engines.mixed import Mix, alike
from serving.engines.packed import pack
from serving.engines.padded import put_together
from serving.engines.plain import replace_plain
from serving.engines.rows import OwnEngine, Row, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Prompt tokens, padding included, that pass through between two steps: those who wait for their next token
#: wait for these. On a GPU, where a pass is launches, more take hardly longer.
_PREFILL_TOKENS = {"cpu": 2048, "cuda": 4096}
#: What a pass costs beside its tokens, in tokens: measured with SmolLM2-135M on one core; on a GPU, where a
#: step's time is that of its launches, all go together.
_PASS_TOKENS, _ALL_TOGETHER = {"cpu": 128}, 1 << 20
T = TypeVar("T")


class _Asked(Row):
    """A request with its adapter's number and its last token."""

    adapter = 0
    token = 0


class _Said(NamedTuple):
    """A step that the device does, or has done.

    Attributes:
        rows: Whose.
        tokens: What it says in each; there when it is over.
        over: Happens then; None if it has.
    """

    rows: list[_Asked]
    tokens: torch.Tensor
    over: Any

    def wait(self) -> None:
        """Wait until it is over."""
        if self.over is not None:
            self.over.synchronize()


class SlotsBase:
    """A base model in memory, and the thread that answers with it.

    Args:
        base: The transformers model; it must not be used elsewhere meanwhile.
        tokenizer: Its tokenizer.
        limits: How much to take on, for all versions together.
    """

    def __init__(self, base: Any, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits) -> None:
        self.base, self.tokenizer, self.limits = base, tokenizer, limits
        pack(base)
        replace_plain(base)
        self._loops = kernels(base)
        self.mix = Mix(base)
        fuse(base, self.mix, limits.max_batch)
        fuse_on_device(base, self.mix)
        self.encoding = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[_Asked] = deque()
        self._joining: list[_Asked] = []
        self._live: list[_Asked] = []
        self._slots = Slots(base, limits.max_batch, self.mix)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        #: On a GPU: the step that nobody has read yet.
        self._said: _Said | None = None
        #: Adapters that are let go: no request may ask for one any more.
        self._removed: set[int] = set()
        self._eos = end_ids(base, tokenizer)
        base.get_output_embeddings().register_forward_pre_hook(make_contiguous)
        self._worker = threading.Thread(target=self._work, name="regraft-slots", daemon=True)
        self._worker.start()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return not self._closed

    def add(self, adapter: Adapter) -> int:
        """Take an adapter in, between two steps; gives its number."""
        return self._between_steps(lambda: self.mix.add(adapter))

    def remove(self, number: int) -> None:
        """Let an adapter go; whoever waits for it, or is answered by it, fails."""

        def drop() -> None:
            with self._changed:
                self._removed.add(number)
                gone = [row for row in (*self._waiting, *self._live) if row.adapter == number]
                self._waiting = deque(row for row in self._waiting if row.adapter != number)
            for row in gone:
                row.fail(EngineClosedError("this model version was unloaded"))
            self._sweep_out()
            self.mix.remove(number)

        self._between_steps(drop)

    def submit(self, request: GenerationRequest, adapter: int) -> Stream:
        """Take on a request; see `Engine.submit`."""
        row = _Asked(request, self.tokenizer, self.cancel)
        row.adapter = adapter
        with self._changed:
            if self._closed or adapter in self._removed:
                raise EngineClosedError("this model version is being unloaded")
            busy = len(self._waiting) + sum(not r.done for r in (*self._joining, *self._live))
            if busy >= self.limits.max_batch + self.limits.max_queued:
                raise QueueFullError(f"{busy} requests are being answered or wait; try again later")
            self._waiting.append(row)
            self._changed.notify()
        return row

    def cancel(self, row: Row) -> None:
        """Stop working for a row: at once if it waits, at the next token if it runs."""
        with self._changed:
            row.done = True
            if row in self._waiting:
                self._waiting.remove(row)  # type: ignore[arg-type]
            self._changed.notify()

    def close(self) -> None:
        """Fail what waits and what runs, end the worker, let go of the model."""
        with self._changed:
            self._closed = True
            rows = [*self._waiting, *self._joining, *self._live]
            self._waiting.clear()
            self._changed.notify()
        for row in rows:
            row.fail(EngineClosedError("this model version was unloaded"))
        self._worker.join()
        del self.base, self._slots, self.mix

    def _between_steps(self, call: Callable[[], T]) -> T:
        done: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise EngineClosedError("this model version is being unloaded")
            self._calls.append((call, done))
            self._changed.notify()
        return done.result()

    def _work(self) -> None:
        torch.set_num_threads(self.limits.threads)  # OpenMP keeps this per calling thread
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._calls or self._waiting or self._live)
                if self._closed:
                    break
                calls, self._calls = self._calls, deque()
            with torch.inference_mode():
                if self._said is not None and calls:
                    self._said.wait()  # what it reads may be freed
                for call, done in calls:
                    try:
                        done.set_result(call())
                    except Exception as error:
                        done.set_exception(error)
                with self._changed:
                    self._joining = self._next_to_join()
                if self._said is not None and self._joining:
                    self._said.wait()  # what it reads may be moved
                self._guarded(self._joining, self._join)
                self._joining = []
                self._sweep_out()
                self._guarded(self._live, self._step)
                self._sweep_out()
        if self._said is not None:
            self._said.wait()
        for _, done in self._calls:
            done.set_exception(EngineClosedError("this model version was unloaded"))

    @staticmethod
    def _guarded(rows: list[_Asked], work: Callable[[list[_Asked]], None]) -> None:
        """Whatever goes wrong fails the rows that it went wrong for, and no others."""
        if not rows:
            return
        try:
            work(rows)
        except Exception as error:
            logger.exception("generation failed for %d requests", len(rows))
            for row in rows:
                row.fail(EngineError(f"generation failed: {type(error).__name__}: {error}"))

    @property
    def _somebody_comes(self) -> bool:
        """Whether there is a slot for one who waits."""
        return bool(self._waiting) and len(self._live) < self.limits.max_batch

    def _next_to_join(self) -> list[_Asked]:
        """Those who wait and for whom there is a slot, as many as pass through together."""
        some: list[_Asked] = []
        widest, most = 0, _PREFILL_TOKENS.get(self.base.device.type, _PREFILL_TOKENS["cpu"])
        while self._waiting and len(some) < self.limits.max_batch - len(self._live):
            row = self._waiting[0]
            widest = max(widest, len(row.request.prompt_ids) + self._virtual(row))
            if some and (len(some) + 1) * widest > most:
                break
            some.append(self._waiting.popleft())
            row.begin()
        return some

    def _virtual(self, row: _Asked) -> int:
        return self.mix.adapter(row.adapter).virtual_tokens

    def _join(self, rows: list[_Asked]) -> None:
        """Read prompts and say their first tokens; prefixes of keys and values go in a batch of their own."""
        rows = [row for row in rows if not row.done]
        for prefixed in (False, True):
            some = [row for row in rows if bool(self.mix.adapter(row.adapter).prefix) == prefixed]
            lengths = [len(row.request.prompt_ids) + self._virtual(row) for row in some]
            for together in alike(lengths, _PASS_TOKENS.get(self.base.device.type, _ALL_TOGETHER)):
                # Neighbours of one adapter go through it together.
                self._read(sorted((some[i] for i in together), key=lambda row: row.adapter))

    def _read(self, rows: list[_Asked]) -> None:
        adapters = [self.mix.adapter(row.adapter) for row in rows]
        inputs = put_together(self.base, [row.request.prompt_ids for row in rows], adapters)
        self.mix.select([row.adapter for row in rows])
        logits = self._slots.read(inputs)
        self._live += rows
        self._say(rows, logits)

    def _step(self, live: list[_Asked]) -> None:
        """Give each row another token; on a GPU the next step begins before this one's tokens are read."""
        said, self._said = self._said, None
        if said is None:
            self.mix.select([row.adapter for row in live])
            logits = self._slots.step([row.token for row in live])
            said = self._begun(live)
            if said is None:
                self._say(live, logits)
                return
        if said.rows == live and self._may_go_on(live) and self._slots.follow():
            self._said = self._begun(live)
        said.wait()
        for row, token in zip(said.rows, said.tokens.tolist(), strict=True):
            if not row.done:
                row.token = token
                row.take(token, self._eos)

    def _begun(self, live: Sequence[_Asked]) -> _Said | None:
        """The step that was just started, if it is recorded and says all that is wanted of it."""
        likeliest = self._slots.likeliest
        if likeliest is None or not all(_says_likeliest(row) for row in live):
            return None
        if not likeliest.is_cuda:
            return _Said(list(live), likeliest.clone(), None)
        tokens = torch.empty(len(live), dtype=torch.long, pin_memory=True)
        tokens.copy_(likeliest, non_blocking=True)
        over = torch.cuda.Event()  # type: ignore[no-untyped-call]
        over.record()
        return _Said(list(live), tokens, over)

    def _may_go_on(self, live: Sequence[_Asked]) -> bool:
        """Whether the next step will be of the same rows, unless one says an end or somebody comes."""
        if self._closed or self._calls or self._somebody_comes:
            return False
        return all(not row.done and row.left > 1 for row in live)

    def _say(self, rows: Sequence[_Asked], logits: torch.Tensor) -> None:
        """Give each row its next token."""
        likeliest = self._likeliest(logits).tolist()
        for index, row in enumerate(rows):
            if row.done:
                continue
            sampled = row.request.temperature > 0
            row.token = draw(row, logits[index]) if sampled else likeliest[index]
            told = row.request.logprobs is not None
            row.take(row.token, self._eos, logits[index] if told else None)

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        if self._loops is None or logits.dtype is not self.base.dtype or logits.stride(1) != 1:
            # The same as `argmax`, which takes five times as long for bf16 on a CPU (torch 2.13).
            return logits.max(-1).indices
        found = torch.empty(len(logits), dtype=torch.long)
        find = self._loops.highest(logits.dtype is torch.bfloat16)
        find(logits.data_ptr(), found.data_ptr(), (*logits.shape, logits.stride(0)))
        return found

    def _sweep_out(self) -> None:
        """Free the slots of those who are done."""
        for slot in range(len(self._live) - 1, -1, -1):
            if self._live[slot].done:
                self._slots.leave(slot)
                last = self._live.pop()
                if slot < len(self._live):
                    self._live[slot] = last


def _says_likeliest(row: Row) -> bool:
    return row.request.temperature == 0 and row.request.logprobs is None


class SlotEngine(OwnEngine):
    """One version: an adapter on a base that it shares.

    Args:
        shared: The base.
        adapter: What to put on it; nothing for the base alone.
        release: Called when the version is unloaded.
    """

    def __init__(
        self, shared: SlotsBase, adapter: Adapter, release: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(shared.tokenizer, shared.encoding)
        self._shared, self._release = shared, release
        self._number = shared.add(adapter)
        self._closed = False
        positions = int(getattr(shared.base.config.get_text_config(), "max_position_embeddings", 4096))
        self.context_length = positions - adapter.virtual_tokens
        self.vocabulary = int(shared.base.config.get_text_config().vocab_size)

    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request; see `Engine.submit`."""
        if self._closed:
            raise EngineClosedError("this model version is being unloaded")
        return self._shared.submit(request, self._number)

    def close(self) -> None:
        """Fail what is waiting and what runs of this version; the base stays for others."""
        if not self._closed:
            self._closed = True
            self._shared.remove(self._number)
            self._release()
