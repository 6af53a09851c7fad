"""A network of CompressAI's form as a codec: images to `.tuc` bytes and back.

The one strip of the container:

    bytes   field
    2       where flag 2 is set: the quality of a variable-rate network in 1/256 of a level, little-endian
    1       number of segments
    1–5     length of each segment but the last, varints as in the container's header
    …       the segments

Flag 1: the segments are those of the exact engine (`codecs.network.engine`), which give the same symbols on
every machine. Otherwise they are the strings of the network's own `compress`, whose probabilities come out of
floating point: a machine that computes otherwise refuses the file.
"""

import copy
import dataclasses
import math
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_tucodec.codecs.cards import UNFIT
from lightning_tucodec.codecs.learned.latents import Decoded, own_modes
from lightning_tucodec.codecs.learned.model_file import ModelFile, check_tensors
from lightning_tucodec.codecs.network.build import (
    Budget,
    Rates,
    build,
    check_trusted,
    stride_of,
)
from lightning_tucodec.codecs.network.engine import ContextEngine
from lightning_tucodec.codecs.network.strings import OwnStrings
from lightning_tucodec.coding.container import (
    QUALITY,
    QUALITY_BYTES,
    CodecKind,
    Container,
    check_size,
    pack,
    quality_bytes,
    quality_of,
    read_varint,
    unpack,
    varint,
)
from lightning_tucodec.coding.rans64 import check_tables
from lightning_tucodec.errors import (
    ConfigError,
    CorruptStreamError,
    ModelFileError,
    TucodecError,
    UnknownModelError,
    UnsupportedVersionError,
    one_line,
)
from lightning_tucodec.io.once import once_property
from lightning_tucodec.nn.blocks import pad_to_multiple
from lightning_tucodec.quality.metrics import as_tensor

_EXACT = 1


class NetworkModel:
    """An exported network, ready to code.

    Args:
        file: see `freeze_network`.
        device: where the network runs.
        quality: of a variable-rate network, 0 … levels − 1, also between two; None: the highest.

    Raises:
        ConfigError: the network has one rate, or not this one.
    """

    KIND = "network"

    def __init__(self, file: ModelFile, device: str = "cpu", quality: float | None = None) -> None:
        self.file, self.id, self.card = file, file.id, file.card
        self.device = torch.device(device)
        self.quality: float | None = None
        self.lock = threading.Lock()
        if quality is not None:
            self.quality = self._rounded(quality)

    def at(self, quality: float) -> "NetworkModel":
        """The same model at another quality."""
        _ = self.network  # both use it
        other = copy.copy(self)
        other.quality = self._rounded(quality)
        return other

    def renamed(self, name: str) -> "NetworkModel":
        """The same model under another name."""
        _ = self.network
        other = copy.copy(self)
        other.file = dataclasses.replace(self.file, name=name)
        return other

    def _rounded(self, quality: float) -> float:
        if self.rates is None:
            raise ConfigError(f"{self.file.name} has one rate, and takes no quality")
        return self.rates.rounded(quality)

    @property
    def name(self) -> str:
        """The model's name, with its quality where that is not the highest."""
        if self.quality is None:
            return self.file.name
        # Only one of the zoo has options in its name.
        sign = "," if ":" in self.file.name else ":"
        return f"{self.file.name}{sign}quality={self.quality:g}"

    @once_property
    @own_modes()
    def network(self) -> nn.Module:
        """The network in eval mode.

        Raises:
            ModelFileError: the file's content is inconsistent, or names a class that is not allowed here.
        """
        description = {key: self.file.config.get(key) for key in ("class_path", "init_args")}
        weights = {k.removeprefix("network."): v for k, v in self.file.tensors.items()}
        values = sum(value.numel() for value in weights.values())
        try:
            # The first values are drawn, and replaced. Builders make temporary copies.
            with torch.random.fork_rng(devices=[]), Budget(16 * values + (1 << 22)):
                network = build(description, check_trusted)
            load(network, weights)
        except ConfigError as error:
            raise ModelFileError(f"model {self.file.name} {error}") from None
        except (*UNFIT, ModelFileError) as error:
            raise ModelFileError(
                f"model {self.file.name}: its content is inconsistent ({one_line(error)})"
            ) from None
        return network.requires_grad_(False).eval().to(self.device)

    @property
    def checked(self) -> nn.Module:
        """See `network`."""
        return self.network

    @once_property
    def stride(self) -> int:
        """See `stride_of`."""
        return stride_of(self.network)

    @once_property
    def rates(self) -> Rates | None:
        """The rates of a variable-rate network; None for one rate."""
        return Rates.of(self.network)

    @property
    def levels(self) -> int:
        """Levels of a variable-rate network; 1: it has one rate."""
        return 1 if self.rates is None else self.rates.levels

    @once_property
    def own(self) -> OwnStrings:
        """The network's own coder."""
        return OwnStrings(self.network, self.stride)

    @once_property
    @own_modes()
    def engine(self) -> ContextEngine | None:
        """The exact coder of its context model, where there is one for it and its weights."""
        try:
            return ContextEngine.of(self.network)
        except ModelFileError:  # sums that would not be exact
            return None

    def _options(self, quality: float | None) -> dict[str, Any]:
        """More arguments of the network's calls, for which its tables are made ready."""
        if self.rates is None:
            return {}
        quality = self.rates.levels - 1 if quality is None else quality
        self.rates.set_tables(quality)
        return self.rates.arguments(quality)

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image.

        Raises:
            ImageInputError: the image is larger than the format allows.
            ModelFileError: the network fails on it.
        """
        height, width = image.shape[:2]
        check_size(width, height)
        return self.write(as_tensor(image, self.device).float() / 255)

    @own_modes()
    @torch.no_grad()
    def write(self, x: Tensor) -> bytes:
        """The `.tuc` file of an image 1×3×H×W in [0, 1], on this model's device."""
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride)
        flags, head = 0, b""
        try:
            if self.engine is not None:
                flags, segments = _EXACT, self.engine.encode(x)
            else:
                with self.lock:
                    segments = self.own.encode(x, **self._options(self.quality))
        except TucodecError:
            raise
        except Exception as error:  # of a class that anybody wrote
            raise ModelFileError(
                f"model {self.name} cannot code this image: {one_line(error)}"
            ) from None
        if self.rates is not None:
            flags |= QUALITY
            quality = self.rates.levels - 1 if self.quality is None else self.quality
            head = quality_bytes(quality)
        lengths = b"".join(varint(len(segment)) for segment in segments[:-1])
        strip = head + bytes([len(segments)]) + lengths + b"".join(segments)
        return pack(Container(CodecKind.NETWORK, self.id, width, height, (strip,), flags))

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file; see `decode_pixels`."""
        return self.decode_pixels(unpack(data))

    def decode_pixels(self, container: Container) -> NDArray[np.uint8]:
        """H×W×3 pixels of an unpacked file of this model.

        Raises:
            UnknownModelError: another model wrote it.
            UnsupportedVersionError: it has flags, which only a newer program writes.
            CorruptStreamError: it is not what the encoder writes, or this machine computes otherwise.
        """
        if container.kind != CodecKind.NETWORK or container.model_id != self.id:
            raise UnknownModelError(
                f"the file was written with model {container.model_id.hex()}, "
                f"not with {self.file.name} ({self.id.hex()})"
            )
        if container.flags & ~(_EXACT | QUALITY):
            raise UnsupportedVersionError(
                f"the file has flags {container.flags:#x} that are unknown: update lightning-tucodec"
            )
        if len(container.strips) != 1 or container.strips[0] is None:
            raise CorruptStreamError("the file's one strip is missing")
        segments, quality = self._segments(container, container.strips[0])
        try:
            x_hat = self._decoded(segments, quality, container)
            if bool(x_hat.isnan().any()):
                raise CorruptStreamError("the network makes values of the file that are no numbers")
        except TucodecError:
            raise
        except Exception as error:  # of a class that anybody wrote
            raise CorruptStreamError(f"the file cannot be decoded: {one_line(error)}") from None
        shown = x_hat[0, :, : container.height, : container.width].clamp(0, 1).mul(255).round()
        return np.ascontiguousarray(shown.to(torch.uint8).permute(1, 2, 0).cpu().numpy())

    def salvage(self, container: Container) -> Decoded:
        """The image: there is one strip, which is damaged or not; see `decode_pixels`."""
        return Decoded(self.decode_pixels(container), [])

    def _segments(self, container: Container, strip: bytes) -> tuple[list[bytes], float | None]:
        if bool(container.flags & QUALITY) != (self.rates is not None):
            raise CorruptStreamError(
                "the file has a quality and its model none, or the other way round"
            )
        position = 0 if self.rates is None else QUALITY_BYTES
        quality = quality_of(container)
        if self.rates is not None and quality is not None and quality > self.rates.levels - 1:
            raise CorruptStreamError(f"the file claims quality {quality:g}")
        if len(strip) <= position or strip[position] == 0:
            raise CorruptStreamError("the file has no segments")
        count, position = strip[position], position + 1
        lengths = []
        for _ in range(count - 1):
            length, position = read_varint(strip, position)
            lengths.append(length)
        rest = len(strip) - position - sum(lengths)
        if rest < 0:
            raise CorruptStreamError("the segments are longer than the file")
        segments = []
        for length in (*lengths, rest):
            segments.append(strip[position : position + length])
            position += length
        return segments, quality

    @own_modes()
    @torch.no_grad()
    def _decoded(
        self, segments: list[bytes], quality: float | None, container: Container
    ) -> Tensor:
        height, width = (
            math.ceil(side / self.stride) * self.stride
            for side in (container.height, container.width)
        )
        if container.flags & _EXACT:
            if self.engine is None:
                raise UnsupportedVersionError(
                    "the file was coded by the exact engine, which this program does not have for its "
                    "network: update lightning-tucodec"
                )
            y_hat = self.engine.decode(segments, (height // self.stride, width // self.stride))
            shown: Tensor = self.network.g_s(y_hat.to(self.device))  # type: ignore[operator]
            return shown
        with self.lock:
            return self.own.decode(segments, height, width, **self._options(quality))

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        card = {
            k: v for k, v in self.card.items() if k in ("recipe", "lmbda", "convention", "source")
        }
        options = {"class_path": self.file.config["class_path"], **card}
        if self.rates is not None:
            options["quality"] = self.rates.levels - 1 if self.quality is None else self.quality
        return {
            "codec": self.name,
            "version": self.id.hex(),
            "options": options,
            "colour": "RGB in, RGB out",
        }


def freeze_network(
    network: nn.Module, description: dict[str, Any], name: str, card: dict[str, Any]
) -> ModelFile:
    """An exported model of a network: class path, arguments, weights and the entropy coder's tables.

    Args:
        network: trained or not, left as it is; tables that it has are kept.
        description: see `build`.
        name: how commands will call the model.
        card: plain types.

    Raises:
        ModelFileError: it has values that are not finite, or no tables can be made of it.
    """
    network = copy.deepcopy(network).cpu().eval()
    try:
        with own_modes(), torch.no_grad():
            network.update()  # type: ignore[operator]
    except Exception as error:  # of a class that anybody wrote
        raise ModelFileError(
            f"model {name}: no tables can be made of it ({one_line(error)})"
        ) from None
    tensors = {f"network.{k}": v.detach().clone() for k, v in network.state_dict().items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelFileError(f"model {name}: {key} holds a value that is not finite")
    config = {"kind": NetworkModel.KIND, "init_args": {}, **description}
    return ModelFile(name, config, tensors, card)


def load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a freshly built network its weights and tables.

    Raises:
        ValueError: they are of another network.
        ModelFileError: the tables are none.
    """
    fresh = network.state_dict()
    expected: dict[str, tuple[Any, torch.dtype | None]] = {}
    for key, value in fresh.items():
        # Tables are empty until they are made, and of any size then.
        shape = weights[key].shape if not value.numel() and key in weights else value.shape
        expected[key] = shape, None if value.is_floating_point() else value.dtype
    check_tensors(expected, weights)
    for key, value in fresh.items():
        if not value.numel() and weights[key].numel():
            owner = network.get_submodule(key.rpartition(".")[0])
            owner.register_buffer(key.rpartition(".")[2], torch.empty_like(weights[key]))
    nn.Module.load_state_dict(network, weights)
    for module in network.modules():
        tables = [
            getattr(module, f"_{part}", None) for part in ("quantized_cdf", "cdf_length", "offset")
        ]
        if all(isinstance(table, Tensor) for table in tables):
            check_tables(*(table.numpy() for table in tables))  # type: ignore[union-attr]
