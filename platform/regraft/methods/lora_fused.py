"""LoRA's forward and backward in the base's own type, without copies of the layer's input in fp32.

PEFT computes an adapter in the type it is held in. With fp32 adapters on a bf16 base that casts every layer's
input and output, keeps the casts for the backward pass, and multiplies thin matrices at the slow fp32 rate.
Here the held weights stay fp32, and so do their gradients' sums, but the products are taken in the base's
type, as torch's autocast would take them. In training only: evaluation and serving run PEFT's own forward.
"""

from __future__ import annotations

import types
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
    function = _function()
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = types.MethodType(_forward_of(function), module)
    return model


def _forward_of(function: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
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
        result = self.base_layer(x)
        return function(x, result, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])

    return forward


def _function() -> Any:
    import torch

    class AddLoRA(torch.autograd.Function):
        """`result + scale * x @ A.T @ B.T`; A (rank, in), B (out, rank), x (..., in), result (..., out)."""

        @staticmethod
        def forward(ctx: Any, x: Any, result: Any, a: Any, b: Any, scale: float) -> Any:
            flat = x.reshape(-1, x.shape[-1]).to(result.dtype)
            low = flat @ a.to(result.dtype).t()
            rows = result.reshape(-1, result.shape[-1])
            found = torch.addmm(rows, low, b.to(result.dtype).t(), alpha=scale)
            ctx.save_for_backward(x, low, a, b)
            ctx.scale = scale
            return found.view(result.shape)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, low, a, b = ctx.saved_tensors
            rows = gradient.reshape(-1, gradient.shape[-1])
            to_low = (rows @ b.to(rows.dtype)).mul_(ctx.scale)
            to_a = (to_low.t() @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(a.dtype)
            # Thin times wide is the fast order on CPU.
            to_b = (low.t() @ rows).t().to(b.dtype).mul_(ctx.scale)
            to_x = None
            if ctx.needs_input_grad[0]:
                to_x = (to_low @ a.to(rows.dtype)).to(x.dtype).view(x.shape)
            return to_x, gradient, to_a, to_b, None

    return AddLoRA.apply
