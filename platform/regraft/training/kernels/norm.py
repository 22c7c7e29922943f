"""RMS norm with frozen weights whose backward pass keeps its input and one number a row.

transformers' own is eight operations, each with its share in the backward pass. Time and error:
`benchmarks/training_kernels.py`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def fused_norms(base: Any) -> Iterator[None]:
    """While open, the model's RMS norms with frozen weights run fused.

    Models have norms of like names that compute something else, as Gemma's does: a class is taken only if one
    of its modules gives on a sample what the function here gives.
    """
    function = _function()
    plain: dict[type, bool] = {}
    changed = []
    for module in base.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            continue
        if hasattr(module.weight, "full_tensor"):  # sharded over workers: values in parts
            continue
        if kind not in plain:
            plain[kind] = _agrees(module, function)
        if plain[kind] and not module.weight.requires_grad and "forward" not in vars(module):
            changed.append(module)

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = function(hidden_states, self.weight, self.variance_epsilon)
        return found

    for module in changed:
        module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _agrees(module: Any, function: Any) -> bool:
    import torch

    weight = module.weight
    sample = torch.linspace(-3, 2, 4 * weight.numel(), device=weight.device, dtype=torch.float32)
    sample = sample.view(4, -1).to(weight.dtype)
    with torch.no_grad():
        right, found = module(sample), function(sample, weight, module.variance_epsilon)
    return found.dtype is right.dtype and torch.allclose(found.float(), right.float(), rtol=2e-2, atol=1e-3)


@cache
def _function() -> Any:
    import torch

    class Norm(torch.autograd.Function):
        """`weight * (x / sqrt(mean(x^2) + epsilon))`, the division in fp32, over the last dimension."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> Any:
            wide = x.float()
            if wide is x:  # already fp32: what follows works in place
                wide = x.clone()
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
            ctx.save_for_backward(x, weight, inverse)
            return wide.mul_(inverse).to(x.dtype) * weight

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, weight, inverse = ctx.saved_tensors
            wide = x.float()
            scaled = (gradient * weight).float()
            along = (scaled * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
            return (scaled * inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None

    return Norm.apply
