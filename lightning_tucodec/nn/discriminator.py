"""Discriminators: they distinguish a photograph from its reconstruction.

Both return a `Verdict`, from which the losses in `lightning_tucodec.nn.losses` are made. A discriminator is
needed for training only and is not exported.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lightning_tucodec.nn.blocks import conv1x1, conv3x3

DiscriminatorKind = Literal["pair", "patch"]

_SLOPE = 0.2
_PAIR_WIDTHS = (32, 64, 128, 128)
_PATCH_WIDTHS = (64, 128, 256, 512)
_AMPLIFY = 8.0  # a reconstruction differs from its original by a few hundredths


class Verdict(NamedTuple):
    """Logits of "this is an original", one or many per image.

    Attributes:
        real: for the originals; positive where the discriminator is right.
        fake: for the reconstructions; negative where it is right.
    """

    real: Tensor
    fake: Tensor

    def right(self) -> Tensor:
        """Share of right answers for each image, (N,), without gradient."""
        real = (self.real > 0).float().flatten(1).mean(1)
        fake = (self.fake < 0).float().flatten(1).mean(1)
        return ((real + fake) / 2).detach()


class PairDiscriminator(nn.Module):
    """Which one of two images is the original? Rippel and Bourdev, ICML 2017, section 4.

    The two come in random order. Every level halves the resolution and gives a scalar; their mean is
    the logit of "the first one". The first layer sees mean and amplified difference of the two, which
    determine the pair.

    Args:
        widths: channels of the levels.
    """

    def __init__(self, widths: Sequence[int] = _PAIR_WIDTHS) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        self.heads = nn.ModuleList()
        width_in = 6
        for width in widths:
            self.levels.append(
                nn.Sequential(
                    conv3x3(width_in, width, stride=2),
                    nn.LeakyReLU(_SLOPE),
                    conv3x3(width, width),
                    nn.LeakyReLU(_SLOPE),
                )
            )
            self.heads.append(conv1x1(width, 1))
            width_in = width

    def forward(self, x: Tensor, x_hat: Tensor, latent: Tensor, swapped: Tensor) -> Verdict:
        """Judge N pairs.

        Args:
            x: originals, N×3×H×W in [0, 1].
            x_hat: their reconstructions.
            latent: not used; see PatchDiscriminator.
            swapped: (N,) bool, where the reconstruction comes first.
        """
        swap = swapped.view(-1, 1, 1, 1)
        first, second = torch.where(swap, x_hat, x), torch.where(swap, x, x_hat)
        features = torch.cat([(first + second) / 2 - 0.5, _AMPLIFY * (first - second)], 1)
        scores = []
        for level, head in zip(self.levels, self.heads, strict=True):
            features = level(features)
            scores.append(head(features).flatten(1).mean(1))
        score = torch.stack(scores, 1).float().mean(1, keepdim=True)
        margin = torch.where(swapped.view(-1, 1), -score, score)
        return Verdict(margin, -margin)


class PatchDiscriminator(nn.Module):
    """Is this patch, given the latent, an original? Mentzer et al. (HiFiC), NeurIPS 2020, Fig. 2 and A.1.

    Spectral normalisation throughout; every forward in training mode updates its state.

    Args:
        latent_channels: M of the codec.
        widths: channels of the convolutions; all but the last halve the resolution.
        condition: channels that the latent is reduced to.
    """

    def __init__(
        self,
        latent_channels: int,
        widths: Sequence[int] = _PATCH_WIDTHS,
        condition: int = 12,
    ) -> None:
        super().__init__()
        self.condition = nn.Sequential(
            spectral_norm(conv3x3(latent_channels, condition)), nn.LeakyReLU(_SLOPE)
        )
        layers: list[nn.Module] = []
        width_in = 3 + condition
        for index, width in enumerate(widths):
            stride = 2 if index < len(widths) - 1 else 1
            layers += [spectral_norm(conv3x3(width_in, width, stride)), nn.LeakyReLU(_SLOPE)]
            width_in = width
        layers.append(spectral_norm(conv1x1(width_in, 1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, x_hat: Tensor, latent: Tensor, swapped: Tensor) -> Verdict:
        """Judge N originals and N reconstructions.

        Args:
            x: originals, N×3×H×W in [0, 1].
            x_hat: their reconstructions.
            latent: N×M×h×w; no gradient goes back into it.
            swapped: not used; see PairDiscriminator.
        """
        condition = F.interpolate(self.condition(latent.detach()), x.shape[-2:], mode="nearest")
        both = torch.cat([x, x_hat.to(x.dtype)]) - 0.5
        logits = self.layers(torch.cat([both, torch.cat([condition, condition])], 1))
        return Verdict(*logits.float().chunk(2))


def make_discriminator(
    kind: DiscriminatorKind, latent_channels: int, widths: Sequence[int] | None = None
) -> PairDiscriminator | PatchDiscriminator:
    """The named discriminator, with its usual widths where none are given.

    Raises:
        ValueError: the name is unknown, or there are no widths.
    """
    if widths is not None and (not widths or min(widths) < 1):
        raise ValueError(f"widths of a discriminator must be positive, got {list(widths)}")
    if kind == "pair":
        return PairDiscriminator(widths or _PAIR_WIDTHS)
    if kind == "patch":
        return PatchDiscriminator(latent_channels, widths or _PATCH_WIDTHS)
    raise ValueError(f"discriminator {kind!r} is unknown; choose one of ['pair', 'patch']")
