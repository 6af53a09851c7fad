"""The learned codec: images to `.tuc` bytes and back, with one exported model."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_tucodec.codecs.learned.latents import (
    Coded,
    Decoded,
    ImageLike,
    Latents,
    as_pixels,
    mark,
    own_modes,
    strip_bounds,
)
from lightning_tucodec.codecs.learned.refine import EFFORT_STEPS, Refinement, refine
from lightning_tucodec.codecs.learned.transforms import Transforms
from lightning_tucodec.coding import wavefront
from lightning_tucodec.coding.container import (
    QUALITY,
    CodecKind,
    Container,
    check_size,
    pack,
    quality_bytes,
    quality_of,
    unpack,
)
from lightning_tucodec.errors import (
    CorruptStreamError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.nn.losses import make_loss
from lightning_tucodec.nn.transforms import STRIDE
from lightning_tucodec.quality.metrics import as_tensor, bits_per_pixel, ms_ssim_scales

Strip = TypeVar("Strip")


def _each_strip(work: Callable[[int], Strip], count: int) -> list[Strip]:
    """What `work` returns for every strip, in order.

    It runs in as many threads as PyTorch has; their number changes no result.
    """
    own = torch.get_num_threads()
    if min(count, own) == 1:
        return [work(number) for number in range(count)]
    with ThreadPoolExecutor(
        min(count, own), initializer=torch.set_num_threads, initargs=(own,)
    ) as pool:
        return list(pool.map(work, range(count)))


class TucModel(Transforms):
    """An exported model, ready to code.

    g_a and g_s run in floating point: another number of threads may change a symbol (another valid
    file) or a decoded pixel by one grey level. Everything that decides bits runs in exact integers.
    """

    def code(self, pixels: NDArray[np.uint8]) -> Coded:
        """Code an H×W×3 image and keep its symbols.

        Raises:
            ImageInputError: the image is larger than the format allows.
        """
        height, width = pixels.shape[:2]
        check_size(width, height)
        latents = self.analyse(pixels)
        return Coded(self.write(latents, width, height), latents)

    def write(self, latents: Latents, width: int, height: int) -> bytes:
        """The `.tuc` file of the latents of an H×W image; the same ones give the same bytes.

        No mode of PyTorch changes that, and none is set, so that it may run beside other code: these are
        integers, in arrays of NumPy and in float64.
        """
        bounds = strip_bounds(*latents.y.shape[:2])

        def strip(number: int) -> bytes:
            rows = slice(*bounds[number])
            stream = wavefront.encode(self.entropy_model, latents.z[number], latents.y[rows])
            return self._head + stream

        strips = tuple(_each_strip(strip, len(bounds)))
        flags = QUALITY if self._head else 0
        return pack(Container(CodecKind.LEARNED, self.id, width, height, strips, flags))

    def compress(self, image: ImageLike, effort: int = 0) -> bytes:
        """The `.tuc` file of an image.

        Args:
            image: PIL image, or uint8 array or tensor H×W×3.
            effort: 0 … 9, how long the encoder searches for better symbols (`codecs.learned.refine`).
        """
        return with_effort(self, effort).code(as_pixels(image)).data

    @property
    def _head(self) -> bytes:
        """What every strip begins with: the level, or nothing."""
        return b"" if self.level is None else quality_bytes(self.level)

    def of(self, container: Container) -> "TucModel":
        """This model at the level of an unpacked file, which is that of its first sound strip.

        Raises:
            UnknownModelError, UnsupportedVersionError, CorruptStreamError: see `read`.
        """
        if container.kind != CodecKind.LEARNED or container.model_id != self.id:
            raise UnknownModelError(
                f"the file was written with model {container.model_id.hex()}, "
                f"not with {self.file.name} ({self.id.hex()})"
            )
        known = 0 if self.level is None else QUALITY
        if unknown := container.flags & ~known:
            raise UnsupportedVersionError(
                f"the file has flags {unknown:#x} that are unknown: update lightning-tucodec"
            )
        if self.level is None:
            return self
        if not container.flags & QUALITY:
            raise CorruptStreamError("the file has no quality, and its model needs one")
        level = quality_of(container)
        if level is None:
            raise CorruptStreamError("nothing can be decoded: every strip is damaged")
        if level > self.levels - 1:
            raise CorruptStreamError(f"the file claims quality {level:g}")
        return self.at(level)

    @own_modes()
    def read(
        self, container: Container, salvage: bool = False
    ) -> tuple[NDArray[np.int32], list[int]]:
        """Symbols of an unpacked file of this model at its level; see `of`.

        Args:
            container: from `unpack`.
            salvage: take a strip that is missing or cannot be decoded for damaged, and go on.

        Returns:
            int32 h×w×M, and the numbers of the damaged strips, whose symbols are those of a plain
            gray.

        Raises:
            UnknownModelError: another model wrote it.
            UnsupportedVersionError: it has flags, which only a newer program writes.
            CorruptStreamError: a strip is not what the encoder writes; with `salvage`: none is.
        """
        head = self.of(container)._head
        if head != self._head:
            raise CorruptStreamError(f"the file is not of quality {self.level:g}")
        height = math.ceil(container.height / STRIDE)
        width = math.ceil(container.width / STRIDE)
        bounds = strip_bounds(height, width)
        if len(bounds) != len(container.strips):
            raise CorruptStreamError(
                f"the header claims {len(container.strips)} strips where the image has {len(bounds)}"
            )
        damaged = []

        def symbols(number: int) -> NDArray[np.int32]:
            top, bottom = bounds[number]
            try:
                if (strip := container.strips[number]) is None:
                    raise CorruptStreamError(f"strip {number + 1} of {len(bounds)} is damaged")
                if not strip.startswith(head):
                    raise CorruptStreamError(f"strip {number + 1} is of another quality")
                strip = strip[len(head) :]
                return wavefront.decode(self.entropy_model, strip, bottom - top, width)
            except CorruptStreamError:
                if not salvage:
                    raise
                damaged.append(number)
                channels = self.entropy_model.network.latent_channels
                neutral = int(np.abs(self.entropy_model.laplace.centres).argmin())
                return np.full((bottom - top, width, channels), neutral, np.int32)

        rows = _each_strip(symbols, len(bounds))
        if len(damaged) == len(bounds):
            raise CorruptStreamError("nothing can be salvaged: every strip is damaged")
        return np.concatenate(rows), sorted(damaged)

    def decode_pixels(self, container: Container) -> NDArray[np.uint8]:
        """H×W×3 pixels of an unpacked file of this model.

        Raises:
            UnknownModelError, UnsupportedVersionError, CorruptStreamError: see `read`.
        """
        model = self.of(container)
        return model.synthesise(model.read(container)[0], container.width, container.height)

    def salvage(self, container: Container) -> Decoded:
        """What the sound strips of `unpack(data, salvage=True)` show, the lost rows hatched.

        Rows next to a damaged strip, as far as g_s reaches, may look different from the true ones.

        Raises:
            UnknownModelError, UnsupportedVersionError, CorruptStreamError: see `read`.
        """
        model = self.of(container)
        y, strips = model.read(container, salvage=True)
        pixels = model.synthesise(y, container.width, container.height)
        return Decoded(pixels, mark(pixels, strips))

    def decompress(self, data: bytes) -> Image.Image:
        """The image of a `.tuc` file that this model wrote.

        Raises:
            CorruptStreamError, UnsupportedVersionError, UnknownModelError: see `read`.
        """
        return Image.fromarray(self.decode_pixels(unpack(data)))

    # The ImageCodec protocol, so that evaluation and allocation treat this like any other codec.

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image."""
        return self.code(image).data

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file."""
        return self.decode_pixels(unpack(data))

    def describe(self) -> dict[str, Any]:
        """What a reader needs to repeat the numbers."""
        options = {k: v for k, v in self.card.items() if k in ("recipe", "lmbda", "convention")}
        if self.level is not None:
            options |= {"quality": self.level, "lmbda": self.loss.lmbda}
        return {
            "codec": self.name,
            "version": self.id.hex(),
            "options": options,
            "colour": "RGB in, RGB out",
        }


class RefinedModel:
    """A learned model whose encoder refines; an ImageCodec whose streams any decoder of the model reads.

    Raises:
        ConfigError: the model's card does not say what the model was trained for.
    """

    def __init__(self, model: TucModel, options: Refinement) -> None:
        self.model = model
        self.options = options
        self.file = model.file
        self._loss = model.loss
        if options.lmbda is not None:
            self._loss = make_loss(model.card["recipe"], options.lmbda)

    @property
    def name(self) -> str:
        """The model's name with the options."""
        _, _, options = self.options.name.partition(":")
        sign = ":" if self.model.step is None else ","
        return f"{self.model.name}{sign}{options}"

    def code(self, pixels: NDArray[np.uint8]) -> Coded:
        """Code an H×W×3 image: refined, or as the model does where that is better on the real file.

        Raises:
            ImageInputError: the image is larger than the format allows.
        """
        height, width = pixels.shape[:2]
        check_size(width, height)
        latents = self.improve(pixels, self.model.analyse(pixels))
        return Coded(self.model.write(latents, width, height), latents)

    @own_modes()
    def improve(self, pixels: NDArray[np.uint8], plain: Latents) -> Latents:
        """Refined symbols, or the plain ones of `TucModel.analyse` where their file is better."""
        steps = EFFORT_STEPS[self.options.effort]
        if steps == 0 or not ms_ssim_scales(*pixels.shape[:2]):
            return plain
        refined = refine(self.model, self._loss, pixels, plain, steps, self.options.seconds)
        return min(plain, refined, key=lambda latents: self._true_loss(pixels, latents))

    def _true_loss(self, pixels: NDArray[np.uint8], latents: Latents) -> float:
        """J of a file: its bytes, and the 8-bit image that a decoder shows."""
        height, width = pixels.shape[:2]
        size = len(self.model.write(latents, width, height))
        shown = self.model.synthesise(latents.y, width, height)
        x_hat, x = (as_tensor(image).float() / 255 for image in (shown, pixels))
        distortion = self._loss.distortion(x_hat, x)
        return float(
            self._loss.total(distortion, torch.tensor(bits_per_pixel(size, height * width)))
        )

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image."""
        return self.code(image).data

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file."""
        return self.model.decode(data)

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        described = self.model.describe()
        refinement = {
            "steps": EFFORT_STEPS[self.options.effort],
            "lmbda": self._loss.lmbda,
            "seconds": self.options.seconds,
        }
        return {
            **described,
            "codec": self.name,
            "options": {**described["options"], "refinement": refinement},
        }


def with_effort(model: TucModel, effort: int) -> TucModel | RefinedModel:
    """The model itself at effort 0, otherwise with an encoder that refines.

    Raises:
        ConfigError: effort is not within 0 … 9, or the model cannot be refined.
    """
    options = Refinement(effort)
    return RefinedModel(model, options) if effort else model
