"""Keys and values of rows that are decoded together, which join and leave between steps.

They lie in slots, one a row, of which those in use come first, so that a step works on views. All slots end
in the same column: a row that joins is put so that it ends there, and what stands before its beginning is
masked, which is what transformers' models understand. One that leaves gives its slot to the last. Evaluation
and serving decode by this.

Imports torch and transformers when imported: import it where it is used.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from regraft.evals.graphs import COLUMNS, Fixed, Graphs, PerRow, wanted

#: Columns that the buffers of keys and values grow by; growing copies them.
ROOM = 64

#: Attention over lengths that change, on a GPU: all but cuDNN's, which is planned anew for each length. A
#: plain step took 50 ms with it and 13 ms without (1.7B parameters, 32 rows, H100, torch 2.11).
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: The name under which transformers knows serving's own attention (`serving.engines.attention`).
ROWS_ATTENTION = "regraft_rows"

#: What a generation configuration may set without an effect on greedy decoding of a decoder.
_NO_MATTER = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "num_beams", "early_stopping",
    "length_penalty", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "transformers_version", "_from_model_config",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {"use_cache": True, "repetition_penalty": 1.0, "num_return_sequences": 1}


def understands(base: Any) -> bool:
    """Whether a model is decoded here to the same tokens as by `generate`; if not, `generate` has to.

    Not understood are caches other than plain growing keys and values (sliding windows, states of linear
    attention), models that prepare their inputs in a way of their own, and generation configurations that
    ask for more than the most likely token, such as a repetition penalty or suppressed tokens.
    """
    known = {"sdpa", "eager", ROWS_ATTENTION}
    if base.config.is_encoder_decoder or base.config._attn_implementation not in known:
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


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer: the slots in use, from the first column in use.

    `DynamicLayer` copies all of them for each token.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots, self.is_initialized = slots, True
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new column; gives all that the rows may look at."""
        s = self.slots
        if s.fixed is not None:
            rows, columns, end = s.fixed.rows, s.fixed.columns, s.fixed.end
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:rows].index_copy_(2, end, states)
            keys, values = (buffer[:rows, :, :columns] for buffer in self.buffers)
            return keys, values
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: s.used, :, s.end : s.end + 1] = states
        keys, values = (buffer[: s.used, :, s.first : s.end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.slots.end - self.slots.first


class Slots:
    """Rows of a model that `understands` accepts; the caller knows what they are and which token each says.

    Args:
        base: The transformers model.
        count: Slots.
        per_row: What the model's layers read for each row beside its token, if they do.
    """

    def __init__(self, base: Any, count: int, per_row: PerRow | None = None) -> None:
        self._base, self._count = base, count
        #: Slots in use, and the columns in use: from `first` up to and without `end`.
        self.used = self.first = self.end = 0
        self._capacity = 0
        self._begins: list[int] = []
        #: The position of each row's next token.
        self.positions: list[int] = []
        #: After a recorded step the likeliest token of each row, on the device; else None.
        self.likeliest: torch.Tensor | None = None
        #: The inputs of a step of fixed shapes while there is one.
        self.fixed: Fixed | None = None
        self._cache = DynamicCache(config=base.config)
        self._layers = [_Layer(weakref.proxy(self)) for _ in self._cache.layers]
        self._cache.layers = self._layers
        self._mask = torch.zeros(count, 0, dtype=torch.long, device=base.device)
        known = inspect.signature(base.forward).parameters
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._takes_positions = "position_ids" in known
        recorded = self._takes_positions and wanted(base)
        self._graphs = Graphs(base, count, per_row) if recorded else None

    def read(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Let prompts in, behind the rows there are.

        Args:
            inputs: Padded on the left: `attention_mask`; `input_ids` or `inputs_embeds`, of which columns
                before the text's are passed over; and `past_key_values` for what stands before the text,
                which the mask then covers.

        Returns:
            What comes next in each row, as logits of shape (rows, vocabulary).
        """
        inputs, mask = dict(inputs), inputs["attention_mask"]
        cache = inputs.setdefault("past_key_values", DynamicCache(config=self._base.config))
        before = cache.get_seq_length()
        for name in inputs.keys() & {"input_ids", "inputs_embeds"}:
            inputs[name] = inputs[name][:, before - mask.shape[1] :]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        logits = self._next(positions, inputs)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        if before:  # what stands before the text stands before the padding too: move that to the left
            order = mask.argsort(dim=-1, stable=True)
            mask = mask.gather(1, order)
            index = order[:, None, :, None]
            states = [tuple(s.take_along_dim(index, dim=2) for s in pair) for pair in states]
        self._join(states, mask)
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Say a token in every row.

        Args:
            tokens: One a row.

        Returns:
            What comes next in each row, as logits of shape (rows, vocabulary); the next step may overwrite
            them.
        """
        if self.end == self._capacity or self._moving_narrows():
            self._move(0)
        logits = self._graphs.step(self, tokens) if self._graphs else None
        self.likeliest = (
            None if logits is None or self._graphs is None else self._graphs.likeliest[: self.used]
        )
        if logits is None:
            logits = self.step_plain(tokens)
            if self._graphs and self._graphs.failed:
                self._graphs = None
        self.end += 1
        self.positions = [position + 1 for position in self.positions]
        return logits

    def follow(self) -> bool:
        """Say in every row the likeliest token of the last step, if that was recorded and the next one is.

        The device then goes on without waiting for anybody to read what it said; see `likeliest`.
        """
        if self.likeliest is None or self._graphs is None or len(self.likeliest) != self.used:
            return False
        if self.end == self._capacity or self._moving_narrows() or not self._graphs.follow(self):
            return False
        self.end += 1
        self.positions = [position + 1 for position in self.positions]
        return True

    def step_plain(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits of a step, before it counts as done: doing it over changes nothing."""
        device = self._base.device
        return self._next(
            torch.tensor(self.positions, device=device)[:, None],
            {
                "input_ids": torch.tensor(tokens, device=device)[:, None],
                "attention_mask": self._mask[: self.used, self.first : self.end + 1],
                "past_key_values": self._cache,
            },
        )

    def step_fixed(self, fixed: Fixed) -> torch.Tensor:
        """The same for a step of fixed shapes, which waits for nothing on the device: it can be recorded."""
        mask, dtype = self._mask[: fixed.rows, : fixed.columns], self._base.dtype
        columns = torch.arange(fixed.columns, device=mask.device)
        in_use = torch.arange(fixed.rows, device=mask.device)[:, None] < fixed.used
        # A row that may look at nothing has no softmax: all look at the token that they say.
        seen = ((mask > 0) & (columns < fixed.end) & in_use) | (columns == fixed.end)
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        added.masked_fill_(~seen, torch.finfo(dtype).min)
        self.fixed = fixed
        try:
            return self._next(
                fixed.positions[:, None],
                {
                    "input_ids": fixed.tokens[:, None],
                    "attention_mask": added[:, None, None],
                    "past_key_values": self._cache,
                },
            )
        finally:
            self.fixed = None

    def leave(self, slot: int) -> None:
        """Free a slot; the last row takes its place."""
        last = self.used - 1
        if slot != last:
            span = slice(self._begins[last], self.end)
            for layer in self._layers:
                for buffer in layer.buffers:
                    buffer[slot, :, span] = buffer[last, :, span]
            self._mask[slot] = self._mask[last]
            self._begins[slot], self.positions[slot] = self._begins[last], self.positions[last]
        self._begins.pop()
        self.positions.pop()
        self.used = last
        self.first = min(self._begins, default=self.end)

    def _join(self, states: Sequence[tuple[torch.Tensor, ...]], mask: torch.Tensor) -> None:
        if not self._layers[0].buffers:
            for layer, pair in zip(self._layers, states, strict=True):
                layer.buffers = [s.new_zeros(self._count, s.shape[1], 0, s.shape[3]) for s in pair]
        rows, columns = mask.shape
        if not self.used and columns < self._capacity:
            self.first = self.end = columns
        elif not self.used or self.end < columns:
            self._move(columns - (self.end - self.first) if self.used else columns)
        here = slice(self.used, self.used + rows)
        begin = self.end - columns
        for layer, pair in zip(self._layers, states, strict=True):
            for buffer, new in zip(layer.buffers, pair, strict=True):
                buffer[here, :, begin : self.end] = new
        self._mask[here, :begin] = 0
        self._mask[here, begin : self.end] = mask
        self._mask[here, self.end :] = 1
        lengths = mask.sum(-1).tolist()
        self.positions += lengths
        self._begins += [self.end - length for length in lengths]
        self.used += rows
        self.first = min(self._begins)

    def _move(self, before: int) -> None:
        """Move what is in use to the left, behind so many free columns, into larger buffers if need be."""
        kept = self.end - self.first if self.used else 0
        old = slice(self.first, self.first + kept)
        first, end = before, before + kept
        room = COLUMNS if self._graphs else ROOM
        grown = max(self._capacity, -(-(end + 1) // room) * room)
        if grown < end + room // 2:  # not again at once
            grown += room
        if self._graphs and grown > self._capacity:  # which costs all graphs
            grown = max(grown, -(-self._capacity * 5 // (4 * room)) * room)
            self._graphs.drop()
        for layer in self._layers:
            for index, buffer in enumerate(layer.buffers):
                if self._graphs and grown == self._capacity:  # graphs go on reading from where it was
                    buffer[: self.used, :, first:end] = buffer[: self.used, :, old].clone()
                    continue
                # Zeros: what is masked is multiplied by nothing, and nothing times NaN is NaN.
                new = buffer.new_zeros(*buffer.shape[:2], grown, buffer.shape[3])
                new[: self.used, :, first:end] = buffer[: self.used, :, old]
                layer.buffers[index] = new
        mask = self._mask.new_ones(self._count, grown)
        mask[:, :first] = 0
        mask[: self.used, first:end] = self._mask[: self.used, old]
        self._begins = [begin - self.first + first for begin in self._begins]
        self._mask = self._mask.copy_(mask) if grown == self._capacity else mask
        self._capacity, self.first, self.end = grown, first if self.used else end, end

    def _moving_narrows(self) -> bool:
        """Whether steps would go through fewer columns if what is in use were moved to the left."""
        if self._graphs is None or self.end % COLUMNS or self.first < COLUMNS // 4:
            return False
        return (self.end - self.first) // COLUMNS < self.end // COLUMNS

    def _next(self, positions: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if self._takes_positions:
            inputs["position_ids"] = positions
        changing = self._base.device.type == "cuda" and self.fixed is None
        with sdpa_kernel(_ATTENTION) if changing else nullcontext():
            out = self._base(**inputs, **self._more, use_cache=True, return_dict=True)
        return out.logits[:, -1]  # type: ignore[no-any-return]
