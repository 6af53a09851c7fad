"""Analysis transform g_a and synthesis transform g_s (Z19 Fig. 1 and section 2.1).

The figure's networks are one point of a family: widths per resolution, residual blocks per stage,
where the attention stands, whether pixels are folded into channels before the first convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tucodec.nn.blocks import (
    GDN,
    Block,
    PixelShuffle,
    PixelUnshuffle,
    ResidualAttentionBlock,
    Upsampling,
    conv1x1,
    conv3x3,
    downsample,
    in_float32,
    residual_blocks,
    upsample,
)

STRIDE = 16
"""Pixels of the image per position of the latent y, along each side."""

_LATENT_GAIN = 8.0
"""Initial gain of the last layer of g_a; pixels have a standard deviation near 0.25."""

_IGDN_GAIN = 12**-0.5
"""Initial gain of the enlarging layers of a g_s with IGDN. An IGDN squares large values; three in a row
behind layers that keep the variance make pixels of 10⁴. PyTorch's default, with which codecs with GDN
are known to train, has this gain."""


@dataclass(frozen=True)
class TransformConfig:
    """Shape of g_a and g_s; the defaults are the paper's.

    Attributes:
        widths: channels at 1/2, 1/4, 1/8 and 1/16 of the image's resolution. A zero at 1/2 skips
            that stage: pixels are folded 4×4 instead, which is much cheaper; zeros at 1/2 and 1/4 fold
            8×8.
        latent_channels: channels of y.
        blocks: residual blocks after each stage, at 1/2, 1/4, 1/8, 1/16 (none drawn).
        head_blocks: residual blocks at the head of g_s (2 as drawn).
        gdn: (I)GDN between the stages; without it the residual blocks are the nonlinearity.
        pyramid: g_a's strided branches from each stage to the latent (as drawn).
        attention_quarter: RNAB at 1/4 resolution; 84 % of the paper's cost.
        attention_latent: RNAB at 1/16 resolution.
        attention_trunk, attention_mask, attention_mask_channels: see ResidualAttentionBlock.
        non_local: a windowed non-local block inside each RNAB.
        upsampling: how g_s enlarges.
        block: kind of the residual blocks. "depthwise" makes g_a's other convolutions 1×1.
        gain: y is what g_a's layers give times this, and g_s divides by it. At high rates y spans hundreds
            of centres; without a gain some layer's weights would have to be as large.
    """

    widths: tuple[int, int, int, int] = (192, 192, 192, 192)
    latent_channels: int = 192
    blocks: tuple[int, int, int, int] = (0, 0, 0, 0)
    head_blocks: int = 2
    gdn: bool = True
    pyramid: bool = True
    attention_quarter: bool = True
    attention_latent: bool = True
    attention_trunk: int = 3
    attention_mask: int = 2
    attention_mask_channels: int | None = None
    non_local: bool = False
    upsampling: Upsampling = "transposed"
    block: Block = "residual"
    gain: float = 1.0

    def __post_init__(self) -> None:
        """Refuse stages and taps that do not exist."""
        if not isinstance(self.widths, tuple) or len(self.widths) != 4:
            raise ValueError(f"widths {self.widths!r}: the shape has four, at 1/2 to 1/16")
        w2, w4, w8, w16 = self.widths
        if (w2 and not w4) or not (w8 and w16):
            raise ValueError(f"widths {self.widths}: only 1/2, or 1/2 and 1/4, may be left out")
        if self.attention_quarter and not w4:
            raise ValueError("attention_quarter needs a stage at 1/4 resolution")
        if not self.gain > 0:
            raise ValueError(f"gain {self.gain}: must be positive")

    @property
    def fold(self) -> int:
        """Side of the squares of pixels that become channels before the first convolution."""
        return 1 if self.widths[0] else 4 if self.widths[1] else 8

    def attention(self, channels: int) -> ResidualAttentionBlock:
        """One RNAB of this family."""
        return ResidualAttentionBlock(
            channels,
            trunk=self.attention_trunk,
            mask=self.attention_mask,
            mask_channels=self.attention_mask_channels,
            non_local=self.non_local,
            upsampling=self.upsampling,
        )


class AnalysisTransform(nn.Module):
    """g_a: image x, N×3×H×W in [0, 1], to latent y, N×M×H/16×W/16 (H, W multiples of 16).

    ::

        x ─ Conv/2 ─ GDN ─┬─ Conv/2 ─ GDN ─┬─ RNAB ─ Conv/2 ─ GDN ─┬─ Conv/2 ─ RNAB ─┐
                          A                B                       C                cat ─ Conv1×1 ─ y
                          └─ Conv/8 ─┐     └─ Conv/4 ─┐            └─ Conv/2 ─────── ┘
    """

    def __init__(self, config: TransformConfig) -> None:
        super().__init__()
        w2, w4, w8, w16 = config.widths
        pointwise = config.block == "depthwise"
        entry = conv1x1 if pointwise else conv3x3
        stages: list[nn.Module] = []
        for level, (width_in, width) in enumerate([(3, w2), (w2, w4), (w4, w8), (w8, w16)]):
            if width == 0:
                continue
            layers: list[nn.Module]
            if width_in == 0:
                fold = config.fold
                layers = [PixelUnshuffle(fold), entry(3 * fold**2, width)]
            else:
                layers = [downsample(width_in, width, pointwise)]
            if config.gdn and level < 3:
                layers.append(GDN(width))
            layers.append(residual_blocks(width, config.blocks[level], config.block))
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.attention_quarter = config.attention(w4) if config.attention_quarter else nn.Identity()
        self.attention_latent = config.attention(w16) if config.attention_latent else nn.Identity()
        taps = [(w, s) for w, s in zip(config.widths[:3], (8, 4, 2), strict=True) if w]
        self.branches = nn.ModuleList(
            conv3x3(width, w16, stride=stride) for width, stride in taps if config.pyramid
        )
        fused = w16 * (1 + len(self.branches))
        self.to_latent = conv1x1(fused, config.latent_channels)
        with torch.no_grad():
            # A photograph's y should span a few centres from the first step on.
            self.to_latent.weight.mul_(_LATENT_GAIN / config.gain)
        self.gain = config.gain

    def forward(self, x: Tensor) -> Tensor:
        """Transform; raises ValueError when a side is not a multiple of 16."""
        if x.shape[-1] % STRIDE or x.shape[-2] % STRIDE:
            raise ValueError(f"image sides must be multiples of {STRIDE}, got {tuple(x.shape)}")
        x = x - 0.5
        taps = []
        # Index of the stage that ends at 1/4 resolution; there is none behind a fold of 8.
        quarter = len(self.stages) - 3
        for index, stage in enumerate(self.stages):
            x = stage(x)
            taps.append(x)
            if index == quarter:
                x = self.attention_quarter(x)
        x = self.attention_latent(x)
        features = [x, *(branch(tap) for branch, tap in zip(self.branches, taps, strict=False))]
        fused = torch.cat(features, dim=1) if len(features) > 1 else x
        return self.gain * in_float32(self.to_latent, fused)


class SynthesisTransform(nn.Module):
    """g_s: quantised latent ŷ, N×M×h×w, to image x̂, N×3×16h×16w, not clamped.

    ::

        ŷ ─ RB ─ RB ─ RNAB ─ Conv×2 ─ IGDN ─ Conv×2 ─ RNAB ─ IGDN ─ Conv×2 ─ IGDN ─ Conv×2 ─ x̂

    The decoder has no pyramid ("unbalanced", Z19 2.1), and its quarter-resolution RNAB stands
    before the IGDN, as in the figure.
    """

    def __init__(self, config: TransformConfig) -> None:
        super().__init__()
        w2, w4, w8, w16 = config.widths

        def enlarge(channels_in: int, channels_out: int) -> nn.Module:
            layer = upsample(channels_in, channels_out, config.upsampling)
            if config.gdn:
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.mul_(_IGDN_GAIN)
            return layer

        layers: list[nn.Module] = []
        if config.latent_channels != w16:
            layers.append(conv1x1(config.latent_channels, w16))
        layers.append(residual_blocks(w16, config.head_blocks, config.block))
        if config.attention_latent:
            layers.append(config.attention(w16))
        layers.append(residual_blocks(w16, config.blocks[3], config.block))
        for level, (width_in, width) in ((2, (w16, w8)), (1, (w8, w4)), (0, (w4, w2))):
            if width == 0:
                continue
            layers.append(enlarge(width_in, width))
            if level == 1 and config.attention_quarter:
                layers.append(config.attention(width))
            if config.gdn:
                layers.append(GDN(width, inverse=True))
            layers.append(residual_blocks(width, config.blocks[level], config.block))
        if w2:
            layers.append(enlarge(w2, 3))
        else:
            fold = config.fold
            leave = conv1x1 if config.block == "depthwise" else conv3x3
            last = leave(w4 or w8, 3 * fold**2)
            with torch.no_grad():
                last.weight.mul_(0.1)  # the first reconstructions are gray, not noise
            layers += [last, PixelShuffle(fold)]
        self.layers = nn.Sequential(*layers)
        self.gain = config.gain

    def forward(self, y_hat: Tensor) -> Tensor:
        """Synthesise the image."""
        first, *others = self.layers
        x = in_float32(first, y_hat / self.gain)
        for layer in others:
            x = layer(x)
        return x + 0.5
