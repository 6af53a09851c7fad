"""The entropy networks in exact integers: h_s, context and entropy parameters as the coder runs them.

A floating-point difference between two machines destroys an arithmetic-coded stream (Ballé, Johnston and
Minnen, "Integer Networks for Data Compression with Latent-Variable Models", ICLR 2019). Here every
activation is an integer with FRACTION_BITS fractional bits, clamped to ±LIMIT after every layer; every
weight is a 16-bit integer with its layer's own number of fractional bits. The integers are carried in
float64: `IntegerLinear` proves when it is built that Σ|w|·LIMIT + |bias| stays below 2^52, so each partial
sum is exact in any order, on any device, with any number of threads, with or without fused multiply-add.
There are matrix products, minima, maxima, floors and one table (the sigmoid of the gates); no library
convolution, whose algorithms need not be exact, and no transcendental function.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.laplace import MU_BITS
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn.context import (
    HORIZONTAL_INPUT_TAPS,
    HORIZONTAL_TAPS,
    LEAKY_SLOPE,
    POINT,
    VERTICAL_INPUT_TAPS,
    VERTICAL_TAPS,
    Tap,
)

FRACTION_BITS = MU_BITS
"""Fractional bits of every activation; the means leave the network in the coder's own format."""

LIMIT = kernels.ACTIVATION_LIMIT
"""Activations lie in ±LIMIT: just below ±256 in latent units."""

EXACT = 2**52
"""Sums below this are exact in float64, with a bit to spare for the rounding offset."""

WEIGHT_MAX = 2**15 - 1
_NEIGHBOURS: tuple[Tap, ...] = tuple((di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1))


class IntegerLinear:
    """An affine map of integers: out = clamp(⌊(x·W + b) / 2^shift + ½⌋).

    Attributes:
        weight: float64[in, out] holding integers of 16 bits; rows are ordered tap by tap.
        bias: float64[out] holding integers, FRACTION_BITS + shift fractional bits, with the rounding
            offset 2^(shift − 1) already added.
        shift: bits that are dropped.

    Raises:
        ModelFileError: a sum could leave the range where float64 is exact.
    """

    def __init__(self, name: str, weight: Tensor, bias: Tensor, shift: int) -> None:
        self.weight = weight.double()
        self.bias = bias.double() + 2.0 ** (shift - 1)
        self.shift = shift
        worst = self.weight.abs().sum(0) * LIMIT + self.bias.abs()
        if not bool((worst < EXACT).all()):
            raise ModelFileError(f"{name}: sums of up to {float(worst.max()):.3g} are not exact")
        if bool((self.weight.abs() > WEIGHT_MAX).any()):
            raise ModelFileError(f"{name}: a weight has more than 16 bits")

    def accumulate(self, x: Tensor) -> Tensor:
        """x·W + b before the shift; n×in to n×out."""
        return torch.addmm(self.bias, x, self.weight)

    def finish(self, accumulated: Tensor) -> Tensor:
        """Shift, round and clamp an accumulator, in place."""
        return accumulated.mul_(2.0**-self.shift).floor_().clamp_(-LIMIT, LIMIT)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to n×in activations."""
        return self.finish(self.accumulate(x))


def leaky(x: Tensor) -> Tensor:
    """max(x, ⌊x / 8⌋): the networks' leaky ReLU."""
    return torch.maximum(x, (x * LEAKY_SLOPE).floor_())


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, clamped."""
    return (x + y).clamp_(-LIMIT, LIMIT)


class WholePlane:
    """Activations of all positions of an h×w plane, row by row, and those around them."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._planes: dict[str, Tensor] = {}

    def put(self, name: str, values: Tensor) -> None:
        """Keep the activations of all positions, (h·w)×C."""
        self._planes[name] = values.unflatten(0, (self.height, self.width))

    def taps(self, name: str, taps: Sequence[Tap]) -> Tensor:
        """Activations around every position: (h·w)×(taps·C), zero outside the plane."""
        reach = [max(0, *(sign * tap[axis] for tap in taps)) for axis in (0, 1) for sign in (-1, 1)]
        up, down, left, right = reach
        padded = nn.functional.pad(self._planes[name], (0, 0, left, right, up, down))
        shifted = [
            padded[up + di : up + di + self.height, left + dj : left + dj + self.width]
            for di, dj in taps
        ]
        return torch.cat(shifted, dim=-1).flatten(0, 1)


def shift_of(tensors: dict[str, Tensor], name: str) -> int:
    """Bits that a layer of a model file drops.

    Raises:
        KeyError: the layer has no such tensor.
        ModelFileError: the number is outside the range that layers of this package have.
    """
    shift = int(tensors[f"{name}.shift"])
    if not 1 <= shift <= 40:
        raise ModelFileError(f"{name}: a shift by {shift} bits is none of this package's")
    return shift


def _context_layers(levels: int, points: bool) -> list[tuple[str, Sequence[Tap]]]:
    """Names and taps of the context's layers but the last; no taps: one point."""
    layers: list[tuple[str, Sequence[Tap]]] = [
        ("context.vertical_input", VERTICAL_INPUT_TAPS),
        ("context.horizontal_input", HORIZONTAL_INPUT_TAPS),
    ]
    for level in range(levels):
        vertical, horizontal = f"context.vertical.{level}", f"context.horizontal.{level}"
        layers += [
            (f"{vertical}.conv1", VERTICAL_TAPS),
            (f"{vertical}.conv2", VERTICAL_TAPS),
            (f"{horizontal}.conv1", HORIZONTAL_TAPS),
            (f"{horizontal}.conv2", HORIZONTAL_TAPS),
            (f"{horizontal}.shortcut", ()),
        ]
        if points:
            layers += [(f"context.point.{level}.conv{i}", ()) for i in (1, 2)]
    return layers


class IntegerEntropyModel:
    """h_s, context and entropy parameters over integers; see the module's docstring for the guarantee.

    Args:
        tensors: what `quantise_network` returned.

    Raises:
        ModelFileError: tensors are missing, or a layer's sums could be inexact.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        try:
            if any(v.is_floating_point() for v in tensors.values()):
                raise ModelFileError("the entropy networks of a model file must be integers")
            self._sigmoid = tensors["sigmoid"].double()
            names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
            self._layers = {
                name: IntegerLinear(
                    name,
                    tensors[f"{name}.weight"],
                    tensors[f"{name}.bias"],
                    shift_of(tensors, name),
                )
                for name in names
            }
            self.hyper_channels = self._layers["h_s.conv1"].weight.shape[0] // len(_NEIGHBOURS)
            self.latent_channels = self._layers["parameters.mu"].weight.shape[1]
        except KeyError as error:
            raise ModelFileError(f"the model file lacks the integer tensor {error}") from None
        self.has_context = "context.out" in self._layers
        self._levels = sum(name.endswith(".shortcut") for name in self._layers)
        self._points = f"context.point.{self._levels - 1}.conv1" in self._layers
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Refuse layers that do not fit together: the compiled decoder trusts these sizes."""
        wide = self._layers["parameters.gamma"].weight.shape[1]
        narrow = self._layers["parameters.hidden"].weight.shape[1]
        expected = {
            "parameters.hidden": (wide, narrow),
            "parameters.mu": (narrow, self.latent_channels),
            "parameters.scale": (narrow, self.latent_channels),
        }
        if self.has_context:
            channels, upsilon = self._layers["context.out"].weight.shape
            for name, taps in _context_layers(self._levels, self._points):
                points = max(1, len(taps))
                reads_y = name.endswith("_input")
                expected[name] = (
                    points * (self.latent_channels if reads_y else channels),
                    channels * (2 if name.endswith(".conv2") else 1),
                )
            expected |= {
                "context.out": (channels, upsilon),
                "parameters.upsilon": (upsilon, wide),
            }
        for name, (rows, columns) in expected.items():
            layer = self._layers.get(name)
            if layer is None or layer.weight.shape != (rows, columns):
                raise ModelFileError(f"{name}: a layer of {rows}×{columns} is missing")
            if layer.bias.shape != (columns,):
                raise ModelFileError(f"{name}: {columns} biases are missing")
        if self._sigmoid.ndim != 1 or self._sigmoid.numel() < 2:
            raise ModelFileError("the table of the sigmoid is missing")
        if not bool(((self._sigmoid >= 0) & (self._sigmoid <= 1 << kernels.GATE_BITS)).all()):
            raise ModelFileError("a value of the sigmoid lies outside 0 … 1")
        # Their sums are added before one common shift; encoder and compiled decoder would choose differently.
        if (
            self.has_context
            and len({self._layers[f"parameters.{k}"].shift for k in ("gamma", "upsilon")}) > 1
        ):
            raise ModelFileError("parameters.gamma and parameters.upsilon differ in their shifts")

    @once_property
    def compiled(self) -> kernels.Network:
        """The layers that `kernels.decode_strip` runs, in its order."""
        names: list[tuple[str, Sequence[Tap]]] = [
            *_context_layers(0, False),
            ("context.out", ()),
            ("parameters.upsilon", ()),
            ("parameters.hidden", ()),
            ("parameters.mu", ()),
            ("parameters.scale", ()),
            *_context_layers(self._levels, True)[2:],
        ]
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        taps: list[Tap] = []
        rows = []
        weight_start = bias_start = 0
        for name, layer_taps in names:
            layer = self._layers.get(name)
            if layer is None:  # a level without its 1×1 block
                rows.append([0] * 7)
                continue
            shape = layer.weight.shape
            ends = (len(taps), len(layer_taps))
            rows.append([weight_start, *shape, bias_start, layer.shift, *ends])
            weights.append(layer.weight.flatten())
            biases.append(layer.bias)
            taps += layer_taps
            weight_start += layer.weight.numel()
            bias_start += layer.bias.numel()
        return kernels.Network(
            torch.cat(weights).to(torch.int16).numpy(),
            torch.cat(biases).numpy(),
            np.array(rows, np.int64),
            np.array(taps, np.int64),
            self._sigmoid.numpy(),
            self._levels,
            self._points,
        )

    def hyper(self, z: Tensor, height: int, width: int) -> Tensor:
        """The Γ part of the first entropy-parameter layer, before its shift.

        Args:
            z: float64 ⌈h/4⌉×⌈w/4⌉×Z, integers with FRACTION_BITS fractional bits.
            height, width: of y.

        Returns:
            float64 (h·w)×wide.
        """
        x = self._dense("h_s.conv1", z)
        x = leaky(self._upsampled("h_s.up1", x))
        x = self._dense("h_s.conv2", x)
        x = leaky(self._upsampled("h_s.up2", x))
        gamma = leaky(self._dense("h_s.conv3", x))[:height, :width]
        return self._layers["parameters.gamma"].accumulate(gamma.flatten(0, 1))

    def _dense(self, name: str, x: Tensor) -> Tensor:
        plane = WholePlane(x.shape[0], x.shape[1])
        plane.put("x", x.flatten(0, 1))
        return self._layers[name](plane.taps("x", _NEIGHBOURS)).unflatten(0, x.shape[:2])

    def _upsampled(self, name: str, x: Tensor) -> Tensor:
        """The layer over x with zeros between its values; products with these zeros are skipped."""
        height, width = x.shape[:2]
        plane = WholePlane(height, width)
        plane.put("x", x.flatten(0, 1))
        layer = self._layers[name]
        weight = layer.weight.unflatten(0, (len(_NEIGHBOURS), -1))
        out = x.new_empty(2 * height, 2 * width, layer.weight.shape[1])
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            # Around (2·row + i, 2·column + j) only even places hold values.
            places = [(i + di, j + dj) for di, dj in _NEIGHBOURS]
            met = [t for t, (row, column) in enumerate(places) if row % 2 == column % 2 == 0]
            taps = [(places[t][0] // 2, places[t][1] // 2) for t in met]
            sums = torch.addmm(layer.bias, plane.taps("x", taps), weight[met].flatten(0, 1))
            out[i::2, j::2] = layer.finish(sums).unflatten(0, (height, width))
        return out

    def parameters(self, gamma: Tensor, plane: WholePlane) -> tuple[Tensor, Tensor]:
        """Means and scale indices of all positions of a plane.

        Args:
            gamma: what `hyper` returned, (h·w)×wide; overwritten.
            plane: holds ŷ under "y"; the context's activations are put there.

        Returns:
            (μ, s), float64 (h·w)×M each: integers, μ with FRACTION_BITS fractional bits.
        """
        first = self._layers["parameters.gamma"]
        if self.has_context:
            upsilon = self._context(plane)
            gamma = gamma.addmm_(upsilon, self._layers["parameters.upsilon"].weight)
        hidden = leaky(self._layers["parameters.hidden"](leaky(first.finish(gamma))))
        return self._layers["parameters.mu"](hidden), self._layers["parameters.scale"](hidden)

    def _context(self, plane: WholePlane) -> Tensor:
        layers = self._layers
        vertical = layers["context.vertical_input"](plane.taps("y", VERTICAL_INPUT_TAPS))
        horizontal = layers["context.horizontal_input"](plane.taps("y", HORIZONTAL_INPUT_TAPS))
        horizontal = add(horizontal, vertical)
        for level in range(self._levels):
            vertical = self._gated(f"context.vertical.{level}", VERTICAL_TAPS, plane, vertical)
            horizontal = self._gated(
                f"context.horizontal.{level}", HORIZONTAL_TAPS, plane, horizontal, vertical
            )
            if self._points:
                horizontal = self._gated(f"context.point.{level}", POINT, plane, horizontal)
        return layers["context.out"](leaky(horizontal))

    def _gated(
        self,
        name: str,
        taps: Sequence[Tap],
        plane: WholePlane,
        x: Tensor,
        shortcut: Tensor | None = None,
    ) -> Tensor:
        """`nn.context.GatedBlock` in integers."""

        def convolve(layer: str, values: Tensor) -> Tensor:
            if taps is not POINT:
                plane.put(layer, values)
                values = plane.taps(layer, taps)
            return self._layers[layer](values)

        hidden = convolve(f"{name}.conv1", leaky(x))
        if shortcut is not None:
            hidden = add(hidden, self._layers[f"{name}.shortcut"](leaky(shortcut)))
        value, gate = convolve(f"{name}.conv2", leaky(hidden)).chunk(2, dim=1)
        half = self._sigmoid.numel() // 2
        step = (gate * 2.0**-kernels.GATE_STEP_BITS).floor_().clamp_(-half, half - 1)
        opened = value * self._sigmoid[(step + half).long()]
        return add(x, opened.mul_(2.0**-kernels.GATE_BITS).add_(0.5).floor_())
