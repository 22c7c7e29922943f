"""How a model computes while it trains: its precision, its activations again, its layers compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def autocast(model: nn.Module, device: str) -> Any:
    """bf16 autocast for a model that holds fp32 weights in its body, else nothing.

    A bf16 base with fp32 adapters needs none: PEFT casts at the adapter.
    """
    import torch

    weights = max(model.parameters(), key=lambda p: p.numel())
    if weights.dtype is torch.float32 and weights.requires_grad:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def checkpointing(base: Any, wanted: bool) -> Iterator[None]:
    """Compute the base's activations again in the backward pass while open.

    transformers makes the embeddings' outputs need a gradient, as a checkpoint whose inputs need none may
    train nothing below it; that is taken back with the rest.
    """
    if not wanted:
        yield
        return
    base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()


@contextmanager
def compiled(base: Any, wanted: bool) -> Iterator[None]:
    """Compile the base's decoder layers while open, one program for all of them, whatever the lengths."""
    if not wanted:
        yield
        return
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
