"""Symbols with one fixed integer table per channel (the hyperlatent z), and how tables are made.

Channel c codes the values offset[c] … offset[c] + L − 2 with the cells 0 … L − 2 of its table.
The last cell, L − 1, escapes to any other value: its rank among those (1, 3, 5, … above the
range, 2, 4, 6, … below it) follows as a bit length, uniform over 32, and the bits below the
leading one, uniform: 5 + floor(log2 rank) bits, and a bounded number of steps on any stream.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.kernels import TOTAL
from lightning_tucodec.coding.rans import RansDecoder
from lightning_tucodec.errors import CorruptStreamError, ModelFileError


def build_cdf(pmf: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Cumulative counts of probabilities: the last is 2^PRECISION and every cell has at least 1.

    Args:
        pmf: float64[..., L], not negative; the last axis need not sum to one exactly.

    Returns:
        uint32[..., L + 1], the first entry 0; each cell within 1 count of its share of the
        2^PRECISION − L counts beyond the floor.

    Raises:
        ValueError: an entry is negative or not finite, or a distribution sums to zero.
    """
    pmf = np.asarray(pmf, dtype=np.float64)
    cumulative = np.cumsum(pmf, axis=-1)
    total = cumulative[..., -1:]
    if not np.isfinite(total).all() or (pmf < 0).any() or (total <= 0).any():
        raise ValueError("probabilities must be finite, not negative and not all zero")
    cells = pmf.shape[-1]
    counts = np.rint(cumulative / total * (TOTAL - cells)) + np.arange(1, cells + 1)
    return np.concatenate([np.zeros_like(total), counts], axis=-1).astype(np.uint32)


@dataclass(frozen=True)
class CategoricalTables:
    """The integer distributions of a model's channels, as the model file stores them.

    Attributes:
        cumulative: uint32[channels, L + 1], each row strictly increasing from 0 to 2^PRECISION;
            the last cell is the escape.
        offset: int32[channels], the value of cell 0.
    """

    cumulative: NDArray[np.uint32]
    offset: NDArray[np.int32]

    def __post_init__(self) -> None:
        """Refuse tables on which the compiled loops would not be safe; ModelFileError."""
        cumulative = np.ascontiguousarray(self.cumulative, dtype=np.uint32)
        offset = np.ascontiguousarray(self.offset, dtype=np.int32)
        if (
            cumulative.ndim != 2
            or offset.shape != cumulative.shape[:1]
            or cumulative.shape[1] < 2
            or (cumulative[:, 0] != 0).any()
            or (cumulative[:, -1] != TOTAL).any()
            or (cumulative[:, 1:] <= cumulative[:, :-1]).any()
            or (np.abs(offset.astype(np.int64)) >= 1 << 30).any()
        ):
            raise ModelFileError("the tables of the hyperlatent are damaged")
        object.__setattr__(self, "cumulative", cumulative)
        object.__setattr__(self, "offset", offset)


def encode_table(
    values: NDArray[np.integer], tables: CategoricalTables
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Intervals of integers, channel after channel.

    Args:
        values: int[channels, n].
        tables: one distribution a channel.

    Returns:
        (start, frequency), uint32 both, one interval a value and three for an escaped one.

    Raises:
        ValueError: the shape does not fit, or a value lies 2^27 or more outside its table.
    """
    values = np.ascontiguousarray(values, dtype=np.int64)
    if values.ndim != 2 or values.shape[0] != tables.offset.size:
        raise ValueError(f"values of shape {values.shape} for {tables.offset.size} channels")
    index = values - tables.offset[:, None]
    escaped = int(((index < 0) | (index >= tables.cumulative.shape[1] - 2)).sum())
    start = np.empty(values.size + 2 * escaped, dtype=np.uint32)
    frequency = np.empty_like(start)
    written = kernels.table_intervals(values, tables.cumulative, tables.offset, start, frequency)
    if written < 0:
        raise ValueError("a value lies too far outside its table")
    return start, frequency


def decode_table(decoder: RansDecoder, n: int, tables: CategoricalTables) -> NDArray[np.int32]:
    """Take the next channels × n values from a stream.

    Args:
        decoder: advanced by what is decoded.
        n: values a channel.
        tables: those of the encoder.

    Returns:
        int32[channels, n].

    Raises:
        CorruptStreamError: the stream ended early or holds what no encoder writes.
    """
    values = np.empty((tables.offset.size, n), dtype=np.int32)
    if not kernels.table_decode(
        decoder.words, decoder.head, tables.cumulative, tables.offset, values
    ):
        raise CorruptStreamError("an entropy-coded segment ends too early")
    return values
