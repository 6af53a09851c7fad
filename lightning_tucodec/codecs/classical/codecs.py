"""Codecs that are not learned, except H.266. Each class is a codec, and its fields are the setting.

JPEG, WebP, AVIF and JPEG 2000 through Pillow, whose files are self-contained; HEVC and AV1 as one
intra picture (`VideoCodec`) and JPEG XL through the ffmpeg binary of imageio-ffmpeg. Every encoder
runs on one thread and is tuned for PSNR where it has such a switch.
"""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from lightning_tucodec.codecs.classical.video import VideoCodec
from lightning_tucodec.codecs.options import Options
from lightning_tucodec.errors import CorruptStreamError, ExternalToolError, ImageInputError
from lightning_tucodec.io import ffmpeg

_SUBSAMPLING = {"420": "4:2:0", "444": "4:4:4"}


class PillowCodec(Options, ABC):
    """A file format that Pillow writes and reads."""

    format: ClassVar[str]
    feature: ClassVar[str]
    """Pillow's name of the library, for its version."""
    colour: ClassVar[str]

    @abstractmethod
    def save_options(self) -> dict[str, Any]:
        """Keyword arguments of `Image.save`."""

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """A whole file; see `ImageCodec.encode`."""
        buffer = io.BytesIO()
        try:
            Image.fromarray(image).save(buffer, self.format, **self.save_options())
        except (OSError, ValueError) as error:
            height, width = image.shape[:2]
            raise ImageInputError(
                f"{self.name} cannot code {width}×{height} pixels: {error}"
            ) from error
        except KeyError:
            raise ExternalToolError(f"this Pillow cannot write {self.format}") from None
        return buffer.getvalue()

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """See `ImageCodec.decode`."""
        try:
            with Image.open(io.BytesIO(data), formats=[self.format]) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:
            # Pillow's readers raise what their parsers happen to: DecompressionBombError, struct.error, ….
            raise CorruptStreamError(f"not a whole {self.format} file: {error}") from error

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        import PIL

        library = f"{self.feature} {features.version(self.feature)}"
        return {
            "codec": self.name,
            "version": f"{library} in Pillow {PIL.__version__}",
            "options": self.save_options(),
            "colour": self.colour,
        }


@dataclass(frozen=True)
class Jpeg(PillowCodec):
    """JPEG.

    Attributes:
        q: libjpeg's quality, 1 … 95.
        chroma: 420 or 444.
        progressive: 1 for progressive scans, which are usually smaller.
        optimize: 1 for Huffman tables made for the image, 0 for the standard's, as most published
            curves have.
    """

    codec_name: ClassVar[str] = "jpeg"
    format: ClassVar[str] = "JPEG"
    feature: ClassVar[str] = "libjpeg_turbo"
    colour: ClassVar[str] = "RGB -> Y'CbCr BT.601 full range, 8 bit, inside libjpeg-turbo"

    q: int
    chroma: str = "420"
    progressive: int = 0
    optimize: int = 1

    def __post_init__(self) -> None:
        self.check_range("q", 1, 95)
        self.check_choice("chroma", *_SUBSAMPLING)
        self.check_range("progressive", 0, 1)
        self.check_range("optimize", 0, 1)

    def save_options(self) -> dict[str, Any]:
        """Pillow's options for this setting."""
        return {
            "quality": self.q,
            "subsampling": _SUBSAMPLING[self.chroma],
            "optimize": bool(self.optimize),
            "progressive": bool(self.progressive),
        }


@dataclass(frozen=True)
class WebP(PillowCodec):
    """Lossy WebP, slowest method, always 4:2:0.

    Attributes:
        q: libwebp's quality, 0 … 100.
    """

    codec_name: ClassVar[str] = "webp"
    format: ClassVar[str] = "WEBP"
    feature: ClassVar[str] = "webp"
    colour: ClassVar[str] = "RGB -> Y'CbCr BT.601 limited range, 8 bit, 4:2:0, inside libwebp"

    q: int

    def __post_init__(self) -> None:
        self.check_range("q", 0, 100)

    def save_options(self) -> dict[str, Any]:
        """Pillow's options for this setting."""
        return {"quality": self.q, "method": 6}


@dataclass(frozen=True)
class Avif(PillowCodec):
    """AVIF through libavif and libaom.

    Attributes:
        q: libavif's quality, 0 … 100.
        chroma: 420 or 444.
        speed: libavif's speed, 0 (slowest) … 10.
    """

    codec_name: ClassVar[str] = "avif"
    format: ClassVar[str] = "AVIF"
    feature: ClassVar[str] = "avif"
    colour: ClassVar[str] = "RGB -> Y'CbCr BT.601 full range, 8 bit, inside libavif"

    q: int
    chroma: str = "420"
    speed: int = 4

    def __post_init__(self) -> None:
        self.check_range("q", 0, 100)
        self.check_choice("chroma", *_SUBSAMPLING)
        self.check_range("speed", 0, 10)

    def save_options(self) -> dict[str, Any]:
        """Pillow's options for this setting."""
        return {
            "quality": self.q,
            "subsampling": _SUBSAMPLING[self.chroma],
            "speed": self.speed,
            "codec": "aom",
            "max_threads": 1,
        }


@dataclass(frozen=True)
class Jpeg2000(PillowCodec):
    """JPEG 2000, irreversible 9/7 wavelet with multiple-component transform, bare codestream.

    Attributes:
        bpp: the rate that OpenJPEG's rate control aims at, in bits a pixel.
    """

    codec_name: ClassVar[str] = "jpeg2000"
    format: ClassVar[str] = "JPEG2000"
    feature: ClassVar[str] = "jpg_2000"
    colour: ClassVar[str] = "RGB -> irreversible colour transform (BT.601 full range), 4:4:4"

    bpp: float

    def __post_init__(self) -> None:
        self.check_range("bpp", 0.01, 24.0)

    def save_options(self) -> dict[str, Any]:
        """Pillow's options for this setting."""
        return {
            "quality_mode": "rates",
            "quality_layers": [24.0 / self.bpp],
            "irreversible": True,
            "mct": 1,
            "no_jp2": True,
        }


@dataclass(frozen=True)
class Hevc(VideoCodec):
    """One intra picture of HEVC by x265.

    ffmpeg's decoder hides it when the end of a stream is missing; the other codecs refuse that.

    Attributes:
        qp: quantisation parameter of the picture, 0 … 51.
        chroma: 420 or 444.
        preset: x265's effort.
    """

    codec_name: ClassVar[str] = "hevc"
    encoder: ClassVar[str] = "libx265"
    decoder: ClassVar[str] = "hevc"
    # Types 35 and 39: access unit delimiters and x265's own signature.
    stream_format: ClassVar[tuple[str, ...]] = (
        *("-bsf:v", "filter_units=remove_types=35|39"),
        *("-f", "hevc"),
    )
    demuxer: ClassVar[str] = "hevc"

    qp: int
    chroma: str = "444"
    preset: str = "veryslow"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("qp", 0, 51)
        self.check_choice("chroma", *_SUBSAMPLING)
        presets = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow")
        self.check_choice("preset", *presets, "slower", "veryslow", "placebo")

    @property
    def subsampling(self) -> str:
        """As chosen."""
        return self.chroma

    def encoder_options(self) -> list[str]:
        """ffmpeg's options for this setting."""
        # ipratio=1: intra pictures take the QP that is asked for, not three less.
        parameters = f"qp={self.qp}:ipratio=1:keyint=1:info=0:log-level=none:pools=none"
        return ["-preset", self.preset, "-tune", "psnr", "-x265-params", parameters]


@dataclass(frozen=True)
class Av1Aom(VideoCodec):
    """One still picture of AV1 by libaom.

    Attributes:
        q: quantiser, 0 … 63.
        chroma: 420 or 444.
        speed: libaom's `cpu-used`, 0 (slowest) … 8.
    """

    codec_name: ClassVar[str] = "av1-aom"
    encoder: ClassVar[str] = "libaom-av1"
    decoder: ClassVar[str] = "libdav1d"
    stream_format: ClassVar[tuple[str, ...]] = ("-f", "obu")
    demuxer: ClassVar[str] = "obu"

    q: int
    chroma: str = "444"
    speed: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("q", 0, 63)
        self.check_choice("chroma", *_SUBSAMPLING)
        self.check_range("speed", 0, 8)

    @property
    def subsampling(self) -> str:
        """As chosen."""
        return self.chroma

    def encoder_options(self) -> list[str]:
        """ffmpeg's options for this setting."""
        options = ["-usage", "allintra", "-still-picture", "1", "-cpu-used", str(self.speed)]
        return [*options, "-crf", str(self.q), "-b:v", "0", "-tune", "psnr", "-aq-mode", "0"]


@dataclass(frozen=True)
class Av1Svt(VideoCodec):
    """One still picture of AV1 by SVT-AV1, always 4:2:0.

    Attributes:
        q: quantiser, 1 … 63.
        preset: SVT's preset, 0 (slowest) … 13.
    """

    codec_name: ClassVar[str] = "av1-svt"
    encoder: ClassVar[str] = "libsvtav1"
    decoder: ClassVar[str] = "libdav1d"
    stream_format: ClassVar[tuple[str, ...]] = ("-f", "obu")
    demuxer: ClassVar[str] = "obu"

    q: int
    preset: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("q", 1, 63)
        self.check_range("preset", 0, 13)

    @property
    def subsampling(self) -> str:
        """Always 4:2:0."""
        return "420"

    def encoder_options(self) -> list[str]:
        """ffmpeg's options for this setting."""
        parameters = "rc=0:aq-mode=0:tune=1:avif=1:lp=1"
        return ["-preset", str(self.preset), "-qp", str(self.q), "-svtav1-params", parameters]


@dataclass(frozen=True)
class JpegXl(Options):
    """JPEG XL by libjxl: VarDCT in XYB.

    Attributes:
        distance: Butteraugli distance aimed at, 0.05 (finest) … 15.
        effort: libjxl's effort, 1 … 9.
    """

    codec_name: ClassVar[str] = "jxl"

    distance: float
    effort: int = 7

    def __post_init__(self) -> None:
        self.check_range("distance", 0.05, 15)
        self.check_range("effort", 1, 9)

    def _options(self) -> list[str]:
        return ["-distance", f"{self.distance:g}", "-effort", str(self.effort), "-threads", "1"]

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """A bare codestream; see `ImageCodec.encode`."""
        height, width = image.shape[:2]
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1"]
        coder = [*self._options(), "-f", "image2pipe"]
        timeout = 60.0 + 100e-6 * height * width
        data = np.ascontiguousarray(image).tobytes()
        return ffmpeg.encode(source, coder, data, encoder="libjxl", timeout=timeout)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """See `ImageCodec.decode`."""
        # PPM tells the size, which raw samples would not.
        ppm = ffmpeg.decode(
            ["-f", "jpegxl_pipe"],
            ["-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe"],
            data,
            decoder="libjxl",
            timeout=60.0 + 100e-6 * (1 << 27),
        )
        with Image.open(io.BytesIO(ppm), formats=["PPM"]) as image:
            return np.array(image)

    def describe(self) -> dict[str, Any]:
        """See `ImageCodec.describe`."""
        command = "ffmpeg -f rawvideo -pix_fmt rgb24 -s WxH -r 1 -i - -frames:v 1 -c:v libjxl"
        return {
            "codec": self.name,
            "version": ffmpeg.version("libjxl"),
            "command": " ".join([command, *self._options(), "-f image2pipe -"]),
            "colour": "RGB 8 bit (sRGB) -> XYB, inside libjxl",
        }
