"""Layers that are written as Llama's, by kernels of their own between the matrix products of a GPU.

Of a recorded step (`regraft.evals.graphs`) of 32 rows of Llama's 1B shape the products took 1.3 ms, and
transformers' other operations 3.4 (H100, torch 2.11). Prompts go this way, and of steps the recorded ones, so
that the first of them is held against a plain one. A layer is replaced where its code is Llama's and its
numbers are the module's on a trial.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from serving.engines.compiled import SWITCH
from serving.engines.device_tables import block_of
from serving.engines.mixed import Mix
from serving.engines.plain import LAYER_PARTS, is_llamas, norms_of

_log = logging.getLogger(__name__)

#: How far a layer may be from the module on a trial, as a share of its largest number: all its parts round.
_APART = 0.05
#: Of a trial: rows, columns, the column that is written, and the tokens of prompts.
_ROWS, _COLUMNS, _END, _TOKENS = 3, 64, 40, 5


class _Lines:
    """Linear layers that read the same, as one product.

    Args:
        parent: The module whose parts they are.
        names: Their names in the base, in full.
    """

    def __init__(self, parent: Any, names: Sequence[str]) -> None:
        layers = [getattr(parent, name.rpartition(".")[2]) for name in names]
        if not all(type(layer) is nn.Linear for layer in layers):
            raise ValueError("its linear layers are quantised, or none")
        if len({layer.bias is None for layer in layers}) > 1:
            raise ValueError("some of its linear layers have a bias")
        self.names, self.sizes = tuple(names), tuple(layer.out_features for layer in layers)
        if not block_of(self.sizes):
            raise ValueError("its linear layers have odd widths")
        self._layers = layers
        self.weight, self.bias = layers[0].weight.detach(), layers[0].bias

    def lay_together(self) -> None:
        """Hold the weights as one; the layers look at their parts of it."""
        if len(self._layers) > 1:
            self.weight = torch.cat([layer.weight.detach() for layer in self._layers])
            for layer, part in zip(self._layers, self.weight.split(self.sizes), strict=True):
                layer.weight.data = part
            if self.bias is not None:
                self.bias = torch.cat([layer.bias.detach() for layer in self._layers])
        self._layers = []

    def output(
        self, x: torch.Tensor, mix: Mix, residual: torch.Tensor | None = None, tokens: int = 1
    ) -> torch.Tensor:
        """What they make, side by side, with what adapters add, and the residual.

        Args:
            x: Of (rows * tokens, inputs), without gaps.
            mix: Says what the rows are.
            residual: What is added at the end, of (rows * tokens, outputs).
            tokens: Of each row.
        """
        from serving.engines import device_adapters

        own = None
        if mix.changed and mix.tables is not None:
            own = mix.tables.group(self.names, self.sizes)
        if own is None:
            if residual is None or self.bias is not None:
                y = nn.functional.linear(x, self.weight, self.bias)
                return y if residual is None else y.add_(residual)
            return torch.addmm(residual, x, self.weight.t())
        by_row, before = (None if t is None else t.view(-1, tokens, t.shape[1]) for t in (x, residual))
        assert by_row is not None
        product = partial(nn.functional.linear, weight=self.weight, bias=self.bias)
        return device_adapters.through(by_row, product, mix.rows, own, before).view(len(x), -1)

    def understood(self, mix: Mix) -> bool:
        """Whether adapters change no inputs that several layers read."""
        if len(self.names) == 1 or not mix.changed or mix.tables is None:
            return True
        known = (mix.tables.layers.get(name) for name in self.names)
        return all(own is None or own.in_scale is None for own in known)


class DeviceLayer:
    """A layer of the base.

    Args:
        name: Of the layer in the base.
        module: The layer.
        mix: Says what the rows are.

    Raises:
        ValueError: If its parts are not what the kernels know.
    """

    def __init__(self, name: str, module: Any, mix: Mix) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.plain, self._mix, self._attention = module.forward, mix, attention
        self._index, self._scale = attention.layer_idx, float(attention.scaling)
        if type(mlp.act_fn).__name__ not in {"SiLU", "SiLUActivation"}:
            raise ValueError("its gate is no SiLU")
        self._qkv = _Lines(attention, [f"{name}.self_attn.{part}_proj" for part in "qkv"])
        self._o = _Lines(attention, [f"{name}.self_attn.o_proj"])
        self._gate_up = _Lines(mlp, [f"{name}.mlp.{part}_proj" for part in ("gate", "up")])
        self._down = _Lines(mlp, [f"{name}.mlp.down_proj"])
        self.width = attention.head_dim
        _, keys, values = self._qkv.sizes
        if keys != values or self.width % 2:
            raise ValueError("its keys and values differ in width")
        self.hidden, self.heads = sum(self._o.sizes), keys // self.width
        self._norms = norms_of(module)

    def lay_together(self) -> None:
        """Hold the weights as the products read them."""
        for lines in (self._qkv, self._gate_up, self._o, self._down):
            lines.lay_together()
            for index, name in enumerate(lines.names):
                self._mix.together[name] = (lines.names, lines.sizes, index)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **more: Any,
    ) -> Any:
        """The layer's output, of shape (rows, tokens, width)."""
        x, mask, cache, turns = hidden_states, attention_mask, past_key_values, position_embeddings
        mix, slots, readable = self._mix, None, cache is not None and turns is not None
        if readable and self._index < len(cache.layers):
            slots = getattr(cache.layers[self._index], "slots", None)
        if readable and x.is_contiguous() and (mix.by_kernels or not mix.changed) and self._understood(mix):
            assert turns is not None
            if x.shape[1] > 1 and slots is None:
                return self.read(x, mask, cache, turns, **more)
            fixed = None if slots is None else slots.fixed
            if (
                fixed is not None
                and mask is not None
                and mask.is_floating_point()
                and tuple(mask.shape) == (len(x), 1, 1, fixed.columns)
            ):
                keys, values = cache.layers[self._index].buffers
                return self.decode(x, mask[:, 0, 0], (keys, values), fixed.end, turns)
        return self.plain(
            hidden_states=x, attention_mask=mask, past_key_values=cache, position_embeddings=turns, **more
        )

    def _understood(self, mix: Mix) -> bool:
        return self._qkv.understood(mix) and self._gate_up.understood(mix)

    def read(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Any, turns: Any, **more: Any
    ) -> torch.Tensor:
        """The output for rows of many tokens, (rows, tokens, width); attention is transformers'."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from serving.engines import device_kernels as kernels

        (rows, tokens, hidden), mix = x.shape, self._mix
        before = x.view(-1, hidden)
        (first, first_epsilon), (second, second_epsilon) = self._norms
        qkv = self._qkv.output(kernels.norm(before, first, first_epsilon), mix, None, tokens)
        cosines, sines = (t.expand(rows, tokens, self.width).reshape(-1, self.width) for t in turns)
        kernels.turn_prompts(qkv, (cosines, sines), self.heads)
        q, k, v = (
            part.view(rows, tokens, -1, self.width).transpose(1, 2)
            for part in torch.split(qkv, list(self._qkv.sizes), dim=1)
        )
        keys, values = cache.update(k, v, self._index)
        seen, _ = sdpa_attention_forward(self._attention, q, keys, values, mask, scaling=self._scale, **more)
        between = self._o.output(seen.reshape(rows * tokens, -1), mix, before, tokens)
        both = self._gate_up.output(kernels.norm(between, second, second_epsilon), mix, None, tokens)
        return self._down.output(kernels.gate(both), mix, between, tokens).view_as(x)

    def decode(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        end: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The output for rows of one token each, (rows, 1, width); its keys and values go into the cache."""
        from serving.engines import device_kernels as kernels

        before, mix = x[:, 0], self._mix
        (first, first_epsilon), (second, second_epsilon) = self._norms
        qkv = self._qkv.output(kernels.norm(before, first, first_epsilon), mix)
        kernels.turn(qkv, turns, cache, end)
        seen = kernels.attend(qkv, cache, mask, self._scale)
        between = self._o.output(seen, mix, before)
        both = self._gate_up.output(kernels.norm(between, second, second_epsilon), mix)
        return self._down.output(kernels.gate(both), mix, between)[:, None]


def usable(base: Any) -> bool:
    """Whether kernels can be had for this model: half precision, on one GPU, with Triton, not turned off."""
    if os.environ.get(SWITCH, "1") == "0" or base.dtype not in {torch.bfloat16, torch.float16}:
        return False
    on_one = base.device.type == "cuda" and len({weights.device for weights in base.parameters()}) == 1
    return on_one and find_spec("triton") is not None


@torch.no_grad()
def fuse_on_device(base: nn.Module, mix: Mix) -> int:
    """Have kernels take rows through adapters, and replace the layers that can be, before there are adapters.

    Args:
        base: The transformers model.
        mix: Of this model.

    Returns:
        How many layers were.
    """
    if not usable(base):
        return 0
    try:
        _try_kernels(base)
    except Exception as error:  # Triton needs a C compiler, and not every machine has one
        _log.warning("decodes without kernels of its own: %s: %s", type(error).__name__, _first_line(error))
        return 0
    mix.by_kernels = True
    count = 0
    for name, module in list(base.named_modules()):
        if module._modules.keys() != LAYER_PARTS or not _written_as(module, "LlamaDecoderLayer"):
            continue
        parts = ((module.self_attn, "LlamaAttention"), (module.mlp, "LlamaMLP"))
        if not all(_written_as(part, known) for part, known in parts):
            continue
        try:
            layer = DeviceLayer(name, module, mix)
            layer.lay_together()
            if not _is_right(layer, base):
                continue
        except Exception as error:  # it only bears the names
            _log.info("%s is decoded by torch: %s: %s", name, type(error).__name__, _first_line(error))
            continue
        module.forward, count = layer, count + 1
    return count


def _try_kernels(base: Any) -> None:
    from serving.engines import device_kernels

    some = torch.ones(1, 16, device=base.device, dtype=base.dtype)
    if (device_kernels.norm(some, some[0], 1e-6) - some).abs().max() > 0.01:
        raise RuntimeError("a kernel does not compute what it should")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _written_as(module: Any, known: str) -> bool:
    return is_llamas(type(module), known)  # type: ignore[arg-type,no-any-return,unused-ignore]


def _is_right(layer: DeviceLayer, base: Any) -> bool:
    """Whether a layer adds to its input what the module does, and keeps the same keys and values."""
    device, dtype, width = base.device, base.dtype, layer.width
    source = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source).to(device, dtype)

    for spread in (3.0, 0.1):
        x = random(_ROWS, 1, layer.hidden) * spread
        angles = torch.randn(_ROWS, 1, width // 2, generator=source).repeat(1, 1, 2).to(device)
        turns = (angles.cos().to(dtype), angles.sin().to(dtype))
        mask = torch.full((_ROWS, 1, 1, _COLUMNS), torch.finfo(dtype).min, device=device, dtype=dtype)
        for row in range(_ROWS):
            mask[row, ..., _END - 10 * row : _END + 1] = 0
        end = torch.tensor([_END], device=device)
        kept = [
            (random(_ROWS, layer.heads, _COLUMNS, width), random(_ROWS, layer.heads, _COLUMNS, width))
        ] * 2
        kept[1] = (kept[0][0].clone(), kept[0][1].clone())
        cache = SimpleNamespace(update=_Keeps(kept[0], end), layers=[])
        wanted = layer.plain(
            hidden_states=x, attention_mask=mask, past_key_values=cache, position_embeddings=turns
        )
        found = layer.decode(x, mask[:, 0, 0], kept[1], end, turns)
        pairs = [(wanted - x, found - x), *zip(*kept, strict=True)]
        x = random(_ROWS, _TOKENS, layer.hidden) * spread
        turns = (turns[0].expand(-1, _TOKENS, -1), turns[1].expand(-1, _TOKENS, -1))
        seen = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=device).tril()[None, None]
        given = {"past_key_values": SimpleNamespace(update=_forgets, layers=[]), "position_embeddings": turns}
        wanted = layer.plain(hidden_states=x, attention_mask=seen, **given)
        found = layer.read(x, seen, given["past_key_values"], turns)
        pairs.append((wanted - x, found - x))
        if not all((one - other).abs().max() <= _APART * one.abs().max() for one, other in pairs):
            return False
    return True


def _forgets(keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return keys, values


class _Keeps:
    """The keys and values of a trial."""

    def __init__(self, kept: tuple[torch.Tensor, torch.Tensor], end: torch.Tensor) -> None:
        self._kept, self._end = kept, end

    def __call__(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept.index_copy_(2, self._end, new)
        return self._kept
