"""Rate-distortion losses, each with its own λ convention (spec of the two recipes: Z19 section 3).

* `MSERateLoss`, the 40 dB entry: λ·MSE + bpp, MSE on [0, 1], λ = 4096 … 8000 in the paper.
* `MSSSIMRateLoss`, the MS-SSIM entry: D + λ·bpp, D = 0.2·MSE + 0.8·(1 − MS-SSIM), λ = 0.2 … 0.6 in
  the paper. Here a larger λ means fewer bits.

bpp always counts the pixels of the image as it was before any padding.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.metrics import ms_ssim
from lightning_tucodec.nn.codec import CodecOutput

MIN_MS_SSIM_SIDE = 176
"""Five scales halve four times and need 11 pixels at the coarsest: 161 at least (lessons: fails below)."""


class RateDistortion(NamedTuple):
    """Terms of a loss, each a scalar tensor averaged over the batch."""

    loss: Tensor
    distortion: Tensor
    mse: Tensor
    bpp_y: Tensor
    bpp_z: Tensor


class RateDistortionLoss(Protocol):
    """What a recipe minimises; `convention` is printed in every report."""

    lmbda: float
    convention: str
    min_crop: int

    def __call__(self, output: CodecOutput, x: Tensor) -> RateDistortion:
        """Loss of a batch; `x` is N×3×H×W in [0, 1]."""


def _rate(output: CodecOutput, x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x.shape[-1] * x.shape[-2]
    bits_y, bits_z = output.bits()
    return bits_y.mean() / pixels, bits_z.mean() / pixels


class MSERateLoss:
    """λ·MSE + bpp."""

    convention = "lambda * MSE + bpp, MSE on [0, 1]"
    min_crop = 16

    def __init__(self, lmbda: float) -> None:
        self.lmbda = lmbda

    def __call__(self, output: CodecOutput, x: Tensor) -> RateDistortion:
        """Loss of a batch; `x` is N×3×H×W in [0, 1]."""
        bpp_y, bpp_z = _rate(output, x)
        mse = (output.x_hat.float() - x.float()).square().mean()
        return RateDistortion(self.lmbda * mse + bpp_y + bpp_z, mse, mse, bpp_y, bpp_z)


class MSSSIMRateLoss:
    """0.2·MSE + 0.8·(1 − MS-SSIM) + λ·bpp."""

    convention = "0.2 * MSE + 0.8 * (1 - MS-SSIM) + lambda * bpp, on [0, 1]"
    min_crop = MIN_MS_SSIM_SIDE

    def __init__(self, lmbda: float) -> None:
        self.lmbda = lmbda

    def __call__(self, output: CodecOutput, x: Tensor) -> RateDistortion:
        """Loss of a batch; `x` is N×3×H×W in [0, 1], sides ≥ 176."""
        bpp_y, bpp_z = _rate(output, x)
        x_hat, x = output.x_hat.float(), x.float()
        mse = (x_hat - x).square().mean()
        distortion = 0.2 * mse + 0.8 * (1 - ms_ssim(x_hat, x).mean())
        loss = distortion + self.lmbda * (bpp_y + bpp_z)
        return RateDistortion(loss, distortion, mse, bpp_y, bpp_z)


def make_loss(recipe: str, lmbda: float) -> RateDistortionLoss:
    """The loss of the recipe "transparent" (MSE) or "ssim".

    Raises:
        ConfigError: another name, or λ is not positive.
    """
    losses: dict[str, type[MSERateLoss | MSSSIMRateLoss]] = {
        "transparent": MSERateLoss,
        "ssim": MSSSIMRateLoss,
    }
    if recipe not in losses:
        raise ConfigError(f"recipe {recipe!r} is unknown; choose one of {sorted(losses)}")
    if not lmbda > 0:
        raise ConfigError(f"lmbda must be positive, got {lmbda}")
    return losses[recipe](lmbda)
