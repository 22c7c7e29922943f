"""Attention of training: causal, over rows of one example each or of several that do not see each other.

In bf16 on a CPU it runs in blocks (`blocks.py`). On CUDA rows of several examples go to torch's flash
attention by their bounds. All else goes to torch's own kernel, with a mask where one is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from regraft.training.kernels.blocks import attend

if TYPE_CHECKING:
    import torch

NAME = "regraft_blocks"
#: Whether rows of several examples come with their bounds, so that no mask has to be made for them.
_BOUNDED: ContextVar[bool] = ContextVar("_BOUNDED", default=False)


@contextmanager
def training_attention(base: Any, *, packed: bool = False) -> Iterator[None]:
    """While open, a transformers model that attends by torch's kernel attends by this module.

    Models with another kind of attention (eager, flash) keep theirs; transformers tells those where the
    examples of a row end.

    Args:
        base: The model.
        packed: Whether rows hold several examples, and their bounds are handed on.
    """
    before = base.config._attn_implementation
    if before != "sdpa":
        yield
        return
    _register()
    base.config._attn_implementation = NAME
    bounded = _BOUNDED.set(packed)
    try:
        yield
    finally:
        _BOUNDED.reset(bounded)
        base.config._attn_implementation = before


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mask(
        *, attention_mask: torch.Tensor | None = None, local_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """None where shapes and bounds say it all: no padding, and no window shorter than the row."""
        causal = kwargs.get("allow_is_causal_skip", True) or _BOUNDED.get()
        if causal and attention_mask is None and (local_size is None or kwargs["kv_length"] <= local_size):
            return None
        found: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, local_size=local_size, **kwargs)
        return found

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def attention(
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
    """Attention as transformers calls it.

    Args:
        module: The layer.
        query: (rows, heads, length, width).
        key: (rows, key heads, length or more, width); what it has more comes before the row.
        value: As `key`.
        attention_mask: None for causal attention, within the bounds that `cu_seq_lens_q` gives if it does;
            all that stands within them also sees the first `shared_prefix` positions.
        dropout: Of the weights.
        scaling: Of the scores; one over the root of the width if not given.
        is_causal: Taken from the layer if not given.
        kwargs: Whatever else the layer hands on.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    where = query.device.type
    if torch.is_autocast_enabled(where):  # as torch's kernel does
        narrow = torch.get_autocast_dtype(where)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    bounds, prefix = kwargs.get("cu_seq_lens_q"), kwargs.get("shared_prefix", 0)
    scale = scaling or query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    mine = attention_mask is None and causal and not dropout and query.shape[1] % key.shape[1] == 0
    narrow_cuda = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if mine and narrow_cuda and bounds is not None and not prefix:
        return _flash_by_bounds(query, key, value, bounds, kwargs["max_length_q"], scale), None
    if mine and not query.is_cuda and query.dtype is torch.bfloat16:
        ends = () if bounds is None else tuple(bounds.tolist())
        return attend(query, key, value, scale, ends, prefix), None
    if attention_mask is None and causal and (bounds is not None or query.shape[2] != key.shape[2]):
        attention_mask = _seen(query.shape[2], key.shape[2], bounds, prefix, query.device)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def _seen(queries: int, keys: int, bounds: torch.Tensor | None, prefix: int, device: Any) -> torch.Tensor:
    """What each query may see, (1, 1, queries, keys): what is before it, in its own example or the prefix."""
    import torch

    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if bounds is not None:
        example = torch.searchsorted(
            bounds, torch.arange(keys, device=device, dtype=bounds.dtype), right=True
        )
        shared = torch.arange(keys, device=device) < prefix
        seen &= (example[keys - queries :, None] == example[None]) | shared
    return seen[None, None]


def _flash_by_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
) -> Any:
    """Torch's flash attention over the examples of one row; gives (1, length, heads, width)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    found: Any = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return found[None]
