"""Integer layers of networks that were not trained for them: convolutions of any weights and activations.

`fixed_point` serves this project's own networks, whose activations are bounded by design. Here activations
are 32-bit integers with FRACTION_BITS fractional bits and lie in ±2^15. A vector of them enters a product
with one common exponent (`products`). The weights of every output have as many fractional bits as the
proof allows:

    Σ|w| < 2^18 and |x| ≤ 2^13  ⇒  |Σ w·x| < 2^31.

Weights become integers by rounding and integer sums alone, so they are the same wherever the model is loaded.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_tucodec.coding import products
from lightning_tucodec.coding.laplace import MU_BITS
from lightning_tucodec.errors import ModelFileError

FRACTION_BITS = MU_BITS
"""Fractional bits of every activation."""

LIMIT = products.ACTIVATION_LIMIT
"""Activations lie in ±LIMIT."""

Tap = tuple[int, int]
Plane = NDArray[np.int32]

_WEIGHT_LIMIT = 2**15 - 1
_BIAS_LIMIT = 2**45
_SHIFT_MAX = 24


def quantised(
    name: str, rows: Tensor, bias: Tensor | None, taps: Sequence[Tap] = ((0, 0),), slope: float = 1
) -> products.Weights:
    """A layer in integers.

    Args:
        name: for errors.
        rows: out×in, inputs ordered tap by tap.
        bias: out values, or none.
        taps: from the upper left corner of the padded plane.
        slope: of the leaky ReLU that follows, 0 … 1.

    Raises:
        ModelFileError: a weight is not finite, or so large that the sums could leave 32 bits.
    """
    weight = rows.detach().cpu().double().numpy()
    outputs, inputs = weight.shape
    offset = np.zeros(outputs) if bias is None else bias.detach().cpu().double().numpy()
    if not (np.isfinite(weight).all() and np.isfinite(offset).all()):
        raise ModelFileError(f"{name}: a weight is not finite")
    if max(np.abs(weight).max(initial=0), np.abs(offset).max(initial=0)) >= 2**15:
        raise ModelFileError(f"{name}: a weight is too large for the exact engine")
    # In integers, as a sum of floating-point numbers depends on its order.
    fine = np.abs(np.rint(weight * 2.0**_SHIFT_MAX).astype(np.int64))
    total, peak = fine.sum(1), fine.max(1, initial=0)
    base = np.abs(np.rint(offset * 2.0**FRACTION_BITS).astype(np.int64))
    shift = np.zeros(outputs, np.int64)
    for bits in range(1, _SHIFT_MAX + 1):
        dropped = _SHIFT_MAX - bits
        fits = (
            ((total >> dropped) + inputs // 2 + 1 < 1 << products.SUM_BITS)
            & (peak >> dropped < _WEIGHT_LIMIT)
            & ((base + 1) << bits < _BIAS_LIMIT)
        )
        shift[fits] = bits
    if (shift < 1).any():
        raise ModelFileError(f"{name}: its weights are too large for the exact engine")
    whole = np.rint(np.ldexp(weight, shift[:, None])).astype(np.int64)
    assert (np.abs(whole).sum(1) < 1 << products.SUM_BITS).all()
    padded = np.zeros((_up(outputs, products.TILE), _up(inputs, products.DEPTH)), np.int16)
    padded[:outputs, :inputs] = whole
    scaled = np.rint(np.ldexp(offset, FRACTION_BITS + shift)).astype(np.int64)
    return products.Weights(
        padded,
        scaled + (np.int64(1) << (shift - 1)),
        shift,
        np.array(taps, np.int64).reshape(-1, 2),
        round(slope * (1 << products.SLOPE_BITS)),
    )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Work:
    """Scratch of a layer at up to n points, and the results."""

    def __init__(self, layer: products.Weights, n: int) -> None:
        outputs, depth = layer.weight.shape
        n = _up(n, products.TILE)
        self.inputs = (
            np.zeros((n, depth), np.int16),
            np.zeros(n, np.int64),
            np.empty((n, outputs), np.int32),
        )
        self.zeros = np.zeros((n, outputs), np.int32)
        self.out = np.empty((n, layer.bias.size), np.int32)


def peaks(plane: Plane) -> Plane:
    """The largest absolute value at each position, int32 h×w of h×w×C."""
    return np.maximum(plane.max(2), -plane.min(2))


@dataclass(frozen=True)
class Convolution:
    """A convolution over whole planes, its leaky ReLU, and a pixel shuffle.

    Attributes:
        phases: one layer for each of stride² places in a cell of the output.
        margin: rows and columns of zeros that the taps reach, around the input.
        stride: positions of the output per position of the input, along each side.
        shuffle: factor of the pixel shuffle, along each side.
    """

    phases: tuple[products.Weights, ...]
    margin: int
    stride: int
    shuffle: int = 1

    @property
    def factor(self) -> int:
        """Positions of the result per position of the input, along each side."""
        return self.stride * self.shuffle

    def __call__(self, x: Plane) -> Plane:
        """Apply to int32 h×w×C; uses PyTorch's number of threads, and is exact with any."""
        height, width = x.shape[:2]
        around = (self.margin, self.margin)
        plane = np.pad(x, (around, around, (0, 0)))
        largest = peaks(plane)
        channels = self.phases[0].bias.size
        out = np.empty((height, self.stride, width, self.stride, channels), np.int32)
        parts = min(torch.get_num_threads(), height)
        bounds = [height * part // parts for part in range(parts + 1)]

        def part(number: int) -> None:
            for place, layer in enumerate(self.phases):
                corner = divmod(place, self.stride)
                products.convolve(layer, plane, largest, *bounds[number : number + 2], corner, out)

        if parts == 1:
            part(0)
        else:
            with ThreadPoolExecutor(parts) as pool:
                list(pool.map(part, range(parts)))
        out = out.reshape(height * self.stride, width * self.stride, channels)
        return _shuffled(out, self.shuffle)


def _shuffled(x: Plane, factor: int) -> Plane:
    """`nn.PixelShuffle` of h×w×C."""
    if factor == 1:
        return x
    height, width, channels = x.shape
    split = x.reshape(height, width, channels // factor**2, factor, factor)
    moved = split.transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(moved.reshape(height * factor, width * factor, -1))


def convolution(name: str, layer: nn.Module, slope: float, shuffle: int) -> Convolution | None:
    """A layer of PyTorch in integers; None for a kind that this module does not support.

    Raises:
        ModelFileError: see `quantised`.
    """
    # Exact types only: a subclass may use its weights in another way.
    if type(layer) not in (nn.Conv2d, nn.ConvTranspose2d):
        return None
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    geometry = (layer.kernel_size, layer.padding, layer.stride)
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or any(len({*sides}) > 1 for sides in geometry):
        return None
    size, padding, stride = layer.kernel_size[0], layer.padding[0], layer.stride[0]
    if isinstance(layer, nn.Conv2d):
        if stride != 1 or size != 2 * padding + 1:
            return None
        rows = layer.weight.permute(0, 2, 3, 1).flatten(1)
        taps = [(i, j) for i in range(size) for j in range(size)]
        phases = (quantised(name, rows, layer.bias, taps, slope),)
        return Convolution(phases, padding, 1, shuffle)
    if layer.output_padding != (stride - size + 2 * padding,) * 2:
        return None
    # Output stride·q + a has the input's position q + δ where its weight's place is a + padding − stride·δ.
    reached = [
        [((a + padding - k) // stride, k) for k in range(size) if (a + padding - k) % stride == 0]
        for a in range(stride)
    ]
    margin = max((abs(delta) for phase in reached for delta, _ in phase), default=0)
    layers = []
    for vertical in reached:
        for horizontal in reached:
            places = [(v, h) for v in vertical for h in horizontal]
            taps = [(v[0] + margin, h[0] + margin) for v, h in places]
            weights = [layer.weight[:, :, v[1], h[1]] for v, h in places]
            if not weights:
                return None
            layers.append(quantised(name, torch.cat(weights).T, layer.bias, taps, slope))
    return Convolution(tuple(layers), margin, stride, shuffle)
