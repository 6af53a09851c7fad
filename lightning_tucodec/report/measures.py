"""BD-rates by further measures, such as those of JPEG AI, from results that hold them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, Quality, decibels
from lightning_tucodec.quality.deltas import bd_rate
from lightning_tucodec.quality.perceptual import JPEG_AI, LOWER_IS_BETTER, MEASURES
from lightning_tucodec.report.page import Table
from lightning_tucodec.report.sources import Entry

Row = dict[str, Any]
_Points = dict[str, dict[str, Row]]


def measure_rows(entries: Iterable[Entry], anchor: str) -> list[Row]:
    """Every measured curve against the anchor by every further measure.

    Rates and measures are means over the images that both curves have.

    Args:
        entries: all curves; those without rows of an evaluation have no further measures.
        anchor: name of a measured curve.

    Returns:
        One row per curve: `codec`, `images`, `percent` (BD-rate by measure, a text if there is none) and
        `mean` (of MS-SSIM and the measures of JPEG AI; None where one of them is missing).
    """
    families: dict[str, _Points] = {}
    for entry in entries:
        for row in entry.rows:
            points = families.setdefault(entry.curve.name, {}).setdefault(row["codec"], {})
            points[row.get("pixels") or row["image"]] = row
    if anchor not in families:
        return []
    rows = []
    for name, points in families.items():
        if name == anchor:
            continue
        images = _images(points) & _images(families[anchor])
        sides = [_means(each, images) for each in (families[anchor], points)]
        measures = [m for m in MEASURES if _all_have(points, m) and _all_have(families[anchor], m)]
        if not images or not measures:
            continue
        percent: dict[str, float | str] = {}
        for measure in ("ms_ssim", *measures):
            try:
                reference = _curve(anchor, sides[0], measure)
                test = _curve(name, sides[1], measure)
                percent[measure] = bd_rate(reference, test, cast(Quality, measure)).percent
            except ConfigError as error:
                percent[measure] = str(error)
        wanted = [percent.get(measure) for measure in ("ms_ssim", *JPEG_AI)]
        known = [value for value in wanted if isinstance(value, float)]
        mean = math.fsum(known) / len(known) if len(known) == len(wanted) else None
        rows.append({"codec": name, "images": len(images), "percent": percent, "mean": mean})
    return rows


def _all_have(points: _Points, measure: str) -> bool:
    """Whether all rows hold a measure, be it without a value for a small image."""
    return all(measure in row for rows in points.values() for row in rows.values())


def _images(points: _Points) -> set[str]:
    """The images that all points have."""
    return set.intersection(*(set(rows) for rows in points.values()))


def _means(points: _Points, images: set[str]) -> list[Row]:
    """One row per point: means over the images of the rate and of all measures that every row holds."""
    means = []
    for rows in points.values():
        own = [rows[image] for image in sorted(images)]
        keys = [k for k in ("bpp", "ms_ssim", *MEASURES) if all(_number(r.get(k)) for r in own)]
        means.append({key: float(np.mean([row[key] for row in own])) for key in keys})
    return means


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _curve(name: str, points: Sequence[Row], measure: str) -> Curve:
    values = np.array([point.get(measure, math.nan) for point in points])
    if measure == "ms_ssim":
        values = decibels(values)
    elif measure in LOWER_IS_BETTER:
        values = -values
    return Curve.of(name, [point["bpp"] for point in points], {measure: values})


def measure_table(rows: Sequence[Row], anchor: str) -> Table:
    """The rows of `measure_rows` for the page."""
    measures = list(dict.fromkeys(key for row in rows for key in row["percent"]))
    cells = [[row["codec"], *map(_cell, _values(row, measures))] for row in rows]
    images = " or ".join(map(str, sorted({row["images"] for row in rows})))
    note = f"Means over the {images} images that both have; MS-SSIM in dB, the others as they are. "
    note += (
        "Mean: of MS-SSIM, VMAF, FSIM, VIF, PSNR-HVS and IW-SSIM; JPEG AI's NLPD is not among them."
    )
    columns = ["codec", *measures, "mean of JPEG AI's"]
    return Table(f"BD-rate against {anchor} by further measures, %", columns, cells, note)


def measure_text(rows: Sequence[Row], anchor: str) -> str:
    """The rows of `measure_rows` as text."""
    measures = list(dict.fromkeys(key for row in rows for key in row["percent"]))
    width = max(len(row["codec"]) for row in rows)
    heads = "".join(f"{name:>12}" for name in [*measures, "mean"])
    lines = [f"BD-rate against {anchor} by further measures, %", " " * width + heads]
    for row in rows:
        shown = ("–" if v is None else f"{v:+.1f}" for v in _values(row, measures))
        lines.append(f"{row['codec']:{width}}" + "".join(f"{text:>12}" for text in shown))
    return "\n".join(lines)


def _values(row: Row, measures: Sequence[str]) -> list[float | None]:
    found = [row["percent"].get(measure) for measure in measures]
    return [value if isinstance(value, float) else None for value in found] + [row["mean"]]


def _cell(value: float | None) -> Any:
    return None if value is None else (value, f"{value:+.1f}".replace("-", "−"))
