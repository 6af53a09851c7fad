"""What the coding benches time: models with latents that carry information, and CompressAI's.

Time depends on what is coded: a model without training makes latents that are all equal, which cost a
coder next to nothing. So the scales of an untrained preset are shifted until P has the wanted rate, and
its symbols are drawn from this P by decoding random bits. CompressAI's networks are treated likewise.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.latents import Latents, strip_bounds
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.library import untrained
from lightning_tucodec.codecs.network.engine import ContextEngine
from lightning_tucodec.codecs.network.zoo import of_zoo
from lightning_tucodec.codecs.registry import own_model
from lightning_tucodec.coding import rans, wavefront
from lightning_tucodec.coding.categorical import build_cdf
from lightning_tucodec.coding.laplace import SCALE_COUNT, decode_laplace, encode_laplace
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn.transforms import STRIDE
from lightning_tucodec.quality.metrics import as_tensor

PEERS = ("mbt2018", "cheng2020-attn")
"""CompressAI's autoregressive models, at 192 channels."""

QUALITIES = {"mbt2018": 4, "cheng2020-attn": 6}
"""Quality of the zoo whose network a peer is, where its name does not say it, as `mbt2018:8` does."""

_HYPER_DECAY = 0.02  # z of the untrained presets: how fast P(k) decays, as in a trained model


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A generated picture with the spectrum and the grain of photographs, H×W×3."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3))
    for octave in range(1, 9):
        small = rng.normal(128, 50, (max(2, 2**octave * height // width), 2**octave, 3))
        layer = Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize((width, height), 3)
        total += (np.asarray(layer, float) - 128) / octave
    total += rng.normal(128, 2.5, (height, width, 1))
    return total.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Subject:
    """A model and what it codes.

    Attributes:
        name: of its rows.
        model: ours.
        pixels: H×W×3.
        latents: coded instead of the picture's own, which an untrained model cannot provide.
    """

    name: str
    model: TucModel
    pixels: NDArray[np.uint8]
    latents: Latents

    @once_property
    def data(self) -> bytes:
        """The `.tuc` file of the latents."""
        height, width = self.pixels.shape[:2]
        return self.model.write(self.latents, width, height)

    @property
    def bpp(self) -> float:
        """Bits per pixel of the file."""
        return 8 * len(self.data) * 3 / self.pixels.size

    @property
    def constant_channels(self) -> int:
        """Channels of y that hold one symbol everywhere."""
        return int((np.ptp(self.latents.y, axis=(0, 1)) == 0).sum())

    def coder(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Actions that run the coder alone over all strips: encoding and decoding.

        The networks' outputs are precomputed. Encoding: symbols to intervals to bytes; decoding: the inverse.
        """
        entropy = self.model.entropy_model
        tables = entropy.laplace
        bounds = strip_bounds(*self.latents.y.shape[:2])
        strips = [
            wavefront.in_order(entropy, z, self.latents.y[top:bottom])
            for (top, bottom), z in zip(bounds, self.latents.z, strict=True)
        ]
        streams = [rans.encode(*encode_laplace(*symbols, tables)) for symbols in strips]

        def forth() -> None:
            for symbols in strips:
                rans.encode(*encode_laplace(*symbols, tables))

        def back() -> None:
            for symbols, stream in zip(strips, streams, strict=True):
                decode_laplace(rans.RansDecoder(stream), symbols.mu, symbols.scale, tables)

        return forth, back


def trained(name: str, pixels: NDArray[np.uint8], device: str = "cpu") -> Subject:
    """A shipped or exported model (`tiny-vbr:quality=3`) with the latents of the picture."""
    model = own_model(name, device)
    return Subject(model.name, model, pixels, model.analyse(pixels))


def sampled(preset: str, bpp: float, pixels: NDArray[np.uint8], device: str = "cpu") -> Subject:
    """An untrained preset whose P has the rate `bpp`, with symbols drawn from P.

    Raises:
        ConfigError: no shift of the scales gives this rate.
    """
    height, width = (math.ceil(side / STRIDE) for side in pixels.shape[:2])
    file = untrained(preset).file
    tensors = dict(file.tensors)
    reach = 3
    decay = _HYPER_DECAY ** np.abs(np.arange(-reach, reach + 1))
    table = build_cdf(np.append(decay, 1e-7))
    channels = tensors["medians"].numel()
    tensors["categorical.cumulative"] = torch.from_numpy(table.astype(np.int32)).repeat(channels, 1)
    tensors["categorical.offset"] = torch.full((channels,), -reach, dtype=torch.int32)
    bias, shift = "entropy.parameters.scale.bias", int(tensors["entropy.parameters.scale.shift"])

    def draw(step: int) -> tuple[TucModel, Latents, float]:
        """The model with its scales raised by `step` table entries, symbols drawn from it, their bpp."""
        changed = {**tensors, bias: tensors[bias] + (step << shift)}
        model = TucModel(ModelFile(f"{preset}, {bpp} bpp", file.config, changed, {}), device)
        rows, z, bits = [], [], 0
        for top, bottom in strip_bounds(height, width):
            # 24 bits a symbol are more than P needs at any of these rates.
            count = (bottom - top) * width * model.entropy_model.network.latent_channels
            words = np.random.default_rng(top).integers(
                0, 1 << 32, 4096 + 3 * count // 4, np.uint32
            )
            words[0] |= 1 << 31  # a head that an encoder could have written
            decoder = rans.RansDecoder(words.tobytes())
            strip_z, strip_y = wavefront.take(model.entropy_model, decoder, bottom - top, width)
            rows.append(strip_y)
            z.append(strip_z)
            bits += 32 * int(decoder.head[1])
        return model, Latents(np.concatenate(rows), z), bits * 3 / pixels.size

    low, high = -SCALE_COUNT, SCALE_COUNT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if draw(middle)[2] < bpp else (low, middle)
    model, latents, rate = draw(high)
    if abs(rate / bpp - 1) > 0.1:
        raise ConfigError(f"--bpp {bpp:g}: {preset} reaches {rate:.3g} bpp with this picture")
    return Subject(f"{preset} {bpp} bpp", model, pixels, latents)


class _Constant(nn.Module):
    """Returns the value that it was built with."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """`value`, whatever x is."""
        return self.value


class Peer:
    """One of CompressAI's networks with random weights and y drawn from its own P at `bpp`.

    The last layer of its entropy parameters predicts one Gaussian everywhere, from which y is drawn; all
    layers run as usual. The same latents are coded by our exact engine for such networks.

    Attributes:
        name: of its rows; of the zoo, and its quality (see `QUALITIES`).
        y_hat: N×M×h×w, what `decompress` finds in the streams.
        strings: as `compress` returns them.
        engine: ours, for the same network.
        segments: as `exact_compress` returns them.
        constant_channels: channels of ŷ that hold one value everywhere.
    """

    def __init__(self, name: str, bpp: float, pixels: NDArray[np.uint8]) -> None:
        self.name = name
        zoo, _, quality = name.partition(":")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: Any = of_zoo(zoo, int(quality or QUALITIES[zoo]))
        self.network = network.eval().to(memory_format=torch.channels_last)
        last = network.entropy_parameters[-1]
        channels = last.bias.numel() // 2
        scale = _gaussian_scale(bpp * STRIDE**2 / channels)
        with torch.no_grad():
            last.weight.zero_()
            last.bias[:channels], last.bias[channels:] = scale, 0
        network.update(force=True)
        self.engine = ContextEngine.of(network)
        assert self.engine is not None
        height, width = (-(-side // 64) for side in pixels.shape[:2])
        x = as_tensor(pixels).float() / 255
        self.x = nn.functional.pad(x, (0, 64 * width - x.shape[3], 0, 64 * height - x.shape[2]))
        self.shape = (height, width)
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(1, channels, 4 * height, 4 * width, generator=generator)
        self._y = y * scale
        self.strings = self.compress()
        seen: list[Tensor] = []
        hook = network.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.decompress()
        hook.remove()
        self.y_hat = seen[0]
        self.segments = self.exact_compress()
        spread = self.y_hat.amax((0, 2, 3)) - self.y_hat.amin((0, 2, 3))
        self.constant_channels = int((spread == 0).sum())

    @property
    def bpp(self) -> float:
        """Bits per pixel of the streams."""
        return 8 * sum(len(s) for one in self.strings for s in one) * 3 / self.x.numel()

    @torch.inference_mode()
    def decompress(self) -> Tensor:
        """CompressAI's whole decoder."""
        x_hat: Tensor = self.network.decompress(self.strings, self.shape)["x_hat"]
        return x_hat

    @torch.inference_mode()
    def compress(self) -> list[list[bytes]]:
        """CompressAI's whole encoder, g_a's result replaced by the drawn latents."""
        with self._drawn():
            strings: list[list[bytes]] = self.network.compress(self.x)["strings"]
        return strings

    @torch.inference_mode()
    def exact_decompress(self) -> Tensor:
        """The whole decoder with our engine."""
        x_hat: Tensor = self.network.g_s(self.exact_latents()).clamp_(0, 1)
        return x_hat

    def exact_latents(self) -> Tensor:
        """ŷ by our engine."""
        assert self.engine is not None
        return self.engine.decode(self.segments, self.shape)

    def exact_compress(self) -> list[bytes]:
        """The whole encoder with our engine, g_a's result replaced."""
        assert self.engine is not None
        with self._drawn():
            return self.engine.encode(self.x)

    @torch.inference_mode()
    def exact_bits(self) -> float:
        """Bits of our engine's segments over those of the likelihoods of `forward`."""
        with self._drawn():
            said = self.network(self.x)["likelihoods"].values()
        estimated = sum(float(-one.double().log2().sum()) for one in said)
        return 8 * sum(map(len, self.segments)) / estimated

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[None]:
        """Within this context g_a returns the drawn latents."""
        hook = self.network.g_a.register_forward_hook(lambda *_: self._y)
        try:
            yield
        finally:
            hook.remove()

    @torch.inference_mode()
    def analyse(self) -> None:
        """g_a alone."""
        self.network.g_a(self.x)

    @torch.inference_mode()
    def synthesise(self) -> None:
        """g_s alone."""
        self.network.g_s(self.y_hat)

    def entropy_only(self) -> "Peer":
        """This peer without its transforms, from here on."""
        self.network.g_a = _Constant(self._y)
        self.network.g_s = _Constant(self.x)
        return self


def _gaussian_scale(bits: float) -> float:
    """The standard deviation at which a rounded Gaussian has this many bits of entropy."""

    def entropy(scale: float) -> float:
        edges = torch.arange(-60, 61, dtype=torch.float64) - 0.5
        mass = torch.special.ndtr(edges / scale).diff()
        return float(-(mass * mass.clamp(min=1e-300).log2()).sum())

    low, high = 0.11, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle) < bits else (low, middle)
    return high
