"""Integer probabilities of a Laplacian over the Voronoi cells of the quantiser's centres.

Cell k of M lies between the edges k − 1 and k, the midpoints between neighbouring centres; the
end cells are open. With N = 2^PRECISION counts, the interval of cell k is [C(k), C(k + 1)),

    C(0) = 0,   C(M) = N,   C(k) = k + F((edges[k − 1] − mean) / b),

where F is the Laplacian's distribution function times N − M. The k gives every cell at least one
count; F is 0 … N − M, monotone by construction: a table of the upper tail ½·exp(−t) every 1/64,
interpolated linearly, and mirrored for negative arguments. So the M intervals always partition
[0, N), whatever the network emits. Means and edges have MU_BITS fractional bits; the scale is
an index s, b = SCALE_MIN · 2^(s / SCALE_STEPS), which becomes an integer factor for 1 / b.

Floating point builds the tables once, at export; the model file stores them, and coding uses
integers only. Against the exact cell masses the rate grows by less than 0.01 % (measured in
tests/coding/test_laplace.py).
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.kernels import TOTAL
from lightning_tucodec.coding.rans import RansDecoder
from lightning_tucodec.errors import CorruptStreamError, ModelFileError

MU_BITS = 12
"""Fractional bits of means, centres and edges."""

SCALE_MIN = 2.0**-6
"""The scale b at index 0, in the latent's units (unit spacing: 1/64 of it)."""

SCALE_STEPS = 32
"""Scale indices an octave: rounding log b to them costs about 2e-5 bit a symbol."""

SCALE_COUNT = 12 * SCALE_STEPS + 1
"""Number of scales, up to b = 64; indices outside are taken to the nearest."""

_TAIL_END = 20  # 2^28·½·exp(−20) rounds to zero counts
_BINS = 1024


def build_tables(centres: NDArray[np.float64]) -> dict[str, NDArray[np.integer]]:
    """The integer tables of a model, for its file and for `LaplaceTables(**tables)`.

    Args:
        centres: float64[M], the quantiser's centres in increasing order, M ≥ 2.

    Returns:
        The fields of `LaplaceTables`.

    Raises:
        ValueError: the centres are closer to each other than two fixed-point steps, out of
            order, or beyond ±2^18.
    """
    fixed = np.rint(np.asarray(centres, dtype=np.float64) * (1 << MU_BITS))
    if not np.isfinite(fixed).all() or (np.abs(fixed) >= 1 << 30).any():
        raise ValueError("centres must be finite and within ±2^18")
    if fixed.ndim != 1 or fixed.size < 2 or (np.diff(fixed) < 2).any():
        raise ValueError(f"centres must increase by at least {2 / (1 << MU_BITS)}")
    whole = fixed.astype(np.int64)
    scales = SCALE_MIN * np.exp2(np.arange(SCALE_COUNT) / SCALE_STEPS)
    unit_bits = (
        kernels.TAIL_STEP_BITS + kernels.TAIL_FRACTION_BITS + kernels.INVERSE_SCALE_SHIFT - MU_BITS
    )
    t = np.arange((_TAIL_END << kernels.TAIL_STEP_BITS) + 1) / (1 << kernels.TAIL_STEP_BITS)
    tail = np.rint((TOTAL - fixed.size) // 2 * np.exp(-t))
    return {
        "centres": whole.astype(np.int32),
        "edges": ((whole[1:] + whole[:-1]) >> 1).astype(np.int32),
        "inverse_scale": np.rint((1 << unit_bits) / scales).astype(np.int32),
        "tail": tail.astype(np.int32),
    }


@dataclass(frozen=True)
class LaplaceTables:
    """What the coder knows of a model, in integers, as the model file stores it.

    Attributes:
        centres: int32[M], the values of the symbols, MU_BITS fractional bits.
        edges: int32[M − 1], strictly increasing, MU_BITS fractional bits.
        inverse_scale: int32[S], the factor for 1 / b of each scale index.
        tail: int32[T], counts beyond t = 0, 1/64, 2/64, …; falls from (N − M) / 2 to 0.
        bins: int32[B], a cell at or below each bin's first position: where to look for a mean.
        bin_shift: log2 of a bin's width.
    """

    centres: NDArray[np.int32]
    edges: NDArray[np.int32]
    inverse_scale: NDArray[np.int32]
    tail: NDArray[np.int32]
    bins: NDArray[np.int32] = field(init=False, repr=False)
    bin_shift: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse tables on which the compiled loops would not be exact; ModelFileError."""
        for name in ("centres", "edges", "inverse_scale", "tail"):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int32)
            object.__setattr__(self, name, array)
        edges, inverse_scale, tail = self.edges, self.inverse_scale, self.tail
        if (
            any(array.ndim != 1 for array in (self.centres, edges, inverse_scale, tail))
            or edges.size < 1
            or self.centres.size != edges.size + 1
            or (edges[1:] <= edges[:-1]).any()
            or (np.abs(edges.astype(np.int64)) > 1 << 30).any()
            or inverse_scale.size < 1
            or (inverse_scale < 1).any()
            or (inverse_scale > 1 << 30).any()
            or tail.size < 3
            or tail[0] > (TOTAL - self.centres.size) // 2
            or (tail[-2:] != 0).any()
            or (tail[1:] > tail[:-1]).any()
        ):
            raise ModelFileError("the tables of the latent's probabilities are damaged")
        first, last = int(edges[0]), int(edges[-1])
        shift = max(0, (last - first).bit_length() - _BINS.bit_length() + 1)
        positions = first + (np.arange(((last - first) >> shift) + 1, dtype=np.int64) << shift)
        bins = np.searchsorted(edges, positions, side="right").astype(np.int32)
        object.__setattr__(self, "bins", bins)
        object.__setattr__(self, "bin_shift", shift)


def encode_laplace(
    symbols: NDArray[np.integer],
    mu: NDArray[np.int32],
    scale: NDArray[np.integer],
    tables: LaplaceTables,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Intervals of symbols, for `rans.encode`.

    Args:
        symbols: int[N], indices of centres.
        mu: int32[N], means with MU_BITS fractional bits; they may lie outside the centres.
        scale: int[N], indices of scales.
        tables: the model's.

    Returns:
        (start, frequency), uint32[N] each.

    Raises:
        ValueError: a symbol is not the index of a centre, or the shapes differ.
    """
    symbols, mu, scale = (np.ascontiguousarray(a, dtype=np.int32) for a in (symbols, mu, scale))
    if not symbols.shape == mu.shape == scale.shape == (symbols.size,):
        raise ValueError(f"shapes {symbols.shape}, {mu.shape}, {scale.shape}: not one [N]")
    start = np.empty(symbols.size, dtype=np.uint32)
    frequency = np.empty_like(start)
    if not kernels.laplace_intervals(
        symbols, mu, scale, tables.edges, tables.inverse_scale, tables.tail, start, frequency
    ):
        raise ValueError(f"a symbol is outside 0 … {tables.edges.size}")
    return start, frequency


def decode_laplace(
    decoder: RansDecoder,
    mu: NDArray[np.int32],
    scale: NDArray[np.integer],
    tables: LaplaceTables,
) -> NDArray[np.int32]:
    """Take the next N symbols from a stream.

    Args:
        decoder: advanced by what is decoded.
        mu: int32[N], the encoder's means.
        scale: int[N], the encoder's scale indices.
        tables: the model's.

    Returns:
        int32[N], indices of centres.

    Raises:
        CorruptStreamError: the stream ended early.
        ValueError: the shapes differ.
    """
    mu, scale = (np.ascontiguousarray(a, dtype=np.int32) for a in (mu, scale))
    if not mu.shape == scale.shape == (mu.size,):
        raise ValueError(f"shapes {mu.shape} and {scale.shape}: not one [N]")
    symbols = np.empty(mu.size, dtype=np.int32)
    if not kernels.laplace_decode(
        decoder.words,
        decoder.head,
        mu,
        scale,
        tables.edges,
        tables.inverse_scale,
        tables.tail,
        tables.bins,
        tables.bin_shift,
        symbols,
    ):
        raise CorruptStreamError("an entropy-coded segment ends too early")
    return symbols
