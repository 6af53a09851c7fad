"""`tucodec compress`: images to `.tuc` files."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
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
from lightning_tucodec.codecs.base import DEFAULT_MODEL
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import (
    ConfigError,
    ImageInputError,
)
from lightning_tucodec.io.files import target_check
from lightning_tucodec.io.temporary import atomic_write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_tucodec.codecs.learned.latents import Latents
    from lightning_tucodec.codecs.learned.targets import Quantity, Setting, Target
    from lightning_tucodec.codecs.library import NetworkModel

FAMILIES: dict["Quantity", tuple[str, ...]] = {
    "bpp": ("tiny-mse", "tiny-transparent"),
    "psnr": ("tiny-mse", "tiny-transparent"),
    "ms_ssim": ("tiny-ssim", "tiny-transparent"),
}
"""Among which models each target chooses by default."""

_RATES_A_LEVEL = 16
"""So many qualities of a variable-rate network, from one level to the next, does a target choose from."""


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
        f"tiny-ssim-1, -2, …; or {' or '.join(jobs.H266_MODELS)}",
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
        help="search for symbols that code the image better; higher levels take longer (0)",
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
    target = _target(arguments)
    if target is not None or arguments.model in jobs.H266_MODELS:
        return _compress_chosen(arguments, target, _settings(arguments, target))
    _refuse(arguments, "qp", "preset")
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.learned.codec import RefinedModel, with_effort
    from lightning_tucodec.codecs.learned.transforms import WHOLE_POSITIONS
    from lightning_tucodec.codecs.library import NetworkModel, load_coder
    from lightning_tucodec.coding.container import check_size
    from lightning_tucodec.io.images import read_image, write_png
    from lightning_tucodec.nn.transforms import STRIDE
    from lightning_tucodec.quality.metrics import bits_per_pixel, quality

    model = load_coder(arguments.model or DEFAULT_MODEL, jobs.device(arguments.device))
    if isinstance(model, NetworkModel):
        return _compress_chosen(arguments, None, [_of_network(arguments, model)])
    if arguments.quality is not None:
        raise ConfigError(f"--quality is for variable-rate networks; {model.name} has one rate")
    encoder = with_effort(model, arguments.effort)
    files, recons, check = _outputs(arguments)

    def prepare(job: jobs.Job) -> "NDArray[np.uint8]":
        check(job)
        pixels = read_image(job[0])
        check_size(pixels.shape[1], pixels.shape[0])
        return pixels

    def network(images: "Sequence[NDArray[np.uint8]]") -> "list[tuple[Latents, float]]":
        started = clock()
        latents = model.analyse_batch(images)
        if isinstance(encoder, RefinedModel):
            latents = [encoder.improve(*pair) for pair in zip(images, latents, strict=True)]
        seconds = (clock() - started) / len(images)
        return [(one, seconds) for one in latents]

    def finish(
        job: jobs.Job, pixels: "NDArray[np.uint8]", result: "tuple[Latents, float]"
    ) -> dict[str, Any]:
        source, target = job
        latents, seconds = result
        height, width = pixels.shape[:2]
        started = clock()
        data = model.write(latents, width, height)
        seconds += clock() - started
        row: dict[str, Any] = {
            "file": str(source),
            "output": str(target),
            "width": width,
            "height": height,
            "bytes": len(data),
            "bpp": bits_per_pixel(len(data), width * height),
        }
        if source in recons or arguments.json:
            shown = model.synthesise(latents.y, width, height)
            if source in recons:
                write_png(recons[source], shown)
            if arguments.json:
                refined = encoder is not model
                row["estimated_bits"] = (
                    model.bits_of(latents) if refined else model.estimated_bits(pixels)
                )
                row.update(quality(pixels, shown))
        # Last: a file that is there is complete, with all that was asked for.
        with atomic_write(target) as stream:
            stream.write(data)
        return {**row, "seconds": seconds, "model": model.name}

    stages = batch.Stages(
        pixels=lambda job: _image_size(job[0]),
        prepare=prepare,
        group=lambda pixels: pixels.shape,
        batch=lambda pixels: max(1, WHOLE_POSITIONS * STRIDE**2 // (pixels.size // 3)),
        network=network,
        finish=finish,
    )
    return jobs.report(batch.run(stages, files), len(files), arguments.json)


def _refuse(arguments: argparse.Namespace, *options: str) -> None:
    """Refuse options of H.266 where it does not code."""
    for option in options:
        if getattr(arguments, option) is not None:
            raise ConfigError(
                f"--{option} is an option of --model {' and '.join(jobs.H266_MODELS)}"
            )


def _target(arguments: argparse.Namespace) -> "Target | None":
    """What --target-… asks for."""
    for quantity in FAMILIES:
        value = getattr(arguments, f"target_{quantity}")
        if value is not None:
            from lightning_tucodec.codecs.learned.targets import Target

            return Target(quantity, value)
    return None


def _settings(arguments: argparse.Namespace, target: "Target | None") -> "list[Setting]":
    """What `targets.best` or, for H.266, `targets.search` chooses from; a single one without a target."""
    from lightning_tucodec.codecs.h266.codec import H266, NO_FILTER
    from lightning_tucodec.codecs.learned.codec import with_effort
    from lightning_tucodec.codecs.library import family, load

    name = arguments.model
    if name in jobs.H266_MODELS:
        if arguments.qp is None and target is None:
            raise ConfigError(f"--model {name} needs --qp or a --target-…")
        options: dict[str, Any] = {"preset": arguments.preset or "medium"}
        if name == "vvc":
            options["filter"] = NO_FILTER
        qps = range(64) if arguments.qp is None else [arguments.qp]
        ladder = [H266(qp, **options) for qp in qps]
        ladder[0].describe()  # says now what is wrong with binary or filter
        return [*ladder]
    assert target is not None
    _refuse(arguments, "preset")
    if rates := _rates(arguments):
        return [*rates]
    names = FAMILIES[target.quantity] if name is None else (name,)
    members = [member for name in names for member in family(name)]
    if not members:
        raise ConfigError(
            f"{target} chooses among the models of a family; --model {name} is none (see `tucodec models`)"
        )
    device = jobs.device(arguments.device)
    return [with_effort(load(member, device), arguments.effort) for member in members]


def _of_network(arguments: argparse.Namespace, model: "NetworkModel") -> "NetworkModel":
    """The setting that the options ask of a network."""
    if arguments.effort:
        raise ConfigError(f"--effort is for this package's own networks; {model.name} is none")
    return model if arguments.quality is None else model.at(arguments.quality)


def _rates(arguments: argparse.Namespace) -> "list[NetworkModel]":
    """The rates of a variable-rate network, falling; none if --model is another thing."""
    from lightning_tucodec.codecs.library import NetworkModel, family, load_any

    if arguments.model is None or family(arguments.model):
        return []
    model = load_any(arguments.model, jobs.device(arguments.device))
    if not isinstance(model, NetworkModel) or model.rates is None:
        return []
    steps = range(_RATES_A_LEVEL * (model.rates.levels - 1), -1, -1)
    return [_of_network(arguments, model).at(step / _RATES_A_LEVEL) for step in steps]


def _compress_chosen(
    arguments: argparse.Namespace, target: "Target | None", settings: "Sequence[Setting]"
) -> int:
    """`run_compress` with the setting that meets a target, through H.266, and by other networks."""
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.h266.codec import H266
    from lightning_tucodec.codecs.learned import targets
    from lightning_tucodec.codecs.library import NetworkModel
    from lightning_tucodec.io.images import read_image, write_png
    from lightning_tucodec.quality.metrics import bits_per_pixel, quality

    is_ladder = isinstance(settings[0], H266 | NetworkModel)
    files, recons, check = _outputs(arguments)

    def prepare(job: jobs.Job) -> "NDArray[np.uint8]":
        check(job)
        return read_image(job[0])

    def finish(job: jobs.Job, pixels: "NDArray[np.uint8]", _: None) -> dict[str, Any]:
        source, out = job
        started = clock()
        if target is None:
            coding = targets.code(settings[0], pixels)
        else:
            choose = targets.search if is_ladder else targets.best
            coding = choose(settings, pixels, target)
        seconds = clock() - started
        if source in recons:
            write_png(recons[source], coding.shown)
        with atomic_write(out) as stream:
            stream.write(coding.data)
        height, width = pixels.shape[:2]
        return {
            "file": str(source),
            "output": str(out),
            "width": width,
            "height": height,
            "bytes": len(coding.data),
            "bpp": bits_per_pixel(len(coding.data), width * height),
            "estimated_bits": None,
            **(quality(pixels, coding.shown) if arguments.json else {}),
            "seconds": seconds,
            **(
                {"model": arguments.model, "qp": coding.setting.qp}
                if isinstance(coding.setting, H266)
                else {"model": coding.setting.name}
            ),
        }

    stages = batch.Stages(
        pixels=lambda job: _image_size(job[0]),
        prepare=prepare,
        group=lambda pixels: pixels.shape,
        batch=lambda pixels: 1,
        network=lambda images: [None] * len(images),
        finish=finish,
    )
    return jobs.report(batch.run(stages, files), len(files), arguments.json)


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


def _outputs(
    arguments: argparse.Namespace,
) -> tuple[list[jobs.Job], dict[Path, Path], Callable[[jobs.Job], None]]:
    """Jobs of `compress`, pictures by source, and what refuses a job whose outputs would replace a file."""
    files = jobs.targets(_images(arguments.images), arguments.out, ".tuc")
    sources = [source for source, _ in files]
    recons = dict(jobs.targets(sources, arguments.recon, ".png") if arguments.recon else [])
    refuse = target_check(sources, arguments.force)

    def check(job: jobs.Job) -> None:
        source, target = job
        if os.path.isdir(source):
            os.listdir(source)  # says when it must not be read
            raise ImageInputError(f"{source}: no image files in this folder")
        for path in (target, recons.get(source)):
            if path is not None:
                refuse(path)

    return files, recons, check


def _images(names: Iterable[str]) -> list[Path]:
    """Files as named, folders replaced by the image files in them, in order of name.

    A folder without image files stays; coding it will say so.
    """
    from lightning_tucodec.io.images import image_files

    files: list[Path] = []
    for path in map(Path, names):
        inside: list[Path] = []
        # Not the method of Path, which raises for names that are too long.
        if os.path.isdir(path):
            with contextlib.suppress(OSError):
                inside = image_files(path)
        files += inside or [path]
    return files
