"""Layers that are written as Llama's, decoded by compiled loops one after another without torch in between.

In a step of 32 rows of SmolLM2-135M torch's small operations, and Python between them, took a fifth of the
time. A layer is replaced where its parts are (`serving.engines.plain`), its code is Llama's, and its numbers
are the module's on a trial; only for rows of one token.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import nn

from serving.engines.compiled import alike, kernels
from serving.engines.looped import Looped
from serving.engines.mixed import Mix
from serving.engines.packed import PackedLinear, Product
from serving.engines.plain import LAYER_PARTS, TRIAL_ROWS, Forgets, is_llamas, norms_of, random

_log = logging.getLogger(__name__)


class Room:
    """Where the layers of a model write what only they read, of bf16.

    Args:
        rows: At most.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: dict[str, torch.Tensor] = {}

    def of(self, name: str, width: int) -> torch.Tensor:
        """Room for (rows, width); layers of one width share it."""
        key = f"{name}-{width}"
        if key not in self._held:
            self._held[key] = torch.zeros(self.rows, width, dtype=torch.bfloat16)
        return self._held[key]


class _Lines:
    """Linear layers that read the same, and their adapters' names.

    Args:
        names: Of the layers in the base.
        product: Their weights.
        out: Where their outputs go, of shape (rows, outputs of all).
    """

    def __init__(self, names: list[str], product: Product, out: torch.Tensor) -> None:
        self.product, self.out = product, out
        self.outputs, self._at = sum(product.sizes), out.data_ptr()
        starts = [sum(product.sizes[:n]) for n in range(len(names))]
        self._parts = list(zip(names, product.sizes, (self._at + 2 * s for s in starts), strict=True))

    def write(self, x: int, rows: int, inputs: int, mix: Looped | None) -> None:
        """The outputs for rows at an address, without gaps, with what adapters add."""
        read = x if mix is None or len(self._parts) > 1 else mix.scaled(self._parts[0][0], x, rows, inputs)
        self.product.write(read, self._at, (rows, inputs, self.outputs, inputs))
        if mix is not None:
            for name, size, at in self._parts:
                mix.adapt(name, x, at, (rows, inputs, size, inputs, self.outputs))

    def changed(self, mix: Looped | None) -> bool:
        """Whether adapters change what comes of these."""
        return mix is not None and any(mix.knows(name) for name, _, _ in self._parts)

    def understood(self, mix: Looped) -> bool:
        """Whether adapters change no inputs that several layers read."""
        return len(self._parts) == 1 or not any(mix.scales(name) for name, _, _ in self._parts)


class FusedLayer:
    """A layer of the base.

    Args:
        name: Of the layer in the base.
        module: The layer; its parts are plain.
        mix: Says what the rows are.
        room: Shared by all layers.

    Raises:
        ValueError: If its parts are not laid out as the loops read them.
    """

    def __init__(self, name: str, module: Any, mix: Mix, room: Room) -> None:
        from serving.engines import kernels as loops
        from serving.engines import rowwise

        attention, mlp = module.self_attn, module.mlp
        self._plain, self._mix = module.forward, mix
        self._index, self.width = attention.layer_idx, attention.head_dim
        self._scale = float(attention.scaling)
        parts = [f"{name}.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
        reads, asks = _one(attention, "q_proj", "k_proj", "v_proj"), _one(mlp, "gate_proj", "up_proj")
        gives, ends = _one(attention, "o_proj"), _one(mlp, "down_proj")
        hidden = sum(gives.sizes)
        if sum(ends.sizes) != hidden:
            raise ValueError("the two halves of the layer differ in width")
        self._qkv = _Lines(parts, reads, room.of("qkv", sum(reads.sizes)))
        self._o = _Lines([f"{name}.self_attn.o_proj"], gives, room.of("added", hidden))
        names = [f"{name}.mlp.{part}" for part in ("gate_proj", "up_proj")]
        self._gate_up = _Lines(names, asks, room.of("gated", sum(asks.sizes)))
        self._down = _Lines([f"{name}.mlp.down_proj"], ends, room.of("added", hidden))
        self._lines = (self._qkv, self._o, self._gate_up, self._down)
        self.most = min(room.rows, *(line.product.most for line in self._lines))
        if not self.most:
            raise ValueError("there is no loop for its linear layers")
        self.hidden, self._inner = hidden, asks.sizes[0]
        q, k, v = reads.sizes
        self._heads, self._own_heads = q // self.width, k // self.width
        self._at = {n: room.of(n, w) for n, w in (("normed", hidden), ("seen", q), ("opened", self._inner))}
        self._norm, self._gate, self._turn = rowwise.norm(True), rowwise.gated(True), rowwise.turned(True)
        self._add = rowwise.added()
        self._attend = loops.attention(self.width, v // k * self.width, q // k, True)
        self._norms = norms_of(module)
        out = self._qkv.out
        self._keys, self._values = (
            out[:, start : start + k].view(-1, 1, self._own_heads, self.width).transpose(1, 2)
            for start in (q, q + k)
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """The layer's output, of shape (rows, tokens, width)."""
        x, mix = hidden_states, self._mix
        looped = mix.looped if mix.changed else None
        if (
            x.shape[1] != 1
            or len(x) > self.most
            or x.dtype is not torch.bfloat16
            or not x.is_contiguous()
            or position_embeddings is None
            or past_key_values is None
            or not _seen_alike(attention_mask, len(x))
            or (mix.changed and (looped is None or not all(line.understood(looped) for line in self._lines)))
            or torch.get_num_threads() != 1
        ):
            return self._plain(
                hidden_states=x, attention_mask=attention_mask, past_key_values=past_key_values,
                position_embeddings=position_embeddings, **more,
            )  # fmt: skip
        return self.decode(x, attention_mask, past_key_values, position_embeddings, looped)

    def decode(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Any, turns: Any, looped: Looped | None = None
    ) -> torch.Tensor:
        """The output for rows of one token each, of shape (rows, 1, width), by the loops."""
        out = torch.empty_like(x)
        self._attention(x, out, mask, cache, turns, looped)
        rows, hidden, normed = len(x), self.hidden, self._at["normed"].data_ptr()
        to, opened = out.data_ptr(), self._at["opened"].data_ptr()
        weights, epsilon = self._norms[1]
        self._norm(to, weights.data_ptr(), normed, (rows, hidden), epsilon)
        self._gate_up.write(normed, rows, hidden, looped)
        both, step = self._gate_up.out.data_ptr(), self._gate_up.outputs
        self._gate(both, both + 2 * self._inner, opened, (rows, self._inner, step, step))
        self._onto(self._down, opened, to, to, (rows, self._inner), looped)
        return out

    def _attention(
        self, x: torch.Tensor, out: torch.Tensor, mask: torch.Tensor | None, cache: Any, turns: Any, mix: Any
    ) -> None:
        rows, width, normed = len(x), self.width, self._at["normed"].data_ptr()
        weights, epsilon = self._norms[0]
        self._norm(x.data_ptr(), weights.data_ptr(), normed, (rows, self.hidden), epsilon)
        self._qkv.write(normed, rows, self.hidden, mix)
        at, step, (cosines, sines) = self._qkv.out.data_ptr(), self._qkv.outputs, turns
        by_row = (0 if len(cosines) == 1 else cosines.stride(0), 0 if len(sines) == 1 else sines.stride(0))
        # Queries and keys lie side by side.
        sizes = (rows, self._heads + self._own_heads, width, step, *by_row)
        self._turn(at, cosines.data_ptr(), sines.data_ptr(), sizes)
        keys, values = cache.update(self._keys[:rows], self._values[:rows], self._index)
        columns = keys.shape[2]
        if mask is None:
            mask = torch.ones(columns, dtype=torch.bool).expand(rows, 1, 1, columns)
        if mask.shape[3] != columns:
            raise ValueError(f"a mask of {mask.shape[3]} columns for keys of {columns}")
        seen = self._at["seen"].data_ptr()
        self._attend(
            at, keys.data_ptr(), values.data_ptr(), seen, mask.data_ptr(),
            (rows, self._own_heads, columns),
            (step, width, *keys.stride()[:3], *values.stride()[:3], mask.stride(0)),
            self._scale,
        )  # fmt: skip
        self._onto(self._o, seen, x.data_ptr(), out.data_ptr(), (rows, self._heads * width), mix)

    def _onto(
        self, line: _Lines, x: int, before: int, out: int, sizes: tuple[int, int], mix: Looped | None
    ) -> None:
        """Add a linear layer's output to what was before."""
        rows, inputs = sizes
        if line.changed(mix):
            line.write(x, rows, inputs, mix)
            self._add(before, line.out.data_ptr(), out, rows * self.hidden)
        else:
            line.product.write(x, out, (rows, inputs, self.hidden, inputs), before)


def _one(parent: Any, *names: str) -> Product:
    """The product of layers, all of which are its parts in this order."""
    layers = [getattr(parent, name) for name in names]
    if not all(type(layer) is PackedLinear and layer.part == n for n, layer in enumerate(layers)):
        raise ValueError("its linear layers are not packed together")
    product: Product = layers[0].product
    if any(layer.product is not product for layer in layers) or len(product.sizes) != len(names):
        raise ValueError("its linear layers are not packed together")
    return product


def _seen_alike(mask: torch.Tensor | None, rows: int) -> bool:
    """Whether the loop can read it: one of each row, for all heads the same."""
    return mask is None or (
        mask.dtype is torch.bool and tuple(mask.shape[:3]) == (rows, 1, 1) and mask.stride(3) == 1
    )


@torch.inference_mode()
def fuse(base: nn.Module, mix: Mix, rows: int) -> int:
    """Replace the layers of a model that can be; after its parts, and before it has adapters.

    Args:
        base: The transformers model.
        mix: Of this model.
        rows: Of a step, at most.

    Returns:
        How many layers were.
    """
    if kernels(base) is None:
        return 0
    room, count = Room(max(rows, TRIAL_ROWS)), 0
    for name, module in list(base.named_modules()):
        kind: Any = type(module)
        if module._modules.keys() != LAYER_PARTS or not is_llamas(kind, "LlamaDecoderLayer"):
            continue
        if not all(isinstance(getattr(module, part).forward, partial) for part in LAYER_PARTS):
            continue  # a part computes something else
        try:
            fused = FusedLayer(name, module, mix, room)
            same = all(_is_right(module, fused, spread) for spread in (3.0, 0.1))
        except (ValueError, AttributeError) as error:  # it only bears the names
            _log.debug("%s stays as it is: %s", name, error)
            continue
        if same:
            module.forward, count = fused, count + 1
    return count


def _is_right(module: Any, fused: FusedLayer, spread: float) -> bool:
    """Whether a layer adds to its input what the module does."""
    x = random(fused.hidden, torch.bfloat16, spread)
    angles = random(fused.width, torch.float32)
    turns = (angles.cos().bfloat16(), angles.sin().bfloat16())
    given = {"hidden_states": x, "past_key_values": Forgets(), "position_embeddings": turns}
    return alike(module.forward(**given) - x, fused.decode(x, None, Forgets(), turns) - x)
