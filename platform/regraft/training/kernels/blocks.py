"""Causal attention in bf16 on a CPU, in blocks of queries.

torch's own kernel is slow there in the backward pass on the short rows of chats.
Scores and softmax are taken in fp32. The products of scores run in oneDNN's bf16 mode: their operands are
bf16 values, so that nothing is lost by it, and they take half the time. What softmax gives is kept for the
backward pass where rows are short, and taken again where they are long. Time and error:
`benchmarks/training_kernels.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

#: Queries of a block: of 64, 128 and 256 the fastest from 60 to 1000 tokens a row.
_QUERIES = 128
#: Bytes of one block's scores: of 3, 6 and 12 millions the fastest.
_SCORES = 6_000_000
#: Longest rows whose softmax is kept: half of this, times heads, values a token; twice as fast backward. With
#: 512 a run of mixed lengths was 2 % faster, and took 7 % more memory.
KEPT_LENGTH = 256
#: Examples of a row are taken together, padded to the longest, while the shortest has this share of it.
_ALIKE = 0.7


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bounds: tuple[int, ...] = (),
    prefix: int = 0,
) -> torch.Tensor:
    """Causal attention.

    Args:
        query: (rows, heads, length, width), bf16.
        key: (rows, key heads, length or more, width); what it has more comes before the row.
        value: (rows, key heads, as the key, value width).
        scale: Of the scores.
        bounds: Where the examples of a single row begin, and where the last one ends; none sees another.
        prefix: Positions before the first bound, which all examples see.

    Returns:
        (rows, length, heads, value width).
    """
    import torch

    longest = max((prefix + e - s for s, e in itertools.pairwise(bounds)), default=key.shape[2])
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    keep = trains and longest <= KEPT_LENGTH
    found: torch.Tensor = _function()(query, key, value, scale, bounds, prefix, keep)
    return found


class _Part(NamedTuple):
    """Some examples of a row, padded to the longest of them.

    `take` are their places in the row, (examples * longest,), where padding repeats the first one; `padding`
    are the places of padding among them, `back` those of the row's tokens.
    """

    examples: int
    longest: int
    rows: slice
    take: torch.Tensor
    padding: torch.Tensor
    back: torch.Tensor

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """The examples of a (1, heads, length, width), as (examples, heads, longest, width)."""
        flat = tensor[0].transpose(0, 1).index_select(0, self.take)
        return flat.view(self.examples, self.longest, *flat.shape[1:]).transpose(1, 2)

    def row(self, padded: torch.Tensor) -> torch.Tensor:
        """The other way, without the padding: (tokens, heads, width)."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.back)


@lru_cache(maxsize=64)
def _parts(bounds: tuple[int, ...]) -> tuple[_Part, ...]:
    """The examples of a row in groups of like length."""
    import torch

    groups: list[list[int]] = []
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    for index, length in enumerate(lengths):
        together = [lengths[i] for i in groups[-1]] if groups else []
        if together and min(*together, length) >= _ALIKE * max(*together, length):
            groups[-1].append(index)
        else:
            groups.append([index])
    parts = []
    for group in groups:
        longest = max(lengths[i] for i in group)
        steps = torch.arange(longest)
        padding = (steps >= torch.tensor([lengths[i] for i in group])[:, None]).flatten()
        take = (torch.tensor([bounds[i] for i in group])[:, None] + steps).flatten()
        take = take.masked_fill(padding, bounds[group[0]])
        rows = slice(bounds[group[0]], bounds[group[-1] + 1])
        places = (torch.nonzero(padding).flatten(), torch.nonzero(~padding).flatten())
        parts.append(_Part(len(group), longest, rows, take, *places))
    return tuple(parts)


def _chunks(rows: int, heads: int, length: int, keys: int) -> Iterator[slice]:
    """Rows that are taken together."""
    together = max(1, _SCORES // (heads * min(length, _QUERIES) * keys * 4))
    for row in range(0, rows, together):
        yield slice(row, min(row + together, rows))


def _blocks(length: int, before: int) -> Iterator[tuple[int, int, int]]:
    """Of a row: from which query to which, and how many keys the last of them sees.

    From the last queries to the first: the first block's keys are all there are.
    """
    for start in range(0, length, _QUERIES)[::-1]:
        end = min(start + _QUERIES, length)
        yield start, end, before + end


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let oneDNN round the operands of fp32 products to bf16, as which ours were born."""
    import torch

    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _flat(tensor: Any, keys: int) -> torch.Tensor:
    """(rows, heads, length, width) by key heads: (rows * keys, heads a key * length, width)."""
    rows, heads, length, width = tensor.shape
    found: torch.Tensor = tensor.reshape(rows * keys, heads // keys * length, width)
    return found


def _after(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Keys or values of examples, with those of the prefix before each."""
    import torch

    return torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], 2) if prefix.shape[2] else own


@cache
def _function() -> Any:
    import torch

    def weights(q: Any, wide_k: Any, queries: int, scale: float) -> torch.Tensor:
        """Of the last queries over the keys given, (rows * keys, heads a key * queries, keys)."""
        scores = q.new_empty(q.shape[0], q.shape[1], wide_k.shape[1], dtype=torch.float32)
        torch.baddbmm(scores, q.float(), wide_k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if queries > 1:
            unseen = scores.new_full((queries, queries), float("-inf")).triu_(1)
            by_head = scores.view(q.shape[0], -1, queries, wide_k.shape[1])
            by_head[..., wide_k.shape[1] - queries :] += unseen
        return torch.softmax(scores, -1).to(q.dtype)

    def forward(query: Any, key: Any, value: Any, scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The outcome, (rows, heads, length, width), and the weights of each block."""
        rows, heads, length, _ = query.shape
        keys, wide = key.shape[1], value.shape[-1]
        found = query.new_empty(rows, length, heads, wide).transpose(1, 2)
        kept = []
        with _bf16_products():
            for where in _chunks(rows, heads, length, key.shape[2]):
                wide_k, v = _flat(key[where], keys).float(), _flat(value[where], keys)
                for start, end, upto in _blocks(length, key.shape[2] - length):
                    p = weights(_flat(query[where, :, start:end], keys), wide_k[:, :upto], end - start, scale)
                    found[where, :, start:end] = torch.bmm(p, v[:, :upto]).view(-1, heads, end - start, wide)
                    kept.append(p)
        return found, kept

    def backward(query: Any, key: Any, value: Any, gradient: Any, scale: float, kept: Any) -> Any:
        """The three gradients; `kept` gives the weights of each block, or is None to take them again."""
        rows, heads, length, width = query.shape
        keys, total, wide = key.shape[1], key.shape[2], value.shape[-1]
        to_query, to_key, to_value = (torch.empty_like(t) for t in (query, key, value))
        for where in _chunks(rows, heads, length, total):
            k, v = _flat(key[where], keys), _flat(value[where], keys)
            wide_k = k.float() if kept is None else k
            sums: list[torch.Tensor] = []
            for start, end, upto in _blocks(length, total - length):
                q, g = (_flat(t[where, :, start:end], keys) for t in (query, gradient))
                if kept is None:
                    with _bf16_products():
                        p = weights(q, wide_k[:, :upto], end - start, scale)
                else:
                    p = next(kept)
                to_scores = torch._softmax_backward_data(
                    torch.bmm(g, v[:, :upto].transpose(1, 2)), p, -1, p.dtype
                )
                mine = torch.bmm(to_scores, k[:, :upto]).mul_(scale)
                to_query[where, :, start:end] = mine.view(-1, heads, end - start, width)
                parts = torch.bmm(to_scores.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), g)
                if not sums:  # sums over blocks are in fp32
                    sums = [part if start == 0 else part.float() for part in parts]
                else:
                    for whole, part in zip(sums, parts, strict=True):
                        whole[:, :upto] += part
            to_key[where] = sums[0].mul_(scale).view(-1, keys, total, width)
            to_value[where] = sums[1].view(-1, keys, total, wide)
        return to_query, to_key, to_value

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, query: Any, key: Any, value: Any, scale: float, bounds: tuple[int, ...], prefix: int,
            keep: bool,
        ) -> Any:  # fmt: skip
            kept: list[torch.Tensor] = []
            if bounds:
                found = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
                begun = [t[:, :, :prefix] for t in (query, key, value)]
                if prefix:
                    of_prefix, kept = forward(begun[0], begun[1], begun[2], scale)
                    found[:, :prefix] = of_prefix.transpose(1, 2)
                for part in _parts(bounds):
                    q, k, v = (part.padded(t) for t in (query, key, value))
                    of_part, weights = forward(q, _after(begun[1], k), _after(begun[2], v), scale)
                    found[0, part.rows] = part.row(of_part)
                    kept += weights
            else:
                of_all, kept = forward(query, key, value, scale)
                found = of_all.transpose(1, 2)
            ctx.save_for_backward(query, key, value, *(kept if keep else ()))
            ctx.how = scale, bounds, prefix, keep
            return found

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            query, key, value, *weights = ctx.saved_tensors
            scale, bounds, prefix, keep = ctx.how
            kept, gradient = iter(weights) if keep else None, gradient.transpose(1, 2)
            nothing = (None,) * 4
            if not bounds:
                return *backward(query, key, value, gradient, scale, kept), *nothing
            found = tuple(t.new_empty(1, t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value))
            begun = [t[:, :, :prefix] for t in (query, key, value)]
            sums: list[torch.Tensor] = []  # of the prefix, over all that see it, in fp32
            if prefix:
                of_prefix = backward(begun[0], begun[1], begun[2], gradient[:, :, :prefix], scale, kept)
                sums = [t.transpose(1, 2).float() for t in of_prefix]
            for part in _parts(bounds):
                of_part = part.padded(gradient)
                # The gradient of padding is none: it repeats a token that has one of its own.
                of_part.transpose(1, 2).flatten(0, 1).index_fill_(0, part.padding, 0)
                q, k, v = (part.padded(t) for t in (query, key, value))
                k, v = _after(begun[1], k), _after(begun[2], v)
                to_q, *to_both = backward(q, k, v, of_part, scale, kept)
                found[0][0, part.rows] = part.row(to_q)
                for place, mine in enumerate(to_both, start=1):
                    if prefix:
                        sums[place] += mine[:, :, :prefix].float().sum(0, keepdim=True).transpose(1, 2)
                    found[place][0, part.rows] = part.row(mine[:, :, prefix:])
            for whole, mine in zip(found, sums, strict=False):
                whole[:, :prefix] = mine
            return *(t.transpose(1, 2) for t in found), *nothing

    return Attend.apply
