"""Loops over the rows of a decoding step, compiled for this processor by numba: attention, adapters, maxima.

A row of one token leaves torch's operations little to do: at 32 rows they take their dispatch, and attention
a matrix product of three rows for each head. Sums are in fp32 whatever the tensors are. Loops take addresses;
who calls them has checked shapes, strides and types. Nothing here knows torch.

Needs numba (`pip install 'regraft[fast]'`): import it where `serving.engines.compiled` says that it is there.
Compiled code is kept beside this file, or in the user's cache.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from serving.engines.instructions import (
    add_weighted,
    compiled,
    exp,
    fetch,
    float32_at,
    int64_at,
    ordered_bfloat16,
    ordered_float32,
    products,
    rounded,
    uint8_at,
    uint16_at,
    widened,
)

#: Columns of keys that are fetched before they are worked on.
_AHEAD = 8


@functools.cache
def attention(width: int, v_width: int, group: int, half: bool) -> Any:
    """Attention of one token a row, over the columns that the row may see; of bf16 if `half`, else of fp32.

    It takes:
        q, k, v, out: Addresses of (rows, heads * group, width), (rows, heads, columns, width), (rows, heads,
            columns, v_width) and (rows, heads * group, v_width), the last without gaps.
        seen: Of (rows, columns): bytes that are not 0 where a row may look; each row has one.
        sizes: rows, heads of keys, columns.
        steps: From one to the next, in numbers: rows and heads of q; rows, heads and columns of k and of v;
            rows of `seen`.
        scale: Of the products.
    """
    kind, size = (1, 2) if half else (0, 4)
    k_bytes, v_bytes = width * size, v_width * size

    def attend(q, k, v, out, seen, sizes, steps, scale):  # noqa: PLR0912
        rows, heads, columns = sizes
        q_row, q_head, k_row, k_head, k_column, v_row, v_head, v_column, seen_row = steps
        looked = uint8_at(seen)
        asked = np.empty((group, width), np.float32)
        weights = np.empty((group, columns), np.float32)
        sums = np.empty((group, v_width), np.float32)
        shown = np.empty(columns + 1, np.int64)
        for row in range(rows):
            count = 0
            for column in range(columns):
                shown[count] = column
                count += looked[row * seen_row + column] != 0
            for head in range(heads):
                for g in range(group):
                    at = q + (row * q_row + (head * group + g) * q_head) * size
                    for i in range(width):
                        if kind:
                            asked[g, i] = widened(uint16_at(at)[i]) * scale
                        else:
                            asked[g, i] = float32_at(at)[i] * scale
                at = k + (row * k_row + head * k_head) * size
                behind = v + (row * v_row + head * v_head) * size
                for n in range(count):
                    fetch(at + (shown[n] + _AHEAD) * k_column * size, k_bytes)
                    fetch(behind + shown[n] * v_column * size, v_bytes)
                    products(
                        asked.ctypes.data, at + shown[n] * k_column * size, weights.ctypes.data + 4 * n,
                        columns, width, group, kind,
                    )  # fmt: skip
                for g in range(group):
                    highest = weights[g, 0]
                    for n in range(count):
                        highest = max(highest, weights[g, n])
                    total = np.float32(0)
                    for n in range(count):
                        weight = exp(weights[g, n] - highest)
                        weights[g, n] = weight
                        total += weight
                    for n in range(count):
                        weights[g, n] /= total
                sums[:] = 0
                at = v + (row * v_row + head * v_head) * size
                behind = k + (row * k_row + (head + 1) * k_head) * size
                if head + 1 == heads:
                    behind = k + (row + 1) * k_row * size
                for n in range(count):
                    fetch(behind + shown[n] * k_column * size, k_bytes)
                    add_weighted(
                        sums.ctypes.data, at + shown[n] * v_column * size, weights.ctypes.data + 4 * n,
                        columns, v_width, group, kind,
                    )  # fmt: skip
                at = out + (row * heads + head) * group * v_width * size
                for g in range(group):
                    for i in range(v_width):
                        if kind:
                            uint16_at(at)[g * v_width + i] = rounded(sums[g, i])
                        else:
                            float32_at(at)[g * v_width + i] = sums[g, i]

    return compiled("void(int64,int64,int64,int64,int64,UniTuple(int64,3),UniTuple(int64,9),float32)")(attend)


@functools.cache
def adapters(half: bool) -> Any:
    """What adapters add to a layer's output, each row by its own; layers of bf16 if `half`, else of fp32.

    Adapters' numbers are in fp32. It takes:
        x, y: Addresses of the layer's inputs (rows, inputs) and outputs (rows, outputs), which change.
        table: Of (adapters, 5) addresses and counts: A (rank, inputs), B (rank, outputs), rank, the outputs'
            scales and what is added after them; 0 where there is none.
        turns: Of (rows, 2): a row, and which line of the table is its own, in the order to take them: what
            neighbours share is near.
        sizes: rows, inputs, outputs; from one row to the next in x, and in y, in numbers.
    """
    kind, size = (1, 2) if half else (0, 4)

    def adapt(x, y, table, turns, sizes):  # noqa: PLR0912
        rows, inputs, outputs, x_row, y_row = sizes
        lines, turn = int64_at(table), int64_at(turns)
        read = np.empty(inputs, np.float32)
        sums = np.empty(outputs, np.float32)
        for number in range(rows):
            row, line = turn[2 * number], 5 * turn[2 * number + 1]
            a, b, rank = float32_at(lines[line]), float32_at(lines[line + 1]), lines[line + 2]
            scale, shift = float32_at(lines[line + 3]), float32_at(lines[line + 4])
            if rank == 0 and lines[line + 3] == 0 and lines[line + 4] == 0:
                continue
            at = y + row * y_row * size
            for o in range(outputs):
                sums[o] = widened(uint16_at(at)[o]) if kind else float32_at(at)[o]
            if rank > 0:
                from_ = x + row * x_row * size
                for i in range(inputs):
                    read[i] = widened(uint16_at(from_)[i]) if kind else float32_at(from_)[i]
            r = 0
            while r + 4 <= rank:  # four at once: what they share is read once
                h0 = h1 = h2 = h3 = np.float32(0)
                a0, b0 = r * inputs, r * outputs
                for i in range(inputs):
                    value = read[i]
                    h0 += a[a0 + i] * value
                    h1 += a[a0 + inputs + i] * value
                    h2 += a[a0 + 2 * inputs + i] * value
                    h3 += a[a0 + 3 * inputs + i] * value
                for o in range(outputs):
                    one = h0 * b[b0 + o] + h1 * b[b0 + outputs + o]
                    two = h2 * b[b0 + 2 * outputs + o] + h3 * b[b0 + 3 * outputs + o]
                    sums[o] += one + two
                r += 4
            while r < rank:
                product = np.float32(0)
                for i in range(inputs):
                    product += a[r * inputs + i] * read[i]
                for o in range(outputs):
                    sums[o] += product * b[r * outputs + o]
                r += 1
            if lines[line + 3] != 0:
                for o in range(outputs):
                    sums[o] *= scale[o]
            if lines[line + 4] != 0:
                for o in range(outputs):
                    sums[o] += shift[o]
            for o in range(outputs):
                if kind:
                    uint16_at(at)[o] = rounded(sums[o])
                else:
                    float32_at(at)[o] = sums[o]

    return compiled("void(int64,int64,int64,int64,UniTuple(int64,5))")(adapt)


@functools.cache
def scaled(half: bool) -> Any:
    """A layer's inputs as adapters scale them; of bf16 if `half`, else of fp32.

    It takes:
        x, out: Addresses of (rows, inputs), the second without gaps.
        table: Of (adapters): addresses of scales in fp32; 0 where there are none.
        places: Of (rows): whose scales are a row's.
        sizes: rows, inputs; from one row to the next in x, in numbers.
    """
    kind, size = (1, 2) if half else (0, 4)

    def scale_rows(x, out, table, places, sizes):
        rows, inputs, x_row = sizes
        lines, place = int64_at(table), int64_at(places)
        for row in range(rows):
            from_, to = x + row * x_row * size, out + row * inputs * size
            line = lines[place[row]]
            if line == 0:
                for i in range(inputs):
                    if kind:
                        uint16_at(to)[i] = uint16_at(from_)[i]
                    else:
                        float32_at(to)[i] = float32_at(from_)[i]
            else:
                scale = float32_at(line)
                for i in range(inputs):
                    if kind:
                        uint16_at(to)[i] = rounded(widened(uint16_at(from_)[i]) * scale[i])
                    else:
                        float32_at(to)[i] = float32_at(from_)[i] * scale[i]

    return compiled("void(int64,int64,int64,int64,UniTuple(int64,3))")(scale_rows)


@functools.cache
def highest(half: bool) -> Any:
    """Where in each row the highest number is, the first of several; of bf16 if `half`, else of fp32.

    It takes the addresses of (rows, columns), and of (rows) for what it finds; then rows, columns, and from
    one row to the next, in numbers.
    """

    def find_short(x, out, sizes):
        rows, columns, step = sizes
        places = int64_at(out)
        for row in range(rows):
            some = uint16_at(x + row * step * 2)
            most, place = np.int16(-32768), 0
            for i in range(columns):
                most = max(most, ordered_bfloat16(some[i]))
            while ordered_bfloat16(some[place]) != most:
                place += 1
            places[row] = place

    def find(x, out, sizes):
        rows, columns, step = sizes
        places = int64_at(out)
        for row in range(rows):
            some = float32_at(x + row * step * 4)
            most, place = np.int32(-2147483648), 0
            for i in range(columns):
                most = max(most, ordered_float32(some[i]))
            while ordered_float32(some[place]) != most:
                place += 1
            places[row] = place

    return compiled("void(int64,int64,UniTuple(int64,3))")(find_short if half else find)
