"""Pre-coded patches: what `tucodec shards precode` writes and the post-filter trains on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.colour import TRANSFORMS, Planes
from lightning_tucodec.errors import DatasetError

FORMAT = "precoded"
"""Format in the index and extension of the samples in the tars."""


@dataclass(frozen=True)
class Precoded:
    """A patch of a photograph beside the same patch of the coded picture.

    Attributes:
        original: uint8 P×P×3.
        planes: as decoded, 4:2:0; P is even.
        qp: that it was coded at.
        transform: of the planes, one of `colour.TRANSFORMS`.
    """

    original: NDArray[np.uint8]
    planes: Planes
    qp: int
    transform: str

    def cut(self, x: int, y: int, side: int) -> "Precoded":
        """A square of this patch, or of a whole picture; x, y and side are even."""
        half = slice(y // 2, (y + side) // 2), slice(x // 2, (x + side) // 2)
        y_, cb, cr = self.planes
        planes = Planes(y_[y : y + side, x : x + side], cb[half], cr[half])
        original = self.original[y : y + side, x : x + side]
        return Precoded(original, planes, self.qp, self.transform)

    def to_bytes(self) -> bytes:
        """The original row by row, the planes as in `Planes.to_bytes`, QP, number of the transform."""
        original = np.ascontiguousarray(self.original).tobytes()
        tail = bytes([self.qp, TRANSFORMS.index(self.transform)])
        return original + self.planes.to_bytes() + tail

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, side: int) -> "Precoded":
        """The inverse of `to_bytes`.

        Raises:
            DatasetError: the length does not fit the side.
        """
        pixels = 3 * side * side
        if len(data) != 2 * pixels + 2 or data[-1] >= len(TRANSFORMS):
            raise DatasetError(f"{len(data)} bytes are not a pre-coded patch of {side} pixels")
        original = np.frombuffer(data[:pixels], np.uint8).reshape(side, side, 3)
        planes = Planes.from_bytes(bytes(data[pixels:-2]), side, side, "420")
        return cls(original, planes, data[-2], TRANSFORMS[data[-1]])
