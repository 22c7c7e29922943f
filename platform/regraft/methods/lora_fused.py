"""LoRA's forward and backward in the base's own type, without copies of the layer's input in fp32.

PEFT computes an adapter in the type it is held in. With fp32 adapters on a bf16 base that casts every layer's
input and output, keeps the casts for the backward pass, and multiplies thin matrices at the slow fp32 rate.
Here the held weights stay fp32, and so do their gradients' sums, but the products are taken in the base's
type, as torch's autocast would take them, and added in place. In training only: evaluation and serving run
PEFT's own forward.
"""

from __future__ import annotations

import types
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


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
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = types.MethodType(_forward, module)
    return model


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    plain = (
        self.training
        and not (args or kwargs or self.merged or self.disable_adapters or self.lora_variant)
        and name in self.lora_A
        and self.lora_B[name].bias is None
        and getattr(self.lora_dropout[name], "p", 0.0) == 0.0
    )
    if not plain:
        # Looked up on the class: a copied module must not run its original's.
        return type(self).forward(self, x, *args, **kwargs)
    base = self.base_layer
    pair = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    if _is_product(base, x):
        return _function()(x, None, base.weight, base.bias, *pair)
    return _function()(x, base(x), None, None, *pair)


def _is_product(base: Any, x: torch.Tensor) -> bool:
    """Whether a layer is no more than a product with frozen weights of the input's type."""
    from torch import nn

    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and base.weight.dtype is x.dtype
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
    )


@cache
def _function() -> Any:
    import torch

    class AddLoRA(torch.autograd.Function):
        """`y + scale * x @ A.T @ B.T`, where y is given or `x @ weight.T + bias` with frozen weights.

        Shapes: A (rank, in), B (out, rank), x (..., in), y (..., out).
        """

        @staticmethod
        def forward(ctx: Any, x: Any, y: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float) -> Any:
            if y is None:
                y = torch.nn.functional.linear(x, weight, bias)
            else:
                ctx.mark_dirty(y)
            narrow_a, narrow_b = a.to(y.dtype), b.to(y.dtype)
            low = x.reshape(-1, x.shape[-1]).to(y.dtype) @ narrow_a.t()
            y.view(-1, y.shape[-1]).addmm_(low, narrow_b.t(), alpha=scale)
            ctx.save_for_backward(x, low, weight, narrow_a, narrow_b)
            ctx.how = scale, a.dtype, b.dtype
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, low, weight, a, b = ctx.saved_tensors
            scale, kind_a, kind_b = ctx.how
            rows = gradient.reshape(-1, gradient.shape[-1])
            to_low = (rows @ b).mul_(scale)
            to_a = (to_low.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(kind_a)
            # Thin times wide is the fast order on CPU.
            to_b = (low.t() @ rows).t().to(kind_b).mul_(scale)
            to_x = None
            if ctx.needs_input_grad[0]:
                to_x = to_low @ a if weight is None else (rows @ weight).addmm_(to_low, a)
                to_x = to_x.to(x.dtype).view(x.shape)
            return to_x, gradient if weight is None else None, None, None, to_a, to_b, None

    return AddLoRA.apply
