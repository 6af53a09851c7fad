"""Hyperprior networks h_a and h_s and the entropy parameters (Z19 Fig. 2 and section 2.3).

z has a quarter of y's resolution along each side, rounded up: y is padded by repeating its border
before h_a, and the output of h_s is cropped to y.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tucodec.nn.blocks import conv3x3, in_float32, pad_to_multiple, transposed3x3
from lightning_tucodec.nn.context import POINT, TapConv2d, leaky

HYPER_STRIDE = 4
"""Positions of y per position of z, along each side."""

_HYPER_GAIN = 8.0
"""Initial gain of the last layer of h_a."""


@dataclass(frozen=True)
class HyperConfig:
    """Size of the hyperprior and of the entropy-parameter network; the defaults are the paper's.

    Attributes:
        channels: width of h_a and h_s.
        latent_channels: channels of z.
        out_channels: channels of Γ, the output of h_s.
        entropy_widths: hidden widths of the entropy-parameter network.
        as_drawn: h_a reads |ŷ|, as in the figure, instead of y.
    """

    channels: int = 192
    latent_channels: int = 192
    out_channels: int = 384
    entropy_widths: tuple[int, int] = (640, 512)
    as_drawn: bool = False


class HyperAnalysis(nn.Module):
    """h_a: y (or |ŷ|), N×M×h×w, to z, N×Z×⌈h/4⌉×⌈w/4⌉."""

    def __init__(self, latent_channels: int, config: HyperConfig) -> None:
        super().__init__()
        c = config.channels
        self.conv1 = conv3x3(latent_channels, c)
        self.conv2 = conv3x3(c, c)
        self.conv3 = conv3x3(c, c, stride=2)
        self.conv4 = conv3x3(c, c)
        self.conv5 = conv3x3(c, config.latent_channels, stride=2)
        with torch.no_grad():
            # z has to rise above its own unit noise in the first steps, or the rate term silences it
            # for good and the hyperprior is never used.
            self.conv5.weight.mul_(_HYPER_GAIN)

    def forward(self, y: Tensor) -> Tensor:
        """Pads to a multiple of 4 by repeating the border, then reduces."""
        x = self.conv2(leaky(self.conv1(pad_to_multiple(y, HYPER_STRIDE))))
        x = self.conv4(leaky(self.conv3(x)))
        return self.conv5(x)


class HyperSynthesis(nn.Module):
    """h_s: ẑ, N×Z×⌈h/4⌉×⌈w/4⌉, to Γ, N×out×h×w. Runs in exact integers when coding."""

    def __init__(self, config: HyperConfig) -> None:
        super().__init__()
        c = config.channels
        self.conv1 = conv3x3(config.latent_channels, c)
        self.up1 = transposed3x3(c, c)
        self.conv2 = conv3x3(c, c)
        self.up2 = transposed3x3(c, c)
        self.conv3 = conv3x3(c, config.out_channels)

    def forward(self, z_hat: Tensor, size: tuple[int, int]) -> Tensor:
        """Γ, cropped to `size` = (h, w) of y."""
        x = leaky(self.up1(self.conv1(z_hat)))
        x = leaky(self.up2(self.conv2(x)))
        return leaky(self.conv3(x))[..., : size[0], : size[1]]


class LaplaceParameters(NamedTuple):
    """Mean and natural logarithm of the scale b of a Laplacian, each N×M×h×w."""

    mu: Tensor
    log_scale: Tensor


class EntropyParameters(nn.Module):
    """T_ep: (Γ, Υ) to (μ, log b) of every element of ŷ, through three 1×1 layers."""

    def __init__(self, latent_channels: int, hyper: HyperConfig, context_channels: int) -> None:
        super().__init__()
        wide, narrow = hyper.entropy_widths
        self.layer1 = TapConv2d(hyper.out_channels + context_channels, wide, POINT)
        self.layer2 = TapConv2d(wide, narrow, POINT)
        self.layer3 = TapConv2d(narrow, 2 * latent_channels, POINT)

    def forward(
        self, gamma: Tensor, upsilon: Tensor | None, bias: Tensor | None = None
    ) -> LaplaceParameters:
        """`upsilon` is None when the model has no context, `bias` when it has one rate."""
        features = gamma if upsilon is None else torch.cat([gamma, upsilon], dim=1)
        x = self.layer1(features)
        if bias is not None:
            x = x + bias
        x = leaky(self.layer2(leaky(x)))
        mu, log_scale = in_float32(self.layer3, x).chunk(2, dim=1)
        return LaplaceParameters(mu, log_scale)
