"""The learned codec: images to `.tuc` bytes and back, with one exported model."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_tucodec.codecs.model_file import ModelFile
from lightning_tucodec.coding import wavefront
from lightning_tucodec.coding.container import (
    CodecKind,
    Container,
    check_size,
    pack,
    unpack,
)
from lightning_tucodec.errors import CorruptStreamError, UnknownModelError
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.hyperprior import HYPER_STRIDE
from lightning_tucodec.nn.transforms import STRIDE

STRIP_POSITIONS = 8192
"""A strip has about this many positions of y at most (2 megapixels): it bounds the memory of the entropy
path and what a damaged byte can cost."""

ImageLike = Image.Image | NDArray[np.uint8] | Tensor


class Latents(NamedTuple):
    """Symbols of one image.

    Attributes:
        y: int32 h×w×M, indices of centres.
        z: int32 Z×⌈rows/4⌉×⌈w/4⌉ for every strip, distances from the medians.
    """

    y: NDArray[np.int32]
    z: list[NDArray[np.int32]]


@dataclass(frozen=True)
class Coded:
    """One coded image.

    Attributes:
        data: the `.tuc` file.
        latents: what it holds.
    """

    data: bytes
    latents: Latents


def strip_bounds(height: int, width: int) -> list[tuple[int, int]]:
    """Rows [top, bottom) of y in every strip; all but the last are a multiple of 4 rows high."""
    rows = max(HYPER_STRIDE, STRIP_POSITIONS // width // HYPER_STRIDE * HYPER_STRIDE)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """H×W×3 uint8 of any image that the Python API takes.

    Raises:
        TypeError: not a PIL image, nor uint8 of shape H×W×3.
    """
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        raise TypeError("an image is a PIL.Image or a uint8 array or tensor of shape H×W×3")
    if image.shape[2] != 3:
        raise TypeError(f"an image has shape H×W×3, got {image.shape}")
    return image


class TucModel:
    """An exported model, ready to code.

    g_a and g_s run in floating point: another number of threads may change a symbol (another valid
    file) or a decoded pixel by one grey level. Everything that decides bits runs in exact integers.
    """

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.id = file.id

    @property
    def name(self) -> str:
        """The model's name."""
        return self.file.name

    @property
    def card(self) -> dict[str, Any]:
        """The model card."""
        return self.file.card

    @cached_property
    def network(self) -> TucodecVAE:
        """The floating-point network (nn.Module) in eval mode."""
        return self.file.network().to(memory_format=torch.channels_last)

    @cached_property
    def entropy_model(self) -> wavefront.EntropyModel:
        """The integers that decide bits."""
        return self.file.entropy_model()

    @torch.inference_mode()
    def analyse(self, pixels: NDArray[np.uint8]) -> Latents:
        """Symbols of an H×W×3 image."""
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255)
        y = self.network.g_a(self.network.pad(x))
        tables = self.entropy_model.laplace
        scale = 2.0**-wavefront.FRACTION_BITS
        edges = torch.from_numpy(tables.edges.astype(np.float32) * np.float32(scale))
        symbols = torch.bucketize(y[0].permute(1, 2, 0).contiguous(), edges, out_int32=True)
        hyper_input = y
        if self.network.config.hyper.as_drawn:
            hyper_input = self._dequantise(symbols.numpy()).abs()
        medians = torch.from_numpy(
            self.entropy_model.medians.astype(np.float32) * np.float32(scale)
        )
        z = []
        for top, bottom in strip_bounds(*symbols.shape[:2]):
            hyper = self.network.h_a(hyper_input[:, :, top:bottom])[0]
            distance = torch.round(hyper - medians[:, None, None])
            limited = distance.clamp(-wavefront.Z_LIMIT, wavefront.Z_LIMIT)
            z.append(limited.to(torch.int32).contiguous().numpy())
        return Latents(symbols.numpy(), z)

    def _dequantise(self, y: NDArray[np.int32]) -> Tensor:
        """ŷ, float32 1×M×h×w."""
        centres = self.entropy_model.laplace.centres.astype(np.float32)
        centres *= np.float32(2.0**-wavefront.FRACTION_BITS)
        return torch.from_numpy(centres[y]).permute(2, 0, 1)[None]

    @torch.inference_mode()
    def synthesise(self, y: NDArray[np.int32], width: int, height: int) -> NDArray[np.uint8]:
        """The H×W×3 image of the symbols y; what every decoder shows."""
        x_hat = self.network.g_s(self._dequantise(y))[0, :, :height, :width]
        return x_hat.clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(1, 2, 0).numpy()

    def code(self, pixels: NDArray[np.uint8]) -> Coded:
        """Code an H×W×3 image and keep its symbols.

        Raises:
            ImageInputError: the image is larger than the format allows.
        """
        height, width = pixels.shape[:2]
        check_size(width, height)
        latents = self.analyse(pixels)
        bounds = strip_bounds(*latents.y.shape[:2])
        strips = tuple(
            wavefront.encode(self.entropy_model, z, latents.y[top:bottom])
            for (top, bottom), z in zip(bounds, latents.z, strict=True)
        )
        data = pack(Container(CodecKind.LEARNED, self.id, width, height, strips))
        return Coded(data, latents)

    def compress(self, image: ImageLike) -> bytes:
        """The `.tuc` file of an image."""
        return self.code(as_pixels(image)).data

    def decode_pixels(self, container: Container) -> NDArray[np.uint8]:
        """H×W×3 pixels of an unpacked file of this model.

        Raises:
            UnknownModelError: another model wrote it.
            CorruptStreamError: a strip is not what the encoder writes.
        """
        if container.kind != CodecKind.LEARNED or container.model_id != self.id:
            raise UnknownModelError(
                f"the file was written with model {container.model_id.hex()}, "
                f"not with {self.name} ({self.id.hex()})"
            )
        height = math.ceil(container.height / STRIDE)
        width = math.ceil(container.width / STRIDE)
        bounds = strip_bounds(height, width)
        if len(bounds) != len(container.strips):
            raise CorruptStreamError(
                f"the header claims {len(container.strips)} strips where the image has {len(bounds)}"
            )
        rows = []
        for (top, bottom), strip in zip(bounds, container.strips, strict=True):
            assert strip is not None
            rows.append(wavefront.decode(self.entropy_model, strip, bottom - top, width))
        return self.synthesise(np.concatenate(rows), container.width, container.height)

    def decompress(self, data: bytes) -> Image.Image:
        """The image of a `.tuc` file that this model wrote.

        Raises:
            CorruptStreamError, UnsupportedVersionError, UnknownModelError: see `decode_pixels`.
        """
        return Image.fromarray(self.decode_pixels(unpack(data)))

    @torch.inference_mode()
    def estimated_bits(self, pixels: NDArray[np.uint8]) -> float:
        """Bits of the floating-point likelihoods of `forward()`, for an H×W×3 image."""
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255)
        _, y, z = self.network.rate(self.network.g_a(self.network.pad(x)))
        return float(-(y.log2().sum(dtype=torch.float64) + z.log2().sum(dtype=torch.float64)))

    # The ImageCodec protocol, so that evaluation and allocation treat this like any other codec.

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image."""
        return self.code(image).data

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file."""
        return self.decode_pixels(unpack(data))

    def describe(self) -> dict[str, Any]:
        """What a reader needs to repeat the numbers."""
        return {
            "codec": self.name,
            "version": self.id.hex(),
            "options": {
                k: v for k, v in self.card.items() if k in ("recipe", "lmbda", "convention")
            },
            "colour": "RGB in, RGB out",
        }
