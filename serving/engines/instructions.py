"""What compiled loops are made of: addresses of numbers, bf16, and numbers that are worked on side by side.

Needs numba. Its cache of compiled loops looks at the file of a loop alone: after a change here, delete
`__pycache__` beside this file.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: Sums may be taken in any order; infinities and NaN keep their meaning.
_MATHS = {"reassoc", "contract", "nsz", "arcp"}
#: Numbers that are worked on side by side, at most; a processor with narrower registers takes several.
_LANES = 16
_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def compiled(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compile a loop at once, or take it from where it was kept when it was compiled before."""

    def compile_now(loop: Callable[..., None]) -> Any:
        # numpy's divisions do not look for zeros, which would keep numbers from being divided side by side.
        options = {"nogil": True, "fastmath": _MATHS, "error_model": "numpy"}
        try:
            return njit(signature, cache=True, **options)(loop)
        except RuntimeError:  # there is nowhere to keep it
            return njit(signature, **options)(loop)

    return compile_now


class _Lanes:
    """Numbers side by side, as instructions.

    Args:
        builder: llvmlite's.
        width: How many numbers follow one another in memory.
    """

    def __init__(self, builder: Any, width: int) -> None:
        self.builder = builder
        self.lanes = next(n for n in (_LANES, 8, 4, 2, 1) if width % n == 0)
        self.count = width // self.lanes
        self.floats = ir.VectorType(_F32, self.lanes)

    def _at(self, address: Any, index: int, size: int, kind: Any) -> Any:
        offset = ir.Constant(_I64, index * self.lanes * size)
        return self.builder.inttoptr(self.builder.add(address, offset), kind.as_pointer())

    def load(self, address: Any, index: int, *, half: bool = False) -> Any:
        """The numbers at a place, of fp32 or of bf16, which is the upper half of fp32."""
        if not half:
            return self.builder.load(self._at(address, index, 4, self.floats), align=4)
        whole = ir.VectorType(_I32, self.lanes)
        bits = self.builder.load(self._at(address, index, 2, ir.VectorType(_I16, self.lanes)), align=2)
        upper = self.builder.shl(self.builder.zext(bits, whole), whole([16] * self.lanes))
        return self.builder.bitcast(upper, self.floats)

    def store(self, value: Any, address: Any, index: int) -> None:
        self.builder.store(value, self._at(address, index, 4, self.floats), align=4)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        flags = ("contract",)  # to one instruction
        return self.builder.fadd(self.builder.fmul(a, b, flags=flags), c, flags=flags)

    def same(self, number: Any) -> Any:
        """One number in all lanes."""
        one = self.builder.insert_element(ir.Constant(self.floats, ir.Undefined), number, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, one, zeros)

    def sum(self, value: Any) -> Any:
        kind = ir.FunctionType(_F32, [_F32, self.floats])
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        module = self.builder.module
        known = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(known, [_F32(0.0), value], fastmath=("reassoc",))


@intrinsic(prefer_literal=True)
def products(_, asked, keys, out, step, width, group, half):
    """Products of some vectors with one, each summed: out[g * step] = sum(asked[g, :] * keys[:])."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = _Lanes(builder, width.literal_value)
        key = [lanes.load(values[1], i, half=bool(half.literal_value)) for i in range(lanes.count)]
        for g in range(group.literal_value):
            first = g * lanes.count
            total = builder.fmul(lanes.load(values[0], first), key[0])
            for i in range(1, lanes.count):
                total = lanes.multiply_add(lanes.load(values[0], first + i), key[i], total)
            at = builder.add(values[2], builder.mul(values[3], _I64(4 * g)))
            builder.store(lanes.sum(total), builder.inttoptr(at, _F32.as_pointer()))
        return context.get_dummy_value()

    if not all(isinstance(t, types.IntegerLiteral) for t in (width, group, half)):
        return None
    return types.none(types.int64, types.int64, types.int64, types.int64, width, group, half), build


@intrinsic(prefer_literal=True)
def add_weighted(_, sums, vector, weights, step, width, group, half):
    """Add one vector to several, as each weighs it: sums[g, :] += weights[g * step] * vector[:]."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = _Lanes(builder, width.literal_value)
        value = [lanes.load(values[1], i, half=bool(half.literal_value)) for i in range(lanes.count)]
        for g in range(group.literal_value):
            at = builder.add(values[2], builder.mul(values[3], _I64(4 * g)))
            weight = lanes.same(builder.load(builder.inttoptr(at, _F32.as_pointer())))
            for i in range(lanes.count):
                place = g * lanes.count + i
                total = lanes.multiply_add(weight, value[i], lanes.load(values[0], place))
                lanes.store(total, values[0], place)
        return context.get_dummy_value()

    if not all(isinstance(t, types.IntegerLiteral) for t in (width, group, half)):
        return None
    return types.none(types.int64, types.int64, types.int64, types.int64, width, group, half), build


@intrinsic(prefer_literal=True)
def fetch(_, address, size):
    """Have so many bytes brought nearer while other work goes on; the address need not be anybody's."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        module, name = builder.module, "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        known = module.globals.get(name) or ir.Function(module, kind, name)
        for start in range(0, size.literal_value, 64):
            at = builder.inttoptr(builder.add(values[0], _I64(start)), byte)
            builder.call(known, [at, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    if not isinstance(size, types.IntegerLiteral):
        return None
    return types.none(types.int64, size), build


@intrinsic
def float32_at(_, address):
    """The fp32 numbers at an address."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), build


@intrinsic
def uint16_at(_, address):
    """The same of whole numbers of two bytes."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.int64), build


@intrinsic
def int64_at(_, address):
    """The same of whole numbers of eight bytes."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), build


@intrinsic
def uint8_at(_, address):
    """The same of bytes."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), build


@njit(inline="always")
def widened(bits):
    """bf16 as fp32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def rounded(value):
    """fp32 as bf16, to the nearest, to the even one of two."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(inline="always")
def ordered_bfloat16(bits):
    """bf16 as a whole number of the same order: those are compared side by side."""
    whole = np.int16(bits)
    return np.int16(whole ^ np.int16(np.int16(whole >> 15) & np.int16(0x7FFF)))


@njit(inline="always")
def ordered_float32(value):
    """The same of fp32."""
    whole = np.float32(value).view(np.int32)
    return np.int32(whole ^ np.int32(np.int32(whole >> 31) & np.int32(0x7FFFFFFF)))


@njit(inline="always")
def exp(x):
    """The exponential function, for x up to 0, to seven digits; a library's takes no numbers side by side."""
    some = x if x > np.float32(-87.0) else np.float32(-87.0)
    power = some * np.float32(1.4426950408889634)
    whole = np.int32(power - np.float32(0.5))  # the nearest, as what is cut off is below 0
    rest = (power - np.float32(whole)) * np.float32(0.6931471805599453)
    # Taylor's series, for up to half of a power of two.
    total = np.float32(1 / 720) + rest * np.float32(1 / 5040)
    total = np.float32(1 / 120) + rest * total
    total = np.float32(1 / 24) + rest * total
    total = np.float32(1 / 6) + rest * total
    total = np.float32(0.5) + rest * total
    total = np.float32(1.0) + rest * total
    total = np.float32(1.0) + rest * total
    return total * np.int32(np.int32(whole + np.int32(127)) << np.int32(23)).view(np.float32)
