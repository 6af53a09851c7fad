"""How `tucodec compress` codes images: by one setting, or for each image by the one that meets a target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.base import DEFAULT_MODEL, H266_MODELS
from lightning_tucodec.codecs.h266.codec import H266, NO_FILTER
from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel, with_effort
from lightning_tucodec.codecs.learned.latents import Latents
from lightning_tucodec.codecs.learned.targets import (
    Coding,
    Ladder,
    Quantity,
    Setting,
    Target,
    best,
    code,
)
from lightning_tucodec.codecs.learned.transforms import WHOLE_POSITIONS
from lightning_tucodec.codecs.library import family, load_coder
from lightning_tucodec.codecs.network.codec import NetworkModel
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.transforms import STRIDE

FAMILIES: dict[Quantity, tuple[str, ...]] = {
    "bpp": ("tiny-vbr", "tiny-mse-5", "tiny-transparent"),
    "psnr": ("tiny-vbr", "tiny-mse-5", "tiny-transparent"),
    "ms_ssim": ("tiny-vbr-ssim", "tiny-transparent"),
}
"""Among which models each target chooses by default: names of families, or of variable-rate models."""

_RATES_A_LEVEL = 16
"""So many qualities of a variable-rate network, from one level to the next, does a target choose from."""


@dataclass(frozen=True)
class Request:
    """What the user asks of an encoder; None where an option is not given.

    Attributes:
        model: name or file; with a target the name of a family; or one of `H266_MODELS`.
        device: where networks run.
        target: what each file has to reach.
        effort: 0 … 9, of this package's own networks.
        quality: of a variable-rate network.
        qp, preset: of H.266.
    """

    model: str | None
    device: str
    target: Target | None = None
    effort: int = 0
    quality: float | None = None
    qp: int | None = None
    preset: str | None = None


class Encoder:
    """Codes images of one size together, in two steps: the networks of all, then the file of each.

    Raises:
        ConfigError: options that do not fit together or the model; says which, as on the command line.
        UnknownModelError, ModelFileError: there is no such model, or it is damaged.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.target = request, request.target
        self.ladders = _ladders(request)
        self._setting = self.ladders[0][0]
        alone = self._setting if self.target is None else None
        self._model = alone.model if isinstance(alone, RefinedModel) else alone

    def together(self, pixels: NDArray[np.uint8]) -> int:
        """How many images of the size of this H×W×3 one are analysed at once."""
        if not isinstance(self._model, TucModel):
            return 1
        return max(1, WHOLE_POSITIONS * STRIDE**2 // (pixels.size // 3))

    def analyse(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Latents | None]:
        """What the network of a learned model makes of images; None where that is part of `code`."""
        if not isinstance(self._model, TucModel):
            return [None] * len(images)
        latents = self._model.analyse_batch(images)
        encoder = self._setting
        if isinstance(encoder, RefinedModel):
            return [encoder.improve(*pair) for pair in zip(images, latents, strict=True)]
        return latents

    def code(self, pixels: NDArray[np.uint8], latents: Latents | None) -> Coding:
        """The file of an image, with what `analyse` made of it.

        Raises:
            ConfigError: no setting meets the target.
            TucodecError: the image cannot be coded.
        """
        if latents is not None:
            model, (height, width) = self._model, pixels.shape[:2]
            assert isinstance(model, TucModel)
            data = model.write(latents, width, height)
            return Coding(self._setting, data, lambda: model.synthesise(latents.y, width, height))
        if self.target is None:
            return code(self._setting, pixels)
        return best(self.ladders, pixels, self.target)

    def estimated_bits(self, pixels: NDArray[np.uint8], latents: Latents | None) -> float | None:
        """Bits of the likelihoods that the model was trained with; None without latents."""
        if latents is None:
            return None
        assert isinstance(self._model, TucModel)
        refined = self._setting is not self._model
        return self._model.bits_of(latents) if refined else self._model.estimated_bits(pixels)

    def named(self, coding: Coding) -> dict[str, Any]:
        """What coded an image, as the options `model` and `qp` name it."""
        if isinstance(coding.setting, H266):
            return {"model": self.request.model, "qp": coding.setting.qp}
        return {"model": coding.setting.name}


def _refuse(request: Request, *options: str) -> None:
    """Refuse options of H.266 where it does not code."""
    for option in options:
        if getattr(request, option) is not None:
            raise ConfigError(f"--{option} is an option of --model {' and '.join(H266_MODELS)}")


def _ladders(request: Request) -> list[Ladder]:
    """What `targets.best` chooses from; a single setting without a target."""
    name, target, device = request.model, request.target, request.device
    if name in H266_MODELS:
        if request.quality is not None:
            raise ConfigError(
                f"--model {name} takes --qp; --quality is for models of several rates"
            )
        if request.effort:
            raise ConfigError(f"--effort is for this package's own networks; {name} is none")
        if request.qp is None and target is None:
            raise ConfigError(f"--model {name} needs --qp or a --target-…")
        options: dict[str, Any] = {"preset": request.preset or "medium"}
        if name == "vvc":
            options["filter"] = NO_FILTER
        qps = range(64) if request.qp is None else [request.qp]
        ladder = [H266(qp, **options) for qp in qps]
        ladder[0].describe()  # says now what is wrong with binary or filter
        return [ladder]
    _refuse(request, "qp", "preset")
    if target is None:
        return [[_of_model(request, load_coder(name or DEFAULT_MODEL, device))]]
    names = FAMILIES[target.quantity] if name is None else (name,)
    members = [member for name in names for member in family(name) or [name]]
    ladders = [_rates(request, load_coder(member, device)) for member in members]
    if name is not None and not family(name) and len(ladders[0]) == 1:
        raise ConfigError(
            f"{target} chooses among the models of a family, or the rates of one model; "
            f"--model {name} is neither (see `tucodec models`)"
        )
    return ladders


def _of_model(request: Request, model: TucModel | NetworkModel) -> Setting:
    """The setting that the options ask of a model."""
    if isinstance(model, TucModel):
        if request.quality is not None:
            model = model.at(request.quality)
        return with_effort(model, request.effort)
    if request.effort:
        raise ConfigError(f"--effort is for this package's own networks; {model.name} is none")
    return model if request.quality is None else model.at(request.quality)


def _rates(request: Request, model: TucModel | NetworkModel) -> Ladder:
    """The rates of a model, falling; one that has a single rate alone."""
    alone = _of_model(request, model)  # refuses what a network does not take
    if model.levels == 1:
        return [alone]
    steps = range(_RATES_A_LEVEL * (model.levels - 1), -1, -1)
    return [_of_model(request, model.at(step / _RATES_A_LEVEL)) for step in steps]
