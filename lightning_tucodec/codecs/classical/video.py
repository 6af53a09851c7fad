"""Still pictures through video encoders: what H.266, HEVC and AV1 have in common here."""

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.colour import (
    Planes,
    colour_path,
    pad,
    planes_to_rgb,
    rgb_to_planes,
)
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.errors import CorruptStreamError, ImageInputError
from lightning_tucodec.io import ffmpeg

_HEADER = struct.Struct(">HH")


@dataclass(frozen=True)
class VideoCodec(Options, ABC):
    """One intra picture of a video codec behind our own conversion to 10-bit Y'CbCr.

    `encode` writes four bytes, width and height as big-endian 16-bit numbers, and then the
    encoder's bitstream. Pictures are padded to even sides, and to 16 pixels, by repeating the last
    row and column; `decode` cuts them to the true size. `encode_planes` and `decode_planes` leave
    out header and conversion.

    Attributes:
        threads: of the encoder; the bitstream is the same for any number.
        timeout: seconds until a process is given up; None: by size, 30 s + 10 minutes a megapixel
            for encoding and 30 s + 20 s a megapixel for decoding.
    """

    threads: int = field(default=1, kw_only=True, compare=False)
    timeout: float | None = field(default=None, kw_only=True, compare=False)

    max_side: ClassVar[int] = 16_384
    smallest: ClassVar[int] = 16
    """Shorter sides are padded to so many pixels."""
    encoder: ClassVar[str]
    decoder: ClassVar[str]
    stream_format: ClassVar[tuple[str, ...]]
    """ffmpeg's muxer and bitstream filters for the bare stream."""
    demuxer: ClassVar[str]

    def __post_init__(self) -> None:
        self.check_process()

    @property
    @abstractmethod
    def subsampling(self) -> str:
        """ "420" or "444"."""

    @property
    def transform(self) -> str:
        """Colour transform, one of `colour.TRANSFORMS`."""
        return "bt709"

    @abstractmethod
    def encoder_options(self) -> list[str]:
        """ffmpeg's options after `-c:v`."""

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Header and bitstream of an H×W×3 image; see `ImageCodec.encode`."""
        height, width = image.shape[:2]
        if max(height, width) > self.max_side:
            raise ImageInputError(
                f"{width}×{height} pixels: {self.name} takes sides up to {self.max_side}"
            )
        planes = rgb_to_planes(pad(image, 2, self.smallest), self.subsampling, self.transform)
        return _HEADER.pack(width, height) + self.encode_planes(planes)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The H×W×3 image; see `ImageCodec.decode`."""
        planes, width, height = self.decode_picture(data)
        return planes_to_rgb(planes, self.transform)[:height, :width]

    def decode_picture(self, data: bytes) -> tuple[Planes, int, int]:
        """What `encode` returned as padded planes, with the width and height of the image."""
        if len(data) <= _HEADER.size:
            raise CorruptStreamError(f"{self.name}: {len(data)} bytes are not a coded picture")
        width, height = _HEADER.unpack_from(data)
        if not (0 < width <= self.max_side and 0 < height <= self.max_side):
            raise CorruptStreamError(f"{self.name}: impossible size {width}×{height}")
        return self.decode_planes(data[_HEADER.size :], height, width), width, height

    def encode_planes(self, planes: Planes) -> bytes:
        """The bare bitstream of planes whose sides are even and at least 16."""
        height, width = planes.y.shape
        source = ["-f", "rawvideo", "-pix_fmt", self._pixel_format, "-s", f"{width}x{height}"]
        # At one picture a second every picture is intra, and the parameter sets are the smallest.
        source += ["-r", "1"]
        coder = [*self.encoder_options(), "-threads", str(self.threads), *self.stream_format]
        timeout = self.timeout or 30.0 + 600e-6 * height * width
        return ffmpeg.encode(
            source, coder, planes.to_bytes(), encoder=self.encoder, timeout=timeout
        )

    def decode_planes(self, stream: bytes, height: int, width: int) -> Planes:
        """Planes of a bare bitstream, padded as `encode` padded an image of this size."""
        height, width = (max(self.smallest, side + side % 2) for side in (height, width))
        data = ffmpeg.decode(
            ["-threads", str(self.threads), "-f", self.demuxer],
            ["-f", "rawvideo", "-pix_fmt", self._pixel_format],
            stream,
            decoder=self.decoder,
            timeout=self.timeout or 30.0 + 20e-6 * height * width,
        )
        return Planes.from_bytes(data, height, width, self.subsampling)

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`; the command is for a picture of W×H pixels."""
        command = [
            "ffmpeg -f rawvideo -pix_fmt",
            self._pixel_format,
            "-s WxH -r 1 -i - -frames:v 1",
        ]
        command += ["-c:v", self.encoder, *self.encoder_options()]
        command += ["-threads", str(self.threads), *self.stream_format, "-"]
        return {
            "codec": self.name,
            "version": ffmpeg.version(self.encoder),
            "command": " ".join(command),
            "colour": colour_path(self.subsampling, self.transform),
        }

    @property
    def _pixel_format(self) -> str:
        return f"yuv{self.subsampling}p10le"
