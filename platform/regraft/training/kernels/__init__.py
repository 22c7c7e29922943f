"""Faster forms of what a transformer computes in training. They know tensors and transformers, nothing else.

Each covers the case it is fast in and leaves every other to the library's own, call by call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from regraft.training.kernels.attention import training_attention
from regraft.training.kernels.norm import fused_norms


@contextmanager
def fast_kernels(base: Any, device: str, *, packed: bool = False) -> Iterator[None]:
    """While open, a transformers model trains with the kernels of this package.

    Args:
        base: A transformers model, alone or inside a PEFT model.
        device: Where it is. Elsewhere than on a CPU only attention over rows of several examples changes: the
            libraries' own kernels are fast there.
        packed: Whether rows hold several examples.
    """
    on_cpu = device == "cpu"
    if not (on_cpu or packed):
        yield
        return
    with training_attention(base, packed=packed), fused_norms(base) if on_cpu else nullcontext():
        yield


__all__ = ["fast_kernels"]
