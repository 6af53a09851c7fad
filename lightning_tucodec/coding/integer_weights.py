"""The entropy networks' weights as integers: made from a trained network, and restored into one.

`fixed_point` computes with them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tucodec.coding import kernels
from lightning_tucodec.coding.container import QUALITY_STEPS
from lightning_tucodec.coding.fixed_point import (
    FRACTION_BITS,
    WEIGHT_MAX,
    shift_of,
)
from lightning_tucodec.coding.laplace import SCALE_MIN, SCALE_STEPS
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.context import TapConv2d

GATE_RANGE = 12
"""The sigmoid's table covers arguments in ±GATE_RANGE; outside it is 0 or 1 within 1e-5."""
_SHIFT_MAX = 24


def sigmoid_table() -> Tensor:
    """int32 values of the sigmoid at the middle of every step, kernels.GATE_BITS fractional bits."""
    half = GATE_RANGE << (FRACTION_BITS - kernels.GATE_STEP_BITS)
    steps = torch.arange(-half, half, dtype=torch.float64) + 0.5
    argument = steps * 2.0 ** (kernels.GATE_STEP_BITS - FRACTION_BITS)
    return torch.round(torch.sigmoid(argument) * 2**kernels.GATE_BITS).to(torch.int32)


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
    # A tensor without storage only needs its shape, and PyTorch would import SymPy to flip it. The same
    # holds for `zeros_like` below.
    taps = layer.weight if layer.weight.is_meta else layer.weight.flip(2, 3)
    return taps.permute(2, 3, 0, 1).flatten(0, 2)


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
        bias = parameters.layer1.bias
        nothing = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
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
    also `sigmoid` int32. Γ and Υ parts of a sum share their shift, so that they can be added. Of a
    variable-rate network, `levels.bias` int64[levels, out] is what each level adds to the bias of Γ's part.
    """
    sources = {name: source.mapped() for name, source in _sources(network).items()}
    bits: dict[str, int] = {}
    for name, source in sources.items():
        peak = max(float(source.weight.abs().max()), 2.0**-9)
        bits[name] = min(_SHIFT_MAX, math.floor(math.log2(WEIGHT_MAX / peak)))
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
    if network.levels is not None:
        scale = 2.0 ** (bits["parameters.gamma"] + FRACTION_BITS)
        tensors["levels.bias"] = torch.round(network.levels.bias.double() * scale).to(torch.int64)
    return tensors


def at_level(tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The integers of a variable-rate network at a level, as those of a network of one rate.

    Args:
        tensors: see `quantise_network`; left as they are.
        step: the level in 1/QUALITY_STEPS, within the network's levels.
    """
    others = {name: value for name, value in tensors.items() if name != "levels.bias"}
    biases = tensors["levels.bias"]
    below = min(step // QUALITY_STEPS, len(biases) - 2)
    share = step - below * QUALITY_STEPS
    sums = biases[below] * (QUALITY_STEPS - share) + biases[below + 1] * share
    others["parameters.gamma.bias"] = others["parameters.gamma.bias"] + sums // QUALITY_STEPS
    return others


def integer_layout(network: TucodecVAE) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what `quantise_network` returns, of a network that may be without storage."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "sigmoid": (tuple(sigmoid_table().shape), torch.int32)
    }
    for name, source in _sources(network).items():
        layout[f"{name}.weight"] = (tuple(source.weight.shape), torch.int16)
        layout[f"{name}.bias"] = (tuple(source.bias.shape), torch.int64)
        layout[f"{name}.shift"] = ((1,), torch.int32)
    if network.levels is not None:
        layout["levels.bias"] = (tuple(network.levels.bias.shape), torch.int64)
    return layout


@torch.no_grad()
def restore_network(network: TucodecVAE, tensors: dict[str, Tensor]) -> None:
    """Fill the floating-point entropy networks with the values that the integers stand for.

    A model file holds these layers once, as integers; `forward()` then estimates with the same values.
    """

    def rows(name: str, output_bits: int = FRACTION_BITS) -> tuple[Tensor, Tensor]:
        bits = shift_of(tensors, name) - FRACTION_BITS + output_bits
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
    if network.levels is not None:
        scale = 2.0 ** (shift_of(tensors, "parameters.gamma") + FRACTION_BITS)
        network.levels.bias.copy_(tensors["levels.bias"].double() / scale)
    fill(parameters.layer2, *rows("parameters.hidden"))
    weight_mu, bias_mu = rows("parameters.mu")
    weight_scale, bias_scale = rows("parameters.scale", output_bits=0)
    fill(
        parameters.layer3,
        torch.cat([weight_mu, weight_scale / _LOG_SCALE_FACTOR], dim=1),
        torch.cat([bias_mu, (bias_scale - _LOG_SCALE_OFFSET) / _LOG_SCALE_FACTOR]),
    )
