"""`tucodec decompress | info | models`: what `.tuc` files hold."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tucodec.cli import jobs
from lightning_tucodec.cli.arguments import (
    Subparsers,
    add_force,
    add_json,
    add_trust,
    command,
    location,
)
from lightning_tucodec.codecs.base import H266_MODELS
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import ModelFileError, TucodecError, UnknownModelError, printable
from lightning_tucodec.io.files import target_check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_tucodec.codecs.learned.codec import TucModel
    from lightning_tucodec.coding.container import Container


def register(subparsers: Subparsers) -> None:
    """`tucodec decompress`, `info` and `models`."""
    _add_decompress(
        command(subparsers, "decompress", run_decompress, "decompress .tuc files to PNG")
    )
    info = command(subparsers, "info", run_info, "show the headers of .tuc files")
    _add_files(info)
    models = command(subparsers, "models", run_models, "list shipped and local models")
    add_json(info, models)
    add_trust(models)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=location, nargs="+", metavar="TUC", help=".tuc files, or folders of them"
    )


def _add_decompress(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument(
        "-o", "--out", type=location, required=True, help="a .png file, or a folder"
    )
    parser.add_argument("--model", type=location, help="model file, if the model is not installed")
    jobs.add_device(parser)
    add_trust(parser)
    add_force(parser)
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="decode the undamaged strips of a damaged file and hatch the rest; exit status 1",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each file")


class _Picture(NamedTuple):
    """A file whose picture is complete: only the PNG file remains to be written."""

    name: str
    container: "Container"
    pixels: "NDArray[np.uint8]"
    damaged: list[int]
    seconds: float


class _Symbols(NamedTuple):
    """A file after entropy decoding and before the synthesis transform g_s."""

    name: str
    model: "TucModel"
    container: "Container"
    y: "NDArray[np.int32]"
    damaged: list[int]
    seconds: float


def run_decompress(arguments: argparse.Namespace) -> int:
    """Decode files; a bad one is named and leaves no output, unless it is to be salvaged."""
    jobs.import_torch()
    from lightning_tucodec.codecs import batch
    from lightning_tucodec.codecs.h266.codec import decode_container
    from lightning_tucodec.codecs.h266.postfilter import FilterModel
    from lightning_tucodec.codecs.learned.latents import mark
    from lightning_tucodec.codecs.learned.transforms import WHOLE_POSITIONS
    from lightning_tucodec.codecs.library import NetworkModel, load_any, load_by_id
    from lightning_tucodec.coding.container import CodecKind, unpack
    from lightning_tucodec.io.images import write_png

    device = jobs.device(arguments.device)
    chosen = load_any(arguments.model, device) if arguments.model else None

    files = jobs.targets(jobs.named(arguments.files, jobs.tuc_files), arguments.out, ".png")
    check = target_check((source for source, _ in files), arguments.force)

    def prepare(job: jobs.Job) -> _Symbols | _Picture:
        check(job[1])
        container = unpack(jobs.read(job[0]), salvage=arguments.salvage)
        started = clock()
        if container.kind == CodecKind.VVC:
            shown = decode_container(container, chosen if isinstance(chosen, FilterModel) else None)
            name = H266_MODELS[bool(any(container.model_id))]
            return _Picture(name, container, shown, [], clock() - started)
        model = chosen or load_by_id(container.model_id, device)
        if isinstance(model, FilterModel):
            raise UnknownModelError(f"{model.name} is a post-filter, which did not write this file")
        started = clock()
        if isinstance(model, NetworkModel):
            shown = model.decode_pixels(container)
            return _Picture(model.name, container, shown, [], clock() - started)
        model = model.of(container)
        y, damaged = model.read(container, arguments.salvage)
        return _Symbols(model.name, model, container, y, damaged, clock() - started)

    def network(batch: Sequence[_Symbols | _Picture]) -> "list[tuple[NDArray[np.uint8], float]]":
        if isinstance(batch[0], _Picture):
            return [(one.pixels, 0.0) for one in batch if isinstance(one, _Picture)]
        started = clock()
        images = batch[0].model.synthesise_batch(
            [one.y for one in batch if isinstance(one, _Symbols)]
        )
        seconds = (clock() - started) / len(batch)
        return [(pixels, seconds) for pixels in images]

    def finish(
        job: jobs.Job, symbols: _Symbols | _Picture, result: "tuple[NDArray[np.uint8], float]"
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
            "model": symbols.name,
        }
        return {**row, "damaged_rows": lost} if arguments.salvage else row

    stages = batch.Stages(
        pixels=lambda job: _coded_size(job[0]),
        prepare=prepare,
        group=lambda one: (
            (one.model.id, one.model.level, one.y.shape)
            if isinstance(one, _Symbols)
            else one.pixels.shape
        ),
        batch=lambda one: (
            max(1, WHOLE_POSITIONS // (one.y.shape[0] * one.y.shape[1]))
            if isinstance(one, _Symbols)
            else 1
        ),
        network=network,
        finish=finish,
    )
    return jobs.report(batch.run(stages, files), len(files), arguments.json)


def _coded_size(path: Path) -> int:
    """Pixels of a `.tuc` by its header; 0 when it has none."""
    from lightning_tucodec.coding.container import unpack

    try:
        container = unpack(jobs.read(path), salvage=True)
    except TucodecError:  # decoding the file will say what is wrong
        return 0
    return container.width * container.height


def run_info(arguments: argparse.Namespace) -> int:
    """Say what stands in `.tuc` files without decoding them; a bad one is named, the others are shown."""
    status, gap = 0, ""
    for path in jobs.named(arguments.files, jobs.tuc_files):
        try:
            row = _header(path)
        except TucodecError as error:
            status = 1
            print(f"tucodec: {error}", file=sys.stderr)
            continue
        if arguments.json:
            print(json.dumps(row))
            continue
        row["bpp"] = f"{row['bpp']:.4f}"
        if not any(bytes.fromhex(row["model_id"])):  # H.266 alone
            row["model_id"] = None
        elif row["model"] is None:
            row["model"] = "not known here (its file is needed: decompress --model FILE)"
        lines = [printable(f"{key:13} {value}") for key, value in row.items() if value is not None]
        print(gap + "\n".join(lines))
        gap = "\n"
    return status


def _header(path: Path) -> dict[str, Any]:
    """What stands in a `.tuc` file, by name; None is not known.

    Raises:
        TucodecError: the file cannot be read, or is damaged.
    """
    from lightning_tucodec.coding.container import CodecKind, quality_of, unpack

    data = jobs.read(path)
    try:
        container = unpack(data)
    except TucodecError as error:
        raise type(error)(f"{path}: {error}") from None
    return {
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
        "quality": quality_of(container),
    }


def _name_of(identity: bytes) -> str | None:
    from lightning_tucodec.codecs.cards import PREVIOUS, coding_files, read_card

    for path in coding_files():
        with contextlib.suppress(ModelFileError):
            card = read_card(path)
            if card.id == identity:
                return f"{card.name} (previous)" if path.parent == PREVIOUS else card.name
    return None


def run_models(arguments: argparse.Namespace) -> int:
    """List shipped and local models; a damaged file is named and the status says so."""
    from lightning_tucodec.codecs.cards import SHIPPED, folder_problem, model_files
    from lightning_tucodec.codecs.library import load_any

    status = 0
    rows = []
    if problem := folder_problem():
        print(f"tucodec: {problem}", file=sys.stderr)
        status = 1
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
    measured = dict.fromkeys(["bpp", "psnr", "ms_ssim"])
    for row in rows:
        measured |= dict.fromkeys(row.get("kodak", {}))
    table = [
        [row["name"], row["id"]]
        + [f"{key}={own[key]}" if key in (own := row.get("kodak", {})) else "" for key in measured]
        + [f"({row['where']})"]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True) if width)
        print(printable("  ".join(padded).rstrip()))
    return status
