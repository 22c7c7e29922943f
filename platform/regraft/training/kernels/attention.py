"""Causal attention in blocks for training in bf16 on a CPU.

torch's CPU kernel is slow there in the backward pass on the short rows of chats. Here scores and softmax are
taken in fp32 over blocks of 64 queries and the keys they may see, and taken again in the backward pass, so
that nothing of the size of the scores is kept. Time and error: `benchmarks/training_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "regraft_blocks"
#: Queries of a block: of 64, 128 and 256 the fastest from 56 to 1024 tokens a row.
_QUERIES = 64
#: Bytes of one block's scores; they stay in the processor's second-level cache.
_SCORES = 3_000_000


@contextmanager
def attention_in_blocks(base: Any) -> Iterator[None]:
    """While open, a transformers model that attends by torch's kernel attends in blocks.

    What the blocks do not cover (a mask, a cache, another type than bf16, dropout) goes to torch's kernel,
    call by call.
    """
    before = base.config._attn_implementation
    if before != "sdpa":
        yield
        return
    _register()
    base.config._attn_implementation = NAME
    try:
        yield
    finally:
        base.config._attn_implementation = before


@cache
def _register() -> None:
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = _function()

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):  # as torch's kernel does
            narrow = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if (
            attention_mask is not None
            or not causal
            or dropout
            or query.dtype is not torch.bfloat16
            or query.shape[2] != key.shape[2]
            or query.shape[1] % key.shape[1]
        ):
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        found = attend(query, key, value, scaling or query.shape[-1] ** -0.5)
        return found.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def _blocks(rows: int, heads: int, length: int) -> Iterator[tuple[slice, int, int]]:
    """Which rows, from which query to which."""
    together = max(1, _SCORES // (heads * min(length, _QUERIES) * length * 4))
    for row in range(0, rows, together):
        for start in range(0, length, _QUERIES):
            yield slice(row, row + together), start, min(start + _QUERIES, length)


@cache
def _function() -> Any:
    import torch

    def weights(q: torch.Tensor, k: torch.Tensor, scale: float, heads_per_key: int) -> torch.Tensor:
        """Of the last queries over all keys given; q is (n, heads_per_key * queries, d), k (n, keys, d)."""
        queries, keys = q.shape[1] // heads_per_key, k.shape[1]
        unseen = torch.full((queries, keys), float("-inf")).triu(1 + keys - queries).repeat(heads_per_key, 1)
        scores = torch.baddbmm(unseen, q.float(), k.float().transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1).to(q.dtype)

    class Attend(torch.autograd.Function):
        """Query (rows, heads, length, d), key and value (rows, key heads, length, d)."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, scale: float) -> Any:
            rows, heads, length, width = query.shape
            group = heads // key.shape[1]
            found = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
            for row, start, end in _blocks(rows, heads, length):
                q = query[row, :, start:end].reshape(-1, group * (end - start), width)
                k = key[row, :, :end].reshape(-1, end, width)
                v = value[row, :, :end].reshape(-1, end, value.shape[-1])
                seen = torch.bmm(weights(q, k, scale, group), v)
                found[row, :, start:end] = seen.view(-1, heads, end - start, value.shape[-1])
            ctx.save_for_backward(query, key, value)
            ctx.scale = scale
            return found

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            query, key, value = ctx.saved_tensors
            rows, heads, length, width = query.shape
            wide, keys = value.shape[-1], key.shape[1]
            group = heads // keys
            to_query = torch.empty_like(query)
            # Sums over blocks in fp32.
            to_key, to_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
            for row, start, end in _blocks(rows, heads, length):
                q = query[row, :, start:end].reshape(-1, group * (end - start), width)
                k = key[row, :, :end].reshape(-1, end, width)
                v = value[row, :, :end].reshape(-1, end, wide)
                g = gradient[row, :, start:end].reshape(-1, group * (end - start), wide)
                p = weights(q, k, ctx.scale, group)
                to_p = torch.bmm(g, v.transpose(1, 2))
                to_scores = torch._softmax_backward_data(to_p, p, -1, p.dtype).mul_(ctx.scale)
                to_query[row, :, start:end] = torch.bmm(to_scores, k).view(-1, heads, end - start, width)
                to_key[row, :, :end] += torch.bmm(to_scores.transpose(1, 2), q).view(-1, keys, end, width)
                to_value[row, :, :end] += torch.bmm(p.transpose(1, 2), g).view(-1, keys, end, wide)
            return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None

    return Attend.apply
