"""Published rate-distortion figures, each curve with its source: what `published:NAME` reads.

A set is a YAML file beside this module: `title`, and `curves` with

| key | what |
|---|---|
| `name` | for labels; a mean over images of which not all are at hand everywhere names their number |
| `source` | repository, file, commit and its date; or the paper and its table |
| `images` | how many the figures are of |
| `averaging`, `rate` | how the mean was made and the rate counted, where the source says it |
| `bpp`, `psnr`, `ms_ssim` | the points, as printed there, rounded to six decimals at most |
| `ms_ssim_db` | instead of `ms_ssim`: mean over images of MS-SSIM in dB |
| `table` | instead of points: a CSV file, a line an image and point |

A table has the columns `image` (its name without a suffix), `pixels` (how many), `point`, `bpp`, `psnr` and,
where it was published, `ms_ssim`.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, ImageCurves, decibels

_FOLDER = files(__name__)


@dataclass(frozen=True)
class Published:
    """One published curve.

    Attributes:
        curve: mean over images.
        count: how many images those are.
        images: image by image, under names without a suffix; None where only means were published.
        sizes: pixels of each of these images.
        decibels_first: MS-SSIM is the mean of the images' dB, not dB of the mean.
    """

    curve: Curve
    count: int
    images: ImageCurves | None
    sizes: Mapping[str, int]
    decibels_first: bool


def names() -> list[str]:
    """Names of the available sets."""
    found = (file.name for file in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def read_published(specification: str) -> list[Published]:
    """The curves of a set.

    Args:
        specification: NAME of the set, or NAME#CURVE for one of its curves; the number of images that is
            part of some names can be left out.

    Raises:
        ConfigError: there is no such set or curve.
    """
    name, _, only = specification.partition("#")
    if name not in names():
        raise ConfigError(f"published:{name}: unknown; there are {', '.join(names())}")
    content = yaml.safe_load(_FOLDER.joinpath(f"{name}.yaml").read_text("utf-8"))
    curves = [_curve(content["title"], entry) for entry in content["curves"]]
    if not only:
        return curves
    chosen = [each for each in curves if only in (each.curve.name, _without_count(each))]
    if not chosen:
        known = ", ".join(each.curve.name for each in curves)
        raise ConfigError(f"published:{name} has no curve {only}; there are {known}")
    return chosen


def _without_count(each: Published) -> str:
    """The name of a curve without its number of images."""
    count = f"{each.count} images"
    return each.curve.name.replace(f" ({count})", "").replace(f", {count})", ")")


def _curve(title: str, entry: Mapping[str, Any]) -> Published:
    name, count = entry["name"], entry["images"]
    source = f"{entry['source']}; {title}, {count} images; averaging: {entry['averaging']}; "
    source += f"rate: {entry['rate']}"
    if "table" in entry:
        images, sizes = _table(name, entry["table"])
        return Published(mean_of(images, source), count, images, sizes, False)
    quality = {key: entry[key] for key in ("psnr", "ms_ssim_db") if key in entry}
    if "ms_ssim" in entry:
        quality["ms_ssim_db"] = decibels(entry["ms_ssim"])
    curve = Curve.of(name, entry["bpp"], quality, source)
    return Published(curve, count, None, {}, "ms_ssim_db" in entry)


def mean_of(images: ImageCurves, source: str) -> Curve:
    """The mean over images; a quality that was not published is left out of it."""
    return replace(images.mean(), source=source, left_out=())


def _table(name: str, file: str) -> tuple[ImageCurves, dict[str, int]]:
    rows = list(csv.DictReader(_FOLDER.joinpath(file).read_text("utf-8").splitlines()))
    images = list(dict.fromkeys(row["image"] for row in rows))
    bpp, psnr, ms_ssim = (
        np.array([float(row.get(key, "nan")) for row in rows]).reshape(len(images), -1)
        for key in ("bpp", "psnr", "ms_ssim")
    )
    sizes = {row["image"]: int(row["pixels"]) for row in rows}
    return ImageCurves(name, images, bpp, psnr, ms_ssim), sizes
