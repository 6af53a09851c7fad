"""Hyperprior networks with a raster-scan context (Minnen, Ballé and Toderici, NeurIPS 2018) on diagonals.

    z ─ h_s ─ params ──────────┐
    ŷ ─ masked 5×5 ─ context ──┴─ 1×1 layers ─ σ, μ       y ≈ ŷ = k + μ,  k = round(y − μ)

A position (i, j) reads positions (i + Δi, j + Δj) with Δj + 3·Δi ≤ −1: positions with equal j + 3·i do not
depend on one another, and the diagonals in their order respect the raster order. The network needs no change.
Since ŷ holds μ, the encoder too goes diagonal by diagonal, through the same integers.

A stream holds z's symbols, channel by channel, then k, diagonal by diagonal, from top to bottom inside a
diagonal, all channels of a position together: as in `wavefront`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_tucodec.coding import products, rans
from lightning_tucodec.coding.categorical import (
    CategoricalTables,
    build_cdf,
    decode_table,
)
from lightning_tucodec.coding.gaussian import SYMBOL_LIMIT, gaussian_tables, scale_indices
from lightning_tucodec.coding.laplace import decode_laplace
from lightning_tucodec.coding.layers import (
    FRACTION_BITS,
    LIMIT,
    Convolution,
    Plane,
    Work,
    quantised,
)
from lightning_tucodec.coding.wavefront import Symbols, diagonals, scan, stream_of
from lightning_tucodec.nn.context import DIAGONAL_SLOPE

REACH = 2
"""The context reads so many rows above and so many columns to either side."""

MEAN_LIMIT = (1 << 23) - 1
"""Means lie in ±MEAN_LIMIT, just below ±2048: so ŷ is exact in float32."""

Z_LIMIT = 4095
"""Symbols of z are clamped to ±Z_LIMIT around their medians."""


@dataclass(frozen=True)
class RasterModel:
    """Everything that decides bits, in integers.

    Attributes:
        hyper: h_s, then the part of the first 1×1 layer that reads its result.
        context: the masked convolution; its taps count from REACH rows and columns outside the plane.
        parameters: the 1×1 layers; the first one has no bias, and reads the context. The last one gives
            the σ of every channel, then every μ.
        categorical: one table a channel, for z.
        medians: int32[Z], FRACTION_BITS fractional bits.
        lowest_scale: lower bound of σ; FRACTION_BITS fractional bits.
    """

    hyper: tuple[Convolution, ...]
    context: products.Weights
    parameters: tuple[products.Weights, ...]
    categorical: CategoricalTables
    medians: NDArray[np.int32]
    lowest_scale: int

    @property
    def channels(self) -> int:
        """M, the channels of y."""
        return self.parameters[-1].bias.size // 2

    @property
    def factor(self) -> int:
        """Positions of y per position of z, along each side."""
        return int(np.prod([layer.factor for layer in self.hyper]))

    def gamma(self, z: NDArray[np.int32]) -> Plane:
        """What h_s adds to the first 1×1 layer, from z's symbols Z×h×w."""
        fixed = (z.astype(np.int64) << FRACTION_BITS) + self.medians[:, None, None]
        x = fixed.clip(-LIMIT, LIMIT).astype(np.int32).transpose(1, 2, 0)
        x = np.ascontiguousarray(x)
        for layer in self.hyper:
            x = layer(x)
        return x


def try_out() -> None:
    """Code a few latents with a model of one Gaussian everywhere, so that all loops are compiled."""
    scale_and_mean = torch.tensor([1.0, 0.0])
    model = RasterModel(
        (Convolution((quantised("hyper", torch.zeros(2, 1), scale_and_mean),), 0, 1),),
        quantised("context", torch.zeros(2, 1), None, [(0, 0)]),
        (quantised("parameters", torch.zeros(2, 2), None),),
        CategoricalTables(build_cdf(np.ones((1, 4))), np.array([-1], np.int32)),
        np.zeros(1, np.int32),
        1 << FRACTION_BITS,
    )
    z, y = np.zeros((1, 2, 2), np.int32), np.ones((2, 2, 1), np.float32)
    assert (decode(model, encode(model, z, y), 2, 2) == y).all()


_Take = Callable[[slice, Plane, Plane], NDArray[np.int32]]


def _walk(model: RasterModel, gamma: Plane, take: _Take) -> Plane:
    """ŷ, int32 h×w×M with FRACTION_BITS fractional bits.

    Args:
        model: decides the bits.
        gamma: from z.
        take: returns k, int32 n×M, of the positions of one diagonal; it gets their places in coding order,
            their means n×M and their scales n×M.
    """
    height, width = gamma.shape[:2]
    gamma = gamma.reshape(height * width, -1)[scan(height, width)]
    most = min(height, -(-width // DIAGONAL_SLOPE))
    context = Work(model.context, most)
    works = [Work(layer, most) for layer in model.parameters]
    plane = np.zeros((height + REACH, width + 2 * REACH, model.channels), np.int32)
    peaks = np.zeros(plane.shape[:2], np.int32)
    done = 0
    for d, top, bottom in diagonals(height, width):
        n = max(0, bottom - top)
        here = slice(done, done + n)
        done += n
        if not n:
            continue
        left = d - DIAGONAL_SLOPE * top
        x = context.out[:n]
        products.diagonal(
            model.context, plane, peaks, top, left, DIAGONAL_SLOPE, context.zeros, context.inputs, x
        )
        for number, (layer, work) in enumerate(zip(model.parameters, works, strict=True)):
            out = work.out[:n]
            products.dense(layer, x, work.zeros if number else gamma[here], work.inputs, out)
            x = out
        scale = scale_indices(x[:, : model.channels], model.lowest_scale)
        mean = x[:, model.channels :].clip(-MEAN_LIMIT, MEAN_LIMIT)
        values = (take(here, mean, scale) << FRACTION_BITS) + mean
        products.place(values, plane, peaks, top + REACH, left + REACH, DIAGONAL_SLOPE)
    return plane[REACH:, REACH:-REACH]


def encode(model: RasterModel, z: NDArray[np.int32], y: NDArray[np.float32]) -> bytes:
    """Code the latents of an image.

    Args:
        model: decides the bits.
        z: int32 Z×h/4×w/4, distances from the medians; beyond ±Z_LIMIT they are clamped.
        y: float32 h×w×M, not yet rounded; h and w are `model.factor` times those of z.

    Returns:
        The stream.
    """
    z = z.clip(-Z_LIMIT, Z_LIMIT)
    height, width, channels = y.shape
    rows = y.reshape(-1, channels)[scan(height, width)]
    symbols = np.empty(rows.shape, np.int32)
    scales = np.empty(rows.shape, np.int32)

    def take(here: slice, mean: Plane, scale: Plane) -> NDArray[np.int32]:
        distance = np.rint(rows[here] - mean * 2.0**-FRACTION_BITS)
        symbols[here] = distance.clip(-SYMBOL_LIMIT, SYMBOL_LIMIT)
        scales[here] = scale
        return symbols[here]

    _walk(model, model.gamma(z), take)
    indices = symbols.reshape(-1) + np.int32(SYMBOL_LIMIT)
    y_symbols = Symbols(indices, np.zeros_like(indices), scales.reshape(-1))
    return stream_of(z, model.categorical, y_symbols, gaussian_tables())


def decode(model: RasterModel, stream: bytes, height: int, width: int) -> NDArray[np.float32]:
    """Decode the latents of an image.

    Args:
        model: the encoder's.
        stream: what `encode` returned.
        height, width: of z.

    Returns:
        ŷ, float32 h×w×M, the same on every machine.

    Raises:
        CorruptStreamError: the stream is not one that the encoder writes.
    """
    decoder = rans.RansDecoder(stream)
    _, y_hat = take(model, decoder, height, width)
    decoder.finish()
    return y_hat


def take(
    model: RasterModel, decoder: rans.RansDecoder, height: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The next latents of a stream; random bits give a sample of the model's own P.

    Returns:
        z, int32 Z×h×w, and ŷ, float32 h×w×M.

    Raises:
        CorruptStreamError: the stream ended early.
    """
    z = decode_table(decoder, height * width, model.categorical)
    z = z.clip(-Z_LIMIT, Z_LIMIT).reshape(-1, height, width)
    tables = gaussian_tables()

    def symbols(here: slice, mean: Plane, scale: Plane) -> NDArray[np.int32]:
        zeros = np.zeros(mean.size, np.int32)
        indices = decode_laplace(decoder, zeros, scale.reshape(-1), tables)
        return indices.reshape(mean.shape) - np.int32(SYMBOL_LIMIT)

    fixed = _walk(model, model.gamma(z), symbols)
    return z, fixed.astype(np.float32) * np.float32(2.0**-FRACTION_BITS)
