"""Latents to a stream and back, diagonal by diagonal.

Positions with equal d = j + 3·i do not depend on one another (`nn.context`), so the decoder takes them
together: h×w latents need w + 3·(h − 1) steps, which one compiled function takes
(`kernels.decode_strip`). The encoder knows all of ŷ and runs the same integer
network over the whole plane at once; integers make both agree to the last bit.

A stream holds the hyperlatent's symbols, channel by channel, then y's symbols, diagonal by diagonal, from
top to bottom inside a diagonal, all channels of a position together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tucodec.coding import kernels, rans
from lightning_tucodec.coding.categorical import CategoricalTables, decode_table, encode_table
from lightning_tucodec.coding.fixed_point import (
    FRACTION_BITS,
    LIMIT,
    IntegerEntropyModel,
    WholePlane,
)
from lightning_tucodec.coding.laplace import LaplaceTables, decode_laplace, encode_laplace
from lightning_tucodec.errors import CorruptStreamError, ModelFileError
from lightning_tucodec.nn.context import DIAGONAL_SLOPE
from lightning_tucodec.nn.hyperprior import HYPER_STRIDE

Z_LIMIT = 127
"""Hyperlatent symbols are clamped to ±Z_LIMIT around their medians."""


@dataclass(frozen=True)
class EntropyModel:
    """Everything that decides bits, in integers.

    Attributes:
        network: h_s, context and entropy parameters.
        laplace: centres and the Laplacian's tables, for y.
        categorical: one table a channel, for z.
        medians: int32[Z], FRACTION_BITS fractional bits.
    """

    network: IntegerEntropyModel
    laplace: LaplaceTables
    categorical: CategoricalTables
    medians: NDArray[np.int32]

    def __post_init__(self) -> None:
        """Prove that what enters the networks is within their bound; ModelFileError."""
        centres = np.abs(self.laplace.centres.astype(np.int64)).max()
        medians = np.abs(self.medians.astype(np.int64)).max(initial=0)
        if centres > LIMIT or medians + (Z_LIMIT << FRACTION_BITS) > LIMIT:
            raise ModelFileError("a centre or a median lies beyond what the integers can hold")


class Diagonal(NamedTuple):
    """Positions (i, d − 3·i) with top ≤ i < bottom; none on some diagonals of narrow planes."""

    number: int
    top: int
    bottom: int


def diagonals(height: int, width: int) -> Iterator[Diagonal]:
    """All diagonals of an h×w plane in decoding order."""
    for d in range(width + DIAGONAL_SLOPE * (height - 1)):
        top = max(0, -(-(d - width + 1) // DIAGONAL_SLOPE))
        yield Diagonal(d, top, min(height - 1, d // DIAGONAL_SLOPE) + 1)


def _rows(diagonal: Diagonal, width: int) -> slice:
    """The diagonal's positions in a plane flattened row by row: an arithmetic sequence."""
    first = diagonal.top * width + diagonal.number - DIAGONAL_SLOPE * diagonal.top
    step = width - DIAGONAL_SLOPE
    count = diagonal.bottom - diagonal.top
    return slice(first, first + step * count, step) if count > 1 else slice(first, first + count)


def scan(height: int, width: int, has_context: bool = True) -> NDArray[np.int64]:
    """Flat positions of an h×w plane in decoding order."""
    positions = np.arange(height * width)
    if not has_context:
        return positions
    return np.concatenate([positions[_rows(d, width)] for d in diagonals(height, width)])


def _hyper(model: EntropyModel, z: NDArray[np.int32], height: int, width: int) -> Tensor:
    """Γ's part of the first entropy-parameter layer from z's symbols, Z×⌈h/4⌉×⌈w/4⌉."""
    fixed = z.astype(np.float64) * 2.0**FRACTION_BITS + model.medians[:, None, None]
    plane = torch.from_numpy(np.ascontiguousarray(fixed.transpose(1, 2, 0)))
    return model.network.hyper(plane, height, width)


class Symbols(NamedTuple):
    """Symbols of y in coding order, int32[N] each, with the parameters that code them."""

    symbol: NDArray[np.int32]
    mu: NDArray[np.int32]
    scale: NDArray[np.int32]


@torch.inference_mode()
def in_order(model: EntropyModel, z: NDArray[np.int32], y: NDArray[np.int32]) -> Symbols:
    """Symbols and parameters of one strip of latents, shaped as in `encode`, all positions at once."""
    height, width, channels = y.shape
    plane = WholePlane(height, width)
    y_hat = torch.from_numpy(model.laplace.centres.astype(np.float64)[y]).flatten(0, 1)
    plane.put("y", y_hat)
    mu, scale = model.network.parameters(_hyper(model, z, height, width), plane)
    order = scan(height, width, model.network.has_context)
    return Symbols(
        y.reshape(-1, channels)[order].reshape(-1),
        mu.to(torch.int32).numpy()[order].reshape(-1),
        scale.to(torch.int32).numpy()[order].reshape(-1),
    )


def encode(model: EntropyModel, z: NDArray[np.int32], y: NDArray[np.int32]) -> bytes:
    """Code one strip of latents.

    Args:
        model: decides the bits.
        z: int32 Z×⌈h/4⌉×⌈w/4⌉, distances from the medians, within ±Z_LIMIT.
        y: int32 h×w×M, indices of centres.

    Returns:
        The stream.
    """
    return stream_of(z, model.categorical, in_order(model, z, y), model.laplace)


def stream_of(
    z: NDArray[np.int32], categorical: CategoricalTables, y: Symbols, laplace: LaplaceTables
) -> bytes:
    """The stream of z's symbols, Z×h×w, then y's."""
    z_start, z_frequency = encode_table(z.reshape(z.shape[0], -1), categorical)
    y_start, y_frequency = encode_laplace(*y, laplace)
    return rans.encode(
        np.concatenate([z_start, y_start]), np.concatenate([z_frequency, y_frequency])
    )


def decode(model: EntropyModel, stream: bytes, height: int, width: int) -> NDArray[np.int32]:
    """Decode one strip of latents.

    Args:
        model: the encoder's.
        stream: what `encode` returned.
        height, width: of y.

    Returns:
        int32 h×w×M, indices of centres.

    Raises:
        CorruptStreamError: the stream is not one that the encoder writes.
    """
    decoder = rans.RansDecoder(stream)
    _, y = take(model, decoder, height, width)
    decoder.finish()
    return y


@torch.inference_mode()
def take(
    model: EntropyModel, decoder: rans.RansDecoder, height: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The next strip of latents of a stream; random bits give a sample of the model's own P.

    Returns:
        z, int32 Z×⌈h/4⌉×⌈w/4⌉, and y, int32 h×w×M, as `encode` takes them.

    Raises:
        CorruptStreamError: the stream ended early.
    """
    z_size = (-(-height // HYPER_STRIDE), -(-width // HYPER_STRIDE))
    z = decode_table(decoder, z_size[0] * z_size[1], model.categorical)
    z = z.clip(-Z_LIMIT, Z_LIMIT).reshape(-1, *z_size)
    gamma = _hyper(model, z, height, width)
    y = np.empty((height, width, model.network.latent_channels), np.int32)
    if model.network.has_context:
        tables = model.laplace
        sound = kernels.decode_strip(
            model.network.compiled,
            kernels.Tables(
                tables.centres,
                tables.edges,
                tables.inverse_scale,
                tables.tail,
                tables.bins,
                tables.bin_shift,
            ),
            gamma.numpy(),
            decoder.words,
            decoder.head,
            y,
        )
        if not sound:
            raise CorruptStreamError("an entropy-coded segment ends too early")
    else:
        mu, scale = model.network.parameters(gamma, WholePlane(height, width))
        symbols = decode_laplace(
            decoder,
            mu.to(torch.int32).numpy().reshape(-1),
            scale.to(torch.int32).numpy().reshape(-1),
            model.laplace,
        )
        y[:] = symbols.reshape(y.shape)
    return z, y
