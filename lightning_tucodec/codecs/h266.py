"""TucodecPSNR: H.266 below, a learned post-filter above, in a `.tuc` file.

The H.266 below is tuned for the squared error of RGB without touching the decoder: orthonormal
colour (`codecs.colour`), and a chroma QP offset that is searched for each image. Strip 0 of the
container:

    bytes   field
    1       QP in the low six bits, colour transform (its number in `colour.TRANSFORMS`) in the high two
    3·m     where flag 1 is set: weights of the post-filter's corrections, see `nn.postfilter`
    …       the picture, see `codecs.parameter_sets`

Flag 1 of the container is the gate: the post-filter of the model id is applied. Where it would hurt an
image it is off, and the model id is zero.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs import parameter_sets
from lightning_tucodec.codecs.colour import TRANSFORMS, Planes, pad, planes_to_rgb, rgb_to_planes
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.codecs.postfilter import FilterModel
from lightning_tucodec.codecs.vvc import PRESETS, Vvc
from lightning_tucodec.coding.container import MODEL_ID_BYTES, CodecKind, Container, pack, unpack
from lightning_tucodec.errors import CorruptStreamError, ImageInputError
from lightning_tucodec.metrics import sse

DEFAULT_FILTER = "vvc-postfilter"
NO_FILTER = "none"
NO_MODEL = bytes(MODEL_ID_BYTES)

OFFSETS = (-2, -4, -6)
"""Chroma QP offsets that are tried; docs/vvc.md has what they are worth."""

_FILTERED = 1


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
        preset: see `Vvc`; every offset tried costs one encoding.
        chroma_qp_offset: −12 … 12; None tries `OFFSETS` and takes the best.
        colour: transform, see `codecs.colour`.
        filter: name or file of a post-filter, or `none`.
        threads: see `Vvc`.
        timeout: see `Vvc`.
    """

    codec_name: ClassVar[str] = "vvc+postfilter"

    qp: int
    preset: str = "medium"
    chroma_qp_offset: int | None = None
    colour: str = "orthonormal"
    filter: str = DEFAULT_FILTER
    threads: int = field(default=1, kw_only=True, compare=False)
    timeout: float | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        self.check_range("qp", 0, 63)
        self.check_choice("preset", *PRESETS)
        self.check_choice("colour", *TRANSFORMS)
        if self.chroma_qp_offset is not None:
            self.check_range("chroma_qp_offset", -12, 12)

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """The `.tuc` file of an H×W×3 image; see `ImageCodec.encode`."""
        return self.code(image).data

    def code(self, image: NDArray[np.uint8], max_bytes: int | None = None) -> CodedPicture:
        """The cheapest of the ways to code an image, in squared error plus λ times bits.

        Args:
            image: H×W×3.
            max_bytes: ways that take more are used only if all do, and then the smallest.
        """
        offsets = OFFSETS if self.chroma_qp_offset is None else (self.chroma_qp_offset,)
        ways = [self._way(image, offset) for offset in offsets]
        fitting = [way for way in ways if max_bytes is None or len(way.data) <= max_bytes]
        if fitting:
            return min(fitting, key=lambda way: way.cost)
        return min(ways, key=lambda way: len(way.data))

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image of a `.tuc` file; see `ImageCodec.decode`."""
        return decode_container(unpack(data), self.model())

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        model = self.model()
        return {
            **self._coder(self.chroma_qp_offset or 0).describe(),
            "codec": self.name,
            "chroma_qp_offsets": OFFSETS if self.chroma_qp_offset is None else None,
            "filter": None if model is None else f"{model.name} {model.id.hex()}",
        }

    def _way(self, image: NDArray[np.uint8], offset: int) -> CodedPicture:
        height, width = image.shape[:2]
        coder = self._coder(offset)
        if max(height, width) > coder.max_side:
            raise ImageInputError(
                f"{width}×{height} pixels: {self.name} takes sides up to {coder.max_side}"
            )
        planes = rgb_to_planes(pad(image, 2, coder.smallest), transform=self.colour)
        stream = coder.encode_planes(planes)
        decoded = coder.decode_planes(stream, height, width)
        shown = planes_to_rgb(decoded, self.colour)[:height, :width]
        error, gate, weights, model = sse(image, shown), 0, b"", self.model()
        if model is not None:
            seen = (decoded, self.qp, self.colour)
            fitted = model.fit(*seen, pad(image, 2, coder.smallest))
            filtered = model.apply(*seen, fitted)[:height, :width]
            if sse(image, filtered) < error:
                shown, error, gate, weights = filtered, sse(image, filtered), _FILTERED, fitted
        strip = bytes([self.qp | TRANSFORMS.index(self.colour) << 6]) + weights
        strip += parameter_sets.strip(stream, *planes.y.shape)
        identity = model.id if model is not None and gate else NO_MODEL
        data = pack(Container(CodecKind.VVC, identity, width, height, (strip,), gate))
        # What a bit is worth on the encoder's own curve, as measured; its λ is of this form.
        slope = 1.1 * 2 ** ((self.qp - 12) / 3)
        return CodedPicture(data, shown, error + slope * 8 * len(data))

    def _coder(self, offset: int) -> Vvc:
        limits: dict[str, Any] = {"threads": self.threads, "timeout": self.timeout}
        return Vvc(self.qp, self.preset, offset, self.colour, **limits)

    def model(self) -> FilterModel | None:
        """The post-filter.

        Raises:
            UnknownModelError, ModelFileError: see `models.load_filter`.
        """
        if self.filter == NO_FILTER:
            return None
        # Models know this codec, so that they can decode its files.
        from lightning_tucodec.codecs.models import load_filter

        return load_filter(self.filter)


def decode_container(container: Container, model: FilterModel | None = None) -> NDArray[np.uint8]:
    """The H×W×3 image of an unpacked file of this kind.

    Args:
        container: of kind VVC.
        model: the post-filter; looked up by its id where the gate is on and this is None.

    Raises:
        CorruptStreamError: the picture is not one of ours.
        UnknownModelError: the post-filter is not known.
    """
    (strip,) = container.strips if len(container.strips) == 1 else (None,)
    if container.kind != CodecKind.VVC or not strip:
        raise CorruptStreamError("the file does not hold one H.266 picture")
    width, height = container.width, container.height
    if max(width, height) > Vvc.max_side or strip[0] >> 6 >= len(TRANSFORMS):
        raise CorruptStreamError(f"impossible picture: {width}×{height}, {strip[0]}")
    qp, transform = strip[0] & 63, TRANSFORMS[strip[0] >> 6]
    start = 1
    if not container.flags & _FILTERED:
        model = None
    else:
        if model is None or model.id != container.model_id:
            from lightning_tucodec.codecs.models import load_filter_by_id

            model = load_filter_by_id(container.model_id)
        start += model.weight_bytes
    coder = Vvc(qp, colour=transform)
    padded = [max(coder.smallest, side + side % 2) for side in (height, width)]
    stream = parameter_sets.restore(strip[start:], *padded)
    planes: Planes = coder.decode_planes(stream, height, width)
    if model is None:
        return planes_to_rgb(planes, transform)[:height, :width]
    return model.apply(planes, qp, transform, strip[1:start])[:height, :width]
