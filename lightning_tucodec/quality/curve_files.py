"""Rate-distortion curves out of files: published ones, and results of `tucodec evaluate`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tucodec.errors import ConfigError, is_one_line, one_line
from lightning_tucodec.io.files import cut_path, expanded, read_bytes
from lightning_tucodec.quality.curves import Curve, ImageCurves, decibels
from lightning_tucodec.quality.decibels import psnr_from_sse

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a damaged or hostile JSON file can raise."""

_ROUNDED = 1e-4
"""Values that were rounded or computed elsewhere may differ by this share."""

_LONGEST = 1e9  # seconds


def is_line(value: object, longest: int = 500) -> bool:
    """Whether a value from a file is text that can stand in a table, a legend and a message."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def is_number(value: object) -> bool:
    """Whether a value from a file is a number that a float can hold (or not finite), or null."""
    if isinstance(value, bool):
        return False
    return (
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) < 1 << 63)
    )


def is_image_label(value: object) -> bool:
    """Whether a value from a file can name an image: a file's name or path, without control characters."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and is_one_line(value)


def contradiction(row: Mapping[str, Any]) -> str | None:
    """What in a measurement cannot be, or does not follow from its counts; None if nothing.

    Keys that it lacks, or that hold no number, are not judged.
    """

    def number(key: str) -> Any:
        value = row.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    for key in ("encode_seconds", "decode_seconds"):
        if (seconds := number(key)) is not None and not 0 <= seconds < _LONGEST:
            return f"{key} cannot be {seconds}"
    if (similarity := number("ms_ssim")) is not None and similarity > 1 + _ROUNDED:
        return f"ms_ssim cannot be {similarity}"
    width, height, size, error, bpp, psnr = map(
        number, ("width", "height", "bytes", "sse", "bpp", "psnr")
    )
    if width is None or height is None:
        return None
    pixels = width * height
    if None not in (size, bpp) and not math.isclose(bpp, 8 * size / pixels, rel_tol=_ROUNDED):
        return f"bpp is {bpp:.6g}, where {size} bytes for {width}×{height} pixels are {8 * size / pixels:.6g}"
    if None not in (error, psnr) and math.isfinite(psnr) and error >= 0:
        told = psnr_from_sse(error, 3 * pixels)
        if not math.isclose(psnr, told, rel_tol=_ROUNDED):
            return f"psnr is {psnr:.6g}, where the squared error gives {told:.6g}"
    return None


def check_entries(entries: object, lines: Sequence[str], numbers: Sequence[str]) -> None:
    """Check a list of entries of a file: these keys must hold a line of text, those a number or null.

    Raises:
        ValueError: what is wrong, and where.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("not a list of entries")
    for index, entry in enumerate(entries):
        for keys, holds, what in (
            (lines, is_line, "a line of text"),
            (numbers, is_number, "a number"),
        ):
            for key in keys:
                if key not in entry or not holds(entry[key]):
                    raise ValueError(f"{key} of entry {1 + index} is not {what}")


def read_curve(path: str | Path) -> Curve:
    """A published curve in CompressAI's format.

    `results` holds `bpp` and one or more of `psnr-rgb`, `ms-ssim-rgb` and `ms-ssim-db-rgb`.

    Raises:
        ConfigError: the file is not such a curve.
    """
    try:
        content: dict[str, Any] = json.loads(read_bytes(path))
        results, about = content["results"], content.get("description", "")
        if not is_line(content["name"]) or not (
            about == "" or is_line(" ".join(about.split()), 5000)
        ):
            raise ValueError("name and description must be text")
        bpp = np.asarray(results["bpp"], np.float64)
        quality = {}
        if "psnr-rgb" in results:
            quality["psnr"] = np.asarray(results["psnr-rgb"], np.float64)
        if "ms-ssim-db-rgb" in results:
            quality["ms_ssim_db"] = np.asarray(results["ms-ssim-db-rgb"], np.float64)
        elif "ms-ssim-rgb" in results:
            quality["ms_ssim_db"] = decibels(results["ms-ssim-rgb"])
        if (np.isfinite(bpp) & (bpp <= 0)).any():
            raise ValueError("a rate that is not above 0")
        if bpp.ndim != 1 or any(v.shape != bpp.shape for v in quality.values()) or not quality:
            raise ValueError("no quality, or not one value a rate")
        return Curve.of(content["name"], bpp, quality, " ".join(about.split()))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not a rate-distortion curve ({one_line(error)})") from None


def read_results(path: str | Path) -> list[ImageCurves]:
    """The curves in a `results.json` of `tucodec evaluate`.

    Points belong to one curve when their specifications differ in the first option only, which sets
    the rate (`vvc:qp=37,preset=slow`), or, for learned models, in a number at the end of the name and in
    `lmbda` (`tiny-mse:effort=3,lmbda=40`).

    Raises:
        ConfigError: the file is not such a result, or an image lacks a point.
    """
    try:
        content: dict[str, Any] = json.loads(read_bytes(path))
        rows = content["rows"]
        check_entries(rows, ["codec"], ("bpp", "psnr", "ms_ssim"))
        if not rows:
            raise ValueError("no rows")
        for key in ("bpp", "bytes", "width", "height"):
            if any(isinstance(row.get(key), int | float) and row[key] <= 0 for row in rows):
                raise ValueError(f"{key} of a row is not above 0")
        for number, row in enumerate(rows, 1):
            if not is_image_label(row.get("image")):
                raise ValueError(f"image of entry {number} is not a line of text")
            if reason := contradiction(row):
                raise ValueError(f"{row['codec']}, {row['image']}: {reason}")
        codecs = list(dict.fromkeys(row["codec"] for row in rows))
        images = list(dict.fromkeys(row["image"] for row in rows))
        values: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            if values.setdefault((row["image"], row["codec"]), row) is not row:
                raise ValueError(f"{row['codec']} has two rows for {row['image']}")
        contents = {row["image"]: row.get("pixels") for row in rows}
        if any(row.get("pixels") != contents[row["image"]] for row in rows):
            raise ValueError("an image with several contents")
        if not all(content is None or is_line(content) for content in contents.values()):
            raise ValueError("pixels of a row is not a line of text")
        known = None not in contents.values()
        pixels = [str(contents[image]) for image in images] if known else ()
        families: dict[str, list[str]] = {}
        for codec in codecs:
            families.setdefault(family(codec), []).append(codec)
        curves = []
        for name, members in families.items():
            bpp, psnr, ms_ssim = (
                np.array([[values[i, c][key] for c in members] for i in images], np.float64)
                for key in ("bpp", "psnr", "ms_ssim")
            )
            curves.append(ImageCurves(name, images, bpp, psnr, ms_ssim, pixels))
        return curves
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UNREADABLE as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: not a whole result of tucodec evaluate ({reason})") from None


def read_named(specification: str) -> Curve:
    """One curve out of a file, as `run.baseline` names it.

    Args:
        specification: FILE of a published curve in CompressAI's format, or FILE#NAME of a `results.json`
            of `tucodec evaluate`, NAME being that of a codec without what sets its rate (`jpeg`).

    Raises:
        ConfigError: the file is neither, or has no such curve.
    """
    file, name = cut_path(specification, "#", ".json")
    file = expanded(file)
    try:
        content = json.loads(read_bytes(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict) or "rows" not in content:
        return read_curve(file)
    curves = {images.name: images.mean() for images in read_results(file)}
    if name not in curves:
        raise ConfigError(f"{specification}: name one of its curves, as in {file}#{next(iter(curves))} "
                          f"({', '.join(curves)})")  # fmt: skip
    return curves[name]


def family(codec: str) -> str:
    """A specification without what sets the rate, see `read_results`."""
    name, _, rest = codec.partition(":")
    options = rest.split(",") if rest else []
    if (
        name == "compressai"
    ):  # a network of its zoo: its name comes first, and each quality is a point
        kept = [o for o in options if not o.startswith(("quality=", "weights="))]
        return f"{name}:{','.join(kept)}"
    if options and not options[0].startswith("effort="):
        options = options[1:]
    else:  # a learned model
        name = re.sub(r"[-_]?\d+$", "", name) or name
        options = [option for option in options if not option.startswith("lmbda=")]
    return ":".join([name, *filter(None, [",".join(options)])])
