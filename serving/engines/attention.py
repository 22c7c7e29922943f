"""Attention of rows that each say one token, by a compiled loop; transformers calls it for a model's layers.

torch's attention on a CPU makes two matrix products for each row and head, here of as many rows as heads
share their keys. What is not plain, prompts first of all, goes to transformers' attention over torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from regraft.evals.slots import ROWS_ATTENTION
from serving.engines.compiled import HALF, kernels

#: What transformers' attention over torch's heeds beside its arguments; it passes over everything else.
_HEEDED = ("softcap", "output_attentions", "position_bias", "cache")


def attend_by_rows(base: Any) -> bool:
    """Have a model's layers attend by a compiled loop while each row says one token, if that can be.

    Args:
        base: The transformers model.

    Returns:
        Whether they do.
    """
    loops = kernels(base)
    if loops is None or base.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(ROWS_ATTENTION, attention)
    AttentionMaskInterface.register(ROWS_ATTENTION, sdpa_mask)
    base.set_attn_implementation(ROWS_ATTENTION)
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    group = heads // (getattr(config, "num_key_value_heads", None) or heads)
    # Compiled now and not in the first request; layers that differ from this are compiled when they are met.
    loops.attention(width, width, group, HALF[base.dtype])
    return bool(base.config._attn_implementation == ROWS_ATTENTION)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """See `sdpa_attention_forward`, whose arguments these are."""
    if not _plain(query, key, value, attention_mask) or dropout or any(more.get(n) for n in _HEEDED):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    from serving.engines import kernels as loops

    rows, all_heads, _, width = query.shape
    heads, columns, v_width = key.shape[1], key.shape[2], value.shape[3]
    if attention_mask is None:
        attention_mask = torch.ones(columns, dtype=torch.bool).expand(rows, 1, 1, columns)
    out = query.new_empty(rows, 1, all_heads, v_width)
    attend = loops.attention(width, v_width, all_heads // heads, HALF[query.dtype])
    attend(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), attention_mask.data_ptr(),
        (rows, heads, columns),
        (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], attention_mask.stride(0)),
        width**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out, None


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the loop knows these: a token a row, and the same mask for all heads."""
    rows, columns = len(q), k.shape[2]
    return (
        q.shape[2] == 1
        and q.device.type == "cpu"
        and q.dtype in HALF
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] == k.shape[3]
        and q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
        and rows == len(k)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and (mask is None or (mask.dtype == torch.bool and tuple(mask.shape) == (rows, 1, 1, columns)))
        and (mask is None or mask.stride(3) == 1)
    )
