"""`tucodec compress`: images to `.tuc` files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tucodec.cli import jobs
from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_trust,
    command,
    location,
    positive,
    real,
    whole,
)
from lightning_tucodec.codecs.base import DEFAULT_MODEL, H266_MODELS
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.io.remarks import remarks
from lightning_tucodec.io.temporary import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_tucodec.codecs.learned.latents import Latents
    from lightning_tucodec.codecs.learned.targets import Quantity, Target

_QUANTITIES: "tuple[Quantity, ...]" = ("bpp", "psnr", "ms_ssim")
"""What there are targets of."""


_NEAR = 0.75
"""What is below this share of a target rate is remarked where no setting has a higher one."""


def register(subparsers: Subparsers) -> None:
    """`tucodec compress`."""
    parser = command(subparsers, "compress", run, "compress images to .tuc files")
    parser.add_argument(
        "images", type=location, nargs="+", metavar="IMG", help="image files, or folders of them"
    )
    parser.add_argument(
        "-o", "--out", type=location, required=True, help="a .tuc file, or a folder"
    )
    parser.add_argument(
        "--model",
        type=location,
        help=f"name or file ({DEFAULT_MODEL}); with a target the name of a family, as tiny-ssim for "
        f"tiny-ssim-1, -2, …; or {' or '.join(H266_MODELS)}",
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--qp", type=whole(0, 63), help="QP of vvc and vvc+postfilter, 0 … 63")
    rate.add_argument(
        "--target-bpp",
        type=positive,
        metavar="B",
        help="best quality of at most B bits a pixel, for each image",
    )
    rate.add_argument(
        "--target-psnr",
        type=real(0),
        metavar="DB",
        help="smallest file of at least DB decibels PSNR, for each image",
    )
    rate.add_argument(
        "--target-ms-ssim",
        type=real(0, 1),
        metavar="S",
        help="smallest file of at least S MS-SSIM, for each image",
    )
    rate.add_argument(
        "--quality",
        type=real(0),
        metavar="Q",
        help="level of a variable-rate network, 0, 1, … and between",
    )
    add_trust(parser)
    parser.add_argument(
        "--preset", help="preset of vvc and vvc+postfilter, faster … slower (medium)"
    )
    jobs.add_device(parser)
    parser.add_argument(
        "--effort",
        type=int,
        choices=range(10),
        default=0,
        metavar="0-9",
        help="search for symbols with a smaller loss, which is rate and distortion together: the file may "
        "also grow and the picture improve; higher levels take longer (0)",
    )
    parser.add_argument(
        "--recon",
        type=location,
        metavar="PNG|DIR",
        help="also write the picture that a decoder will show: a .png file, or a folder",
    )
    add_force(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object for each file, with its quality"
    )


def run(arguments: argparse.Namespace) -> int:
    """Code images; a bad one is named, the others succeed, the status says that one failed."""
    jobs.import_torch()
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.encoder import Encoder, Request
    from lightning_tucodec.coding.container import check_size
    from lightning_tucodec.io.images import read_image, write_png
    from lightning_tucodec.quality.metrics import bits_per_pixel, quality

    target = _target(arguments)
    request = Request(
        model=arguments.model,
        device=jobs.device(arguments.device),
        target=target,
        effort=arguments.effort,
        quality=arguments.quality,
        qp=arguments.qp,
        preset=arguments.preset,
    )
    encoder = Encoder(request)
    files, recons, check = jobs.outputs(
        arguments.images, arguments.out, arguments.recon, arguments.force
    )

    remark = remarks()

    def prepare(job: jobs.Job) -> "NDArray[np.uint8]":
        check(job)
        pixels = read_image(
            job[0], lambda loss: remark(loss, job[0], f"{loss}; 8-bit RGB is coded")
        )
        check_size(pixels.shape[1], pixels.shape[0])
        return pixels

    def network(
        images: "Sequence[NDArray[np.uint8]]",
    ) -> "list[tuple[Latents | None, float]]":
        started = clock()
        latents = encoder.analyse(images)
        seconds = (clock() - started) / len(images)
        return [(one, seconds) for one in latents]

    def finish(
        job: jobs.Job, pixels: "NDArray[np.uint8]", result: "tuple[Latents | None, float]"
    ) -> dict[str, Any]:
        source, out = job
        latents, seconds = result
        started = clock()
        coding = encoder.code(pixels, latents)
        seconds += clock() - started
        height, width = pixels.shape[:2]
        row: dict[str, Any] = {
            "file": str(source),
            "output": str(out),
            "width": width,
            "height": height,
            "bytes": len(coding.data),
            "bpp": bits_per_pixel(len(coding.data), width * height),
        }
        if coding.is_finest and target and row["bpp"] < _NEAR * target.value:
            text = f"{row['bpp']:.3g} bpp is the highest quality there is, far below {target}"
            remark("target", source, text)
        if source in recons:
            write_png(recons[source], coding.shown)
        if arguments.json:
            row["estimated_bits"] = encoder.estimated_bits(pixels, latents)
            row.update(quality(pixels, coding.shown))
        # Last: a file that is there is complete, with all that was asked for.
        with atomic_write(out) as stream:
            stream.write(coding.data)
        return {**row, "seconds": seconds, **encoder.named(coding)}

    stages = batch.Stages(
        pixels=lambda job: _image_size(job[0]),
        prepare=prepare,
        group=lambda pixels: pixels.shape,
        batch=encoder.together,
        network=network,
        finish=finish,
    )
    return jobs.report(batch.run(stages, files), len(files), arguments.json)


def _target(arguments: argparse.Namespace) -> "Target | None":
    """What --target-… asks for."""
    for quantity in _QUANTITIES:
        value = getattr(arguments, f"target_{quantity}")
        if value is not None:
            from lightning_tucodec.codecs.learned.targets import Target

            return Target(quantity, value)
    return None


def _image_size(path: Path) -> int:
    """Pixels of an image by its header; 0 when it has none."""
    from PIL import Image

    from lightning_tucodec.io.images import is_special

    try:
        if is_special(path):
            return 0
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # reading the image will say what is wrong
        return 0
