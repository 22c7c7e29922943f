"""Greedy decoding in a batch that is kept full: rows leave as they end, waiting prompts take their places.

A step of a small batch costs nearly what a step of a full one does, as its weights are read either way.
transformers' `generate` goes on with all rows until the last one ends; here a row's place, with its keys and
values, goes to the next prompt. This is for models with full attention and no more: `understands` tells.

Imports torch and transformers when imported: import it where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from regraft.watchdog import alive

#: Columns that the buffers of keys and values grow by; growing copies them.
ROOM = 32
#: Places change hands when this share of them is free: letting in a prompt costs nearly a step, however many
#: come together, and giving up places copies what the others hold. An eighth was slower with 8 places (by a
#: third), a half with 32.
CHANGE_AT = 0.25

#: What a generation configuration may set without an effect on greedy decoding of a decoder.
_NO_MATTER = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "num_beams", "early_stopping",
    "length_penalty", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "transformers_version", "_from_model_config",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {"use_cache": True, "repetition_penalty": 1.0, "num_return_sequences": 1}


def understands(base: Any) -> bool:
    """Whether this module decodes a model to the same tokens as `generate`; if not, `generate` has to.

    Not understood are caches other than plain growing keys and values (sliding windows, states of linear
    attention), models that prepare their inputs in a way of their own, and generation configurations that
    ask for more than the most likely token, such as a repetition penalty or suppressed tokens.
    """
    if base.config.is_encoder_decoder or base.config._attn_implementation not in {"sdpa", "eager"}:
        return False
    if type(base).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=base.config).layers):
        return False
    asked = base.generation_config.to_dict().items()
    return not any(
        value not in (None, False) and value != _NEUTRAL.get(name)
        for name, value in asked
        if name not in _NO_MATTER
    )


def decode(
    base: Any,
    lengths: Sequence[int],
    inputs: Callable[[Sequence[int]], dict[str, Any]],
    *,
    ends: frozenset[int],
    max_new_tokens: int,
    places: int,
) -> Iterator[tuple[int, list[int]]]:
    """Decode prompts greedily, the shortest first.

    Args:
        base: A transformers model that `understands` accepts.
        lengths: Tokens of each prompt.
        inputs: Gives the left-padded inputs of some prompts by their numbers: `attention_mask`, `input_ids`
            or `inputs_embeds`, and `past_key_values` for what stands before, which the mask then covers.
        ends: Token ids that end an answer.
        max_new_tokens: Longest answer.
        places: Prompts decoded together at most.

    Yields:
        A prompt's number and its new tokens, without the one that ended them, as soon as it is done.
    """
    waiting = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batch = _Batch(base, min(places, len(waiting)))
    answers: dict[int, list[int]] = {}
    while waiting or answers:
        free = batch.rows.count(None)
        enough = free >= max(1, CHANGE_AT * len(batch.rows))
        if waiting and (enough or free >= len(waiting)):
            some, waiting = waiting[:free], waiting[free:]
            answers |= {prompt: [] for prompt in some}
            new = batch.let_in(some, inputs(some))
        else:
            if enough:
                batch.give_up()
            new = batch.step()
        alive()
        for row, token in new:
            prompt = batch.rows[row]
            if token not in ends:
                answers[prompt].append(token)
            if token in ends or len(answers[prompt]) == max_new_tokens:
                batch.rows[row] = None
                yield prompt, answers.pop(prompt)


class _Window:
    """The columns in use, of buffers of a capacity. All rows end in the same column."""

    def __init__(self) -> None:
        self.first = self.end = self.capacity = 0


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer: a window of a buffer. `DynamicLayer` copies all of them for each token."""

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window, self.is_initialized = window, True
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at, new = self.window, self.window.end + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, at.end : new] = states
        keys, values = (buffer[:, :, at.first : new] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.window.end - self.window.first


class _Batch:
    """Rows that are decoded together. What stands in a free row is computed on, and read by nobody."""

    def __init__(self, base: Any, places: int) -> None:
        self.base, self.device = base, base.device
        #: The prompt in each place; None if it is free.
        self.rows: list[Any] = [None] * places
        #: The first column of each row.
        self.begins = [0] * places
        self.window = _Window()
        self.cache = DynamicCache(config=base.config)
        self.cache.layers = [_Layer(self.window) for _ in self.cache.layers]
        self.tokens = torch.zeros(places, 1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros_like(self.tokens)
        self.mask = torch.zeros(places, 0, dtype=torch.long, device=self.device)
        known = inspect.signature(base.forward).parameters
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._takes_positions = "position_ids" in known

    @property
    def _live(self) -> list[int]:
        return [row for row, prompt in enumerate(self.rows) if prompt is not None]

    def let_in(self, prompts: Sequence[int], inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """Put prompts in free places; gives rows and their first new tokens."""
        mask = inputs["attention_mask"]
        cache = inputs.setdefault("past_key_values", DynamicCache(config=self.base.config))
        before = cache.get_seq_length()
        if before:
            inputs["input_ids"] = inputs["input_ids"][:, before:]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        tokens = self._most_likely(positions, **inputs)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        if before:  # what stands before the text stands before the padding too: move that to the left
            order = mask.argsort(dim=-1, stable=True)
            mask = mask.gather(1, order)
            index = order[:, None, :, None]
            states = [tuple(s.take_along_dim(index, dim=2) for s in pair) for pair in states]
        at, columns = self.window, mask.shape[1]
        if not at.capacity:
            for layer, pair in zip(self.cache.layers, states, strict=True):
                layer.buffers = [s.new_zeros(len(self.rows), s.shape[1], 0, s.shape[3]) for s in pair]
        if columns > at.end:
            self._make_room(before=columns - (at.end - at.first))
        rows = [row for row, prompt in enumerate(self.rows) if prompt is None][: len(prompts)]
        where, begin = torch.tensor(rows, device=self.device), at.end - columns
        for layer, pair in zip(self.cache.layers, states, strict=True):
            for buffer, new in zip(layer.buffers, pair, strict=True):
                buffer[where, :, begin : at.end] = new
        self.mask[where, :begin] = 0
        self.mask[where, begin : at.end] = mask
        lengths = mask.sum(-1, keepdim=True)
        self.tokens[where], self.positions[where] = tokens, lengths
        for row, prompt, length in zip(rows, prompts, lengths[:, 0].tolist(), strict=True):
            self.rows[row], self.begins[row] = prompt, at.end - length
        at.first = min(self.begins[row] for row in self._live)
        return list(zip(rows, tokens[:, 0].tolist(), strict=True))

    def step(self) -> list[tuple[int, int]]:
        """Decode one token of every row; gives the rows that are not free and their tokens."""
        at = self.window
        live = self._live
        at.first = min(self.begins[row] for row in live)
        if at.end == at.capacity:
            self._make_room()
        # Free rows stay at their first position: learned positions have an end.
        taken = torch.tensor([[prompt is not None] for prompt in self.rows], device=self.device)
        self.positions *= taken
        self.tokens = self._most_likely(
            self.positions,
            input_ids=self.tokens,
            attention_mask=self.mask[:, at.first : at.end + 1],
            past_key_values=self.cache,
        )
        at.end += 1
        self.positions += taken
        tokens = self.tokens[:, 0].tolist()
        return [(row, tokens[row]) for row in live]

    def give_up(self) -> None:
        """Go on with the rows that are not free."""
        keep = self._live
        self.rows, self.begins = [self.rows[r] for r in keep], [self.begins[r] for r in keep]
        where = torch.tensor(keep, device=self.device)
        self.tokens, self.positions, self.mask = self.tokens[where], self.positions[where], self.mask[where]
        for layer in self.cache.layers:
            layer.buffers = [buffer[where] for buffer in layer.buffers]

    def _make_room(self, before: int = 0) -> None:
        """Move what the window holds into larger buffers, with columns before and after it."""
        at = self.window
        used = slice(at.first, at.end)
        first, end = before, before + at.end - at.first
        at.capacity = end + ROOM
        for layer in self.cache.layers:
            for index, old in enumerate(layer.buffers):
                # Zeros: what is masked is multiplied by nothing, and nothing times NaN is NaN.
                new = old.new_zeros(*old.shape[:2], at.capacity, old.shape[3])
                new[:, :, first:end] = old[:, :, used]
                layer.buffers[index] = new
        mask = self.mask.new_ones(len(self.mask), at.capacity)
        mask[:, :first], mask[:, first:end] = 0, self.mask[:, used]
        self.begins = [begin - at.first + first for begin in self.begins]
        self.mask, at.first, at.end = mask, first, end

    def _most_likely(self, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The next token of each row, as a column."""
        if self._takes_positions:
            inputs["position_ids"] = positions
        out = self.base(**inputs, **self._more, use_cache=True, return_dict=True)
        return out.logits[:, -1].float().argmax(-1, keepdim=True)  # type: ignore[no-any-return]
