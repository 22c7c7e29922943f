"""Loops over rows that need nothing but themselves, compiled by numba: norms, gates, rotations, sums.

See `serving.engines.kernels`, whose rules hold here.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from serving.engines.instructions import compiled, exp, float32_at, rounded, uint16_at, widened


@functools.cache
def norm(half: bool) -> Any:
    """Root mean square normalisation, rounded where transformers' models round; of bf16 if `half`, else fp32.

    It takes the addresses of (rows, width), of the weights (width), and of (rows, width) for what it makes,
    all without gaps; then rows and width; then what is added to the mean of squares.
    """
    kind, size = (1, 2) if half else (0, 4)

    def normalise(x, weights, out, sizes, epsilon):
        rows, width = sizes
        for row in range(rows):
            at, to = x + row * width * size, out + row * width * size
            squares = np.float32(0)
            for i in range(width):
                value = widened(uint16_at(at)[i]) if kind else float32_at(at)[i]
                squares += value * value
            factor = np.float32(1.0) / np.sqrt(squares / np.float32(width) + epsilon)
            for i in range(width):
                if kind:
                    value = widened(rounded(widened(uint16_at(at)[i]) * factor))
                    uint16_at(to)[i] = rounded(widened(uint16_at(weights)[i]) * value)
                else:
                    float32_at(to)[i] = float32_at(weights)[i] * (float32_at(at)[i] * factor)

    return compiled("void(int64,int64,int64,UniTuple(int64,2),float32)")(normalise)


@functools.cache
def gated(half: bool) -> Any:
    """SiLU of one tensor times another, rounded in between; of bf16 if `half`, else of fp32.

    It takes the addresses of both, (rows, width), and of (rows, width) without gaps for what it makes; then
    rows, width, and from one row to the next in the first and in the second, in numbers.
    """
    kind, size = (1, 2) if half else (0, 4)

    def gate(x, y, out, sizes):
        rows, width, x_row, y_row = sizes
        for row in range(rows):
            at, by, to = x + row * x_row * size, y + row * y_row * size, out + row * width * size
            for i in range(width):
                value = widened(uint16_at(at)[i]) if kind else float32_at(at)[i]
                part = exp(-abs(value))
                share = (np.float32(1.0) if value >= 0 else part) / (np.float32(1.0) + part)
                if kind:
                    opened = widened(rounded(value * share))
                    uint16_at(to)[i] = rounded(opened * widened(uint16_at(by)[i]))
                else:
                    float32_at(to)[i] = value * share * float32_at(by)[i]

    return compiled("void(int64,int64,int64,UniTuple(int64,4))")(gate)


@functools.cache
def turned(half: bool) -> Any:
    """Turn queries or keys by their positions in place, in halves as Llama does; bf16 if `half`, else fp32.

    It takes the addresses of (rows, heads * width), and of cosines and sines (rows, width) without gaps in a
    row; then rows, heads, width, and from one row to the next in the three, in numbers.
    """
    kind, size = (1, 2) if half else (0, 4)

    def turn(x, cosines, sines, sizes):
        rows, heads, width, x_row, cosine_row, sine_row = sizes
        middle = width // 2
        for row in range(rows):
            cosine, sine = cosines + row * cosine_row * size, sines + row * sine_row * size
            for head in range(heads):
                at = x + (row * x_row + head * width) * size
                for i in range(middle):
                    if kind:
                        some, c, s = uint16_at(at), uint16_at(cosine), uint16_at(sine)
                        one, two = widened(some[i]), widened(some[i + middle])
                        a = widened(rounded(one * widened(c[i])))
                        b = widened(rounded(two * widened(s[i])))
                        d = widened(rounded(two * widened(c[i + middle])))
                        e = widened(rounded(one * widened(s[i + middle])))
                        some[i], some[i + middle] = rounded(a - b), rounded(d + e)
                    else:
                        all_, c_, s_ = float32_at(at), float32_at(cosine), float32_at(sine)
                        first, second = all_[i], all_[i + middle]
                        all_[i] = first * c_[i] - second * s_[i]
                        all_[i + middle] = second * c_[i + middle] + first * s_[i + middle]

    return compiled("void(int64,int64,int64,UniTuple(int64,6))")(turn)


@functools.cache
def added() -> Any:
    """The sums of two tensors of bf16. It takes their addresses, the sums' and how many numbers there are."""

    def add(one, other, out, count):
        first, second, to = uint16_at(one), uint16_at(other), uint16_at(out)
        for i in range(count):
            to[i] = rounded(widened(first[i]) + widened(second[i]))

    return compiled("void(int64,int64,int64,int64)")(add)
