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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.laplace import MU_BITS, SCALE_MIN, SCALE_STEPS
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.context import (
    HORIZONTAL_INPUT_TAPS,
    HORIZONTAL_TAPS,
    LEAKY_SLOPE,
    POINT,
    VERTICAL_INPUT_TAPS,
    VERTICAL_TAPS,
    Tap,
    TapConv2d,
)

FRACTION_BITS = MU_BITS
"""Fractional bits of every activation; the means leave the network in the coder's own format."""

LIMIT = kernels.ACTIVATION_LIMIT
"""Activations lie in ±LIMIT: just below ±256 in latent units."""

EXACT = 2**52
"""Sums below this are exact in float64, with a bit to spare for the rounding offset."""

GATE_RANGE = 12
"""The sigmoid's table covers arguments in ±GATE_RANGE; outside it is 0 or 1 within 1e-5."""

_WEIGHT_MAX = 2**15 - 1
_SHIFT_MAX = 24
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
        if bool((self.weight.abs() > _WEIGHT_MAX).any()):
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


def sigmoid_table() -> Tensor:
    """int32 values of the sigmoid at the middle of every step, kernels.GATE_BITS fractional bits."""
    half = GATE_RANGE << (FRACTION_BITS - kernels.GATE_STEP_BITS)
    steps = torch.arange(-half, half, dtype=torch.float64) + 0.5
    argument = steps * 2.0 ** (kernels.GATE_STEP_BITS - FRACTION_BITS)
    return torch.round(torch.sigmoid(argument) * 2**kernels.GATE_BITS).to(torch.int32)


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


@dataclass(frozen=True)
class _Source:
    """A floating-point layer in the form that is quantised: [in, out] weight rows and a bias."""

    weight: Tensor
    bias: Tensor
    output_bits: int = FRACTION_BITS
    factor: float = 1.0
    """What the sum is multiplied by,"""
    offset: float = 0.0
    """and what is added to that; to be folded into weight and bias."""

    def mapped(self) -> "_Source":
        """With the map of the sum folded in."""
        weight, bias = self.weight * self.factor, self.bias * self.factor + self.offset
        return _Source(weight, bias, self.output_bits)


def _tap_rows(layer: TapConv2d) -> Tensor:
    """out×in×taps to (taps·in)×out."""
    return layer.weight.permute(2, 1, 0).flatten(0, 1)


def _dense_rows(layer: nn.Conv2d) -> Tensor:
    """out×in×3×3 to (9·in)×out, in the order of _NEIGHBOURS."""
    return layer.weight.permute(2, 3, 1, 0).flatten(0, 2)


def _transposed_rows(layer: nn.ConvTranspose2d) -> Tensor:
    """in×out×3×3 to (9·in)×out: a transposed convolution is a flipped one over inserted zeros."""
    return layer.weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)


_LOG_SCALE_FACTOR = SCALE_STEPS / math.log(2)
_LOG_SCALE_OFFSET = -SCALE_STEPS * math.log2(SCALE_MIN)


def _sources(network: TucodecVAE) -> dict[str, _Source]:
    """Every affine map of the entropy path, by name.

    The first entropy-parameter layer is split into its Γ and its Υ part: the former is computed for
    the whole plane at once. The last one is split into the means and the scale indices, which
    have a map from log b to table index.
    """
    h_s, parameters = network.h_s, network.entropy_parameters
    sources: dict[str, _Source] = {}

    def take(name: str, layer: nn.Module, rows: Tensor) -> None:
        assert isinstance(layer.bias, Tensor)
        sources[name] = _Source(rows, layer.bias)

    for name in ("conv1", "conv2", "conv3"):
        take(f"h_s.{name}", getattr(h_s, name), _dense_rows(getattr(h_s, name)))
    for name in ("up1", "up2"):
        take(f"h_s.{name}", getattr(h_s, name), _transposed_rows(getattr(h_s, name)))
    if network.context is not None:
        for name, module in network.context.named_modules():
            if isinstance(module, TapConv2d):
                take(f"context.{name}", module, _tap_rows(module))
    first = _tap_rows(parameters.layer1)
    split = network.config.hyper.out_channels
    sources["parameters.gamma"] = _Source(first[:split], parameters.layer1.bias)
    if network.context is not None:
        nothing = torch.zeros_like(parameters.layer1.bias)
        sources["parameters.upsilon"] = _Source(first[split:], nothing)
    take("parameters.hidden", parameters.layer2, _tap_rows(parameters.layer2))
    weight_mu, weight_scale = _tap_rows(parameters.layer3).chunk(2, dim=1)
    bias_mu, bias_scale = parameters.layer3.bias.chunk(2)
    sources["parameters.mu"] = _Source(weight_mu, bias_mu)
    sources["parameters.scale"] = _Source(
        weight_scale, bias_scale, output_bits=0, factor=_LOG_SCALE_FACTOR, offset=_LOG_SCALE_OFFSET
    )
    return sources


@torch.no_grad()
def quantise_network(network: TucodecVAE) -> dict[str, Tensor]:
    """Integer tensors of the entropy path, for the model file and for `IntegerEntropyModel`.

    For every layer `<name>.weight` int16[in, out], `<name>.bias` int64[out] and `<name>.shift` int32[1];
    also `sigmoid` int32. Γ and Υ parts of a sum share their shift, so that they add up.
    """
    sources = {name: source.mapped() for name, source in _sources(network).items()}
    bits: dict[str, int] = {}
    for name, source in sources.items():
        peak = max(float(source.weight.abs().max()), 2.0**-9)
        bits[name] = min(_SHIFT_MAX, math.floor(math.log2(_WEIGHT_MAX / peak)))
    if "parameters.upsilon" in bits:
        both = min(bits["parameters.gamma"], bits["parameters.upsilon"])
        bits["parameters.gamma"] = bits["parameters.upsilon"] = both
    tensors: dict[str, Tensor] = {"sigmoid": sigmoid_table()}
    for name, source in sources.items():
        weight = torch.round(source.weight.double() * 2.0 ** bits[name])
        bias = torch.round(source.bias.double() * 2.0 ** (bits[name] + FRACTION_BITS))
        shift = bits[name] + FRACTION_BITS - source.output_bits
        tensors[f"{name}.weight"] = weight.to(torch.int16).contiguous()
        tensors[f"{name}.bias"] = bias.to(torch.int64)
        tensors[f"{name}.shift"] = torch.tensor([shift], dtype=torch.int32)
    return tensors


def integer_layout(network: TucodecVAE) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what `quantise_network` returns, of a network that may be without storage."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "sigmoid": (tuple(sigmoid_table().shape), torch.int32)
    }
    for name, source in _sources(network).items():
        layout[f"{name}.weight"] = (tuple(source.weight.shape), torch.int16)
        layout[f"{name}.bias"] = (tuple(source.bias.shape), torch.int64)
        layout[f"{name}.shift"] = ((1,), torch.int32)
    return layout


def _shift(tensors: dict[str, Tensor], name: str) -> int:
    """Bits that a layer of a model file drops.

    Raises:
        KeyError: the layer has no such tensor.
        ModelFileError: no layer of this package drops so many, or so few.
    """
    shift = int(tensors[f"{name}.shift"])
    if not 1 <= shift <= 40:
        raise ModelFileError(f"{name}: a shift by {shift} bits is none of this package's")
    return shift


@torch.no_grad()
def restore_network(network: TucodecVAE, tensors: dict[str, Tensor]) -> None:
    """Fill the floating-point entropy networks with the values that the integers stand for.

    A model file holds these layers once, as integers; `forward()` then estimates with the same values.
    """

    def rows(name: str, output_bits: int = FRACTION_BITS) -> tuple[Tensor, Tensor]:
        bits = _shift(tensors, name) - FRACTION_BITS + output_bits
        weight = tensors[f"{name}.weight"].double() * 2.0**-bits
        return weight, tensors[f"{name}.bias"].double() * 2.0 ** -(bits + FRACTION_BITS)

    def fill(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        assert isinstance(layer.bias, Tensor)
        if isinstance(layer, TapConv2d):
            weight = weight.unflatten(0, (len(layer.taps), -1)).permute(2, 1, 0)
        else:
            weight = weight.unflatten(0, (3, 3, -1))
            transposed = isinstance(layer, nn.ConvTranspose2d)
            weight = (
                weight.permute(2, 3, 0, 1).flip(2, 3) if transposed else weight.permute(3, 2, 0, 1)
            )
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

    for name, module in network.named_modules():
        if name.startswith("h_s.") or (name.startswith("context.") and f"{name}.weight" in tensors):
            fill(module, *rows(name))
    parameters = network.entropy_parameters
    first, bias = rows("parameters.gamma")
    if network.context is not None:
        first = torch.cat([first, rows("parameters.upsilon")[0]])
    fill(parameters.layer1, first, bias)
    fill(parameters.layer2, *rows("parameters.hidden"))
    weight_mu, bias_mu = rows("parameters.mu")
    weight_scale, bias_scale = rows("parameters.scale", output_bits=0)
    fill(
        parameters.layer3,
        torch.cat([weight_mu, weight_scale / _LOG_SCALE_FACTOR], dim=1),
        torch.cat([bias_mu, (bias_scale - _LOG_SCALE_OFFSET) / _LOG_SCALE_FACTOR]),
    )


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
    """h_s, context and entropy parameters over integers; see the module's text for the promise.

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
                    _shift(tensors, name),
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
        # Their sums are added before the shift; the encoder and the compiled decoder would take another one.
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
        """The layer over x with zeros between its values; what meets a zero is left out."""
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
