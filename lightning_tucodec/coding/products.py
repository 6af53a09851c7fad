"""Compiled loops of the integer layers: products of 16-bit numbers, exact in any order on any machine.

A vector of activations (int32) enters a layer as 13 bits and a common exponent, rounded: |x| ≤ 2^13. A
layer's weights are 16-bit numbers with Σ|w| < 2^18 at every output (`layers.quantised` proves it). So no sum
leaves 32 bits, and processors multiply and add pairs of such numbers in one instruction: five times as fast
as products in float64, with a quarter of the bytes.

The functions here trust their arguments. They stand in one file for the reason given in `kernels`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding.compiling import compiled, emitted

Ints = NDArray[Any]

MANTISSA_BITS = 13  # of the activations that enter a product
SUM_BITS = 31 - MANTISSA_BITS  # Σ|w| stays below 2^SUM_BITS
ACTIVATION_LIMIT = (1 << 27) - 1
SLOPE_BITS = 16  # fractional bits of a leaky ReLU's slope

TILE = 4  # points and outputs that are multiplied at a time
LANES = 8  # 32-bit sums in a vector; each takes two products at once
DEPTH = 2 * LANES
BLOCK = 32  # points that are gathered at a time


class Weights(NamedTuple):
    """A layer of the kind x·W + b, then a leaky ReLU.

    Attributes:
        weight: int16[out, in], with zeros up to multiples of TILE and DEPTH; inputs are ordered tap by tap.
        bias: int64[out], with FRACTION_BITS + shift fractional bits; ½ is added for rounding.
        shift: int64[out], fractional bits of the weights of each output.
        taps: int64[T, 2], (Δi, Δj) from the upper left corner of the padded plane.
        slope: of the leaky ReLU, SLOPE_BITS fractional bits.
    """

    weight: Ints
    bias: Ints
    shift: Ints
    taps: Ints
    slope: int


@emitted
def _multiply_tile(typing: Any, weight: Any, x: Any, sums: Any, j: Any, p: Any) -> Any:
    """sums[p + b, j + a] = Σ weight[j + a, k]·x[p + b, k], a and b < TILE, in 32-bit integers.

    Written in LLVM IR, with portable vectors: from a loop in Python LLVM's optimiser does not find the
    instruction that multiplies and adds pairs of 16-bit numbers.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    int16, int32, int64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    narrow, wide = ir.VectorType(int16, DEPTH), ir.VectorType(int32, DEPTH)
    vector = ir.VectorType(int32, LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            cgutils.create_struct_proxy(kind)(context, builder, value)
            for kind, value in zip((weight, x, sums), arguments[:3], strict=True)
        ]
        first_output, first_point = arguments[3:]
        depth = cgutils.unpack_tuple(builder, arrays[0].shape)[1]
        columns = cgutils.unpack_tuple(builder, arrays[2].shape)[1]

        def rows(array: Any, first: Any) -> list[Any]:
            numbers = [builder.add(first, int64(n)) for n in range(TILE)]
            return [builder.gep(array.data, [builder.mul(n, depth)]) for n in numbers]

        weights, points = rows(arrays[0], first_output), rows(arrays[1], first_point)
        before = builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(int64)
        k.add_incoming(int64(0), before)

        def load(row: Any) -> Any:
            place = builder.bitcast(builder.gep(row, [k]), narrow.as_pointer())
            return builder.sext(builder.load(place, align=2), wide)

        halves = [ir.Constant(vector, [2 * lane + odd for lane in range(LANES)]) for odd in (0, 1)]
        totals = [builder.phi(vector) for _ in range(TILE * TILE)]
        loaded_weights, loaded_points = [load(r) for r in weights], [load(r) for r in points]
        results = []
        for number, total in enumerate(totals):
            b, a = divmod(number, TILE)
            product = builder.mul(loaded_weights[a], loaded_points[b])
            even, odd = (builder.shuffle_vector(product, product, half) for half in halves)
            results.append(builder.add(total, builder.add(even, odd)))
            total.add_incoming(ir.Constant(vector, [0] * LANES), before)
            total.add_incoming(results[-1], loop)
        following = builder.add(k, int64(DEPTH))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        add_up = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(int32, [vector]),
            f"llvm.vector.reduce.add.v{LANES}i32",
        )
        for number, result in enumerate(results):
            b, a = divmod(number, TILE)
            row = builder.mul(builder.add(first_point, int64(b)), columns)
            place = builder.add(row, builder.add(first_output, int64(a)))
            total = builder.call(add_up, [result])
            builder.store(total, builder.gep(arrays[2].data, [place]))
        return context.get_dummy_value()

    return types.void(weight, x, sums, types.int64, types.int64), generate


@compiled
def _exponent(peak: Any) -> Any:
    """The shift that leaves MANTISSA_BITS of the largest activation."""
    exponent = np.int64(0)
    while (peak >> exponent) >> MANTISSA_BITS:
        exponent += 1
    return exponent


@compiled
def _affine(
    layer: Weights, x: Ints, exponent: Ints, n: int, start: Ints, sums: Ints, out: Ints
) -> None:
    """φ(start + x·W + b) of the first n rows of x, up to the next multiple of TILE."""
    weight, bias, shift, slope = layer.weight, layer.bias, layer.shift, layer.slope
    for j in range(0, weight.shape[0], TILE):
        for p in range(0, n, TILE):
            _multiply_tile(weight, x, sums, np.int64(j), np.int64(p))
    for p in range(n):
        left = exponent[p]
        for j in range(bias.size):
            value = start[p, j] + (((np.int64(sums[p, j]) << left) + bias[j]) >> shift[j])
            if value < 0:
                value = (value * slope) >> SLOPE_BITS
            out[p, j] = min(max(value, -ACTIVATION_LIMIT), ACTIVATION_LIMIT)


@compiled
def _gather(
    layer: Weights, plane: Ints, peaks: Ints, i: int, j: int, x: Ints, exponent: Ints, p: int
) -> None:
    """The activations at all taps around a point become row p of x."""
    taps = layer.taps
    channels = plane.shape[2]
    peak = np.int32(0)
    for t in range(taps.shape[0]):
        peak = max(peak, peaks[i + taps[t, 0], j + taps[t, 1]])
    shift = _exponent(peak)
    half = np.int32((1 << shift) >> 1)
    for t in range(taps.shape[0]):
        source = plane[i + taps[t, 0], j + taps[t, 1]]
        target = x[p, t * channels : (t + 1) * channels]
        for c in range(channels):
            target[c] = (source[c] + half) >> shift
    exponent[p] = shift


@compiled
def convolve(
    layer: Weights,
    plane: Ints,
    peaks: Ints,
    top: int,
    bottom: int,
    corner: tuple[int, int],
    out: Ints,
) -> None:
    """The layer at all positions of rows top … bottom − 1, into int32 out[h, corner[0], w, corner[1], C].

    plane is int32 and zero around the layer's input; peaks has the largest absolute value at each position.
    """
    outputs, depth = layer.weight.shape
    width = out.shape[2]
    x = np.zeros((BLOCK, depth), np.int16)
    exponent = np.zeros(BLOCK, np.int64)
    start = np.zeros((BLOCK, outputs), np.int32)
    sums = np.empty((BLOCK, outputs), np.int32)
    result = np.empty((BLOCK, outputs), np.int32)
    for first in range(top * width, bottom * width, BLOCK):
        n = min(BLOCK, bottom * width - first)
        for p in range(n):
            i = (first + p) // width
            _gather(layer, plane, peaks, i, first + p - i * width, x, exponent, p)
        _affine(layer, x, exponent, n, start, sums, result)
        for p in range(n):
            i = (first + p) // width
            row = out[i, corner[0], first + p - i * width, corner[1]]
            for c in range(row.size):
                row[c] = result[p, c]


@compiled
def diagonal(
    layer: Weights, plane: Ints, peaks: Ints, top: int, left: int, slope: int,
    start: Ints, work: tuple[Ints, Ints, Ints], out: Ints,
) -> None:  # fmt: skip
    """The layer at out.shape[0] points: (top, left), (top + 1, left − slope), …"""
    x, exponent, sums = work
    for p in range(out.shape[0]):
        _gather(layer, plane, peaks, top + p, left - slope * p, x, exponent, p)
    _affine(layer, x, exponent, out.shape[0], start, sums, out)


@compiled
def dense(
    layer: Weights, values: Ints, start: Ints, work: tuple[Ints, Ints, Ints], out: Ints
) -> None:
    """start + a layer that reads no neighbours, at n points, int32 n×C."""
    x, exponent, sums = work
    n, channels = values.shape
    for p in range(n):
        peak = np.int32(0)
        for c in range(channels):
            peak = max(peak, abs(values[p, c]))
        shift = _exponent(peak)
        half = np.int32((1 << shift) >> 1)
        for c in range(channels):
            x[p, c] = (values[p, c] + half) >> shift
        exponent[p] = shift
    _affine(layer, x, exponent, n, start, sums, out)


@compiled
def place(values: Ints, plane: Ints, peaks: Ints, top: int, left: int, slope: int) -> None:
    """Put int32 n×C values of a diagonal's points into a plane."""
    for p in range(values.shape[0]):
        peak = np.int32(0)
        target = plane[top + p, left - slope * p]
        for c in range(values.shape[1]):
            target[c] = values[p, c]
            peak = max(peak, abs(values[p, c]))
        peaks[top + p, left - slope * p] = peak
