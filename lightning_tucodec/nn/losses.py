"""Rate-distortion losses, each with its own λ convention (spec of the two recipes: Z19 section 3).

* `MSERateLoss`, the 40 dB entry: λ·MSE + bpp, MSE on [0, 1], λ = 4096 … 8000 in the paper.
* `MSSSIMRateLoss`, the MS-SSIM entry: D + λ·bpp, D = 0.2·MSE + 0.8·(1 − MS-SSIM), λ = 0.2 … 0.6 in
  the paper. Here a larger λ means fewer bits.
* `CompressAIMSELoss`: λ·255²·MSE + bpp, λ = 0.0018 … 0.18 in CompressAI's tables, and
  `CompressAIMSSSIMLoss`: λ·(1 − MS-SSIM) + bpp, λ = 2.4 … 220 there; both as its `RateDistortionLoss`.

bpp always counts the pixels of the image as it was before any padding.

Adversarial losses are functions of a discriminator's `Verdict` alone, so each works with either
discriminator: `PairGameLoss` (Rippel and Bourdev), `NonSaturatingLoss` (HiFiC) and `HingeLoss`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.discriminator import Verdict
from lightning_tucodec.nn.recipes import recipe_name
from lightning_tucodec.quality.metrics import ms_ssim

MIN_MS_SSIM_SIDE = 192
"""Five scales halve four times, and the coarsest must hold windows of 11 pixels: 161 do, with a single
window that stands for the whole crop; 192 are the first multiple of 16 with more than one."""

AdversarialKind = Literal["pair", "non_saturating", "hinge"]


class RateDistortion(NamedTuple):
    """Terms of a loss, each a scalar tensor averaged over the batch."""

    loss: Tensor
    distortion: Tensor
    mse: Tensor
    bpp_y: Tensor
    bpp_z: Tensor


class Reconstruction(Protocol):
    """A network's output for N images: `CodecOutput`, or the output of other networks in this form."""

    @property
    def x_hat(self) -> Tensor:
        """N×3×H×W, not clamped."""

    def bits(self) -> tuple[Tensor, Tensor]:
        """Estimated bits of y and of z for every image, each of shape (N,), float32."""


class RateDistortionLoss(ABC):
    """What a recipe minimises: a weighted sum of a distortion D and the rate, one of whose weights is λ.

    Attributes:
        convention: the sum in words, printed in every report.
        min_crop: side of the smallest crop that D can be measured on.
        weighs_rate: λ is the weight of the rate, and not of D.
        lmbda: λ.
        weights: of D and of bpp.
    """

    convention: ClassVar[str]
    min_crop: ClassVar[int]
    weighs_rate: ClassVar[bool] = False

    def __init__(self, lmbda: float) -> None:
        self.lmbda = lmbda
        self.weights = (1.0, lmbda) if self.weighs_rate else (lmbda, 1.0)

    def __call__(self, output: Reconstruction, x: Tensor) -> RateDistortion:
        """Loss of a batch; `x` is N×3×H×W in [0, 1]. Computed in float32 under any autocast."""
        with torch.autocast(x.device.type, enabled=False):
            bpp_y, bpp_z = _rate(output, x)
            mse = _mse(output.x_hat, x)
            distortion = self.distortion(output.x_hat, x)
            loss = self.total(distortion, bpp_y + bpp_z)
        return RateDistortion(loss, distortion, mse, bpp_y, bpp_z)

    def scaled(self, factor: float) -> "RateDistortionLoss":
        """The loss whose distortion weighs `factor` times as much against the rate."""
        return type(self)(self.lmbda / factor if self.weighs_rate else self.lmbda * factor)

    def at_levels(self, output: Reconstruction, x: Tensor, factor: Tensor) -> RateDistortion:
        """The same with a balance of its own for each of N images.

        Each image's loss is scaled by `factor`^−0.6: as the least loss grows about with `factor`^0.6, all
        rates then weigh alike.

        Args:
            output: of the network, for N images.
            x: N×3×H×W in [0, 1].
            factor: N; what an image's balance gives its distortion, in proportion to this loss's.
        """
        with torch.autocast(x.device.type, enabled=False):
            pixels = x.shape[-1] * x.shape[-2]
            bpp_y, bpp_z = (bits / pixels for bits in output.bits())
            distortion = self.distortion(output.x_hat, x, each=True)
            own = self.total(factor * distortion, bpp_y + bpp_z)
            loss = (own * factor**-0.6).mean()
            mse = _mse(output.x_hat, x)
        return RateDistortion(loss, distortion.mean(), mse, bpp_y.mean(), bpp_z.mean())

    def total(self, distortion: Tensor, bpp: Tensor) -> Tensor:
        """The weighted sum that is minimised."""
        of_distortion, of_rate = self.weights
        return of_distortion * distortion + of_rate * bpp

    @abstractmethod
    def distortion(self, x_hat: Tensor, x: Tensor, *, each: bool = False) -> Tensor:
        """D of N images, both N×3×H×W in [0, 1]: a scalar, or with `each` of every image, (N,)."""


def _rate(output: Reconstruction, x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = x.shape[-1] * x.shape[-2]
    bits_y, bits_z = output.bits()
    return bits_y.mean() / pixels, bits_z.mean() / pixels


def _mse(x_hat: Tensor, x: Tensor, each: bool = False) -> Tensor:
    squares = (x_hat.float() - x.float()).square()
    return squares.mean((1, 2, 3)) if each else squares.mean()


def _dissimilarity(x_hat: Tensor, x: Tensor, each: bool = False) -> Tensor:
    """1 − MS-SSIM, sides ≥ 11 (the recipes' crops: ≥ 192)."""
    similarity = ms_ssim(x_hat.float(), x.float())
    return 1 - (similarity if each else similarity.mean())


class MSERateLoss(RateDistortionLoss):
    """λ·MSE + bpp."""

    convention = "lambda * MSE + bpp, MSE on [0, 1]"
    min_crop = 16

    def distortion(self, x_hat: Tensor, x: Tensor, *, each: bool = False) -> Tensor:
        """Mean squared error; see `RateDistortionLoss`."""
        return _mse(x_hat, x, each)


class MSSSIMRateLoss(RateDistortionLoss):
    """0.2·MSE + 0.8·(1 − MS-SSIM) + λ·bpp."""

    convention = "0.2 * MSE + 0.8 * (1 - MS-SSIM) + lambda * bpp, on [0, 1]"
    min_crop = MIN_MS_SSIM_SIDE
    weighs_rate = True

    def distortion(self, x_hat: Tensor, x: Tensor, *, each: bool = False) -> Tensor:
        """0.2·MSE + 0.8·(1 − MS-SSIM); see `RateDistortionLoss`."""
        return 0.2 * _mse(x_hat, x, each) + 0.8 * _dissimilarity(x_hat, x, each)


class CompressAIMSELoss(RateDistortionLoss):
    """λ·255²·MSE + bpp."""

    convention = "lambda * 255^2 * MSE + bpp, MSE on [0, 1]"
    min_crop = MSERateLoss.min_crop

    def distortion(self, x_hat: Tensor, x: Tensor, *, each: bool = False) -> Tensor:
        """255²·MSE; see `RateDistortionLoss`."""
        return 255**2 * _mse(x_hat, x, each)


class CompressAIMSSSIMLoss(RateDistortionLoss):
    """λ·(1 − MS-SSIM) + bpp."""

    convention = "lambda * (1 - MS-SSIM) + bpp"
    min_crop = MIN_MS_SSIM_SIDE

    def distortion(self, x_hat: Tensor, x: Tensor, *, each: bool = False) -> Tensor:
        """1 − MS-SSIM; see `RateDistortionLoss`."""
        return _dissimilarity(x_hat, x, each)


def make_loss(recipe: str, lmbda: float) -> RateDistortionLoss:
    """The loss of a recipe.

    Args:
        recipe: "mse", "ssim", or with CompressAI's λ "compressai-mse" or "compressai-ms-ssim".
        lmbda: λ in its convention.

    Raises:
        ConfigError: the name is unknown, or λ is not positive.
    """
    losses: dict[str, type[RateDistortionLoss]] = {
        "mse": MSERateLoss,
        "ssim": MSSSIMRateLoss,
        "compressai-mse": CompressAIMSELoss,
        "compressai-ms-ssim": CompressAIMSSSIMLoss,
    }
    name = recipe_name(recipe)
    if name not in losses:
        raise ConfigError(f"recipe {recipe!r} is unknown; choose one of {sorted(losses)}")
    if not lmbda > 0:
        raise ConfigError(f"lmbda must be positive, got {lmbda}")
    return losses[name](lmbda)


def check_crop(recipe: str, crop: int) -> None:
    """Refuse crops that a recipe's distortion cannot be measured on.

    Raises:
        ConfigError: too small; says why.
    """
    least = make_loss(recipe, 1.0).min_crop
    if crop < least:
        reason = (
            ": MS-SSIM halves the image four times and its window has 11 pixels"
            if least == MIN_MS_SSIM_SIDE
            else ""
        )
        raise ConfigError(
            f"recipe {recipe!r} needs crops of at least {least} pixels, got {crop}{reason}"
        )


class AdversarialLoss(Protocol):
    """The losses of both players of an adversarial game."""

    def discriminator(self, verdict: Verdict) -> Tensor:
        """What the discriminator minimises; a scalar."""

    def codec(self, verdict: Verdict) -> Tensor:
        """What the codec adds to its loss; a scalar whose gradient goes through `verdict`."""


class PairGameLoss:
    """Cross-entropy of the right order, and of the wrong one for the codec (Rippel and Bourdev).

    The codec's side is the non-saturating form: its gradient is large while it loses.
    """

    def discriminator(self, verdict: Verdict) -> Tensor:
        """log(1 + exp(−margin))."""
        return softplus(-verdict.real).mean()

    def codec(self, verdict: Verdict) -> Tensor:
        """log(1 + exp(margin)); real = −fake in a pair, so that only one side is taken."""
        return softplus(-verdict.fake).mean()


class NonSaturatingLoss:
    """Goodfellow et al., 2014, as in HiFiC."""

    def discriminator(self, verdict: Verdict) -> Tensor:
        """−log D(real) − log(1 − D(fake))."""
        return softplus(-verdict.real).mean() + softplus(verdict.fake).mean()

    def codec(self, verdict: Verdict) -> Tensor:
        """−log D(fake)."""
        return softplus(-verdict.fake).mean()


class HingeLoss:
    """Lim and Ye, "Geometric GAN", 2017."""

    def discriminator(self, verdict: Verdict) -> Tensor:
        """Hinge loss: answers that are right by a margin of at least one contribute zero."""
        return relu(1 - verdict.real).mean() + relu(1 + verdict.fake).mean()

    def codec(self, verdict: Verdict) -> Tensor:
        """−logit(fake)."""
        return -verdict.fake.mean()


def make_adversarial_loss(kind: AdversarialKind) -> AdversarialLoss:
    """The named loss.

    Raises:
        ConfigError: the name is unknown.
    """
    losses: dict[str, type[PairGameLoss | NonSaturatingLoss | HingeLoss]] = {
        "pair": PairGameLoss,
        "non_saturating": NonSaturatingLoss,
        "hinge": HingeLoss,
    }
    if kind not in losses:
        raise ConfigError(f"adversarial loss {kind!r} is unknown; choose one of {sorted(losses)}")
    return losses[kind]()
