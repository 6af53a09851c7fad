"""RGB to 10-bit planes and back, 4:4:4 or 4:2:0.

Two transforms: `bt709`, full range, as players know it; and `orthonormal`, whose axes are the gray
axis, blue against green, and red against green and blue, all of one scale. RGB-PSNR weighs an error
of every sample of an orthonormal plane alike, so that an encoder that minimises the sum of squared
errors over its samples minimises that of RGB. docs/experiments.md has the gain.

Siting: a chroma sample of 4:2:0 lies in the centre of its 2×2 luma samples. The decoder
interpolates bilinearly (weights 3/4 and 1/4 along each axis, edge samples repeated); the encoder's
chroma is the least-squares fit to that: the half-resolution plane whose interpolation comes closest
to the full one. On training photographs coded at QP 37 this pair was better at equal rate than box,
cubic and Lanczos filters, and centred siting better than left; the ceiling that the conversion
alone sets on RGB-PSNR (`conversion_ceiling`) is 1.9 dB higher than that of Lanczos-3 both ways.

`turned` rotates the two chroma planes of an orthonormal picture into each other. Along the principal
axes of an image's own chroma (`chroma_turn`) one of the planes has less to code.

The way back uses elementwise fp32 operations only, each correctly rounded, so that the same planes
give the same pixels on every machine.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import CorruptStreamError

BIT_DEPTH = 10
_PEAK = (1 << BIT_DEPTH) - 1
_MIDDLE = 1 << (BIT_DEPTH - 1)
_KR, _KB = 0.2126, 0.0722
_KG = 1.0 - _KR - _KB

_MATRICES = {
    "bt709": np.array(
        [
            [_KR, _KG, _KB],
            [-_KR / (2 * (1 - _KB)), -_KG / (2 * (1 - _KB)), 0.5],
            [0.5, -_KG / (2 * (1 - _KR)), -_KB / (2 * (1 - _KR))],
        ]
    ),
    # A third of what keeps lengths, so that luma of white is one.
    "orthonormal": np.array(
        [[1.0, 1.0, 1.0], [0.0, -(1.5**0.5), 1.5**0.5], [2**0.5, -(0.5**0.5), -(0.5**0.5)]]
    )
    / 3,
}
"""Rows make luma and two chroma planes of R, G, B in [0, 1]; luma is in [0, 1], chroma within ±½."""

TRANSFORMS = tuple(_MATRICES)
"""Names of the colour transforms."""

_WORDS = {
    "bt709": "Y'CbCr BT.709 full range",
    "orthonormal": "orthonormal (R+G+B, B-G, 2R-G-B)",
}


def colour_path(chroma: str, transform: str = "bt709") -> str:
    """The conversions in words, for reports."""
    if chroma == "420":
        return (
            f"RGB -> {_WORDS[transform]}, 10 bit, 4:2:0 centre-sited, least-squares chroma -> "
            "bilinear chroma -> RGB 8 bit"
        )
    return f"RGB -> {_WORDS[transform]}, 10 bit, 4:4:4 -> RGB 8 bit"


class Planes(NamedTuple):
    """10-bit planes: luma H×W, chroma of the same size (4:4:4) or half of it (4:2:0), uint16."""

    y: NDArray[np.uint16]
    cb: NDArray[np.uint16]
    cr: NDArray[np.uint16]

    def to_bytes(self) -> bytes:
        """Planar little-endian samples, as ffmpeg's yuv420p10le and yuv444p10le."""
        return b"".join(plane.astype("<u2", copy=False).tobytes() for plane in self)

    @classmethod
    def from_bytes(cls, data: bytes, height: int, width: int, chroma: str) -> "Planes":
        """The inverse of `to_bytes` for a luma size.

        Raises:
            CorruptStreamError: the length does not fit the size.
        """
        half = 2 if chroma == "420" else 1
        size, part = height * width, (height // half) * (width // half)
        if len(data) != 2 * (size + 2 * part):
            raise CorruptStreamError(
                f"the decoded picture has {len(data)} bytes, but {width}×{height} in 4:{chroma[1]}:"
                f"{chroma[2]} has {2 * (size + 2 * part)}"
            )
        samples = np.frombuffer(data, dtype="<u2")
        return cls(
            samples[:size].reshape(height, width),
            samples[size : size + part].reshape(height // half, width // half),
            samples[size + part :].reshape(height // half, width // half),
        )


def rgb_to_planes(
    image: NDArray[np.uint8], chroma: str = "420", transform: str = "bt709"
) -> Planes:
    """Convert an H×W×3 image; for 4:2:0 both sides must be even and at least 4."""
    red, green, blue = (image[..., channel].astype(np.float64) / 255.0 for channel in range(3))
    luma, *differences = (
        row[0] * red + row[1] * green + row[2] * blue for row in _MATRICES[transform]
    )
    if chroma == "420":
        differences = [_halve(_halve(plane, 0), 1) for plane in differences]
    return Planes(_quantise(luma, 0), *(_quantise(plane, _MIDDLE) for plane in differences))


def planes_to_rgb(planes: Planes, transform: str = "bt709") -> NDArray[np.uint8]:
    """Convert back to an H×W×3 image."""
    return to_eight_bits(planes_to_float(planes, transform))


def planes_to_float(planes: Planes, transform: str = "bt709") -> NDArray[np.float32]:
    """Convert back to float32 3×H×W in units of 8-bit levels, neither rounded nor clipped."""
    luma = planes.y.astype(np.float32)
    cb, cr = (plane.astype(np.float32) - np.float32(_MIDDLE) for plane in planes[1:])
    if cb.shape != luma.shape:
        cb, cr = (_double(_double(plane, 0), 1) for plane in (cb, cr))
    image = np.empty((3, *luma.shape), np.float32)
    # Rounded before use, so that every machine has the same factors.
    back = np.round(np.linalg.inv(_MATRICES[transform]), 12) * (255.0 / _PEAK)
    for channel, factors in zip(image, back, strict=True):
        terms = [
            plane * np.float32(factor)
            for plane, factor in zip((luma, cb, cr), factors, strict=True)
            if factor
        ]
        channel[:] = sum(terms[1:], start=terms[0])
    return image


TURNS = 256
"""Steps of half a circle; a byte holds −128 … 127, a quarter either way."""


def chroma_turn(planes: Planes) -> int:
    """Steps that bring the chroma planes to their principal axes, the first being the larger one."""
    first, second = (plane.astype(np.float64).ravel() for plane in planes[1:])
    (a, b), (_, c) = np.cov(first, second, bias=True)
    return (round(np.arctan2(2 * b, a - c) / 2 / np.pi * TURNS) + 128) % TURNS - 128


def turned(planes: Planes, steps: int) -> Planes:
    """The picture with its chroma turned; `turned(…, -steps)` undoes it, to within a rounding."""
    if steps == 0:
        return planes
    # Rounded, so that every machine has the same factors.
    angle = steps * np.pi / TURNS
    cosine, sine = (np.float64(round(float(f(angle)), 12)) for f in (np.cos, np.sin))
    first, second = (plane.astype(np.float64) - float(_MIDDLE) for plane in planes[1:])
    rotated = (cosine * first + sine * second, cosine * second - sine * first)
    return Planes(planes.y, *(_samples(plane + float(_MIDDLE)) for plane in rotated))


def to_eight_bits(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 3×H×W in 8-bit levels to uint8 H×W×3, rounded half to even and clipped."""
    return np.ascontiguousarray(np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def pad(image: NDArray[np.uint8], multiple: int, smallest: int) -> NDArray[np.uint8]:
    """Repeat the last row and column until both sides are a multiple and not below `smallest`."""
    target = [max(smallest, -(-side // multiple) * multiple) for side in image.shape[:2]]
    missing = [(0, want - side) for want, side in zip(target, image.shape[:2], strict=True)]
    return np.pad(image, (*missing, (0, 0)), mode="edge") if any(map(any, missing)) else image


def conversion_ceiling(image: NDArray[np.uint8], chroma: str = "420") -> float:
    """RGB-PSNR in dB of the conversion to 10-bit planes and back alone, without coding.

    No codec behind this conversion can exceed it on this image.
    """
    from lightning_tucodec.quality.decibels import psnr_from_sse
    from lightning_tucodec.quality.metrics import sse

    height, width = image.shape[:2]
    back = planes_to_rgb(rgb_to_planes(pad(image, 2, 4), chroma))[:height, :width]
    return psnr_from_sse(sse(image, back), image.size)


def _quantise(plane: NDArray[np.float64], offset: int) -> NDArray[np.uint16]:
    """Values of range one to 10 bits around `offset`."""
    return _samples(plane * _PEAK + offset)


def _samples(plane: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Rounded and clipped to 10 bits."""
    return np.clip(np.rint(plane), 0, _PEAK).astype(np.uint16)


def _double(plane: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Bilinear interpolation to twice the size along one axis, samples in the centre of pairs."""
    plane = np.moveaxis(plane, axis, 0)
    near = plane * np.float32(0.75)
    far = plane * np.float32(0.25)
    result = np.empty((2 * len(plane), *plane.shape[1:]), np.float32)
    result[0::2] = near
    result[1::2] = near
    result[2::2] += far[:-1]
    result[0] += far[0]
    result[1:-1:2] += far[1:]
    result[-1] += far[-1]
    return np.moveaxis(result, 0, axis)


def _halve(plane: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The plane of half the size whose `_double` is closest to `plane` in least squares."""
    from scipy.linalg import solveh_banded

    plane = np.moveaxis(plane, axis, 0)
    even, odd = plane[0::2], plane[1::2]
    projected = 0.75 * (even + odd)
    projected[0] += 0.25 * even[0]
    projected[:-1] += 0.25 * even[1:]
    projected[1:] += 0.25 * odd[:-1]
    projected[-1] += 0.25 * odd[-1]
    # The normal matrix of the interpolation is tridiagonal; the repeated edges change its corners.
    bands = np.empty((2, len(projected)))
    bands[0] = 0.375
    bands[1] = 1.25
    bands[1, 0] += 0.375
    bands[1, -1] += 0.375
    flat = solveh_banded(bands, projected.reshape(len(projected), -1))
    return np.moveaxis(flat.reshape(projected.shape), 0, axis)
