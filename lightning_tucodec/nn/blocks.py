"""Building blocks of the transforms: residual and attention blocks, GDN, resampling.

All tensors are N×C×H×W. Sources: Zhou et al., "End-to-end Optimized Image Compression with Attention
Mechanism", CLIC/CVPRW 2019, Fig. 1 (Z19 below); Zhang et al., "Residual Non-local Attention
Networks", ICLR 2019 (RNAN); Ballé et al., "Density Modeling of Images using a Generalized
Normalization Transformation", ICLR 2016 (GDN).
"""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Upsampling = Literal["transposed", "pixel_shuffle", "pointwise"]
Block = Literal["residual", "depthwise"]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution that keeps (or divides by `stride`, rounding up) the spatial size."""
    return preserving(nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1))


def conv1x1(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 1×1 convolution."""
    return preserving(nn.Conv2d(channels_in, channels_out, 1))


def transposed3x3(channels_in: int, channels_out: int, factor: int = 2) -> nn.ConvTranspose2d:
    """A transposed 3×3 convolution that enlarges `factor` times and keeps the variance.

    A value of the output sums 9 / factor² taps. PyTorch's default would shrink the variance twelvefold
    at factor 2; two such layers in h_s silence the hyperprior before it is learned.
    """
    layer = nn.ConvTranspose2d(
        channels_in, channels_out, 3, stride=factor, padding=1, output_padding=factor - 1
    )
    nn.init.normal_(layer.weight, std=factor / (9 * channels_in) ** 0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the right and bottom border of N×C×H×W until both sides are multiples."""
    # Not by F.pad's "replicate": its gradient has no deterministic kernel on a GPU, and Inductor mistakes its
    # layout on a CPU, channels-last.
    for axis in (3, 2):
        if missing := -x.shape[axis] % multiple:
            border = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, *[border] * missing], axis)
    return x


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer, under autocast in float32: bfloat16 holds 8 bits, values of y and μ need more."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return layer(x.float())
    return layer(x)


def preserving(layer: nn.Conv2d) -> nn.Conv2d:
    """Initialise so that the output has the variance of the input.

    PyTorch's default shrinks it threefold; ten layers later the latent is all zeros after rounding,
    and a network without GDN learns nothing for the first thousand steps.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class PixelUnshuffle(nn.Module):
    """Fold `factor`×`factor` pixels into channels: N×C×(fH)×(fW) to N×(C·f²)×H×W."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Fold; both sides of `x` must be multiples of the factor."""
        f = self.factor
        return rearrange(x, "n c (h fh) (w fw) -> n (c fh fw) h w", fh=f, fw=f)


class PixelShuffle(nn.Module):
    """The inverse of PixelUnshuffle: N×(C·f²)×H×W to N×C×(fH)×(fW)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Unfold channels into pixels."""
        f = self.factor
        return rearrange(x, "n (c fh fw) h w -> n c (h fh) (w fw)", fh=f, fw=f)


def upsample(channels_in: int, channels_out: int, kind: Upsampling, factor: int = 2) -> nn.Module:
    """3×3 convolution that enlarges `factor` times; Z19 does not say which kind it used.

    "transposed" costs a quarter of "pixel_shuffle" at factor 2 and equal widths; "pointwise" is a pixel
    shuffle behind a 1×1 convolution.
    """
    if kind == "transposed":
        return transposed3x3(channels_in, channels_out, factor)
    layer = conv1x1 if kind == "pointwise" else conv3x3
    return nn.Sequential(layer(channels_in, channels_out * factor**2), PixelShuffle(factor))


def downsample(channels_in: int, channels_out: int, pointwise: bool = False) -> nn.Module:
    """A 3×3 convolution with stride 2, or 2×2 pixels folded before a 1×1 convolution."""
    if pointwise:
        return nn.Sequential(PixelUnshuffle(2), conv1x1(4 * channels_in, channels_out))
    return conv3x3(channels_in, channels_out, stride=2)


class _NonNegative(torch.autograd.Function):
    """max(x, bound) whose gradient still pushes values below the bound upwards."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound); a value below the bound keeps its gradient when descent would raise it."""
    return _NonNegative.apply(x, bound)


class GDN(nn.Module):
    """Generalised divisive normalisation, y_i = x_i / sqrt(β_i + Σ_j γ_ij x_j²); inverse multiplies.

    β ≥ 1e-6 and γ ≥ 0 are kept by the usual square re-parametrisation (Ballé 2016).
    """

    _PEDESTAL = 2.0**-36

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter(torch.sqrt(torch.ones(channels) + self._PEDESTAL))
        self.gamma = nn.Parameter(torch.sqrt(0.1 * torch.eye(channels) + self._PEDESTAL))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`; the shape stays."""
        beta = lower_bound(self.beta, (1e-6 + self._PEDESTAL) ** 0.5).square() - self._PEDESTAL
        gamma = lower_bound(self.gamma, self._PEDESTAL**0.5).square() - self._PEDESTAL
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * norm.sqrt() if self.inverse else x * norm.rsqrt()


class ResidualBlock(nn.Module):
    """x + Conv3×3(ReLU(Conv3×3(x))), the RB of Z19 Fig. 1; starts close to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape and resolution stay."""
        return x + self.conv2(F.relu(self.conv1(x)))


class DepthwiseBlock(nn.Module):
    """x + W₂·φ(W₁·D(x)): D a depthwise 3×3 convolution, W 1×1 ones, φ a leaky ReLU between.

    Costs about a fifth of a ResidualBlock of equal width, so a network of equal cost is twice as wide or
    deep (as in DCVC-RT's and ConvNeXt's blocks). Starts close to the identity.
    """

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = preserving(nn.Conv2d(channels, channels * expansion, 1))
        self.project = preserving(nn.Conv2d(channels * expansion, channels, 1))
        with torch.no_grad():
            self.project.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape and resolution stay."""
        inner = F.leaky_relu(self.expand(self.depthwise(x)), 0.125, inplace=True)
        return self.project(inner).add_(x)


def residual_blocks(channels: int, count: int, kind: Block = "residual") -> nn.Sequential:
    """`count` blocks in a row (none is the identity)."""
    block = ResidualBlock if kind == "residual" else DepthwiseBlock
    return nn.Sequential(*(block(channels) for _ in range(count)))


class NonLocalBlock(nn.Module):
    """x + W·softmax(θ(x)ᵀφ(x))·g(x) inside windows: embedded Gaussian, W starts at zero (RNAN 3.2).

    Every position attends to the `window`×`window` positions of its own window, so memory grows
    linearly with the image: a full affinity matrix of a 2000×2000 image at quarter resolution would
    need 6·10¹⁰ entries. Padding added to fill the last windows is masked out of the softmax.
    """

    def __init__(self, channels: int, window: int = 16) -> None:
        super().__init__()
        self.window = window
        inner = channels // 2
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.out = nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shape and resolution stay."""
        height, width = x.shape[-2:]
        w = self.window
        pad = (0, -width % w, 0, -height % w)

        def windows(t: Tensor) -> Tensor:
            return rearrange(F.pad(t, pad), "n c (h wh) (v wv) -> (n h v) (wh wv) c", wh=w, wv=w)

        valid = windows(torch.ones_like(x[:1, :1]))[..., 0] > 0  # windows × keys
        valid = valid.repeat(x.shape[0], 1)[:, None, :]
        attended = F.scaled_dot_product_attention(
            windows(self.theta(x)),
            windows(self.phi(x)),
            windows(self.g(x)),
            attn_mask=valid,
            scale=1.0,
        )
        merged = rearrange(
            attended,
            "(n h v) (wh wv) c -> n c (h wh) (v wv)",
            n=x.shape[0],
            h=(height + pad[3]) // w,
            wh=w,
            wv=w,
        )
        return x + self.out(merged[..., :height, :width])


class ResidualAttentionBlock(nn.Module):
    """RNAB, x + T(x) ⊙ sigmoid(M(x)) (Z19 Fig. 1, inset).

    ::

        x ─┬─ RB ×trunk ─────────────────────────────────────────────┐
           ├─ [NLB] ─ RB×m ─ Conv/2 ─ RB×m ─ Up×2 ─ RB×m ─ Conv ─ σ ─⊙─(+)─
           └────────────────────────────────────────────────────────────┘

    Args:
        channels: width of x and of the trunk.
        trunk: residual blocks on the data path (3 as drawn).
        mask: residual blocks before, inside and after the subscaled part (2 as drawn).
        mask_channels: width of the mask branch; `channels` as drawn. A thinner branch is entered
            and left through its own first and last convolution.
        non_local: put a windowed non-local block first in the mask branch, as RNAN does; Z19's
            text names it, its figure does not show one.
        window: side of the non-local block's windows.
        upsampling: kind of the mask's upscale.
    """

    def __init__(
        self,
        channels: int,
        trunk: int = 3,
        mask: int = 2,
        mask_channels: int | None = None,
        non_local: bool = False,
        window: int = 16,
        upsampling: Upsampling = "transposed",
    ) -> None:
        super().__init__()
        inner = mask_channels or channels
        self.trunk = residual_blocks(channels, trunk)
        entry: list[nn.Module] = [NonLocalBlock(channels, window)] if non_local else []
        if inner != channels:
            entry.append(nn.Conv2d(channels, inner, 1))
        self.before = nn.Sequential(*entry, residual_blocks(inner, mask))
        self.inside = nn.Sequential(
            conv3x3(inner, inner, stride=2),
            residual_blocks(inner, mask),
            upsample(inner, inner, upsampling),
        )
        self.after = nn.Sequential(residual_blocks(inner, mask), conv3x3(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape and resolution stay; odd sizes are enlarged inside and cropped back."""
        height, width = x.shape[-2:]
        mask = self.inside(self.before(x))[..., :height, :width]
        return x + self.trunk(x) * torch.sigmoid(self.after(mask))
