"""The floating-point half of a learned model: images to symbols and back, in tiles, and estimates of bits."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_tucodec.codecs.learned.latents import (
    Latents,
    own_modes,
    strip_bounds,
)
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.coding import wavefront
from lightning_tucodec.coding.container import QUALITY_STEPS, quality_step
from lightning_tucodec.errors import ConfigError, ModelFileError
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn import tiles
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.hyperprior import HYPER_STRIDE
from lightning_tucodec.nn.losses import RateDistortionLoss, make_loss
from lightning_tucodec.nn.transforms import STRIDE, TransformConfig

TILE_MEMORY = 640 << 20
"""About so many bytes of activations are held at a time; larger planes are transformed in tiles."""

WHOLE_POSITIONS = 8192
"""Planes of so many latent positions (2 megapixels) are never tiled."""


def _scaled(positions: slice) -> slice:
    """Latent positions as pixels."""
    return slice(STRIDE * positions.start, STRIDE * positions.stop)


def _layout(transform: TransformConfig) -> torch.memory_format:
    """What is faster on CPUs: channels last, but not where pixels are folded first."""
    return torch.channels_last if transform.fold == 1 else torch.contiguous_format


class Transforms:
    """The networks of an exported model on a device.

    They run in floating point: another number of threads may change a symbol, or a decoded pixel by one grey
    level. What decides bits are the integers of `entropy_model`.
    """

    def __init__(self, file: ModelFile, device: str = "cpu", level: float | None = None) -> None:
        """Prepare a model; nothing is computed yet.

        Args:
            file: the exported model.
            device: runs g_a, h_a and g_s; bits are decided on the CPU.
            level: of a variable-rate network; None: its highest.

        Raises:
            ConfigError: the network has one rate, or not this level.
            ModelFileError: the file's content is inconsistent.
        """
        self.file = file
        self.id = file.id
        self.device = torch.device(device)
        self.step: int | None = None if level is None else self.step_of(level)

    @property
    def levels(self) -> int:
        """Levels of a variable-rate network; 1: it has one rate."""
        return self.file.checked.levels

    def step_of(self, level: float) -> int:
        """A level in 1/QUALITY_STEPS, as files hold it.

        Raises:
            ConfigError: the network has one rate, or not this level.
        """
        if self.levels == 1:
            raise ConfigError(f"{self.file.name} has one rate, and takes no quality")
        return quality_step(level, self.levels)

    @property
    def level(self) -> float | None:
        """The level of a variable-rate network; None of one rate."""
        if self.levels == 1:
            return None
        return self.levels - 1.0 if self.step is None else self.step / QUALITY_STEPS

    def at(self, level: float) -> Self:
        """The same model at another level; both share the networks."""
        step = self.step_of(level)
        _ = self.network
        other = copy.copy(self)
        vars(other).pop("entropy_model", None)
        other.step = step
        return other

    @property
    def loss(self) -> RateDistortionLoss:
        """What the model was trained for, at its level.

        Raises:
            ConfigError: its card does not say that.
        """
        recipe, lmbda = (self.card.get(key) for key in ("recipe", "lmbda"))
        if recipe is None or lmbda is None:
            raise ConfigError(
                f"model {self.name}: its card names no recipe and λ, so there is nothing to optimise for"
            )
        loss = make_loss(recipe, lmbda)
        levels = self.network.levels
        return (
            loss if levels is None or self.level is None else loss.scaled(levels.factor(self.level))
        )

    @property
    def name(self) -> str:
        """The model's name, with its level where that is not the highest."""
        if self.step is None:
            return self.file.name
        return f"{self.file.name}:quality={self.step / QUALITY_STEPS:g}"

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
        return self.file.entropy_model(self.step)

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
            x = self.network.pad(x).contiguous(memory_format=self.layout)
            return self.network.analyse(x, self.level)

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
            x_hat = self.network.synthesise(self.dequantise(y), self.level)
            x_hat = x_hat.clamp_(0, 1).mul_(255).round_()
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

    @own_modes()
    @torch.inference_mode()
    def estimated_bits(self, pixels: NDArray[np.uint8]) -> float:
        """Bits of the floating-point likelihoods of `forward()`, for an H×W×3 image."""
        _, y, z = self.network.rate(self._latent([pixels]), level=self.level)
        return float(-(y.log2().sum(dtype=torch.float64) + z.log2().sum(dtype=torch.float64)))

    @own_modes()
    @torch.inference_mode()
    def bit_map(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The same at each position of y, h×w; the bits of a z are spread over its positions of y."""
        _, y, z = self.network.rate(self._latent([pixels]), level=self.level)
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
            parameters = network.parameters_of(z_hat, strip, self.level)
            y = network.prior(strip, below, above, *parameters)
            for mass in (y, network.factorized_prior.likelihood(z_hat)):
                bits -= float(mass.log2().sum(dtype=torch.float64))
        return bits
