"""`tucodec compress | decompress | info | models`: files in, files out, one clear line for a bad one."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tucodec.cli.arguments import add_force, location, positive, real, whole
from lightning_tucodec.errors import (
    ConfigError,
    ImageInputError,
    OutputError,
    TucodecError,
    UnknownModelError,
    reason,
)
from lightning_tucodec.io.files import atomic_write, target_check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_tucodec.codecs.learned.codec import Latents, TucModel
    from lightning_tucodec.codecs.learned.targets import Quantity, Setting, Target
    from lightning_tucodec.coding.container import Container

Job = tuple[Path, Path]
"""A file and what is made of it."""

DEFAULT_MODEL = "tiny-mse-2"

FAMILIES: dict["Quantity", tuple[str, ...]] = {
    "bpp": ("tiny-mse", "tiny-transparent"),
    "psnr": ("tiny-mse", "tiny-transparent"),
    "ms_ssim": ("tiny-ssim", "tiny-transparent"),
}
"""Among which models each target chooses by default."""

H266_MODELS = ("vvc", "vvc+postfilter")
"""What `--model` also takes: H.266 without and with the learned post-filter."""


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec compress`."""
    parser.add_argument(
        "images", nargs="+", type=location, metavar="IMG", help="image files, or folders of them"
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
    rate.add_argument("--qp", type=whole(0, 63), help="of vvc and vvc+postfilter, 0 … 63")
    rate.add_argument(
        "--target-bpp", type=positive, metavar="B", help="for every image the best of at most B"
    )
    rate.add_argument(
        "--target-psnr",
        type=real(0),
        metavar="DB",
        help="for every image the smallest file with DB",
    )
    rate.add_argument(
        "--target-ms-ssim",
        type=real(0, 1),
        metavar="S",
        help="for every image the smallest file with S",
    )
    parser.add_argument("--preset", help="of vvc and vvc+postfilter, faster … slower (medium)")
    _add_device(parser)
    parser.add_argument(
        "--effort",
        type=int,
        choices=range(10),
        default=0,
        metavar="0-9",
        help="search for symbols that code the image better; each level takes longer (0)",
    )
    parser.add_argument(
        "--recon", type=location, metavar="PNG", help="also write what a decoder will show"
    )
    add_force(parser)
    parser.add_argument("--json", action="store_true", help="one object a file, with quality")


def add_decompress_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec decompress`."""
    parser.add_argument("files", nargs="+", type=location, metavar="TUC")
    parser.add_argument(
        "-o", "--out", type=location, required=True, help="a .png file, or a folder"
    )
    parser.add_argument(
        "--model", type=location, help="file of the model, when it is not among the known ones"
    )
    _add_device(parser)
    add_force(parser)
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="decode what is undamaged of a damaged file and hatch the rest; the exit status is 1",
    )
    parser.add_argument("--json", action="store_true", help="one object a file")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where the networks run; a GPU when there is one. Bits are decided on the CPU",
    )


def run_compress(arguments: argparse.Namespace) -> int:
    """Code images; a bad one is named, the others succeed, the status says that one failed."""
    target = _target(arguments)
    if target is not None or arguments.model in H266_MODELS:
        return _compress_chosen(arguments, target)
    for option in ("qp", "preset"):
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--{option} is an option of --model {' and '.join(H266_MODELS)}")
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.learned.codec import WHOLE_POSITIONS
    from lightning_tucodec.codecs.learned.refine import RefinedModel, with_effort
    from lightning_tucodec.codecs.library import load
    from lightning_tucodec.coding.container import check_size
    from lightning_tucodec.io.images import read_image, write_png
    from lightning_tucodec.nn.transforms import STRIDE
    from lightning_tucodec.quality.metrics import bits_per_pixel, quality

    model = load(arguments.model or DEFAULT_MODEL, _device(arguments.device))
    encoder = with_effort(model, arguments.effort)
    jobs, recons, check = _outputs(arguments)

    def prepare(job: Job) -> "NDArray[np.uint8]":
        check(job)
        pixels = read_image(job[0])
        check_size(pixels.shape[1], pixels.shape[0])
        return pixels

    def network(images: "Sequence[NDArray[np.uint8]]") -> "list[tuple[Latents, float]]":
        started = time.perf_counter()
        latents = model.analyse_batch(images)
        if isinstance(encoder, RefinedModel):
            latents = [encoder.improve(*pair) for pair in zip(images, latents, strict=True)]
        seconds = (time.perf_counter() - started) / len(images)
        return [(one, seconds) for one in latents]

    def finish(
        job: Job, pixels: "NDArray[np.uint8]", result: "tuple[Latents, float]"
    ) -> dict[str, Any]:
        source, target = job
        latents, seconds = result
        height, width = pixels.shape[:2]
        started = time.perf_counter()
        data = model.write(latents, width, height)
        seconds += time.perf_counter() - started
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
    return _report(batch.run(stages, jobs), len(jobs), arguments.json)


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
    from lightning_tucodec.codecs.learned.refine import with_effort
    from lightning_tucodec.codecs.library import family, load

    name = arguments.model
    if name in H266_MODELS:
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
    if arguments.preset is not None:
        raise ConfigError(f"--preset is an option of --model {' and '.join(H266_MODELS)}")
    names = FAMILIES[target.quantity] if name is None else (name,)
    members = [member for name in names for member in family(name)]
    if not members:
        raise ConfigError(
            f"{target} chooses among the models of a family; --model {name} is none (see `tucodec models`)"
        )
    device = _device(arguments.device)
    return [with_effort(load(member, device), arguments.effort) for member in members]


def _compress_chosen(arguments: argparse.Namespace, target: "Target | None") -> int:
    """`run_compress` with the setting that meets a target, and through H.266."""
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.h266.codec import H266
    from lightning_tucodec.codecs.learned import targets
    from lightning_tucodec.io.images import read_image, write_png
    from lightning_tucodec.quality.metrics import bits_per_pixel, quality

    settings = _settings(arguments, target)
    jobs, recons, check = _outputs(arguments)

    def prepare(job: Job) -> "NDArray[np.uint8]":
        check(job)
        return read_image(job[0])

    def finish(job: Job, pixels: "NDArray[np.uint8]", _: None) -> dict[str, Any]:
        source, out = job
        started = time.perf_counter()
        if target is None:
            coding = targets.code(settings[0], pixels)
        else:
            choose = targets.search if isinstance(settings[0], H266) else targets.best
            coding = choose(settings, pixels, target)
        seconds = time.perf_counter() - started
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
    return _report(batch.run(stages, jobs), len(jobs), arguments.json)


def _image_size(path: Path) -> int:
    """Pixels of an image by its header; 0 when it has none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # reading the image will say what is wrong
        return 0


def _device(name: str) -> str:
    """Where the networks run: `auto` is a GPU when there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave the option out")
    return name


class _Picture(NamedTuple):
    """A file that needs no network of ours any more."""

    model: "NamedModel"
    container: "Container"
    pixels: "NDArray[np.uint8]"
    damaged: list[int]
    seconds: float


class NamedModel(NamedTuple):
    """A name where a model is expected."""

    name: str


class _Symbols(NamedTuple):
    """A file between the entropy decoder and g_s."""

    model: "TucModel"
    container: "Container"
    y: "NDArray[np.int32]"
    damaged: list[int]
    seconds: float


def run_decompress(arguments: argparse.Namespace) -> int:
    """Decode files; a bad one is named and leaves no output, unless it is to be salvaged."""
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.h266.codec import decode_container
    from lightning_tucodec.codecs.h266.postfilter import FilterModel
    from lightning_tucodec.codecs.learned.codec import WHOLE_POSITIONS, mark
    from lightning_tucodec.codecs.library import load_any, load_by_id
    from lightning_tucodec.coding.container import CodecKind, unpack
    from lightning_tucodec.io.images import write_png

    device = _device(arguments.device)
    chosen = load_any(arguments.model, device) if arguments.model else None

    jobs = _targets([Path(name) for name in arguments.files], arguments.out, ".png")
    check = target_check((source for source, _ in jobs), arguments.force)

    def prepare(job: Job) -> _Symbols | _Picture:
        check(job[1])
        container = unpack(_read(job[0]), salvage=arguments.salvage)
        started = time.perf_counter()
        if container.kind == CodecKind.VVC:
            shown = decode_container(container, chosen if isinstance(chosen, FilterModel) else None)
            name = NamedModel(H266_MODELS[bool(any(container.model_id))])
            return _Picture(name, container, shown, [], time.perf_counter() - started)
        model = chosen or load_by_id(container.model_id, device)
        if isinstance(model, FilterModel):
            raise UnknownModelError(f"{model.name} is a post-filter, which did not write this file")
        started = time.perf_counter()
        y, damaged = model.read(container, arguments.salvage)
        return _Symbols(model, container, y, damaged, time.perf_counter() - started)

    def network(batch: Sequence[_Symbols | _Picture]) -> "list[tuple[NDArray[np.uint8], float]]":
        if isinstance(batch[0], _Picture):
            return [(one.pixels, 0.0) for one in batch if isinstance(one, _Picture)]
        started = time.perf_counter()
        images = batch[0].model.synthesise_batch(
            [one.y for one in batch if isinstance(one, _Symbols)]
        )
        seconds = (time.perf_counter() - started) / len(batch)
        return [(pixels, seconds) for pixels in images]

    def finish(
        job: Job, symbols: _Symbols | _Picture, result: "tuple[NDArray[np.uint8], float]"
    ) -> dict[str, Any]:
        source, target = job
        width, height = symbols.container.width, symbols.container.height
        pixels = result[0][:height, :width]
        lost = mark(pixels, symbols.damaged)
        write_png(target, pixels)
        row = {
            "file": str(source),
            "output": str(target),
            "width": width,
            "height": height,
            "seconds": symbols.seconds + result[1],
            "model": symbols.model.name,
        }
        return {**row, "damaged_rows": lost} if arguments.salvage else row

    stages = batch.Stages(
        pixels=lambda job: _coded_size(job[0]),
        prepare=prepare,
        group=lambda one: (
            (one.model.id, one.y.shape) if isinstance(one, _Symbols) else one.pixels.shape
        ),
        batch=lambda one: (
            max(1, WHOLE_POSITIONS // (one.y.shape[0] * one.y.shape[1]))
            if isinstance(one, _Symbols)
            else 1
        ),
        network=network,
        finish=finish,
    )
    return _report(batch.run(stages, jobs), len(jobs), arguments.json)


def _coded_size(path: Path) -> int:
    """Pixels of a `.tuc` by its header; 0 when it has none."""
    from lightning_tucodec.coding.container import unpack

    try:
        container = unpack(_read(path), salvage=True)
    except TucodecError:  # decoding the file will say what is wrong
        return 0
    return container.width * container.height


def run_info(arguments: argparse.Namespace) -> int:
    """Say what stands in a `.tuc` file without decoding it."""
    from lightning_tucodec.coding.container import CodecKind, unpack

    path = Path(arguments.file)
    data = _read(path)
    try:
        container = unpack(data)
    except TucodecError as error:
        raise type(error)(f"{path}: {error}") from None
    row: dict[str, Any] = {
        "file": str(path),
        "kind": CodecKind(container.kind).name.lower(),
        "width": container.width,
        "height": container.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (container.width * container.height),
        "header_bytes": len(data) - sum(len(strip or b"") for strip in container.strips),
        "strips": [len(strip or b"") for strip in container.strips],
        "model_id": container.model_id.hex(),
        "model": _name_of(container.model_id),
    }
    if arguments.json:
        print(json.dumps(row))
    else:
        for key, value in row.items():
            print(f"{key:13} {value}")
    return 0


def _name_of(identity: bytes) -> str | None:
    from lightning_tucodec.codecs.library import models

    return next((name for name, card in models().items() if card["id"] == identity.hex()), None)


def run_models(arguments: argparse.Namespace) -> int:
    """List shipped and local models; a damaged file is named and the status says so."""
    from lightning_tucodec.codecs.library import SHIPPED, load_any, model_files

    status = 0
    rows = []
    for path in model_files():
        try:
            model = load_any(path)
        except TucodecError as error:
            print(f"tucodec: {error}", file=sys.stderr)
            status = 1
            continue
        where = "shipped" if path.parent == SHIPPED else str(path)
        rows.append({**model.card, "name": model.name, "id": model.id.hex(), "where": where})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return status
    for row in rows:
        words = " ".join(f"{key}={value}" for key, value in row.get("kodak", {}).items())
        print(f"{row['name']:16} {row['id']}  {words}  ({row['where']})")
    return status


def _outputs(
    arguments: argparse.Namespace,
) -> tuple[list[Job], dict[Path, Path], Callable[[Job], None]]:
    """Jobs of `compress`, pictures by source, and what refuses a job whose outputs would replace a file."""
    jobs = _targets(_images(arguments.images), arguments.out, ".tuc")
    sources = [source for source, _ in jobs]
    recons = dict(_targets(sources, arguments.recon, ".png") if arguments.recon else [])
    refuse = target_check(sources, arguments.force)

    def check(job: Job) -> None:
        source, target = job
        if os.path.isdir(source):
            os.listdir(source)  # says when it must not be read
            raise ImageInputError(f"{source}: no image files in this folder")
        for path in (target, recons.get(source)):
            if path is not None:
                refuse(path)

    return jobs, recons, check


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


def _targets(sources: list[Path], out: str, suffix: str) -> list[tuple[Path, Path]]:
    """(source, target): one file when OUT names one, else `<stem><suffix>` in the folder OUT.

    Raises:
        OutputError: OUT is a file of another kind, one file for several sources, or two sources would
            write the same file.
    """
    is_folder = os.path.isdir(out) or out.endswith(os.sep)
    if out.lower().endswith(suffix) and not is_folder:
        if len(sources) > 1:
            raise OutputError(f"-o {out}: one file for {len(sources)} inputs; name a folder")
        return [(sources[0], Path(out))]
    if out == "-" or (Path(out).suffix and not is_folder):
        raise OutputError(
            f"-o {out}: is no {suffix} file; name one, or a folder, which ends in {os.sep} when it is new "
            "and has a dot in its name"
        )
    jobs = [(source, Path(out) / f"{source.stem}{suffix}") for source in sources]
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target in seen:
            raise OutputError(f"{seen[target]} and {source} would both be written to {target}")
        seen[target] = source
    return jobs


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageInputError(f"{path}: {error.strerror}") from None


def _report(
    outcomes: Iterable[tuple[Job, dict[str, Any] | Exception]], count: int, as_json: bool
) -> int:
    """Print every outcome, with progress; exit status 1 when anything failed."""
    from tqdm import tqdm

    status = 0
    interactive = sys.stderr.isatty() and count > 1
    for (source, _), row in tqdm(
        outcomes, total=count, unit="file", disable=not interactive, leave=False
    ):
        if isinstance(row, Exception):
            status = 1
            text = reason(row)
            named = text if str(source) in text else f"{source}: {text}"
            tqdm.write(f"tucodec: {named}", file=sys.stderr)
            continue
        tqdm.write(json.dumps(row) if as_json else _line(row), file=sys.stdout)
        if lost := row.get("damaged_rows"):
            status = 1
            rows = ", ".join(f"{top}–{bottom - 1}" for top, bottom in lost)
            tqdm.write(
                f"tucodec: {source}: rows {rows} are damaged; they are hatched in {row['output']}",
                file=sys.stderr,
            )
    return status


def _line(row: dict[str, Any]) -> str:
    words = [f"{row['file']} -> {row['output']}", f"{row['width']}x{row['height']}"]
    if "bytes" in row:
        words.append(f"{row['bytes']} bytes, {row['bpp']:.4f} bpp")
    return "  ".join([*words, f"{row['seconds']:.2f} s", row["model"]])
