"""The exact engine for CompressAI's networks with a raster-scan context, in integers on diagonals.

CompressAI's own coder for such networks (mbt2018, cheng2020-anchor and -attn) runs them once for every
position of y, in floating point: slow, and its files decode to noise where another machine rounds otherwise.
Here h_s, the masked convolution and the 1×1 layers become integers (`coding.layers`), and positions that do
not depend on one another are coded together (`coding.raster`).

A network is judged by its parts and by what `forward` makes of them, not by its class.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tucodec.coding import raster
from lightning_tucodec.coding.categorical import CategoricalTables
from lightning_tucodec.coding.kernels import PRECISION, TOTAL
from lightning_tucodec.coding.layers import FRACTION_BITS, Convolution, convolution, quantised
from lightning_tucodec.coding.raster import REACH, RasterModel
from lightning_tucodec.errors import CorruptStreamError, ModelFileError

_PARTS = (
    *("g_a", "g_s", "h_a", "h_s", "entropy_bottleneck", "gaussian_conditional"),
    *("context_prediction", "entropy_parameters"),
)
_TAPS = [(i, j) for i in range(5) for j in range(5) if (i, j) < (REACH, REACH)]
_BOTTLENECK_PRECISION = 16  # of CompressAI's tables
_SCALE_BOUND_MIN = 2.0**-4


class ContextEngine:
    """The exact coder of one network; see `of`.

    Attributes:
        network: the transforms g_a and h_a are run in floating point.
        model: everything that decides bits, in integers.
    """

    def __init__(self, network: nn.Module, model: RasterModel) -> None:
        self.network = network
        self.model = model

    @classmethod
    def of(cls, network: nn.Module) -> "ContextEngine | None":
        """The engine of a network, on the CPU; None where it has another entropy model.

        Raises:
            ModelFileError: the tables of its bottleneck were never made (`network.update()`), or its weights
                are too large for exact sums.
        """
        if not _has_the_parts(network):
            return None
        model = _integers(network)
        return cls(network, model) if model is not None and _behaves(network) else None

    @torch.inference_mode()
    def encode(self, x: Tensor) -> list[bytes]:
        """The segments of an image: one, of z and y.

        Args:
            x: float 1×3×H×W in [0, 1]; H and W multiples of the network's stride.

        Raises:
            ModelFileError: the network makes values of it that are not finite.
        """
        network: Any = self.network
        if x.ndim != 4 or len(x) != 1:
            raise ValueError(f"one image 1×3×H×W, not {tuple(x.shape)}")
        y = network.g_a(x)
        z = network.h_a(y)
        if not (torch.isfinite(y).all() and torch.isfinite(z).all()):
            raise ModelFileError("the network makes values that are not finite of an image")
        factor = self.model.factor
        if y.shape[2:] != (factor * z.shape[2], factor * z.shape[3]):
            raise ValueError(f"an image of {tuple(x.shape[2:])} is not padded to the stride")
        medians = self.model.medians[:, None, None] * 2.0**-FRACTION_BITS
        distance = np.rint(z[0].double().cpu().numpy() - medians)
        symbols = distance.clip(-raster.Z_LIMIT, raster.Z_LIMIT).astype(np.int32)
        values = y[0].permute(1, 2, 0).float().cpu().numpy()
        return [raster.encode(self.model, symbols, values)]

    @torch.inference_mode()
    def decode(self, segments: Sequence[bytes], shape: tuple[int, int]) -> Tensor:
        """ŷ, float32 1×M×h×w on the CPU, the same on every machine.

        Args:
            segments: what `encode` returned.
            shape: height and width of z.

        Raises:
            CorruptStreamError: they are none that `encode` writes.
        """
        if len(segments) != 1:
            raise CorruptStreamError(f"{len(segments)} segments where the exact engine writes one")
        y_hat = raster.decode(self.model, segments[0], *shape)
        return torch.from_numpy(y_hat).permute(2, 0, 1)[None]


def _has_the_parts(network: nn.Module) -> bool:
    """Whether a network consists of the parts of such a model, and nothing else holds weights."""
    parts = {name.partition(".")[0] for name, _ in network.named_parameters()}
    context = getattr(network, "context_prediction", None)
    bottleneck = getattr(network, "entropy_bottleneck", None)
    mask = getattr(context, "mask", None)
    return (
        all(isinstance(getattr(network, name, None), nn.Module) for name in _PARTS)
        and parts <= set(_PARTS)
        and isinstance(context, nn.Conv2d)
        and context.kernel_size == (5, 5)
        and context.padding == (2, 2)
        and context.stride == context.dilation == (1, 1)
        and context.groups == 1
        and context.padding_mode == "zeros"
        and isinstance(mask, Tensor)
        and mask.shape == context.weight.shape
        and bool((mask == _mask(mask)).all())
        and isinstance(getattr(bottleneck, "quantiles", None), Tensor)
    )


def _mask(like: Tensor) -> Tensor:
    """The mask of type A: ones at positions that come earlier in raster order."""
    mask = torch.zeros_like(like)
    for i, j in _TAPS:
        mask[..., i, j] = 1
    return mask


def _flat(module: nn.Module) -> list[nn.Module]:
    """The layers of a chain, in order."""
    if isinstance(module, nn.Sequential):
        return [layer for part in module for layer in _flat(part)]
    return [module]


def _slope(layer: nn.Module) -> float | None:
    """The slope of a leaky ReLU or a ReLU."""
    if type(layer) is nn.ReLU:
        return 0.0
    if type(layer) is nn.LeakyReLU and 0 <= layer.negative_slope <= 1:
        return float(layer.negative_slope)
    return None


def _steps(module: nn.Module) -> list[tuple[nn.Module, float, int]] | None:
    """A chain as convolutions, each with the slope and the pixel shuffle that follow it; None: it is none."""
    steps: list[tuple[nn.Module, float, int]] = []
    active = True  # nothing may be between a convolution and its activation but a shuffle
    for layer in _flat(module):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            steps.append((layer, 1.0, 1))
            active = False
        elif isinstance(layer, nn.PixelShuffle) and steps and steps[-1][2] == 1:
            steps[-1] = (*steps[-1][:2], layer.upscale_factor)
        elif (slope := _slope(layer)) is not None and not active:
            steps[-1] = (steps[-1][0], slope, steps[-1][2])
            active = True
        else:
            return None
    return steps or None


@torch.no_grad()
def _integers(network: Any) -> RasterModel | None:
    """What decides the bits of a network; None where a layer is of another kind."""
    hyper, parameters = _steps(network.h_s), _steps(network.entropy_parameters)
    if hyper is None or parameters is None:
        return None
    context: nn.Conv2d = network.context_prediction
    channels, width = context.in_channels, context.out_channels
    sizes = [width]
    for layer, _, shuffle in parameters:
        fits = (
            type(layer) is nn.Conv2d
            and layer.kernel_size == layer.stride == (1, 1)
            and layer.padding == (0, 0)
            and layer.groups == 1
            and shuffle == 1
        )
        if not fits:
            return None
        assert isinstance(layer, nn.Conv2d)
        sizes.append(layer.out_channels)
    first: Any = parameters[0][0]
    split = first.in_channels - width
    if sizes[-1] != 2 * channels or split < 1 or parameters[-1][1] != 1.0:
        return None

    layers: list[Convolution] = []
    for number, (layer, slope, shuffle) in enumerate(hyper):
        step = convolution(f"h_s, layer {number + 1}", layer, slope, shuffle)
        if step is None:
            return None
        layers.append(step)
    rows = first.weight.flatten(1)
    name = "entropy_parameters, layer 1"
    layers.append(Convolution((quantised(name, rows[:, :split], first.bias),), 0, 1))
    points = [quantised(name, rows[:, split:], None, slope=parameters[0][1])]
    for number, (layer, slope, _) in enumerate(parameters[1:], 2):
        point: Any = layer
        name = f"entropy_parameters, layer {number}"
        points.append(quantised(name, point.weight.flatten(1), point.bias, slope=slope))
    weight = torch.stack([context.weight[:, :, i, j] for i, j in _TAPS], 1).flatten(1)
    bound = float(network.gaussian_conditional.lower_bound_scale.bound)
    if bound < _SCALE_BOUND_MIN:
        return None
    tables, medians = _bottleneck(network.entropy_bottleneck)
    return RasterModel(
        tuple(layers),
        quantised("context_prediction", weight, context.bias, _TAPS),
        tuple(points),
        tables,
        medians,
        round(bound * 2**FRACTION_BITS),
    )


def _bottleneck(bottleneck: Any) -> tuple[CategoricalTables, np.ndarray]:
    """The integer tables of z, from those of CompressAI, and the medians.

    Raises:
        ModelFileError: there are none, or they are damaged.
    """
    cdf, length, offset = (
        getattr(bottleneck, name).cpu().numpy().astype(np.int64)
        for name in ("_quantized_cdf", "_cdf_length", "_offset")
    )
    channels = bottleneck.quantiles.shape[0]
    if not cdf.size:
        raise ModelFileError("the network's tables were never made: call its update()")
    sound = cdf.ndim == 2 and len(cdf) == channels and length.shape == offset.shape == (channels,)
    if not sound or (length < 3).any() or (length > cdf.shape[1]).any():
        raise ModelFileError("the tables of entropy_bottleneck are damaged")
    # Their rows end where their range does. Ours are equally long: cells of one count precede the last one.
    cells = int(length.max()) - 1
    cumulative = np.empty((channels, cells + 1), np.int64)
    for c, size in enumerate(length):
        scaled = cdf[c, :size] << (PRECISION - _BOTTLENECK_PRECISION)
        cumulative[c, : size - 1] = scaled[:-1]
        cumulative[c, size - 1 : -1] = scaled[-2] + np.arange(1, cells - size + 2)
        cumulative[c, -1] = scaled[-1]
    if (cumulative < 0).any() or (cumulative > TOTAL).any():
        raise ModelFileError("the tables of entropy_bottleneck are damaged")
    medians = bottleneck.quantiles[:, 0, 1].double().cpu().numpy()
    fixed = np.rint(medians * 2.0**FRACTION_BITS)
    if not (np.abs(fixed) < 1 << 26).all():
        raise ModelFileError("a median of entropy_bottleneck is too large for the exact engine")
    tables = CategoricalTables(cumulative.astype(np.uint32), offset.astype(np.int32))
    return tables, fixed.astype(np.int32)


@torch.no_grad()
def _behaves(network: Any) -> bool:
    """Whether `forward` does with the parts what this engine does, at a small y of every size of value."""
    device = network.context_prediction.weight.device
    kind = network.context_prediction.weight.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 64, 128, generator=generator).to(device, kind)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        y = network.g_a(x)
        y = (4 * torch.randn(y.shape, generator=generator)).to(y)
        hook = network.g_a.register_forward_hook(lambda *_: y)
        try:
            said = network(x)
        finally:
            hook.remove()
        z_hat, z_likelihoods = network.entropy_bottleneck(network.h_a(y))
        y_hat = torch.round(y)
        context = network.context_prediction(y_hat)
        scales, means = network.entropy_parameters(
            torch.cat((network.h_s(z_hat), context), 1)
        ).chunk(2, 1)
        scales = scales.clamp(min=float(network.gaussian_conditional.lower_bound_scale.bound))
        distance = torch.round(y - means).abs().double()
        half = (
            torch.special.ndtr((0.5 - distance) / scales),
            torch.special.ndtr((-0.5 - distance) / scales),
        )
        pairs = (
            (said["likelihoods"]["y"].double(), half[0] - half[1]),
            (said["likelihoods"]["z"], z_likelihoods),
            (said["x_hat"], network.g_s(y_hat)),
        )
        return len(said["likelihoods"]) == 2 and all(
            a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-2, atol=1e-4)
            for a, b in pairs
        )
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError, AssertionError):
        return False  # another interface, other shapes
    finally:
        for module, training in modes:
            module.training = training
