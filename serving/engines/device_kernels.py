"""Triton kernels of a decoding step on a GPU: what transformers' layers do between their products.

A step of a few rows is some hundred small kernels there, most of which read and write all that they touch for
one operation. These do as much in one as rows have to themselves: a normalisation, a gate, turning queries
and keys and keeping them, attention. `serving.engines.device_adapters` has those of adapters.

Numbers are rounded where transformers' models round, but for turned queries and keys, which are rounded once.
Rows are a step's, of one token each. With `TRITON_INTERPRET=1` all this runs on a CPU, for tests.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

#: Columns of keys that a program looks at together.
_COLUMNS = 64
#: Rows of the smallest matrix that `tl.dot` multiplies.
_LEAST_ROWS = 16
#: Programs that fill a GPU of today twice over; attention with fewer goes through columns in parts, of so
#: many columns at least.
_PROGRAMS, _LEAST_COLUMNS = 264, 256
#: Triton's interpreter (3.9) multiplies matrices of bf16 wrongly, as numpy has no such type.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _norm(x, weight, out, width, epsilon, block: tl.constexpr):
    at = tl.arange(0, block)
    there = at < width
    start = tl.program_id(0).to(tl.int64) * width
    value = tl.load(x + start + at, there, 0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + epsilon)
    normed = (value * factor).to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + at, there, 0.0).to(tl.float32)
    tl.store(out + start + at, (normed * scale).to(out.dtype.element_ty), there)


@triton.jit
def _gate(both, out, inner, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    there = at < inner
    gate = tl.load(both + row * 2 * inner + at, there, 0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + at, there, 0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + at, (opened * up).to(out.dtype.element_ty), there)


@triton.jit
def _turn(
    qkv, cosines, sines, keys, values, end, heads, own, row_step, head_step, turn_step,
    half: tl.constexpr, block: tl.constexpr, keep: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, block)
    there = at < half
    read = qkv + (row * (heads + 2 * own) + head) * 2 * half
    first = tl.load(read + at, there, 0.0)
    second = tl.load(read + half + at, there, 0.0)
    column = 0
    if keep:
        column = tl.load(end) * 2 * half
    if head >= heads + own:
        kept = values + row * row_step + (head - heads - own).to(tl.int64) * head_step + column
        tl.store(kept + at, first, there)
        tl.store(kept + half + at, second, there)
    else:
        turn = row * turn_step
        cos_first = tl.load(cosines + turn + at, there, 0.0).to(tl.float32)
        cos_second = tl.load(cosines + turn + half + at, there, 0.0).to(tl.float32)
        sin_first = tl.load(sines + turn + at, there, 0.0).to(tl.float32)
        sin_second = tl.load(sines + turn + half + at, there, 0.0).to(tl.float32)
        one, other = first.to(tl.float32), second.to(tl.float32)
        low = (one * cos_first - other * sin_first).to(first.dtype)
        high = (other * cos_second + one * sin_second).to(first.dtype)
        if head < heads or not keep:  # turned where it stands
            tl.store(read + at, low, there)
            tl.store(read + half + at, high, there)
        else:
            kept = keys + row * row_step + (head - heads).to(tl.int64) * head_step + column
            tl.store(kept + at, low, there)
            tl.store(kept + half + at, high, there)


@triton.jit
def _attend(
    queries, keys, values, mask, out, maxima, sums, row_step, head_step, query_step, mask_step, columns, each,
    scale, splits, width: tl.constexpr, wide: tl.constexpr, group: tl.constexpr, grouped: tl.constexpr,
    block: tl.constexpr, whole: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    of = tl.arange(0, grouped)
    at = tl.arange(0, wide)
    asks = (of < group)[:, None] & (at < width)[None, :]
    mine = head * group + of
    q = tl.load(queries + row * query_step + mine[:, None] * width + at[None, :], asks, 0.0)
    if exact:
        q = q.to(tl.float32)
    highest = tl.full([grouped], float("-inf"), tl.float32)
    total = tl.zeros([grouped], tl.float32)
    seen = tl.zeros([grouped, wide], tl.float32)
    begin = row * row_step + head.to(tl.int64) * head_step
    for start in range(split * each, tl.minimum((split + 1) * each, columns), block):
        column = start + tl.arange(0, block)
        here = column < columns
        shown = tl.load(mask + row * mask_step + column, here, float("-inf")).to(tl.float32)
        if tl.max(shown, 0) > -1e30:
            place = begin + column.to(tl.int64) * width
            inside = here[:, None] & (at < width)[None, :]
            k = tl.load(keys + place[:, None] + at[None, :], inside, 0.0)
            if exact:
                k = k.to(tl.float32)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + shown[None, :]
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            less = tl.exp(highest - higher)
            total = total * less + tl.sum(weight, 1)
            v = tl.load(values + place[:, None] + at[None, :], inside, 0.0)
            if exact:
                v = v.to(tl.float32)
            seen = seen * less[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            highest = higher
    if whole:
        found = (seen / total[:, None]).to(out.dtype.element_ty)
        heads = tl.num_programs(1) * group
        tl.store(out + (row * heads + mine)[:, None] * width + at[None, :], found, asks)
    else:
        part = (row * tl.num_programs(1) * group + mine) * splits + split
        tl.store(maxima + part, highest, of < group)
        tl.store(sums + part, total, of < group)
        tl.store(out + part[:, None] * width + at[None, :], seen, asks)


@triton.jit
def _combine(parts, maxima, sums, out, splits, width: tl.constexpr, wide: tl.constexpr, block: tl.constexpr):
    mine = tl.program_id(0).to(tl.int64)
    of = tl.arange(0, block)
    at = tl.arange(0, wide)
    there = of < splits
    highest = tl.load(maxima + mine * splits + of, there, float("-inf"))
    weight = tl.exp(highest - tl.max(highest, 0))  # of a part where nothing is shown: 0
    total = tl.sum(weight * tl.load(sums + mine * splits + of, there, 0.0), 0)
    inside = there[:, None] & (at < width)[None, :]
    seen = tl.load(parts + (mine * splits + of)[:, None] * width + at[None, :], inside, 0.0)
    found = tl.sum(seen * weight[:, None], 0) / total
    tl.store(out + mine * width + at, found.to(out.dtype.element_ty), at < width)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square normalisation of (rows, width) without gaps."""
    out = torch.empty_like(x)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(len(x),)](x, weight, out, width, epsilon, block, num_warps=8 if block > 2048 else 4)
    return out


def gate(both: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of each row of (rows, 2 * inner), times the second."""
    rows, inner = len(both), both.shape[1] // 2
    out = both.new_empty(rows, inner)
    _gate[(rows, triton.cdiv(inner, 1024))](both, out, inner, 1024)
    return out


def turn(
    qkv: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    end: torch.Tensor,
) -> None:
    """Turn queries where they stand, and keys and values into the cache.

    Args:
        qkv: Queries, keys and values of (rows, heads, of keys, of values), side by side without gaps.
        turns: Cosines and sines of (rows or 1, 1, width).
        cache: Keys and values of (slots, heads, columns, width), without gaps.
        end: The column to write, of shape (1).
    """
    keys, values = cache
    own, width = keys.shape[1], keys.shape[3]
    heads = qkv.shape[1] // width - 2 * own
    cosines, sines = turns
    turn_step = 0 if len(cosines) == 1 else cosines.stride(0)
    _turn[(len(qkv), heads + 2 * own)](
        qkv, cosines, sines, keys, values, end, heads, own, keys.stride(0), keys.stride(1), turn_step,
        width // 2, triton.next_power_of_2(width // 2), True, num_warps=1,
    )  # fmt: skip


def turn_prompts(qkv: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], own: int) -> None:
    """Turn queries and keys where they stand.

    Args:
        qkv: As `turn` takes them, for each token of each row: (rows * tokens, heads, of keys, of values).
        turns: Cosines and sines of (rows * tokens, width), without gaps.
        own: Heads of keys.
    """
    cosines, sines = turns
    width = cosines.shape[1]
    heads = qkv.shape[1] // width - 2 * own
    _turn[(len(qkv), heads + own)](
        qkv, cosines, sines, qkv, qkv, qkv, heads, own, 0, 0, width,
        width // 2, triton.next_power_of_2(width // 2), False, num_warps=1,
    )  # fmt: skip


def attend(
    qkv: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """What rows see, of shape (rows, heads * width).

    Args:
        qkv: As `turn` leaves them.
        cache: As `turn` takes it.
        mask: What is added to each column, of shape (rows, columns); far below zero where a row may not look.
        scale: Of the products.
    """
    keys, values = cache
    own, width = keys.shape[1], keys.shape[3]
    heads, (rows, columns) = qkv.shape[1] // width - 2 * own, mask.shape
    splits = max(1, min(-(-_PROGRAMS // (rows * own)), columns // _LEAST_COLUMNS))
    each = triton.cdiv(triton.cdiv(columns, splits), _COLUMNS) * _COLUMNS
    out = qkv.new_empty(rows, heads * width)
    whole = splits == 1
    numbers = (0, 0) if whole else (rows * heads, splits)
    parts = out if whole else qkv.new_empty(*numbers, width, dtype=torch.float32)
    maxima, sums = (qkv.new_empty(numbers, dtype=torch.float32) for _ in range(2))
    wide, group = triton.next_power_of_2(width), heads // own
    _attend[(rows, own, splits)](
        qkv, keys, values, mask, parts, maxima, sums, keys.stride(0), keys.stride(1), qkv.stride(0),
        mask.stride(0), columns, each, scale, splits, width, wide, group,
        max(_LEAST_ROWS, triton.next_power_of_2(group)), _COLUMNS, whole, _INTERPRETED,
    )  # fmt: skip
    if not whole:
        _combine[(rows * heads,)](
            parts, maxima, sums, out, splits, width, wide, triton.next_power_of_2(splits)
        )
    return out
