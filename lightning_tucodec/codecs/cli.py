"""`tucodec compress | decompress | info | models`: files in, files out, one clear line for a bad one."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tucodec.errors import ImageInputError, TucodecError
from lightning_tucodec.files import atomic_write

if TYPE_CHECKING:
    from lightning_tucodec.codecs.tuc import TucModel

DEFAULT_MODEL = "tiny-mse"


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec compress`."""
    parser.add_argument("images", nargs="+", metavar="IMG", help="image files, or folders of them")
    parser.add_argument("-o", "--out", required=True, help="a .tuc file, or a folder")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or file (%(default)s)")
    parser.add_argument("--recon", metavar="PNG", help="also write what a decoder will show")
    parser.add_argument("--json", action="store_true", help="one object a file, with quality")


def add_decompress_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tucodec decompress`."""
    parser.add_argument("files", nargs="+", metavar="TUC")
    parser.add_argument("-o", "--out", required=True, help="a .png file, or a folder")
    parser.add_argument("--model", help="file of the model, when it is not among the known ones")
    parser.add_argument("--json", action="store_true", help="one object a file")


def run_compress(arguments: argparse.Namespace) -> int:
    """Code images; a bad one is named, the others succeed, the status says that one failed."""
    from lightning_tucodec.codecs.models import load

    model = load(arguments.model)
    jobs = _targets(_images(arguments.images), arguments.out, ".tuc")
    recons = dict(_targets([source for source, _ in jobs], arguments.recon, ".png")
                  if arguments.recon else [])  # fmt: skip

    def compress(source: Path, target: Path) -> dict[str, Any]:
        return _compress(model, source, target, recons.get(source), measure=arguments.json)

    return _each(jobs, compress, arguments.json)


def _compress(
    model: "TucModel", source: Path, target: Path, recon: Path | None, measure: bool
) -> dict[str, Any]:
    from lightning_tucodec.images import read_image, write_png
    from lightning_tucodec.metrics import bits_per_pixel

    pixels = read_image(source)
    started = time.perf_counter()
    coded = model.code(pixels)
    seconds = time.perf_counter() - started
    with atomic_write(target) as stream:
        stream.write(coded.data)
    height, width = pixels.shape[:2]
    row: dict[str, Any] = {
        "file": str(source),
        "output": str(target),
        "width": width,
        "height": height,
        "bytes": len(coded.data),
        "bpp": bits_per_pixel(len(coded.data), width * height),
    }
    if recon or measure:
        shown = model.synthesise(coded.latents.y, width, height)
        if recon:
            write_png(recon, shown)
        if measure:
            row["estimated_bits"] = model.estimated_bits(pixels)
            row.update(_quality(pixels, shown))
    return {**row, "seconds": seconds, "model": model.name}


def _quality(pixels: Any, shown: Any) -> dict[str, float | None]:
    """PSNR (None when nothing differs) and MS-SSIM (None below 11 pixels a side)."""
    import torch

    from lightning_tucodec.metrics import ms_ssim, ms_ssim_scales, psnr_from_sse, sse

    error = sse(pixels, shown)
    quality: dict[str, float | None] = {
        "psnr": psnr_from_sse(error, pixels.size) if error else None,
        "ms_ssim": None,
    }
    if ms_ssim_scales(*pixels.shape[:2]):
        first, second = (
            torch.from_numpy(a).permute(2, 0, 1)[None].float() / 255 for a in (pixels, shown)
        )
        quality["ms_ssim"] = float(ms_ssim(first, second))
    return quality


def run_decompress(arguments: argparse.Namespace) -> int:
    """Decode files; a bad one is named and leaves no output."""
    from lightning_tucodec.codecs.models import load, load_by_id
    from lightning_tucodec.coding.container import unpack
    from lightning_tucodec.images import write_png

    chosen = load(arguments.model) if arguments.model else None

    def decompress(source: Path, target: Path) -> dict[str, Any]:
        container = unpack(_read(source))
        model = chosen or load_by_id(container.model_id)
        started = time.perf_counter()
        pixels = model.decode_pixels(container)
        seconds = time.perf_counter() - started
        write_png(target, pixels)
        return {
            "file": str(source),
            "output": str(target),
            "width": container.width,
            "height": container.height,
            "seconds": seconds,
            "model": model.name,
        }

    jobs = _targets([Path(name) for name in arguments.files], arguments.out, ".png")
    return _each(jobs, decompress, arguments.json)


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
    from lightning_tucodec.codecs.models import load_by_id

    try:
        return load_by_id(identity).name
    except TucodecError:
        return None


def run_models(arguments: argparse.Namespace) -> int:
    """List shipped and local models; a damaged file is named and the status says so."""
    from lightning_tucodec.codecs.models import SHIPPED, load, model_files

    status = 0
    rows = []
    for path in model_files():
        try:
            model = load(path)
        except TucodecError as error:
            print(f"tucodec: {error}", file=sys.stderr)
            status = 1
            continue
        where = "shipped" if path.parent == SHIPPED else str(path)
        rows.append({"name": model.name, "id": model.id.hex(), "where": where, **model.card})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return status
    for row in rows:
        rd = row.get("rd", {})
        words = " ".join(f"{key}={value}" for key, value in rd.items())
        print(f"{row['name']:16} {row['id']}  {words}  ({row['where']})")
    return status


def _images(names: Iterable[str]) -> list[Path]:
    """Files as named, folders replaced by the image files in them, in order of name."""
    from lightning_tucodec.images import image_files

    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise ImageInputError(f"{path}: no image files in this folder")
            files += inside
        else:
            files.append(path)
    return files


def _targets(sources: list[Path], out: str, suffix: str) -> list[tuple[Path, Path]]:
    """(source, target): one file when OUT names one, else `<stem><suffix>` in the folder OUT.

    Raises:
        ImageInputError: two sources would write the same file, or OUT is one file for several.
    """
    if out.lower().endswith(suffix) and not Path(out).is_dir():
        if len(sources) > 1:
            raise ImageInputError(f"-o {out}: one file for {len(sources)} inputs; name a folder")
        return [(sources[0], Path(out))]
    jobs = [(source, Path(out) / f"{source.stem}{suffix}") for source in sources]
    seen: dict[Path, Path] = {}
    for source, target in jobs:
        if target in seen:
            raise ImageInputError(f"{seen[target]} and {source} would both be written to {target}")
        seen[target] = source
    return jobs


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageInputError(f"{path}: {error.strerror}") from None


def _each(
    jobs: list[tuple[Path, Path]], work: Callable[[Path, Path], dict[str, Any]], as_json: bool
) -> int:
    """Do every job, with progress; exit status 1 when any failed."""
    from tqdm import tqdm

    failed = 0
    interactive = sys.stderr.isatty() and len(jobs) > 1
    for source, target in tqdm(jobs, unit="file", disable=not interactive, leave=False):
        try:
            row = work(source, target)
        except (TucodecError, OSError) as error:
            failed += 1
            text = str(error)
            named = text if str(source) in text else f"{source}: {text}"
            tqdm.write(f"tucodec: {named}", file=sys.stderr)
            continue
        text = json.dumps(row) if as_json else _line(row)
        tqdm.write(text, file=sys.stdout)
    return 1 if failed else 0


def _line(row: dict[str, Any]) -> str:
    words = [f"{row['file']} -> {row['output']}", f"{row['width']}x{row['height']}"]
    if "bytes" in row:
        words.append(f"{row['bytes']} bytes, {row['bpp']:.4f} bpp")
    return "  ".join([*words, f"{row['seconds']:.2f} s", row["model"]])
