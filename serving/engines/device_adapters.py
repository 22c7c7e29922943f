"""Triton kernels that take rows of one batch, each through its own adapter, on a GPU.

What an adapter adds is computed in fp32 and rounded once with the layer's output, as in PEFT. Rows of a step
have one token each, those of prompts many. Each half of an adapter's product is one kernel for layers that
read the same. A step's rows are programs of their own: with rows put together by adapter both kernels took
twice as long (H100, 32 rows, four adapters), for there were too few programs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from serving.engines.device_tables import Group

#: Inputs and ranks of an adapter that a program takes together for a row, and inputs, ranks and tokens for
#: prompts.
_INPUTS, _RANKS = 2048, 4
_PROMPT_INPUTS, _PROMPT_RANKS, _TOKENS = 128, 16, 16


@triton.jit
def _shrink(x, down, places, ranks, h, inputs, layers, most, block: tl.constexpr, some: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    first = tl.program_id(2) * some
    entry = ranks + (tl.load(places + row) * layers + layer) * 3
    start = tl.load(entry)
    rank = tl.load(entry + 1)
    if first < rank:
        of = first + tl.arange(0, some)
        total = tl.zeros([some, block], tl.float32)
        for begin in range(0, inputs, block):
            at = begin + tl.arange(0, block)
            read = tl.load(x + row * inputs + at, at < inputs, 0.0).to(tl.float32)
            there = (of < rank)[:, None] & (at < inputs)[None, :]
            total += tl.load(down + (start + of)[:, None] * inputs + at[None, :], there, 0.0) * read[None, :]
        tl.store(h + (row * layers + layer) * most + of, tl.sum(total, 1), of < rank)


@triton.jit
def _expand(
    y, h, up, places, ranks, blocks, layout, vectors, residual, out, outputs, layers, most, vector_step,
    block: tl.constexpr, some: tl.constexpr, onto: tl.constexpr, scaled: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    layer = tl.load(blocks + tl.program_id(1))
    begin = tl.load(layout + layer * 4)
    size = tl.load(layout + layer * 4 + 1)
    at = tl.program_id(1) * block + tl.arange(0, block)
    own = at - begin
    place = tl.load(places + row)
    entry = ranks + (place * layers + layer) * 3
    rank = tl.load(entry + 1)
    offset = tl.load(entry + 2)
    value = tl.load(y + row * outputs + at).to(tl.float32)
    added = tl.zeros([block], tl.float32)
    for first in range(0, rank, some):
        of = first + tl.arange(0, some)
        low = tl.load(h + (row * layers + layer) * most + of, of < rank, 0.0)
        high = tl.load(up + offset + of[:, None] * size + own[None, :], (of < rank)[:, None], 0.0)
        added += tl.sum(low[:, None] * high, 0)
    if scaled:
        scale_at = tl.load(layout + layer * 4 + 2)
        shift_at = tl.load(layout + layer * 4 + 3)
        if scale_at >= 0:
            value = value * tl.load(vectors + place * vector_step + scale_at + own)
        if shift_at >= 0:
            added += tl.load(vectors + place * vector_step + shift_at + own)
    made = (value + added).to(out.dtype.element_ty)
    if onto:
        before = tl.load(residual + row * outputs + at).to(tl.float32)
        made = (before + made.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * outputs + at, made)


@triton.jit
def _shrink_prompts(
    x, down, places, ranks, h, tokens, inputs, layers, most, parts,
    tile: tl.constexpr, block: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * tile + tl.arange(0, tile)
    layer = tl.program_id(2) // parts
    first = (tl.program_id(2) % parts) * some
    entry = ranks + (tl.load(places + row) * layers + layer) * 3
    start = tl.load(entry)
    rank = tl.load(entry + 1)
    if first < rank:
        of = first + tl.arange(0, some)
        known = token < tokens
        at_token = row * tokens + token
        total = tl.zeros([tile, some], tl.float32)
        for begin in range(0, inputs, block):
            at = begin + tl.arange(0, block)
            inside = at < inputs
            here = x + at_token[:, None] * inputs + at[None, :]
            read = tl.load(here, known[:, None] & inside[None, :], 0.0).to(tl.float32)
            there = (of < rank)[None, :] & inside[:, None]
            low = tl.load(down + (start + of)[None, :] * inputs + at[:, None], there, 0.0)
            total += tl.dot(read, low, input_precision="tf32x3")
        to = h + (at_token[:, None] * layers + layer) * most + of[None, :]
        tl.store(to, total, known[:, None] & (of < rank)[None, :])


@triton.jit
def _expand_prompts(
    y, h, up, places, ranks, blocks, layout, vectors, tokens, outputs, layers, most, vector_step,
    tile: tl.constexpr, block: tl.constexpr, some: tl.constexpr, scaled: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * tile + tl.arange(0, tile)
    layer = tl.load(blocks + tl.program_id(2))
    begin = tl.load(layout + layer * 4)
    size = tl.load(layout + layer * 4 + 1)
    at = tl.program_id(2) * block + tl.arange(0, block)
    own = at - begin
    place = tl.load(places + row)
    entry = ranks + (place * layers + layer) * 3
    rank = tl.load(entry + 1)
    offset = tl.load(entry + 2)
    if scaled or rank > 0:
        known = (token < tokens)[:, None]
        at_token = row * tokens + token
        here = y + at_token[:, None] * outputs + at[None, :]
        value = tl.load(here, known, 0.0).to(tl.float32)
        added = tl.zeros([tile, block], tl.float32)
        for first in range(0, rank, some):
            of = first + tl.arange(0, some)
            seen = h + (at_token[:, None] * layers + layer) * most + of[None, :]
            low = tl.load(seen, known & (of < rank)[None, :], 0.0)
            high = tl.load(up + offset + of[:, None] * size + own[None, :], (of < rank)[:, None], 0.0)
            added += tl.dot(low, high, input_precision="tf32x3")
        if scaled:
            scale_at = tl.load(layout + layer * 4 + 2)
            shift_at = tl.load(layout + layer * 4 + 3)
            if scale_at >= 0:
                value = value * tl.load(vectors + place * vector_step + scale_at + own)[None, :]
            if shift_at >= 0:
                added += tl.load(vectors + place * vector_step + shift_at + own)[None, :]
        tl.store(here, (value + added).to(y.dtype.element_ty), known)


def through(
    x: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    places: torch.Tensor,
    group: Group,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What layers that read the same make, each row's with its own adapter, of shape (rows, tokens, outputs).

    Args:
        x: What they read, (rows, tokens, inputs).
        product: What they make of it without adapters, side by side.
        places: Each row's place in the set of adapters.
        group: What the set changes in these layers; inputs are scaled for one layer only.
        residual: To be added at the end, of the shape of what they make, without gaps.
    """
    read, scale = x, group.in_scales[0]
    if scale is not None:
        read = (x * group.vectors[:, scale].index_select(0, places)[:, None]).to(x.dtype)
    x, y = x.contiguous(), product(read).contiguous()
    if x.shape[1] == 1:
        before = None if residual is None else residual[:, 0]
        return adapt(x[:, 0], y[:, 0], places, group, before)[:, None]
    adapt_prompts(x, y, places, group)
    return y if residual is None else y.add_(residual)


def adapt(
    x: torch.Tensor, y: torch.Tensor, places: torch.Tensor, group: Group, residual: torch.Tensor | None
) -> torch.Tensor:
    """What layers that read the same make for rows of which each has an adapter, of shape (rows, outputs).

    Args:
        x: What they read, (rows, inputs) without gaps.
        y: What they make of it without adapters, (rows, outputs) side by side without gaps.
        places: Each row's place in the set of adapters.
        group: Their `serving.engines.device_tables.Group`.
        residual: To be added at the end, of `y`'s shape.
    """
    (rows, inputs), (_, outputs) = x.shape, y.shape
    layers, most = group.layers, group.most
    h = x.new_empty(rows, layers, max(most, 1), dtype=torch.float32)
    if most:
        _shrink[(rows, layers, triton.cdiv(most, _RANKS))](
            x, group.down, places, group.ranks, h, inputs, layers, most,
            min(_INPUTS, triton.next_power_of_2(inputs)), _RANKS, num_warps=8,
        )  # fmt: skip
    _expand[(rows, outputs // group.block)](
        y, h, group.up, places, group.ranks, group.blocks, group.layout, group.vectors,
        y if residual is None else residual, y, outputs, layers, max(most, 1), group.vectors.stride(0),
        group.block, 16, residual is not None, group.scaled, num_warps=4,
    )  # fmt: skip
    return y


def adapt_prompts(x: torch.Tensor, y: torch.Tensor, places: torch.Tensor, group: Group) -> torch.Tensor:
    """The same for rows of many tokens: (rows, tokens, inputs) and (rows, tokens, outputs) without gaps."""
    (rows, tokens, inputs), outputs = x.shape, y.shape[2]
    layers, most = group.layers, group.most
    h = x.new_empty(rows, tokens, layers, max(most, 1), dtype=torch.float32)
    tiles = triton.cdiv(tokens, _TOKENS)
    if most:
        parts = triton.cdiv(most, _PROMPT_RANKS)
        _shrink_prompts[(rows, tiles, layers * parts)](
            x, group.down, places, group.ranks, h, tokens, inputs, layers, most, parts,
            _TOKENS, _PROMPT_INPUTS, _PROMPT_RANKS,
        )  # fmt: skip
    _expand_prompts[(rows, tiles, outputs // group.block)](
        y, h, group.up, places, group.ranks, group.blocks, group.layout, group.vectors, tokens, outputs,
        layers, max(most, 1), group.vectors.stride(0), _TOKENS, group.block, _PROMPT_RANKS, group.scaled,
    )  # fmt: skip
    return y
