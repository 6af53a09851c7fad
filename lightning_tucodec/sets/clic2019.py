"""The challenge of CLIC 2019: its validation images and Tucodec's three entries on them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_tucodec.io.images import read_image
from lightning_tucodec.sets.allocation import Quantity
from lightning_tucodec.sets.evaluate import find_images
from lightning_tucodec.sets.manifest import byte_budget


@dataclass(frozen=True)
class Entry:
    """One of Tucodec's entries on the validation set (Zhou et al., CVPRW 2019, Table 1).

    Attributes:
        psnr: pooled, dB.
        ms_ssim: of the set.
        size: bytes in all.
        seconds: to decode the set, on CLIC's server.
        minimised: the quantity that was minimised within the limits.
    """

    name: str
    psnr: float
    ms_ssim: float
    size: int
    seconds: float
    minimised: Quantity


VALIDATION_IMAGES = 102
VALIDATION_MEGAPIXELS = 251.86
VALIDATION_BUDGET = 4_722_341
"""Bytes that CLIC allowed for the validation set at 0.15 bpp. They give the pixels to within about fifty."""

ENTRIES = (
    Entry("TucodecSSIM", 29.840, 0.9760, 4_692_810, 23_953.868, "ms_ssim"),
    Entry("TucodecPSNR", 32.520, 0.9640, 4_722_141, 15_255.275, "sse"),
    Entry("TucodecPSNR40dB", 40.000, 0.9930, 27_216_543, 24_013.782, "bytes"),
)

_PROFESSIONAL = """
alberto-montalesi-176097:2791424 alejandro-escamilla-6:2742272 ales-krivec-15949:2433024
alexander-shustov-73:2787328 allef-vinicius-109434:2795520 amy-zhang-15940:1493280
andrew-ruiz-376:2787328 benjamin-sloth-lindgreen-705:2795520 casey-fyfe-999:2785280
clem-onojeghuo-33741:2795520 daniel-robert-405:1266000 davide-ragusa-716:2512940
dogancan-ozturan-395:2774400 felix-russell-saw-140699:2040500 gian-reto-tarnutzer-45212:2805760
jared-erondu-21325:2795520 jason-briscoe-149782:2795520 jeremy-cai-1174:2361920
juskteez-vu-1041:1975125 kazuend-28556:2795520 lobostudio-hamburg-75377:2795520
martin-wessely-211:614400 martyn-seddon-220:2795520 michael-durana-82941:2795520
mullermarc-184:893976 nomao-saeki-33553:2797568 paul-itkin-46101:579840 philipp-reiner-207:1296000
philippe-wuyts-45997:2462082 roberto-nickson-48063:2795520 schicka-307:196608
sergey-zolkin-1045:2795520 sergey-zolkin-21232:1585176 stefan-kunze-26931:2799616
thong-vo-428:998560 todd-quackenbush-222:316080 todd-quackenbush-27493:2115584
veeterzy-82537:2797568 vita-vilcina-3055:2261952 wojciech-szaturski-3611:2634100 zugr-108:2795520
"""

PROFESSIONAL = {
    name: int(pixels) for name, _, pixels in (e.partition(":") for e in _PROFESSIONAL.split())
}
"""Names without a suffix and pixels of the 41 images of the professional part, as published tables name
them. Of the 61 of the mobile part no list was at hand."""


def is_validation_set(images: int, pixels: int) -> bool:
    """Whether a set has as many images and pixels as CLIC 2019's validation set."""
    return images == VALIDATION_IMAGES and byte_budget(0.15, pixels) == VALIDATION_BUDGET


def comparison(measured: dict[str, dict[str, Any]], minimised: dict[str, Quantity]) -> str:
    """Measured submissions and Tucodec's entries of the same kind, as a Markdown table.

    Args:
        measured: totals of `verify` by the submission's name.
        minimised: by the same names, what was minimised.
    """
    lines = [
        "| entry | images | Mpx | bytes | bpp | PSNR | MS-SSIM | decoding, s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def add(name: str, images: int, pixels: float, size: int, *values: float) -> None:
        psnr, similarity, seconds = values
        rate = f"{8e-6 * size / pixels:.5f}"
        lines.append(
            f"| {name} | {images} | {pixels:.2f} | {size} | {rate} | {psnr:.3f} | {similarity:.4f} "
            f"| {seconds:.0f} |"
        )

    comparable = True
    for name, totals in measured.items():
        pixels = totals["pixels"] / 1e6
        values = (totals["psnr"], totals["ms_ssim"], totals["decode_seconds"])
        add(name, totals["images"], pixels, totals["bytes"], *values)
        comparable &= is_validation_set(totals["images"], totals["pixels"])
    for entry in ENTRIES:
        if entry.minimised in minimised.values():
            values = (entry.psnr, entry.ms_ssim, entry.seconds)
            add(
                f"{entry.name}, 2019", VALIDATION_IMAGES, VALIDATION_MEGAPIXELS, entry.size, *values
            )
    if not comparable:
        lines += ["", f"Not comparable: CLIC 2019's validation set has {VALIDATION_IMAGES} images and "
                  f"{VALIDATION_MEGAPIXELS} Mpx."]  # fmt: skip
    return "\n".join(lines)


def parts(sizes: Sequence[tuple[str, int]]) -> list[str]:
    """Which of the validation images are there, one line per part.

    Args:
        sizes: file names and pixels of images.
    """
    stems = [(Path(name).stem, pixels) for name, pixels in sizes]
    found = {stem for stem, pixels in stems if PROFESSIONAL.get(stem) == pixels}
    missing = [name for name in PROFESSIONAL if name not in found]
    altered = [stem for stem, pixels in stems if PROFESSIONAL.get(stem, pixels) != pixels]
    line = f"professional: {len(found)} of {len(PROFESSIONAL)}, by name and pixels"
    line += f"; missing: {', '.join(missing)}" if missing else ""
    line += f"; of another size: {', '.join(altered)}" if altered else ""
    others = len(sizes) - len(found) - len(altered)
    mobile = VALIDATION_IMAGES - len(PROFESSIONAL)
    return [
        line,
        f"mobile: the names of the {mobile} are not known to this program; {others} other images are here",
    ]


def run_check(arguments: argparse.Namespace) -> int:
    """`tucodec clic check`: status 1 when the images are not CLIC 2019's validation set."""
    sizes = [
        (path.name, read_image(path).size // 3)
        for path in tqdm(find_images(arguments.images), disable=None)
    ]
    pixels = sum(size for _, size in sizes)
    found = f"{len(sizes)} images, {pixels / 1e6:.2f} Mpx, {byte_budget(0.15, pixels)} bytes at 0.15 bpp"
    if is_validation_set(len(sizes), pixels):
        print(f"{found}: CLIC 2019's validation set")
        return 0
    print(f"{found}; CLIC 2019's validation set has {VALIDATION_IMAGES} images, "
          f"{VALIDATION_MEGAPIXELS} Mpx, {VALIDATION_BUDGET} bytes")  # fmt: skip
    print("\n".join(parts(sizes)))
    return 1
