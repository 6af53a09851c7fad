"""Which of several codings of one image meets a target: a rate, a PSNR or an MS-SSIM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.h266.codec import H266
from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel
from lightning_tucodec.codecs.network.codec import NetworkModel
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.once import once_property
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.quality.metrics import (
    bits_per_pixel,
    ms_ssim_scales,
    pixels_ms_ssim,
    sse,
)

Quantity = Literal["bpp", "psnr", "ms_ssim"]
Setting = H266 | TucModel | RefinedModel | NetworkModel

Ladder = Sequence[Setting]
"""Settings by falling rate and quality, as QP 0 … 63."""


class Coding:
    """One way to code an image.

    Args:
        setting: what coded it.
        data: the `.tuc` file.
        show: finds what a decoder shows.

    Attributes:
        is_finest: it was chosen for a rate, and every other setting keeps to that rate as well.
    """

    is_finest = False

    def __init__(
        self, setting: Setting, data: bytes, show: Callable[[], NDArray[np.uint8]]
    ) -> None:
        self.setting, self.data, self._show = setting, data, show

    @once_property
    def shown(self) -> NDArray[np.uint8]:
        """H×W×3, what a decoder shows."""
        return self._show()


@dataclass(frozen=True)
class Target:
    """What a coding has to reach.

    Attributes:
        quantity: "bpp", headers counted, is an upper bound; "psnr", in dB, and "ms_ssim" are lower ones.
        value: the bound.
    """

    quantity: Quantity
    value: float

    def measure(self, image: NDArray[np.uint8], coding: Coding) -> float:
        """The quantity of a coding of an H×W×3 image; infinite for the PSNR of the image itself."""
        if self.quantity == "bpp":
            return bits_per_pixel(len(coding.data), image.shape[0] * image.shape[1])
        if self.quantity == "psnr":
            error = sse(image, coding.shown)
            return psnr_from_sse(error, image.size) if error else np.inf
        value = pixels_ms_ssim(image, coding.shown)
        if value is None:
            raise ConfigError(f"{self}: MS-SSIM needs at least 11 pixels a side")
        return value

    def met(self, measured: float) -> bool:
        """Whether a value of the quantity is within the bound."""
        return measured <= self.value if self.quantity == "bpp" else measured >= self.value

    def __str__(self) -> str:
        """As on the command line."""
        return f"--target-{self.quantity.replace('_', '-')} {self.value:g}"


def code(setting: Setting, image: NDArray[np.uint8]) -> Coding:
    """Code an H×W×3 image."""
    if isinstance(setting, H266):
        picture = setting.code(image)
        return Coding(setting, picture.data, lambda: picture.shown)
    if isinstance(setting, NetworkModel):
        data = setting.encode(image)
        return Coding(setting, data, lambda: setting.decode(data))
    coded, (height, width) = setting.code(image), image.shape[:2]
    return Coding(
        setting, coded.data, lambda: _model(setting).synthesise(coded.latents.y, width, height)
    )


class _End(NamedTuple):
    """The last setting of a ladder that meets a target; where none does, the one tried last."""

    coding: Coding
    measured: float
    met: bool


def best(ladders: Sequence[Ladder], image: NDArray[np.uint8], target: Target) -> Coding:
    """The best picture within a rate, or the fewest bytes with a quality, of all settings.

    Better is meant in the quality that the models were trained for.

    Args:
        ladders: each is searched for its end, in few codings; a model of one rate is a ladder of its own.
        image: H×W×3.
        target: what to meet.

    Raises:
        ConfigError: none meets the target; says which comes closest.
    """
    ends = [_end(ladder, image, target) for ladder in ladders]
    meeting = [end.coding for end in ends if end.met]
    if not meeting:
        sign = 1 if target.quantity == "bpp" else -1
        closest = min(ends, key=lambda end: sign * end.measured)
        raise _missed(target, closest.coding.setting.name, closest.measured)
    if target.quantity == "bpp":
        # PSNR as well where an image is too small for MS-SSIM, which nobody has asked for.
        by_ssim = all(_is_ssim(ladder[0]) for ladder in ladders)
        by_ssim = by_ssim and ms_ssim_scales(*image.shape[:2]) > 0
        trained_for = Target("ms_ssim" if by_ssim else "psnr", 0)
        chosen = meeting[0]
        if len(meeting) > 1:
            chosen = max(meeting, key=lambda coding: trained_for.measure(image, coding))
        chosen.is_finest = all(
            end.met and end.coding.setting is ladder[0]
            for end, ladder in zip(ends, ladders, strict=True)
        )
        return chosen
    return min(meeting, key=lambda coding: len(coding.data))


def _end(ladder: Ladder, image: NDArray[np.uint8], target: Target) -> _End:
    """The finest setting of a ladder within a rate, or the coarsest with a quality, by bisection."""
    upper_bound = target.quantity == "bpp"
    found: _End | None = None
    low, high = 0, len(ladder) - 1
    while low <= high:
        middle = (low + high) // 2
        coding = code(ladder[middle], image)
        measured = target.measure(image, coding)
        end = _End(coding, measured, target.met(measured))
        if end.met:
            found = end
        if end.met == upper_bound:
            high = middle - 1
        else:
            low = middle + 1
    return found or end


def _missed(target: Target, name: str, measured: float) -> ConfigError:
    unit = {"bpp": " bpp", "psnr": " dB"}.get(target.quantity, "")
    takes = "takes" if target.quantity == "bpp" else "reaches"
    return ConfigError(f"{target}: even {name} {takes} {measured:.4g}{unit}")


def _model(setting: TucModel | RefinedModel) -> TucModel:
    """Whose decoder reads the setting's files."""
    return setting.model if isinstance(setting, RefinedModel) else setting


def _is_ssim(setting: Setting) -> bool:
    if isinstance(setting, H266 | NetworkModel):
        return False
    return _model(setting).card.get("recipe") == "ssim"
