"""Rate-distortion losses, each with its own λ convention (spec of the two recipes: Z19 section 3).

* `MSERateLoss`, the 40 dB entry: λ·MSE + bpp, MSE on [0, 1], λ = 4096 … 8000 in the paper.
* `MSSSIMRateLoss`, the MS-SSIM entry: D + λ·bpp, D = 0.2·MSE + 0.8·(1 − MS-SSIM), λ = 0.2 … 0.6 in
  the paper. Here a larger λ means fewer bits.

bpp always counts the pixels of the image as it was before any padding.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

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


class RateDistortionLoss(ABC):
    """What a recipe minimises; `convention` is printed in every report."""

    convention: ClassVar[str]
    min_crop: ClassVar[int]

    def __init__(self, lmbda: float) -> None:
        self.lmbda = lmbda

    def __call__(self, output: CodecOutput, x: Tensor) -> RateDistortion:
        """Loss of a batch; `x` is N×3×H×W in [0, 1]."""
        bpp_y, bpp_z = _rate(output, x)
        mse = _mse(output.x_hat, x)
        distortion = self.distortion(output.x_hat, x)
        loss = self.total(distortion, bpp_y + bpp_z)
        return RateDistortion(loss, distortion, mse, bpp_y, bpp_z)

    @abstractmethod
    def distortion(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """D of a batch, a scalar; both N×3×H×W in [0, 1]."""

    @abstractmethod
    def total(self, distortion: Tensor, bpp: Tensor) -> Tensor:
        """The weighted sum that is minimised."""


def _rate(output: CodecOutput, x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x.shape[-1] * x.shape[-2]
    bits_y, bits_z = output.bits()
    return bits_y.mean() / pixels, bits_z.mean() / pixels


def _mse(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat.float() - x.float()).square().mean()


class MSERateLoss(RateDistortionLoss):
    """λ·MSE + bpp."""

    convention = "lambda * MSE + bpp, MSE on [0, 1]"
    min_crop = 16

    def distortion(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Mean squared error."""
        return _mse(x_hat, x)

    def total(self, distortion: Tensor, bpp: Tensor) -> Tensor:
        """λ·D + bpp."""
        return self.lmbda * distortion + bpp


class MSSSIMRateLoss(RateDistortionLoss):
    """0.2·MSE + 0.8·(1 − MS-SSIM) + λ·bpp."""

    convention = "0.2 * MSE + 0.8 * (1 - MS-SSIM) + lambda * bpp, on [0, 1]"
    min_crop = MIN_MS_SSIM_SIDE

    def distortion(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """0.2·MSE + 0.8·(1 − MS-SSIM), sides ≥ 11 (the recipe's crops: ≥ 176)."""
        similarity = ms_ssim(x_hat.float(), x.float()).mean()
        return 0.2 * _mse(x_hat, x) + 0.8 * (1 - similarity)

    def total(self, distortion: Tensor, bpp: Tensor) -> Tensor:
        """D + λ·bpp."""
        return distortion + self.lmbda * bpp


def make_loss(recipe: str, lmbda: float) -> RateDistortionLoss:
    """The loss of the recipe "transparent" (MSE) or "ssim".

    Raises:
        ConfigError: another name, or λ is not positive.
    """
    losses: dict[str, type[RateDistortionLoss]] = {
        "transparent": MSERateLoss,
        "ssim": MSSSIMRateLoss,
    }
    if recipe not in losses:
        raise ConfigError(f"recipe {recipe!r} is unknown; choose one of {sorted(losses)}")
    if not lmbda > 0:
        raise ConfigError(f"lmbda must be positive, got {lmbda}")
    return losses[recipe](lmbda)
