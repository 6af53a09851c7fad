"""Integer probabilities of a rounded Gaussian, as CompressAI's networks model y − μ.

`laplace` needs only a table of its distribution's upper tail. Here it is the Gaussian's,

    Q(t) = ½·erfc(t / √2),

symbols are whole numbers around a mean of zero, and cells are one wide. A stream depends on these tables, and
the model files of such networks do not hold them: they are computed in exact decimal arithmetic, the same on
every machine.
"""

import functools
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.laplace import MU_BITS, LaplaceTables

SYMBOL_LIMIT = 2047
"""Symbols lie in ±SYMBOL_LIMIT: eight standard deviations of the largest scale."""

SCALE_BITS = 6
"""Scale indices an octave: 2^SCALE_BITS; rounding σ to them costs about 2e-5 bit a symbol."""

SCALE_OCTAVE = 8
"""The smallest scale has so many bits, of which MU_BITS are fractional: 1/16."""

SCALE_COUNT = 12 << SCALE_BITS
"""Number of scales, up to σ = 256."""

_TAIL_END = 6.25  # 2^28·Q(6.25) rounds to zero counts


@functools.cache
def gaussian_tables() -> LaplaceTables:
    """The tables of the integers k, |k| ≤ SYMBOL_LIMIT; the index of symbol k is k + SYMBOL_LIMIT."""
    symbols = np.arange(-SYMBOL_LIMIT, SYMBOL_LIMIT + 1, dtype=np.int64)
    steps = int(_TAIL_END * (1 << kernels.TAIL_STEP_BITS))
    counts = kernels.TOTAL - symbols.size
    with localcontext() as context:
        context.prec = 50
        factor = 1 / (2 * _pi()).sqrt()
        step = Decimal(1) / (1 << kernels.TAIL_STEP_BITS)
        tail = [int(counts * _tail(n * step, factor) + Decimal("0.5")) for n in range(steps)]
    unit_bits = (
        kernels.TAIL_STEP_BITS + kernels.TAIL_FRACTION_BITS + kernels.INVERSE_SCALE_SHIFT - MU_BITS
    )
    inverse = []
    for index in range(SCALE_COUNT):
        octave, part = divmod(index, 1 << SCALE_BITS)
        # σ in the middle of its cell, with MU_BITS + 1 fractional bits.
        middle = ((2 << SCALE_BITS) + 2 * part + 1) << (octave + SCALE_OCTAVE - SCALE_BITS)
        inverse.append(((2 << (unit_bits + MU_BITS + 1)) // middle + 1) // 2)
    tail[0] = min(tail[0], counts // 2)
    return LaplaceTables(
        centres=(symbols << MU_BITS).astype(np.int32),
        edges=((2 * symbols[1:] - 1) << (MU_BITS - 1)).astype(np.int32),
        inverse_scale=np.array(inverse, np.int32),
        tail=np.array([*tail, 0, 0], np.int32),
    )


def scale_indices(scale: NDArray[np.int32], lowest: int) -> NDArray[np.int32]:
    """Indices of scales with MU_BITS fractional bits; smaller ones count as `lowest`.

    A number's exponent and the first bits of its mantissa are its place on the grid. They are read from
    float32, in which these numbers are exact.
    """
    exact = scale.clip(lowest, 1 << (SCALE_OCTAVE + 12)).astype(np.float32)
    place = (exact.view(np.int32) >> (23 - SCALE_BITS)) - ((127 + SCALE_OCTAVE) << SCALE_BITS)
    return place.clip(0, SCALE_COUNT - 1)


def _pi() -> Decimal:
    """π, by Machin's formula."""

    def arctan_of_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k = 1
        while abs(power) > Decimal(10) ** -55:
            power /= -n * n
            k += 2
            total += power / k
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))


def _tail(t: Decimal, factor: Decimal) -> Decimal:
    """Q(t), by the series of ½ − Q."""
    term, total, n = t, t, 0
    while abs(term) > Decimal(10) ** -40:
        n += 1
        term *= -t * t / (2 * n)
        total += term / (2 * n + 1)
    return Decimal("0.5") - factor * total
