"""Static batching over transformers' `generate`: slower than slots, and right for every PEFT kind.

One worker thread takes all waiting requests as one left-padded batch and answers them together; each row
has its own sampling, its own stop and its own end. What arrives meanwhile waits for the next batch.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from regraft.evals.generation import base_of, make_contiguous, padded_inputs, soft_prompt
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    GenerationRequest,
    QueueFullError,
    Stream,
)
from serving.engines.rows import OwnEngine, Row, draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _TakeTokens(StoppingCriteria):  # type: ignore[misc]
    """Hands each row its new token and says which rows are done.

    A stopping criterion sees every step's tokens and decides per row; a streamer only sees them.
    """

    def __init__(self, rows: Sequence[Row], eos: frozenset[int]) -> None:
        self._rows = rows
        self._eos = eos
        #: Of the step, of shape (rows, vocabulary); kept only if somebody asks for log-probabilities.
        self._logits: torch.Tensor | None = None

    def keep(self, model: Any, args: Any, output: Any) -> None:
        """A hook on the model: keep what it said itself, before `generate` processes it."""
        self._logits = output.logits[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for index, (row, token) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.done:
                row.take(token, self._eos, None if self._logits is None else self._logits[index])
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)


class _SampleRows(LogitsProcessor):  # type: ignore[misc]
    """Draws the tokens of sampled rows and masks all others, so that `generate` itself stays greedy."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for index, row in enumerate(self._rows):
            if row.done or row.request.temperature == 0:
                continue
            drawn = draw(row, scores[index])
            scores[index] = -torch.inf
            scores[index, drawn] = 0
        return scores


class StaticEngine(OwnEngine):
    """Answers with one loaded transformers or PEFT model.

    Args:
        model: As `Method.load` gives it; it must not be used elsewhere meanwhile.
        tokenizer: The tokenizer of its base.
        limits: How much to take on.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, limits: EngineLimits | None = None
    ) -> None:
        self._limits = limits or EngineLimits()
        super().__init__(tokenizer, threading.Lock())
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._closed = False

        self._base = base_of(model)
        self._model: Any = model
        self._soft_prompt = soft_prompt(model)
        self._config = _greedy(self._base.generation_config, tokenizer)
        eos = self._config.eos_token_id
        self._eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        virtual = self._soft_prompt.virtual_tokens if self._soft_prompt else 0
        self.context_length = int(getattr(self._base.config, "max_position_embeddings", 4096)) - virtual
        self.vocabulary = int(self._base.config.get_text_config().vocab_size)
        self._hook = self._base.get_output_embeddings().register_forward_pre_hook(make_contiguous)
        self._worker = threading.Thread(target=self._work, name="regraft-engine", daemon=True)
        self._worker.start()

    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request; see `Engine.submit`."""
        row = Row(request, self._tokenizer, self.cancel)
        with self._changed:
            if self._closed:
                raise EngineClosedError("this model version is being unloaded")
            busy = len(self._waiting) + sum(not r.done for r in self._running)
            if busy >= self._limits.max_batch + self._limits.max_queued:
                raise QueueFullError(f"{busy} requests are being answered or wait; try again later")
            self._waiting.append(row)
            self._changed.notify()
        return row

    def cancel(self, row: Row) -> None:
        """Stop working for a row: at once if it waits, at the next token if it runs."""
        with self._changed:
            row.done = True
            if row in self._waiting:
                self._waiting.remove(row)

    def close(self) -> None:
        """Fail what waits and what runs, end the worker, let go of the model."""
        with self._changed:
            self._closed = True
            rows = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify()
        for row in rows:
            row.fail(EngineClosedError("this model version was unloaded"))
        self._worker.join()
        self._hook.remove()
        self._model = self._base = self._soft_prompt = None

    def _work(self) -> None:
        torch.set_num_threads(self._limits.threads)  # OpenMP keeps this per calling thread
        while batch := self._next_batch():
            try:
                self._answer(batch)
            except Exception as error:  # whatever it was, only this batch has failed
                for row in batch:
                    row.fail(EngineError(f"generation failed: {type(error).__name__}: {error}"))
            finally:
                with self._changed:
                    self._running = []

    def _next_batch(self) -> list[Row]:
        """Wait for requests and take those that go together; empty when closed."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                # Requests of one burst arrive one by one: a moment's patience saves the others a whole batch.
                self._changed.wait_for(self._full, timeout=self._limits.gather_seconds)
                if self._waiting and not self._closed:
                    self._running = list(self._waiting)[: self._limits.max_batch]
                    for row in self._running:
                        self._waiting.remove(row)
                        row.begin()
                    return self._running
        return []

    def _full(self) -> bool:
        return len(self._waiting) >= self._limits.max_batch or self._closed

    @torch.inference_mode()
    def _answer(self, rows: list[Row]) -> None:
        config = copy.deepcopy(self._config)
        config.max_new_tokens = max(row.request.max_new_tokens for row in rows)
        prompts = [row.request.prompt_ids for row in rows]
        generate, inputs = padded_inputs(self._model, prompts, self._config.pad_token_id, self._soft_prompt)
        tokens = _TakeTokens(rows, self._eos)
        told = any(row.request.logprobs is not None for row in rows)
        kept = self._base.register_forward_hook(tokens.keep) if told else None
        try:
            generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_SampleRows(rows)]),
                stopping_criteria=StoppingCriteriaList([tokens]),
            )
        finally:
            if kept is not None:
                kept.remove()
        for row in rows:  # the model's own configuration may end a batch too, for instance by max_time
            if not row.done:
                row.finish("length")


def _greedy(config: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model's generation settings without sampling: that is done row by row."""
    config = copy.deepcopy(config)
    config.do_sample = False
    config.num_beams = 1
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"):
        setattr(config, name, None)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return config
