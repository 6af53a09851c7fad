"""The learned codec: images to `.tuc` bytes and back, with one exported model."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.learned.refine import with_effort
from lightning_tucodec.coding import wavefront
from lightning_tucodec.coding.container import (
    CodecKind,
    Container,
    check_size,
    pack,
    unpack,
)
from lightning_tucodec.errors import (
    CorruptStreamError,
    ModelFileError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn import tiles
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.hyperprior import HYPER_STRIDE
from lightning_tucodec.nn.transforms import STRIDE, TransformConfig

TILE_MEMORY = 640 << 20
"""About so many bytes of activations are held at a time; larger planes are transformed in tiles."""

WHOLE_POSITIONS = 8192
"""Planes of so many latent positions (2 megapixels) are never tiled."""

Strip = TypeVar("Strip")


def _each_strip(work: Callable[[int], Strip], count: int) -> list[Strip]:
    """What `work` returns for every strip, in order; on PyTorch's number of threads, and exact on any."""
    own = torch.get_num_threads()
    if min(count, own) == 1:
        return [work(number) for number in range(count)]
    with ThreadPoolExecutor(
        min(count, own), initializer=torch.set_num_threads, initargs=(own,)
    ) as pool:
        return list(pool.map(work, range(count)))


def _scaled(positions: slice) -> slice:
    """Latent positions as pixels."""
    return slice(STRIDE * positions.start, STRIDE * positions.stop)


def _layout(transform: TransformConfig) -> torch.memory_format:
    """What is faster on CPUs: channels last, but not where pixels are folded first."""
    return torch.channels_last if transform.fold == 1 else torch.contiguous_format


class TucModel:
    """An exported model, ready to code.

    g_a and g_s run in floating point: another number of threads may change a symbol (another valid
    file) or a decoded pixel by one grey level. Everything that decides bits runs in exact integers.
    """

    def __init__(self, file: ModelFile, device: str = "cpu") -> None:
        """`device` runs g_a, h_a and g_s; bits are decided on the CPU."""
        self.file = file
        self.id = file.id
        self.device = torch.device(device)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.file.name

    @property
    def card(self) -> dict[str, Any]:
        """The model card."""
        return self.file.card

    @once_property
    @own_modes()
    def network(self) -> TucodecVAE:
        """The floating-point network (nn.Module) in eval mode."""
        network = self.file.network()
        return network.to(memory_format=_layout(network.config.transform)).to(self.device)

    @once_property
    @own_modes()
    def layout(self) -> torch.memory_format:
        """How the activations of the network lie in memory."""
        return _layout(self.network.config.transform)

    @once_property
    @own_modes()
    def frozen_network(self) -> TucodecVAE:
        """The same network with frozen weights, for optimising latents only."""
        network = self.file.network().requires_grad_(False)
        return network.to(memory_format=_layout(network.config.transform)).to(self.device)

    @once_property
    @own_modes()
    def entropy_model(self) -> wavefront.EntropyModel:
        """The integers that decide bits."""
        return self.file.entropy_model()

    @once_property
    @own_modes()
    def _halo_analysis(self) -> tiles.Halo:
        return tiles.measure(self.network.g_a, 3, STRIDE, 1)

    @once_property
    @own_modes()
    def _halo_synthesis(self) -> tiles.Halo:
        return tiles.measure(
            self.network.g_s, self.network.config.transform.latent_channels, 1, STRIDE
        )

    @torch.inference_mode()
    def _latent(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """y, float32 N×M×h×w, of N images H×W×3 of one size."""
        height, width = (math.ceil(side / STRIDE) for side in images[0].shape[:2])

        def transform(rows: slice, columns: slice) -> Tensor:
            x = np.stack([pixels[_scaled(rows), _scaled(columns)] for pixels in images])
            x = torch.from_numpy(x).to(self.device).permute(0, 3, 1, 2).float().div_(255)
            return self.network.g_a(self.network.pad(x).contiguous(memory_format=self.layout))

        if height * width <= WHOLE_POSITIONS:
            return transform(slice(0, height), slice(0, width))
        channels = self.network.config.transform.latent_channels
        y = torch.empty(len(images), height, width, channels, device=self.device)
        y = y.permute(0, 3, 1, 2)
        for rows, columns in tiles.tiles(height, width, self._halo_analysis, TILE_MEMORY):
            tile = transform(rows.read, columns.read)
            y[:, :, rows.keep, columns.keep] = tile[:, :, rows.inside, columns.inside]
        return y

    def analyse(self, pixels: NDArray[np.uint8]) -> Latents:
        """Symbols of an H×W×3 image."""
        return self.analyse_batch([pixels])[0]

    @own_modes()
    @torch.inference_mode()
    def analyse_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[Latents]:
        """Symbols of H×W×3 images of one size."""
        return self.symbols(self._latent(images))

    @own_modes()
    @torch.inference_mode()
    def symbols(self, y: Tensor) -> list[Latents]:
        """Symbols of N images from their latents.

        Args:
            y: g_a of the images, padded to multiples of 16; float32 N×M×h×w, on this model's device.

        Raises:
            ModelFileError: a value is not finite.
        """
        if not torch.isfinite(y).all():
            raise ModelFileError(f"model {self.name}: makes values that are not finite of an image")
        scale = 2.0**-wavefront.FRACTION_BITS
        edges, medians = (
            torch.from_numpy(fixed.astype(np.float32) * np.float32(scale)).to(self.device)
            for fixed in (self.entropy_model.laplace.edges, self.entropy_model.medians)
        )
        symbols = torch.bucketize(y.permute(0, 2, 3, 1).contiguous(), edges, out_int32=True)
        hyper_input = y
        if self.network.config.hyper.as_drawn:
            hyper_input = self.dequantise(symbols).abs()
        strips = []
        for top, bottom in strip_bounds(*symbols.shape[1:3]):
            hyper = self.network.h_a(hyper_input[:, :, top:bottom])
            distance = torch.round(hyper - medians[:, None, None])
            limited = distance.clamp(-wavefront.Z_LIMIT, wavefront.Z_LIMIT)
            strips.append(limited.to(torch.int32).contiguous().cpu().numpy())
        return [
            Latents(indices, [z[n] for z in strips])
            for n, indices in enumerate(symbols.cpu().numpy())
        ]

    @once_property
    @own_modes()
    def centres(self) -> Tensor:
        """The centres as every decoder knows them, float32."""
        fixed = self.entropy_model.laplace.centres.astype(np.float32)
        return torch.from_numpy(fixed * np.float32(2.0**-wavefront.FRACTION_BITS)).to(self.device)

    def dequantise(self, y: Tensor) -> Tensor:
        """ŷ, float32 N×M×h×w, of indices N×h×w×M."""
        y_hat = self.centres[y].permute(0, 3, 1, 2)
        return y_hat.contiguous(memory_format=self.layout)

    def synthesise(self, y: NDArray[np.int32], width: int, height: int) -> NDArray[np.uint8]:
        """The H×W×3 image of the symbols y; what every decoder shows."""
        return self.synthesise_batch([y])[0][:height, :width]

    @own_modes()
    @torch.inference_mode()
    def synthesise_batch(self, latents: Sequence[NDArray[np.int32]]) -> list[NDArray[np.uint8]]:
        """The 16h×16w×3 images of symbols h×w×M, all of one size."""

        def transform(rows: slice, columns: slice) -> NDArray[np.uint8]:
            y = torch.from_numpy(np.stack([y[rows, columns] for y in latents])).to(self.device)
            x_hat = self.network.g_s(self.dequantise(y)).clamp_(0, 1).mul_(255).round_()
            return x_hat.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        height, width = latents[0].shape[:2]
        if height * width <= WHOLE_POSITIONS:
            return list(transform(slice(0, height), slice(0, width)))
        images = np.empty((len(latents), STRIDE * height, STRIDE * width, 3), np.uint8)
        for rows, columns in tiles.tiles(height, width, self._halo_synthesis, TILE_MEMORY):
            tile = transform(rows.read, columns.read)
            kept = tile[:, _scaled(rows.inside), _scaled(columns.inside)]
            images[:, _scaled(rows.keep), _scaled(columns.keep)] = kept
        return list(images)

    def code(self, pixels: NDArray[np.uint8]) -> Coded:
        """Code an H×W×3 image and keep its symbols.

        Raises:
            ImageInputError: the image is larger than the format allows.
        """
        height, width = pixels.shape[:2]
        check_size(width, height)
        latents = self.analyse(pixels)
        return Coded(self.write(latents, width, height), latents)

    @own_modes()
    def write(self, latents: Latents, width: int, height: int) -> bytes:
        """The `.tuc` file of the latents of an H×W image; the same ones give the same bytes."""
        bounds = strip_bounds(*latents.y.shape[:2])

        def strip(number: int) -> bytes:
            rows = slice(*bounds[number])
            return wavefront.encode(self.entropy_model, latents.z[number], latents.y[rows])

        strips = tuple(_each_strip(strip, len(bounds)))
        return pack(Container(CodecKind.LEARNED, self.id, width, height, strips))

    def compress(self, image: ImageLike, effort: int = 0) -> bytes:
        """The `.tuc` file of an image.

        Args:
            image: PIL image, or uint8 array or tensor H×W×3.
            effort: 0 … 9, how long the encoder searches for better symbols (`codecs.learned.refine`).
        """
        return with_effort(self, effort).code(as_pixels(image)).data

    @own_modes()
    def read(
        self, container: Container, salvage: bool = False
    ) -> tuple[NDArray[np.int32], list[int]]:
        """Symbols of an unpacked file of this model.

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
        if container.kind != CodecKind.LEARNED or container.model_id != self.id:
            raise UnknownModelError(
                f"the file was written with model {container.model_id.hex()}, "
                f"not with {self.name} ({self.id.hex()})"
            )
        if container.flags:
            raise UnsupportedVersionError(
                f"the file has flags {container.flags:#x} that are unknown: update lightning-tucodec"
            )
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
        return self.synthesise(self.read(container)[0], container.width, container.height)

    def salvage(self, container: Container) -> Decoded:
        """What the sound strips of `unpack(data, salvage=True)` show, the lost rows hatched.

        Rows next to a damaged strip, as far as g_s reaches, may look different from the true ones.

        Raises:
            UnknownModelError, UnsupportedVersionError, CorruptStreamError: see `read`.
        """
        y, strips = self.read(container, salvage=True)
        pixels = self.synthesise(y, container.width, container.height)
        return Decoded(pixels, mark(pixels, strips))

    def decompress(self, data: bytes) -> Image.Image:
        """The image of a `.tuc` file that this model wrote.

        Raises:
            CorruptStreamError, UnsupportedVersionError, UnknownModelError: see `read`.
        """
        return Image.fromarray(self.decode_pixels(unpack(data)))

    @own_modes()
    @torch.inference_mode()
    def estimated_bits(self, pixels: NDArray[np.uint8]) -> float:
        """Bits of the floating-point likelihoods of `forward()`, for an H×W×3 image."""
        _, y, z = self.network.rate(self._latent([pixels]))
        return float(-(y.log2().sum(dtype=torch.float64) + z.log2().sum(dtype=torch.float64)))

    @own_modes()
    @torch.inference_mode()
    def bit_map(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The same at each position of y, h×w; the bits of a z are spread over its positions of y."""
        _, y, z = self.network.rate(self._latent([pixels]))
        bits_y, bits_z = (-v[0].double().log2().sum(0).cpu().numpy() for v in (y, z))
        height, width = bits_y.shape
        spread = bits_z.repeat(HYPER_STRIDE, 0)[:height].repeat(HYPER_STRIDE, 1)[:, :width]
        owner = np.arange(spread.size).reshape(spread.shape)
        rows, columns = np.divmod(owner, width)
        cell = rows // HYPER_STRIDE * bits_z.shape[1] + columns // HYPER_STRIDE
        share: NDArray[np.float64] = spread / np.bincount(cell.ravel())[cell]
        return bits_y + share

    @own_modes()
    @torch.inference_mode()
    def bits_of(self, latents: Latents) -> float:
        """Bits of the floating-point likelihoods of given symbols, as a file of them holds them."""
        network = self.network
        y_hat = self.dequantise(torch.from_numpy(latents.y)[None].to(self.device))
        medians = network.factorized_prior.medians()[:, None, None]
        bits = 0.0
        for (top, bottom), z in zip(strip_bounds(*latents.y.shape[:2]), latents.z, strict=True):
            strip = y_hat[:, :, top:bottom]
            z_hat = torch.from_numpy(z)[None].to(self.device) + medians
            _, _, below, above = network.quantizer.assign(strip)
            y = network.prior(strip, below, above, *network.parameters_of(z_hat, strip))
            for mass in (y, network.factorized_prior.likelihood(z_hat)):
                bits -= float(mass.log2().sum(dtype=torch.float64))
        return bits

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
