"""What the learned codec and the search for better symbols share: latents, strips, what an image may be."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_tucodec.io.images import to_pixels
from lightning_tucodec.nn.hyperprior import HYPER_STRIDE
from lightning_tucodec.nn.transforms import STRIDE

STRIP_POSITIONS = 8192
"""A strip has about this many positions of y at most (2 megapixels): it bounds the memory of the entropy
path and what a damaged byte can cost."""

SPLIT_POSITIONS = 3072
"""Larger planes (0.8 megapixels) have two strips at least, because strips are coded side by side. A restart
in mid-image costs about 0.3 % of the bytes there, more in smaller ones."""

ImageLike = Image.Image | NDArray[np.uint8] | Tensor


class Latents(NamedTuple):
    """Symbols of one image.

    Attributes:
        y: int32 h×w×M, indices of centres.
        z: int32 Z×⌈rows/4⌉×⌈w/4⌉ for every strip, distances from the medians.
    """

    y: NDArray[np.int32]
    z: list[NDArray[np.int32]]


class Decoded(NamedTuple):
    """One decoded image.

    Attributes:
        pixels: H×W×3.
        damaged: rows of pixels [top, bottom) that are lost, in order; none unless salvaged.
    """

    pixels: NDArray[np.uint8]
    damaged: list[tuple[int, int]]


@dataclass(frozen=True)
class Coded:
    """One coded image.

    Attributes:
        data: the `.tuc` file.
        latents: what it holds.
    """

    data: bytes
    latents: Latents


def strip_bounds(height: int, width: int) -> list[tuple[int, int]]:
    """Rows [top, bottom) of y in every strip; all but the last are a multiple of 4 rows high."""
    rows = max(HYPER_STRIDE, STRIP_POSITIONS // width // HYPER_STRIDE * HYPER_STRIDE)
    if height * width > SPLIT_POSITIONS:
        rows = min(rows, math.ceil(height / 2 / HYPER_STRIDE) * HYPER_STRIDE)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """H×W×3 uint8 of any image that the Python API takes.

    Raises:
        TypeError: not a PIL image, nor uint8 of shape H×W×3.
    """
    if isinstance(image, Image.Image):
        return to_pixels(image)
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        raise TypeError("an image is a PIL.Image or a uint8 array or tensor of shape H×W×3")
    if image.shape[2] != 3:
        raise TypeError(f"an image has shape H×W×3, got {image.shape}")
    # PyTorch takes no negative strides, which a mirrored view has.
    return np.ascontiguousarray(image)


def mark(pixels: NDArray[np.uint8], strips: Sequence[int]) -> list[tuple[int, int]]:
    """Overwrite damaged strips of an H×W×3 image with bars in magenta and black.

    Returns:
        The rows [top, bottom) of the bars, from the top.
    """
    height, width = pixels.shape[:2]
    bounds = strip_bounds(math.ceil(height / STRIDE), math.ceil(width / STRIDE))
    marked: list[tuple[int, int]] = []
    for number in strips:
        top, bottom = (min(STRIDE * row, height) for row in bounds[number])
        rows, columns = np.ogrid[top:bottom, :width]
        bars = ((rows + columns) // 16 % 2).astype(np.uint8) * 255
        pixels[top:bottom, :, 0] = pixels[top:bottom, :, 2] = bars
        pixels[top:bottom, :, 1] = 0
        if marked and marked[-1][1] == top:
            top = marked.pop()[0]
        marked.append((top, bottom))
    return marked


_CPU = torch.device("cpu")


class _Float32:
    """float32 as PyTorch's default type while anybody is inside: it is of all threads, unlike the modes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.callers = torch.float32

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.callers = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.set_default_dtype(self.callers)


_float32 = _Float32()


@contextmanager
def own_modes() -> Iterator[None]:
    """PyTorch as it starts, whatever modes the caller is in: coding gives the same everywhere."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        # Only where it is needed: the mode costs time at each call.
        nullcontext() if torch.get_default_device() == _CPU else _CPU,
        _float32,
    ):
        yield
