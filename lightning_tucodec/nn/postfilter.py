"""PostFilter: from decoded planes and their plain conversion to better RGB.

The networks of Zhou et al., "Variational Autoencoder for Low Bit-rate Image Compression", CVPRW 2018,
Fig. 3 (Z18 below): a convolution, residual blocks with activations before the convolutions, a
convolution, and a skip around all of it. Z18 filters RGB at full resolution (`paper`). The other
sizes work on the decoded planes at half resolution, so that a convolution costs a quarter and
sees twice as far, and the interpolation of chroma is learned:

::

    luma ─ unshuffle ─ 4 ┐
                         ├ 6 ─ Conv ─ PreActivationBlock × n ─ Conv ─ 12·m ─ shuffle ─ m·3 ─(·)─(+)─ RGB
    chroma ─────────── 2 ┘                    │                               weights of the image  │
                             qp ─ MLP ─ scales and shifts                           plain conversion┘

The network proposes m corrections, each of three planes on the `axes`; the encoder, which knows the
original, fits a weight to each plane by least squares, and the file carries the weights: 3·m bytes.
Subspace projection of AV1's self-guided filter, with learned guides: Kousha et al., "Guided CNN
Restoration with Explicitly Signaled Linear Combination", ICIP 2022.
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

_AXES = (
    (3**-0.5, 3**-0.5, 3**-0.5), (0.0, -(2**-0.5), 2**-0.5), (2 * 6**-0.5, -(6**-0.5), -(6**-0.5)),
)  # fmt: skip

WEIGHT_STEPS = 32
"""Steps of a weight from 0 to 1; a byte holds −4 to 4."""

_RIDGE = 1e-3
"""How much a weight costs that differs from the default, as a share of what the correction is worth."""


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
        corrections: how many are proposed.
        mirrored: what decoders use is the mean of the corrections of the picture and of its mirror image,
            the geometric self-ensemble of Timofte et al., "Seven ways to improve example-based single
            image super resolution", CVPR 2016. It doubles the time; training does without.
    """

    channels: int = 64
    blocks: int = 6
    half_resolution: bool = True
    conditioned: bool = True
    corrections: int = 3
    mirrored: bool = True


SIZES = {
    "paper": PostFilterConfig(half_resolution=False, corrections=1, mirrored=False),
    "fast": PostFilterConfig(channels=40, blocks=9),
    "tiny": PostFilterConfig(channels=32, blocks=4),
}
"""446, 69 and 21 kMAC a pixel."""


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
        # In place where no gradient needs the old values: new memory costs a decoder as much as the sums.
        if scale is not None and shift is not None:
            inner = torch.addcmul(
                shift, inner, scale, out=None if torch.is_grad_enabled() else inner
            )
        return self.conv2(F.leaky_relu(inner, _SLOPE, inplace=True)).add_(x)


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
    """Proposes corrections of decoded pictures; before training the first correction is zero."""

    def __init__(self, config: PostFilterConfig) -> None:
        super().__init__()
        if min(config.channels, config.blocks, config.corrections) < 1:
            raise ValueError(f"channels, blocks and corrections must be at least 1: {config}")
        self.config = config
        planes, factor = (6, 2) if config.half_resolution else (3, 1)
        self.fold, self.unfold = PixelUnshuffle(2), PixelShuffle(factor)
        self.head = conv3x3(planes, config.channels)
        self.body = nn.ModuleList(PreActivationBlock(config.channels) for _ in range(config.blocks))
        values = 3 * factor**2
        self.tail = conv3x3(config.channels, values * config.corrections)
        # The first correction is used from the start and may begin at zero. The others' weights
        # begin at zero, so these corrections must not.
        nn.init.zeros_(self.tail.weight[:values])
        self.modulation = (
            QpModulation(config.channels, config.blocks) if config.conditioned else None
        )

    def forward(self, picture: DecodedPicture) -> Tensor:
        """Corrections along the `axes`, N×M×3×H×W."""
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
        x = self.tail(F.leaky_relu(x, _SLOPE, inplace=True))
        return self.unfold(x).unflatten(1, (self.config.corrections, 3)).mul_(_RESIDUAL)

    def ensemble(self, picture: DecodedPicture) -> Tensor:
        """What decoders use; as `forward`."""
        corrections = self(picture)
        if not self.config.mirrored:
            return corrections
        luma, chroma, plain = (plane.flip(-1) for plane in picture[:3])
        mirror = DecodedPicture(luma, chroma, plain, picture.qp)
        return corrections.add_(self(mirror).flip(-1)).div_(2)

    @property
    def reach(self) -> int:
        """Distance in pixels beyond which the input cannot affect an output pixel; even."""
        layers = 2 + 2 * self.config.blocks
        return 2 * layers + 2 if self.config.half_resolution else math.ceil(layers / 2) * 2


def axes(like: Tensor) -> Tensor:
    """Directions of the corrections in R, G, B, 3×3: gray, B − G and 2R − G − B, each of length one.

    Built on the device: a constant on the host would be copied to the device in every step.
    """
    return torch.stack([like.new_full((), value) for row in _AXES for value in row]).view(3, 3)


def corrected(plain: Tensor, corrections: Tensor, weights: Tensor) -> Tensor:
    """RGB, not clamped: N×3×H×W, N×M×3×H×W and N×M×3 to N×3×H×W."""
    planes = torch.einsum("nmc,nmchw->nchw", weights, corrections)
    return plain + torch.einsum("ck,nchw->nkhw", axes(plain), planes)


class Normal(NamedTuple):
    """Normal equations of the weights of one or several pictures' parts; parts add up.

    Attributes:
        gram: N×3×M×M, products of the corrections.
        right: N×3×M, their products with the error.
    """

    gram: Tensor
    right: Tensor

    @classmethod
    def of(cls, corrections: Tensor, error: Tensor) -> "Normal":
        """From corrections N×M×3×H×W and original minus plain conversion, N×3×H×W."""
        guides = corrections.flatten(3).transpose(1, 2)
        target = torch.einsum("ck,nkhw->nchw", axes(error), error).flatten(2)
        gram = guides @ guides.transpose(2, 3)
        return cls(gram, (guides @ target[..., None])[..., 0])

    def weights(self) -> Tensor:
        """The weights as a file carries them, N×M×3, multiples of 1 / WEIGHT_STEPS."""
        count = self.right.shape[-1]
        default = F.pad(torch.ones_like(self.right[..., :1]), (0, count - 1))
        worth = self.gram.diagonal(dim1=2, dim2=3).mean(2) * _RIDGE + 1e-9
        ridge = worth[..., None, None] * torch.eye(
            count, dtype=self.gram.dtype, device=self.gram.device
        )
        right = self.right + worth[..., None] * default
        # `solve` would wait for the device to report success; the ridge guarantees it.
        solution = torch.linalg.solve_ex(self.gram + ridge, right)[0].transpose(1, 2)
        return (solution * WEIGHT_STEPS).round().clamp(-128, 127) / WEIGHT_STEPS
