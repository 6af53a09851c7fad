"""Initial weights for high rates: the Karhunen–Loève transform of the training pixels.

From random weights a codec at 40 dB needs hours to become a near-orthonormal transform, which an
eigenvalue decomposition finds at once (Karhunen–Loève: the best linear transform coding for Gaussian
sources; Goyal, "Theoretical foundations of transform coding", IEEE SPM 2001). The residual blocks start at
zero and learn what a linear transform cannot do.
"""

from collections.abc import Iterator
from itertools import zip_longest
from math import isqrt

import torch
from torch import Tensor, nn

from lightning_tucodec.nn.blocks import DepthwiseBlock, PixelUnshuffle
from lightning_tucodec.nn.codec import TucodecVAE

REACH = 4.0
"""Standard deviations of a latent channel that the centres span to both sides."""


@torch.no_grad()
def start_as_klt(network: TucodecVAE, x: Tensor) -> None:
    """Set the weights of g_a and g_s.

    Every 1×1 layer of g_a takes the strongest principal axes of what comes in, and its counterpart in
    g_s is the transpose. `TransformConfig.gain` decides the quantiser's step. For λ·MSE + bpp and 16×16
    pixels of three colours a position, steps far below the latents' deviation are best at
    gain = sqrt(λ·ln 2 / 18).

    Args:
        network: with folded pixels, pointwise layers and depthwise blocks only (as `tiny`).
        x: crops of training images, N×3×H×W in [0, 1].

    Raises:
        ValueError: a network of another kind.
    """
    config = network.config.transform
    plain = not (
        config.gdn or config.pyramid or config.attention_quarter or config.attention_latent
    )
    if (
        config.fold == 1
        or config.block != "depthwise"
        or config.upsampling != "pointwise"
        or not plain
    ):
        raise ValueError(
            "a KLT start needs folded pixels, depthwise blocks and pointwise upsampling, "
            "and neither GDN nor pyramid nor attention"
        )
    analysis, synthesis = (list(_silence_blocks(part)) for part in (network.g_a, network.g_s))
    values = x - 0.5
    for layer, inverse in zip_longest(analysis, reversed(synthesis)):
        if inverse is None:  # as many latent channels as g_s is wide: g_s has no such layer
            nn.init.dirac_(layer.weight)
            break
        values = PixelUnshuffle(isqrt(layer.in_channels // values.shape[1]))(values)
        rows = values.transpose(0, 1).flatten(1).double()
        axes = torch.linalg.eigh(rows @ rows.T)[1].flip(1).T.float()[: layer.out_channels]
        # A layer wider than its input keeps random rows; they have no effect at first.
        layer.weight[: len(axes)] = axes[..., None, None]
        nn.init.zeros_(inverse.weight)
        inverse.weight[:, : len(axes)] = axes.T[..., None, None]
        values = layer(values)
    # The mean of the pixels may span more than the centres do; it gets a coarser step.
    reach = network.quantizer.centres().abs().max() / REACH
    scale = (reach / network.g_a(x).std((0, 2, 3))).clamp(max=1)
    analysis[-1].weight.mul_(scale[:, None, None, None])
    synthesis[0].weight.div_(scale[:, None, None])


def _silence_blocks(module: nn.Module) -> Iterator[nn.Conv2d]:
    """Make the residual blocks the identity; the convolutions outside of them, their biases at zero."""
    for child in module.children():
        layer = child.project if isinstance(child, DepthwiseBlock) else child
        if not isinstance(layer, nn.Conv2d):
            yield from _silence_blocks(layer)
            continue
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if layer is child:
            yield layer
        else:
            nn.init.zeros_(layer.weight)
