"""Faster forms of what a transformer computes in training. They know tensors and transformers, nothing else.

Each covers the case it is fast in and leaves every other to the library's own, call by call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regraft.training.kernels.attention import attention_in_blocks
from regraft.training.kernels.norm import fused_norms


@contextmanager
def fast_kernels(base: Any, device: str) -> Iterator[None]:
    """While open, a transformers model on a CPU trains with the kernels of this package.

    Args:
        base: A transformers model, alone or inside a PEFT model.
        device: Where it is; on others than the CPU nothing changes, the libraries' kernels are fast there.
    """
    if device != "cpu":
        yield
        return
    with attention_in_blocks(base), fused_norms(base):
        yield


__all__ = ["fast_kernels"]
