"""LoRA's forward and backward in the base's own type, without copies of the layer's input in fp32.

PEFT computes an adapter in the type it is held in. With fp32 adapters on a bf16 base that casts every layer's
input and output, keeps the casts for the backward pass, and multiplies thin matrices at the slow fp32 rate.
Here the held weights stay fp32, and so do their gradients' sums, but the products are taken in the base's
type, as torch's autocast would take them, and added in place. Layers that read the same input (queries,
keys and values; the two halves of a gated net) are taken together: their thin products are one. In training
only: evaluation and serving run PEFT's own forward.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Names of layers that one module calls on the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: nn.Module) -> nn.Module:
    """Give every plain LoRA layer of a PEFT model the fused forward for training.

    What it does not cover (dropout, DoRA and other variants, several adapters, merged or disabled ones) goes
    PEFT's way, call by call.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    kinds: tuple[type, ...] = (LoraLinear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:  # bitsandbytes is not installed for this platform
        pass
    else:
        kinds = (LoraLinear, Linear4bit)
    for parent in list(model.modules()):
        children = {name: m for name, m in parent.named_children() if isinstance(m, kinds)}
        for names in _TOGETHER:
            if all(name in children for name in names):
                _Together([children.pop(name) for name in names])
        for layer in children.values():
            _Together([layer])
    return model


class _Together:
    """Layers that read the same input: the first one asked computes for all, the others find theirs."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._source: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        for place, layer in enumerate(layers):
            layer.forward = types.MethodType(self._forward_of(place), layer)

    def _forward_of(self, place: int) -> Any:
        def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            mine = layer is self._layers[place]  # a copied module has this forward too, and is another layer
            if mine and x is self._source and place in self._waiting:
                found = self._waiting.pop(place)
                if not self._waiting:
                    self._source = None
                return found
            if args or kwargs or not _is_plain(layer):
                # Looked up on the class: a copied module must not run its original's.
                return type(layer).forward(layer, x, *args, **kwargs)
            if not _is_product(layer.base_layer, x):
                return _apply(x, [layer], layer.base_layer(x))[0]
            others = self._layers if mine and len(self._layers) > 1 else [layer]
            if len(others) > 1 and all(_is_plain(m) and _is_product(m.base_layer, x) for m in others):
                self._source, self._waiting = x, dict(enumerate(_apply(x, others)))
                return self._waiting.pop(place)
            return _apply(x, [layer])[0]

        return forward

    def __deepcopy__(self, memo: Any) -> _Together:
        return self  # the copy's layers are not these: they compute each for itself


def _is_plain(layer: Any) -> bool:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    return bool(
        layer.training
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and name in layer.lora_A
        and layer.lora_B[name].bias is None
        and getattr(layer.lora_dropout[name], "p", 0.0) == 0.0
    )


def _is_product(base: Any, x: torch.Tensor) -> bool:
    """Whether a layer is no more than a product with frozen weights of the input's type."""
    from torch import nn

    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and base.weight.dtype is x.dtype
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
    )


def _apply(x: torch.Tensor, layers: Sequence[Any], given: torch.Tensor | None = None) -> Any:
    """What each layer makes of the input; `given` is what a single one's base made of it."""
    parts: list[Any] = []
    for layer in layers:
        name, base = layer.active_adapters[0], layer.base_layer
        weights = (base.weight, base.bias) if given is None else (None, None)
        parts += [*weights, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]]
    return _function()(x, given, *parts)


@cache
def _function() -> Any:
    import torch

    class AddLoRA(torch.autograd.Function):
        """For each of some layers `y + scale * x @ A.T @ B.T`; y is given or `x @ weight.T + bias`, frozen.

        Shapes: A (rank, in), B (out, rank), x (..., in), y (..., out).
        """

        @staticmethod
        def forward(ctx: Any, x: Any, given: Any, *parts: Any) -> Any:
            layers = [parts[i : i + 5] for i in range(0, len(parts), 5)]
            if given is not None:
                ctx.mark_dirty(given)
            kind = x.dtype if given is None else given.dtype
            downs, ups = ([layer[i].to(kind) for layer in layers] for i in (2, 3))
            down = downs[0] if len(downs) == 1 else torch.cat(downs)
            low = x.reshape(-1, x.shape[-1]).to(kind) @ down.t()
            found = []
            for layer, up, mine in zip(layers, ups, low.split([len(a) for a in downs], 1), strict=True):
                y = torch.nn.functional.linear(x, layer[0], layer[1]) if given is None else given
                y.view(-1, y.shape[-1]).addmm_(mine, up.t(), alpha=layer[4])
                found.append(y)
            ctx.save_for_backward(x, low, down, *ups, *(layer[0] for layer in layers))
            ctx.how = [(len(a), a.dtype, b.dtype, scale) for _, _, a, b, scale in layers]
            return tuple(found)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            x, low, down, *rest = ctx.saved_tensors
            ups, weights = rest[: len(gradients)], rest[len(gradients) :]
            rows = [g.reshape(-1, g.shape[-1]) for g in gradients]
            ranks = [how[0] for how in ctx.how]
            to_lows = [(g @ up).mul_(how[3]) for g, up, how in zip(rows, ups, ctx.how, strict=True)]
            to_low = to_lows[0] if len(to_lows) == 1 else torch.cat(to_lows, 1)
            to_downs = (to_low.t() @ x.reshape(-1, x.shape[-1]).to(down.dtype)).split(ranks)
            # Thin times wide is the fast order on CPU.
            to_ups = [(mine.t() @ g).t() for mine, g in zip(low.split(ranks, 1), rows, strict=True)]
            to_x = None
            if ctx.needs_input_grad[0]:
                if weights[0] is None:
                    to_x = to_low @ down
                else:
                    to_x = rows[0] @ weights[0]
                    for g, weight in zip(rows[1:], weights[1:], strict=True):
                        to_x.addmm_(g, weight)
                    to_x.addmm_(to_low, down)
                to_x = to_x.to(x.dtype).view(x.shape)
            found: list[Any] = [to_x, gradients[0] if weights[0] is None else None]
            for to_a, to_b, (_, kind_a, kind_b, scale) in zip(to_downs, to_ups, ctx.how, strict=True):
                found += [None, None, to_a.to(kind_a), to_b.to(kind_b).mul_(scale), None]
            return tuple(found)

    return AddLoRA.apply
