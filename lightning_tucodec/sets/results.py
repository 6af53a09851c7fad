"""Results of an evaluation: summed over the set, written as JSON and CSV, printed as a table."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import begins_with
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.decibels import ms_ssim_db, psnr_from_sse
from lightning_tucodec.quality.perceptual import DEFINITIONS as PERCEPTUAL
from lightning_tucodec.quality.perceptual import MEASURES
from lightning_tucodec.sets.measure import Row

if TYPE_CHECKING:
    from lightning_tucodec.sets.allocation import Table

FORMAT = "tucodec-evaluation-1"

_HEADS = (f'{{\n "format": "{FORMAT}"', "image,codec,", "codec,images,bytes,")
"""How the files of `write_results` begin."""

DEFINITIONS = {
    "pixels": "digest of the original's size and pixels",
    "bpp": "8 * all bytes of the coded files, headers included / all pixels of the originals",
    "psnr": "RGB, 8 bit, pooled: squared error summed over all values of all images (CLIC)",
    "psnr_y": "BT.709 full-range luma of the 8-bit RGB, not rounded, pooled",
    "ms_ssim": "RGB, mean of the images' values weighted by their pixels (CLIC)",
    "*_mean": "mean of the images' own values, as most papers average",
    "ms_ssim_db": "-10 * log10(1 - MS-SSIM)",
    "ceiling_psnr": "pooled PSNR of the conversion to 10-bit 4:2:0 and back alone; where the codec "
    "works behind that conversion it cannot exceed it",
    "seconds": "wall clock, including the start of external programs; machines under load differ",
    "peak_memory": "bytes: largest resident set of a process that codes and decodes the largest "
    "image, or of the program it calls; interpreter and libraries are part of it",
}
"""The averaging rules, which stand in every result."""


def summarise(rows: Sequence[Row], codecs: Sequence[ImageCodec]) -> list[Row]:
    """One row per codec for the whole set; see `DEFINITIONS`."""
    from lightning_tucodec.quality.metrics import bits_per_pixel

    sets = []
    for codec in codecs:
        own = [row for row in rows if row["codec"] == codec.name]
        area = [row["width"] * row["height"] for row in own]
        size, pixels = sum(row["bytes"] for row in own), sum(area)
        similar = [row["ms_ssim"] for row in own]
        weighted = plain = None
        if all(value is not None for value in similar):
            weighted = float(np.average(similar, weights=area))
            plain = float(np.mean(similar))
        entry: Row = {
            "codec": codec.name,
            "images": len(own),
            "bytes": size,
            "bpp": bits_per_pixel(size, pixels),
            "bpp_mean": _mean(own, "bpp"),
            "psnr": psnr_from_sse(sum(row["sse"] for row in own), 3 * pixels),
            "psnr_mean": _mean(own, "psnr"),
            "psnr_y": psnr_from_sse(math.fsum(row["sse_y"] for row in own), pixels),
            "psnr_y_mean": _mean(own, "psnr_y"),
            "ms_ssim": weighted,
            "ms_ssim_mean": plain,
            "ms_ssim_db": None if weighted is None else float(ms_ssim_db(weighted)),
            "encode_seconds": math.fsum(row["encode_seconds"] for row in own),
            "decode_seconds": math.fsum(row["decode_seconds"] for row in own),
        }
        entry |= {m: _known_mean(own, m) for m in MEASURES if all(m in row for row in own)}
        if "ceiling_psnr" in own[0]:
            squared = [
                3 * n * 10 ** (-row["ceiling_psnr"] / 10) for n, row in zip(area, own, strict=True)
            ]
            total = math.fsum(squared)
            entry["ceiling_psnr"] = psnr_from_sse(total, 3 * pixels, peak=1.0)
        sets.append(entry)
    return sets


def write_results(
    output: Path,
    rows: Sequence[Row],
    sets: Sequence[Row],
    codecs: Sequence[ImageCodec],
    specifications: Sequence[str] = (),
) -> None:
    """Everything as JSON to `output`; rows and sets as CSV beside it, in `.csv` and `.sets.csv`.

    Each row of the CSV files describes its codec, and each row of a set its averaging rule.

    Args:
        output: ends in .json.
        rows: of `evaluate`.
        sets: of `summarise`.
        codecs: those measured.
        specifications: the text that named each codec; it locates a model that was given as a file.
    """
    described = {codec.name: codec.describe() for codec in codecs}
    for codec, text in zip(codecs, specifications, strict=bool(specifications)):
        described[codec.name]["specification"] = text
    content = {
        "format": FORMAT,
        "definitions": DEFINITIONS | {k: v for k, v in PERCEPTUAL.items() if k in sets[0]},
        "codecs": described,
        "sets": sets,
        "rows": rows,
    }
    with atomic_write(output, "w") as stream:
        json.dump(finite(content), stream, indent=1, allow_nan=False)
        stream.write("\n")
    codings = {}
    for name, entry in described.items():
        command = entry.get("command") or json.dumps(entry.get("options", {}))
        codings[name] = {
            "version": entry["version"],
            "command": command,
            "colour": entry["colour"],
        }
    _, by_image, by_codec = results_files(output)
    _write_csv(by_image, [{**row, **codings[row["codec"]]} for row in rows])
    averaging = {"averaging": "; ".join(f"{k}: {v}" for k, v in DEFINITIONS.items())}
    lines = [{**entry, **codings[entry["codec"]], **averaging} for entry in sets]
    _write_csv(by_codec, lines)


def results_files(output: Path) -> tuple[Path, Path, Path]:
    """The files of `write_results`: JSON, and rows and sets as CSV."""
    return output, output.with_suffix(".csv"), output.with_suffix(".sets.csv")


def is_results(path: Path) -> bool:
    """Whether a file begins like one that `write_results` wrote."""
    return begins_with(path, _HEADS)


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path, "w") as stream:
        stream.write(text.getvalue())


def allocation_table(rows: Sequence[Row]) -> "Table":
    """The rows of an evaluation as the table that `allocation.allocate` chooses from.

    Raises:
        ConfigError: an image is too small for MS-SSIM.
    """
    from lightning_tucodec.sets.allocation import Table

    images = list(dict.fromkeys(row["image"] for row in rows))
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    shape = len(images), len(codecs)
    size = np.full(shape, -1, np.int64)
    error = np.zeros(shape, np.int64)
    similarity, seconds = np.zeros(shape), np.zeros(shape)
    pixels = np.zeros(len(images), np.int64)
    for row in rows:
        i, j = images.index(row["image"]), codecs.index(row["codec"])
        if row["ms_ssim"] is None:
            raise ConfigError(f"{row['image']}: too small for MS-SSIM (11 pixels a side)")
        size[i, j], error[i, j], similarity[i, j] = row["bytes"], row["sse"], row["ms_ssim"]
        seconds[i, j] = row["decode_seconds"]
        pixels[i] = row["width"] * row["height"]
    return Table(images, codecs, pixels, size, error, similarity, seconds)


def table_text(sets: Sequence[Row]) -> str:
    """The set rows as a text table."""
    width = max(len(entry["codec"]) for entry in sets)
    further = [name for name in MEASURES if all(name in entry for entry in sets)]
    heading = f"{'codec':{width}}      bytes     bpp    PSNR  PSNR-Y  MS-SSIM   mean PSNR"
    lines = [heading + "".join(f"  {name:>11}" for name in further)]
    for entry in sets:
        similarity = "      –" if entry["ms_ssim"] is None else f"{entry['ms_ssim']:.5f}"
        lines.append(
            f"{entry['codec']:{width}} {entry['bytes']:10d} {entry['bpp']:7.4f} "
            f"{entry['psnr']:7.3f} {entry['psnr_y']:7.3f}  {similarity}     {entry['psnr_mean']:7.3f}"
            + "".join(f"  {_shown(entry[name]):>11}" for name in further)
        )
    lines.append(
        "bytes, bpp, PSNR, PSNR-Y: of the set as a whole, all pixels together; MS-SSIM: mean weighted by "
        "pixels; others: means over the images, as in the curves of `tucodec compare`"
    )
    return "\n".join(lines)


def _mean(rows: Sequence[Row], key: str) -> float:
    return math.fsum(row[key] for row in rows) / len(rows)


def _known_mean(rows: Sequence[Row], key: str) -> float | None:
    """The mean; None where a row has no value."""
    return None if any(row[key] is None for row in rows) else _mean(rows, key)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinity: the PSNR of a lossless coding becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
