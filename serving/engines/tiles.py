"""Products of a few rows with weights that oneDNN laid out, by the processor's matrix units (AMX).

A step of decoding reads all weights once, and how soon they come is its speed. oneDNN's product of 32 rows
waits for memory where this loop has asked for it before: with SmolLM2-135M's layers it took 0.70 to 0.77 of
the time, and gave the same bits (`benchmarks/serving.py` counts whole answers). Many rows are oneDNN's.

Needs numba, like `serving.engines.kernels`.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from serving.engines.instructions import compiled, float32_at, rounded, uint16_at, widened

#: Rows of a product at most: two tiles of sixteen.
MOST_ROWS = 32
#: Outputs, and inputs, that are worked on together, and the bytes of their weights.
BLOCK = 32
_BLOCK_BYTES = 2 * BLOCK * BLOCK
#: How far before their turn weights are asked for, in bytes. From 8 to 32 KiB the time was the same.
_AHEAD = 16384

llvmlite.binding.initialize_native_asmparser()


def _instruction(text: str, operands: int) -> Any:
    """An instruction of the matrix units, of so many addresses or steps; none is moved past another."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.asm(kind, text, ",".join(["r"] * operands + ["~{memory}"]), list(values), True)
        return context.get_dummy_value()

    if operands == 0:
        return intrinsic(lambda _: (types.none(), build))
    if operands == 1:
        return intrinsic(lambda _, a: (types.none(types.int64), build))
    return intrinsic(lambda _, a, b: (types.none(types.int64, types.int64), build))


_configure, _release = _instruction("ldtilecfg ($0)", 1), _instruction("tilerelease", 0)
_soon = _instruction("prefetcht1 ($0)", 1)
# Sums of the upper and lower rows for the left and right outputs; rows; weights.
_zero0, _zero1, _zero2, _zero3 = (_instruction(f"tilezero %tmm{n}", 0) for n in range(4))
_store0, _store1, _store2, _store3 = (_instruction(f"tilestored %tmm{n}, ($0,$1,1)", 2) for n in range(4))
_upper, _lower, _left, _right = (_instruction(f"tileloadd ($0,$1,1), %tmm{n}", 2) for n in range(4, 8))
_upper_left, _upper_right = (_instruction(f"tdpbf16ps %tmm{w}, %tmm4, %tmm{w - 6}", 0) for w in (6, 7))
_lower_left, _lower_right = (_instruction(f"tdpbf16ps %tmm{w}, %tmm5, %tmm{w - 4}", 0) for w in (6, 7))


@functools.cache
def product() -> Any:
    """Rows of bf16 times weights, summed in fp32.

    It takes:
        x, weights, bias, more, out: Addresses of (rows, inputs) of bf16; of bf16 by blocks, (outputs / 32,
            inputs / 32, 16, 32, 2), of which the last are two inputs of one output; of (outputs) of fp32,
            or 0; of (rows, outputs) of bf16, or 0, which is added to what was rounded, and may be `out`; of
            (rows, outputs) of bf16. The last two are without gaps.
        sizes: rows, 1 to 32; inputs and outputs, by 32; from one row to the next in x, in numbers.
    """

    def multiply(x, weights, bias, more, out, sizes):  # noqa: PLR0912
        rows, inputs, outputs, x_row = sizes
        upper, lower = min(rows, 16), max(rows - 16, 0)
        shapes = np.zeros(64, np.uint8)  # of tiles, as the processor reads them
        shapes[0] = 1
        for tile in range(8):
            shapes[16 + 2 * tile] = 64
            shapes[48 + tile] = 16
        for tile in (0, 1, 4):
            shapes[48 + tile] = upper
        if lower > 0:
            for tile in (2, 3, 5):
                shapes[48 + tile] = lower
        sums = np.empty((32, 32), np.float32)
        to = sums.ctypes.data
        _configure(shapes.ctypes.data)
        steps = inputs // BLOCK
        for block in range(outputs // BLOCK):
            _zero0()
            _zero1()
            _zero2()
            _zero3()
            at = weights + block * steps * _BLOCK_BYTES
            for k in range(steps):
                for line in range(0, _BLOCK_BYTES, 64):
                    _soon(at + _AHEAD + line)
                _upper(x + 64 * k, 2 * x_row)
                _left(at, 128)
                _right(at + 64, 128)
                _upper_left()
                _upper_right()
                if lower > 0:
                    _lower(x + 32 * x_row + 64 * k, 2 * x_row)
                    _lower_left()
                    _lower_right()
                at += _BLOCK_BYTES
            _store0(to, 128)
            _store1(to + 64, 128)
            if lower > 0:
                _store2(to + 2048, 128)
                _store3(to + 2112, 128)
            for row in range(rows):
                place = 2 * (row * outputs + BLOCK * block)
                made, before, steady = uint16_at(out + place), uint16_at(more + place), float32_at(bias)
                if bias != 0:
                    for i in range(BLOCK):
                        sums[row, i] += steady[BLOCK * block + i]
                if more != 0:
                    for i in range(BLOCK):
                        made[i] = rounded(widened(before[i]) + widened(rounded(sums[row, i])))
                else:
                    for i in range(BLOCK):
                        made[i] = rounded(sums[row, i])
        _release()

    return compiled("void(int64,int64,int64,int64,int64,UniTuple(int64,4))")(multiply)
