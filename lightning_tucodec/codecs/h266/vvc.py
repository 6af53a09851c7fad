"""H.266/VVC: libvvenc and the VVC decoder inside the ffmpeg binary of imageio-ffmpeg.

libvvenc takes 4:2:0 in 10 bits only, so `codecs.colour.conversion_ceiling` bounds what it can reach
on an image. Perceptual quantiser adaptation is off (`-qpa 0`), in favour of PSNR; access unit
delimiters, which a decoder of one picture does not need, are left out of the stream.
"""

from dataclasses import dataclass
from typing import ClassVar

from lightning_tucodec.codecs.classical.video import VideoCodec
from lightning_tucodec.codecs.colour import TRANSFORMS

PRESETS = ("faster", "fast", "medium", "slow", "slower")

_WIDE = ("MTS=1", "ISP=1", "TransformSkip=1", "BDPCM=1")
"""All transforms and partitions of intra blocks; no transform at all, for glitter and graphics."""

_DEEP = (*_WIDE, "MaxMTTDepthI=3")
"""One more split as well."""

_THOROUGH = (*_DEEP, "ContentBasedFastQtbt=0", "QtbttExtraFast=0", "FastTTSplit=0")
"""And no shortcuts in the search for the splits."""

TOOLS: dict[str, tuple[str, ...]] = {
    "preset": (),
    "wide": _WIDE,
    "deep": _DEEP,
    "thorough": _THOROUGH,
}


@dataclass(frozen=True)
class Vvc(VideoCodec):
    """One intra picture of H.266.

    Attributes:
        qp: quantisation parameter of the slice, 0 … 63; six more double the step.
        preset: libvvenc's effort, `faster` … `slower`; a 768×512 photograph takes about 0.3, 2 and
            9 s with `faster`, `medium` and `slower` at QP 42.
        chroma_qp_offset: added to the QP of Cb and Cr, −12 … 12. RGB-PSNR at 0.15 bpp gains from
            finer chroma.
        colour: the transform, `bt709` or `orthonormal`, see `codecs.colour`.
        tools: `preset`, or more than that: `wide` adds what can be done to a block, for twice the time,
            `deep` also splits once more, for thrice, `thorough` also searches without shortcuts, for six
            times. Their gains: docs/experiments.md.
    """

    codec_name: ClassVar[str] = "vvc"
    encoder: ClassVar[str] = "libvvenc"
    decoder: ClassVar[str] = "vvc"
    # Type 20: access unit delimiters.
    stream_format: ClassVar[tuple[str, ...]] = (
        *("-bsf:v", "filter_units=remove_types=20"),
        *("-f", "vvc"),
    )
    demuxer: ClassVar[str] = "vvc"

    qp: int
    preset: str = "medium"
    chroma_qp_offset: int = 0
    colour: str = "bt709"
    tools: str = "preset"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("qp", 0, 63)
        self.check_choice("preset", *PRESETS)
        self.check_range("chroma_qp_offset", -12, 12)
        self.check_choice("colour", *TRANSFORMS)
        self.check_choice("tools", *TOOLS)

    @property
    def subsampling(self) -> str:
        """Always 4:2:0."""
        return "420"

    @property
    def transform(self) -> str:
        """The colour conversion that was chosen."""
        return self.colour

    def encoder_options(self) -> list[str]:
        """ffmpeg's options for this setting."""
        options = ["-preset", self.preset, "-qp", str(self.qp), "-qpa", "0"]
        parameters = []
        if self.chroma_qp_offset:
            parameters += [f"{plane}QpOffset={self.chroma_qp_offset}" for plane in ("Cb", "Cr")]
        parameters += TOOLS[self.tools]
        if parameters:
            options += ["-vvenc-params", ":".join(parameters)]
        return options
