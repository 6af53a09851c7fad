"""PostFilter: from decoded planes and their plain conversion to better RGB.

The networks of Zhou et al., "Variational Autoencoder for Low Bit-rate Image Compression", CVPRW 2018,
Fig. 3 (Z18 below): a convolution, residual blocks with activations before the convolutions, a
convolution, and a skip around all of it. Z18 filters RGB at full resolution (`paper`). The other
sizes work on the decoded planes at half resolution, so that a convolution costs a quarter and
sees twice as far, and the interpolation of chroma is learned:

::

    luma ─ unshuffle ─ 4 ┐
                         ├ 6 ─ Conv ─ PreActivationBlock × n ─ Conv ─ 12 ─ shuffle ─ 3 ─(+)─ RGB
    chroma ─────────── 2 ┘                    │                                          │
                             qp ─ MLP ─ scales and shifts                plain conversion┘
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tucodec.nn.blocks import PixelShuffle, PixelUnshuffle, conv3x3

_SLOPE = 0.1

_RESIDUAL = 1 / 16
"""What is learned is a few grey levels; at this scale the last layer's weights are like the others'."""


class DecodedPicture(NamedTuple):
    """What a post-filter sees of a batch of decoded pictures with even sides.

    Attributes:
        luma: N×1×H×W in [0, 1].
        chroma: N×2×(H/2)×(W/2), centred: [−½, ½].
        plain: N×3×H×W, RGB in [0, 1] as the plain conversion gives it, not rounded.
        qp: N, quantisation parameters.
    """

    luma: Tensor
    chroma: Tensor
    plain: Tensor
    qp: Tensor


@dataclass(frozen=True)
class PostFilterConfig:
    """Shape of a PostFilter.

    Attributes:
        channels: of all hidden layers.
        blocks: number of residual blocks, two convolutions each.
        half_resolution: work on the planes at half resolution rather than on RGB.
        conditioned: scale and shift the blocks' channels by what the QP says; otherwise the network
            serves the QP that it was trained at.
    """

    channels: int = 64
    blocks: int = 6
    half_resolution: bool = True
    conditioned: bool = True


SIZES = {
    "paper": PostFilterConfig(half_resolution=False),
    "fast": PostFilterConfig(channels=40),
    "tiny": PostFilterConfig(channels=32, blocks=4),
}
"""446, 45 and 20 kMAC a pixel."""


class PreActivationBlock(nn.Module):
    """x + Conv3×3(LReLU(s ⊙ Conv3×3(LReLU(x)) + t)); starts close to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """Shape and resolution stay; scale and shift are N×C×1×1, or None for 1 and 0."""
        inner = self.conv1(F.leaky_relu(x, _SLOPE))
        if scale is not None and shift is not None:
            inner = torch.addcmul(shift, inner, scale)
        return x + self.conv2(F.leaky_relu(inner, _SLOPE))


class QpModulation(nn.Module):
    """Scales and shifts of every block's channels, as a smooth function of the QP; starts at 1 and 0."""

    HIDDEN = 32

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.channels, self.blocks = channels, blocks
        self.embed = nn.Linear(1, self.HIDDEN)
        self.out = nn.Linear(self.HIDDEN, 2 * channels * blocks)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, qp: Tensor) -> list[tuple[Tensor, Tensor]]:
        """N QPs to one pair (scale, shift) of N×C×1×1 a block."""
        position = (qp.to(self.out.weight.dtype)[:, None] - 38.0) / 6.0
        values = self.out(F.silu(self.embed(position)))
        values = values.view(-1, self.blocks, 2, self.channels, 1, 1)
        return [(1 + values[:, i, 0], values[:, i, 1]) for i in range(self.blocks)]


class PostFilter(nn.Module):
    """A filter for decoded pictures; an untrained one gives the plain conversion."""

    def __init__(self, config: PostFilterConfig) -> None:
        super().__init__()
        if config.channels < 1 or config.blocks < 1:
            raise ValueError(f"channels and blocks must be at least 1: {config}")
        self.config = config
        planes, values = (6, 12) if config.half_resolution else (3, 3)
        self.fold, self.unfold = PixelUnshuffle(2), PixelShuffle(2)
        self.head = conv3x3(planes, config.channels)
        self.body = nn.ModuleList(PreActivationBlock(config.channels) for _ in range(config.blocks))
        self.tail = conv3x3(config.channels, values)
        nn.init.zeros_(self.tail.weight)
        self.modulation = (
            QpModulation(config.channels, config.blocks) if config.conditioned else None
        )

    def forward(self, picture: DecodedPicture) -> Tensor:
        """RGB, N×3×H×W, not clamped."""
        half = self.config.half_resolution
        planes = torch.cat([self.fold(picture.luma - 0.5), picture.chroma], 1) if half else None
        x = picture.plain - 0.5 if planes is None else planes
        # Planes vary little around their mean: bring them to the variance that the layers keep.
        x = self.head(x.contiguous(memory_format=torch.channels_last) * 4.0)
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(self.body)
        if self.modulation is not None:
            pairs = list(self.modulation(picture.qp))
        for block, (scale, shift) in zip(self.body, pairs, strict=True):
            x = block(x, scale, shift)
        x = self.tail(F.leaky_relu(x, _SLOPE))
        return picture.plain + _RESIDUAL * (self.unfold(x) if half else x)

    @property
    def reach(self) -> int:
        """Pixels beyond which the input has no say in an output pixel; even."""
        layers = 2 + 2 * self.config.blocks
        return 2 * layers + 2 if self.config.half_resolution else math.ceil(layers / 2) * 2
