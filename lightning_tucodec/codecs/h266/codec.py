"""TucodecPSNR: H.266 with a learned post-filter, in a `.tuc` file.

The H.266 encoder is tuned for the squared error of RGB without a change of the decoder: orthonormal
colour (`codecs.colour`), chroma rotated to its principal axes and a chroma QP offset, both searched for
each image, and libvvenc's deep tools (`Vvc.tools`). Strip 0 of the container:

    bytes   field
    1       QP in the low six bits, colour transform (its number in `colour.TRANSFORMS`) in the high two
    1       angle of the chroma rotation, signed, see `colour.turned`
    3·m     where flag 1 is set: weights of the post-filter's corrections, see `nn.postfilter`
    …       the picture, see `codecs.h266.parameter_sets`

Flag 1 of the container is the gate: the post-filter of the model id is applied. Where it would hurt an
image it is off, and the model id is zero.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.colour import (
    TRANSFORMS,
    Planes,
    chroma_turn,
    pad,
    planes_to_rgb,
    rgb_to_planes,
    turned,
)
from lightning_tucodec.codecs.h266 import parameter_sets
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.h266.vvc import PRESETS, TOOLS, Vvc
from lightning_tucodec.codecs.library import load_filter, load_filter_by_id
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.coding.container import MODEL_ID_BYTES, CodecKind, Container, pack, unpack
from lightning_tucodec.errors import (
    CorruptStreamError,
    ImageInputError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.quality.metrics import sse

DEFAULT_FILTER = "vvc-postfilter"
NO_FILTER = "none"
NO_MODEL = bytes(MODEL_ID_BYTES)

OFFSETS = (-2, -4, -6)
"""Chroma QP offsets that are tried; docs/experiments.md has the gains."""

SEARCH_PRESET = "faster"
"""Preset that offsets and turn are tried with: the order of their costs is nearly that of slower ones."""

_FILTERED = 1

_HEAD_BYTES = 2


class CodedPicture(NamedTuple):
    """One way to code an image.

    Attributes:
        data: the `.tuc` file.
        shown: H×W×3, what a decoder shows.
        cost: squared error plus λ times the bits.
    """

    data: bytes
    shown: NDArray[np.uint8]
    cost: float


@dataclass(frozen=True)
class H266(Options):
    """H.266 in a `.tuc`, with or without a post-filter.

    Attributes:
        qp: 0 … 63.
        preset: see `Vvc`.
        chroma_qp_offset: −12 … 12; None tries `OFFSETS` with `SEARCH_PRESET` and takes the cheapest in
            squared error plus λ times bits.
        colour: transform, see `codecs.colour`.
        filter: name or file of a post-filter, or `none`.
        tools: see `Vvc`.
        turn: −128 … 127, see `colour.turned`; None tries `colour.chroma_turn` in the same way.
        threads: see `Vvc`.
        timeout: see `Vvc`.
    """

    codec_name: ClassVar[str] = "vvc+postfilter"

    qp: int
    preset: str = "medium"
    chroma_qp_offset: int | None = None
    colour: str = "orthonormal"
    filter: str = DEFAULT_FILTER
    tools: str = "deep"
    turn: int | None = None
    threads: int = field(default=1, kw_only=True, compare=False)
    timeout: float | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        self.check_process()
        self.check_range("qp", 0, 63)
        self.check_choice("preset", *PRESETS)
        self.check_choice("colour", *TRANSFORMS)
        self.check_choice("tools", *TOOLS)
        if self.chroma_qp_offset is not None:
            self.check_range("chroma_qp_offset", -12, 12)
        if self.turn is not None:
            self.check_range("turn", -128, 127)

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image; see `ImageCodec.encode`."""
        return self.code(image).data

    def code(self, image: NDArray[np.uint8]) -> CodedPicture:
        """The picture with the cheapest chroma QP offset and turn, filtered where that is cheaper still.

        Raises:
            ImageInputError: the image is too large.
        """
        height, width = image.shape[:2]
        if max(height, width) > Vvc.max_side:
            raise ImageInputError(
                f"{width}×{height} pixels: {self.name} takes sides up to {Vvc.max_side}"
            )
        planes = rgb_to_planes(pad(image, 2, Vvc.smallest), transform=self.colour)
        offsets = OFFSETS if self.chroma_qp_offset is None else (self.chroma_qp_offset,)
        turns = sorted({0, chroma_turn(planes)}) if self.turn is None else [self.turn]
        settings = [
            dataclasses.replace(self, chroma_qp_offset=offset, turn=turn)
            for offset in offsets
            for turn in turns
        ]
        if len(settings) > 1:
            quick: dict[str, Any] = {
                "preset": SEARCH_PRESET,
                "tools": "preset",
                "filter": NO_FILTER,
            }
            costs = [dataclasses.replace(s, **quick)._code(image, planes).cost for s in settings]
            settings = [settings[int(np.argmin(costs))]]
        return settings[0]._code(image, planes)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file that needs this post-filter or none; see `ImageCodec.decode`."""
        container, model = unpack(data), self.model()
        if container.flags & _FILTERED and (model is None or model.id != container.model_id):
            raise UnknownModelError(
                f"the file was written with post-filter {container.model_id.hex()}, not by {self.name}"
            )
        return decode_container(container, model)

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        model = self.model()
        return {
            **self._coder().describe(),
            "codec": self.name,
            "chroma_qp_offsets": OFFSETS if self.chroma_qp_offset is None else None,
            "filter": None if model is None else f"{model.name} {model.id.hex()}",
        }

    def _code(self, image: NDArray[np.uint8], planes: Planes) -> CodedPicture:
        """Code with exactly this chroma offset and this turn."""
        height, width = image.shape[:2]
        coder, turn = self._coder(), self.turn or 0
        stream = coder.encode_planes(turned(planes, turn))
        decoded = turned(coder.decode_planes(stream, height, width), -turn)
        head = bytes([self.qp | TRANSFORMS.index(self.colour) << 6, turn % 256])
        picture = parameter_sets.strip(stream, *planes.y.shape)
        # What a bit is worth on the encoder's own curve, as measured; its λ is of this form.
        slope = 1.1 * 2 ** ((self.qp - 12) / 3)

        def way(
            shown: NDArray[np.uint8], identity: bytes, weights: bytes, flags: int
        ) -> CodedPicture:
            strips = (head + weights + picture,)
            data = pack(Container(CodecKind.VVC, identity, width, height, strips, flags))
            return CodedPicture(data, shown, sse(image, shown) + slope * 8 * len(data))

        plain = way(planes_to_rgb(decoded, self.colour)[:height, :width], NO_MODEL, b"", 0)
        model = self.model()
        if model is None:
            return plain
        padded = pad(image, 2, coder.smallest)
        weights, shown = model.fit(decoded, self.qp, self.colour, padded)
        filtered = way(shown[:height, :width], model.id, weights, _FILTERED)
        return min(plain, filtered, key=lambda way: way.cost)

    def _coder(self) -> Vvc:
        offset = self.chroma_qp_offset or 0
        limits: dict[str, Any] = {"threads": self.threads, "timeout": self.timeout}
        return Vvc(self.qp, self.preset, offset, self.colour, self.tools, **limits)

    def model(self) -> FilterModel | None:
        """The post-filter.

        Raises:
            UnknownModelError, ModelFileError: see `models.load_filter`.
        """
        if self.filter == NO_FILTER:
            return None
        # Models know this codec, so that they can decode its files.
        return load_filter(self.filter)


def without_filter(data: bytes, model: FilterModel | None = None) -> bytes:
    """The file of the same picture with the gate closed; for `model` see `decode_container`."""
    container = unpack(data)
    head, _, picture, _ = _parts(container, model)
    return pack(
        dataclasses.replace(container, model_id=NO_MODEL, strips=(head + picture,), flags=0)
    )


def decode_container(container: Container, model: FilterModel | None = None) -> NDArray[np.uint8]:
    """The H×W×3 image of an unpacked file of this kind.

    Args:
        container: of kind VVC.
        model: the post-filter; looked up by its id where the gate is on and this is None.

    Raises:
        CorruptStreamError: the picture is not one of ours.
        UnsupportedVersionError: it has flags that only a newer program writes.
        UnknownModelError: the post-filter is not known.
    """
    head, weights, picture, model = _parts(container, model)
    width, height = container.width, container.height
    qp, transform = head[0] & 63, TRANSFORMS[head[0] >> 6]
    turn = int.from_bytes(head[1:], signed=True)
    coder = Vvc(qp, colour=transform)
    padded = [max(coder.smallest, side + side % 2) for side in (height, width)]
    stream = parameter_sets.restore(picture, *padded)
    planes = turned(coder.decode_planes(stream, height, width), -turn)
    if model is None:
        return planes_to_rgb(planes, transform)[:height, :width]
    return model.apply(planes, qp, transform, weights)[:height, :width]


def _parts(
    container: Container, model: FilterModel | None
) -> tuple[bytes, bytes, bytes, FilterModel | None]:
    """Head, weights and picture of the strip, and the filter, which is None where the gate is closed."""
    if container.kind == CodecKind.VVC and container.flags & ~_FILTERED:
        raise UnsupportedVersionError(
            f"the file has flags {container.flags:#x} that are unknown: update lightning-tucodec"
        )
    (strip,) = container.strips if len(container.strips) == 1 else (None,)
    if container.kind != CodecKind.VVC or strip is None or len(strip) < _HEAD_BYTES:
        raise CorruptStreamError("the file does not hold one H.266 picture")
    width, height = container.width, container.height
    if max(width, height) > Vvc.max_side or strip[0] >> 6 >= len(TRANSFORMS):
        raise CorruptStreamError(f"impossible picture: {width}×{height}, {strip[0]}")
    head, rest = strip[:_HEAD_BYTES], strip[_HEAD_BYTES:]
    if not container.flags & _FILTERED:
        return head, b"", rest, None
    if model is None or model.id != container.model_id:
        model = load_filter_by_id(container.model_id)
    return head, rest[: model.weight_bytes], rest[model.weight_bytes :], model
