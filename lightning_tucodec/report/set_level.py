"""What candidates reach over a set of images under one budget: ours, published ones, and both together.

Nothing is coded. The candidates are the rows of evaluations and published tables that are known image by
image. A published point has no stream here, so an answer that uses one is a report and never a submission.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lightning_tucodec.errors import ConfigError, one_line, printable
from lightning_tucodec.io.files import read_bytes
from lightning_tucodec.io.images import MAX_PIXELS
from lightning_tucodec.quality.curve_files import UNREADABLE, family, is_number
from lightning_tucodec.report.sources import Entry, Evaluation, Material, read_sources
from lightning_tucodec.sets.allocation import Allocation, Quantity, Table, allocate
from lightning_tucodec.sets.clic2019 import ENTRIES, VALIDATION_IMAGES, VALIDATION_MEGAPIXELS
from lightning_tucodec.sets.limits import Requirements
from lightning_tucodec.sets.manifest import Limits
from lightning_tucodec.sets.results import finite

PUBLISHED = "published, not decodable here"


@dataclass(frozen=True)
class Candidates:
    """Every known coding of every image.

    Attributes:
        table: the codings; MS-SSIM and seconds are NaN where they were not published.
        families: of the candidates, in the table's order.
        published: the families that have no streams here.
    """

    table: Table
    families: Sequence[str]
    published: frozenset[str]

    def part(self, families: Sequence[str], minimise: Quantity, limits: Limits) -> Table:
        """The codings of some families that state all values needed.

        Raises:
            ConfigError: an image has no such coding.
        """
        table = self.table
        exists = (table.bytes >= 0) & np.isin(self.families, families)
        needed = ["bytes"]
        if minimise == "ms_ssim" or limits.min_ms_ssim is not None:
            needed.append("MS-SSIM")
            exists &= np.isfinite(table.ms_ssim)
            table = replace(table, ms_ssim=np.nan_to_num(table.ms_ssim))
        if limits.max_seconds is not None and table.seconds is not None:
            needed.append("decoding seconds")
            exists &= np.isfinite(table.seconds)
            table = replace(table, seconds=np.nan_to_num(table.seconds))
        for name, known in zip(table.images, exists.any(1), strict=True):
            if not known:
                raise ConfigError(f"{name}: no coding states its {' and '.join(needed)}")
        return table.only(exists)


def candidates(material: Material) -> Candidates:
    """The candidates among some sources, over the images that every evaluation has.

    Raises:
        ConfigError: no evaluation, no image that all have, two results of one coding, or rows of another
            program that lack a number.
    """
    if not material.evaluations:
        raise ConfigError("a set needs a results.json of tucodec evaluate among the sources")
    for evaluation in material.evaluations:
        _check_counts(evaluation)
    pictures = _shared(material.evaluations)
    if not pictures:
        raise ConfigError("the results have no image in common")
    columns: dict[str, dict[str, Mapping[str, Any]]] = {}
    families: dict[str, str] = {}
    for evaluation in material.evaluations:
        for row in evaluation.rows:
            known = columns.setdefault(row["codec"], {}).setdefault(_key(row), row)
            if any(known[key] != row[key] for key in ("bytes", "sse")):
                raise ConfigError(
                    f"{evaluation.path}: {row['codec']} has another result for {row['image']} than in "
                    "the sources before it; give each codec once"
                )
            families[row["codec"]] = family(row["codec"])
    published = [entry for entry in material.entries if not entry.measured and entry.images]
    for entry in published:
        for point, rows in _points(entry, pictures).items():
            columns[point], families[point] = rows, entry.curve.name
    images, names = list(pictures), list(columns)
    shape = len(images), len(names)
    size, error = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    similar, seconds = np.full(shape, math.nan), np.full(shape, math.nan)
    for j, name in enumerate(names):
        for i, image in enumerate(images):
            if (coding := columns[name].get(image)) is None:
                continue
            size[i, j], error[i, j] = coding["bytes"], coding["sse"]
            similar[i, j] = math.nan if coding.get("ms_ssim") is None else coding["ms_ssim"]
            taken = coding.get("decode_seconds")
            seconds[i, j] = math.nan if taken is None else taken
    pixels = np.array([_pixels(row) for row in pictures.values()], np.int64)
    labels = [row["image"] for row in pictures.values()]
    table = Table(labels, names, pixels, size, error, similar, seconds)
    apart = frozenset(entry.curve.name for entry in published)
    return Candidates(table, [families[name] for name in names], apart)


def _check_counts(evaluation: Evaluation) -> None:
    """Refuse rows without the whole numbers that a set is summed from, or with impossible ones."""
    for row in evaluation.rows:
        for key, least in (("width", 1), ("height", 1), ("bytes", 1), ("sse", 0)):
            if type(row.get(key)) is not int or not least <= row[key] < 1 << 50:
                raise ConfigError(
                    f"{evaluation.path}: {key} of {row['codec']} for {row['image']} is not a count"
                )
        if _pixels(row) > MAX_PIXELS:
            raise ConfigError(
                f"{evaluation.path}: {row['image']} has more than {MAX_PIXELS} pixels"
            )
        if not is_number(row.get("decode_seconds")):
            raise ConfigError(
                f"{evaluation.path}: decode_seconds of {row['codec']} for {row['image']} is not a number"
            )


def _key(row: Mapping[str, Any]) -> str:
    return str(row.get("pixels") or row["image"])


def _pixels(row: Mapping[str, Any]) -> int:
    return int(row["width"]) * int(row["height"])


def _shared(evaluations: Sequence[Evaluation]) -> dict[str, Mapping[str, Any]]:
    """A row of each image that all evaluations have, by its content."""
    sides = [{_key(row): row for row in evaluation.rows} for evaluation in evaluations]
    return {key: row for key, row in sides[0].items() if all(key in side for side in sides)}


def _points(
    entry: Entry, pictures: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The points of a published table as rows by image; bytes are rounded up, errors follow from PSNR."""
    curves = entry.images
    assert curves is not None
    keys = list(curves.pixels or curves.images)
    points: dict[str, dict[str, Mapping[str, Any]]] = {}
    for point in range(curves.bpp.shape[1]):
        rows: dict[str, Mapping[str, Any]] = {}
        for i, key in enumerate(keys):
            bpp, psnr = float(curves.bpp[i, point]), float(curves.psnr[i, point])
            if key not in pictures or not (math.isfinite(bpp) and math.isfinite(psnr)):
                continue
            pixels = _pixels(pictures[key])
            rows[key] = {
                "bytes": math.ceil(bpp * pixels / 8),
                "sse": math.ceil(3 * pixels * 255**2 * 10 ** (-psnr / 10)),
                "ms_ssim": float(curves.ms_ssim[i, point]),
            }
        points[f"{entry.curve.name} #{1 + point}"] = rows
    return points


def reached(given: Candidates, minimise: Quantity, required: Requirements) -> list[dict[str, Any]]:
    """What each family reaches alone, all of ours together, and these with each published one.

    Args:
        given: the candidates.
        minimise: `sse`, `ms_ssim` or `bytes`.
        required: of the set.

    Returns:
        One row per choice: `candidates`, `published` (whether any is), and `bytes, bpp, psnr, ms_ssim,
        seconds_per_megapixel, gap, shares` (images and bytes by candidate), or `refused`, why there is none.
    """
    names = list(dict.fromkeys(given.families))
    own = [name for name in names if name not in given.published]
    groups = [[name] for name in names]
    if len(own) > 1:
        groups.append(own)
    groups += [[*own, name] for name in names if name in given.published]
    limits = required.over(int(given.table.pixels.sum()))
    rows = []
    for group in groups:
        row: dict[str, Any] = {"candidates": " + ".join(group)}
        row["published"] = any(name in given.published for name in group)
        try:
            table = given.part(group, minimise, limits)
            if required.max_image_bpp is not None:
                table = table.capped(required.max_image_bpp)
            row |= _told(given, allocate(table, minimise, **asdict(limits)))
        except ConfigError as error:
            row["refused"] = str(error)
        rows.append(row)
    return rows


def _told(given: Candidates, best: Allocation) -> dict[str, Any]:
    images = np.arange(len(best.choice))
    seconds = given.table.seconds
    taken = math.nan if seconds is None else float(seconds[images, best.choice].sum())
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for i, j in enumerate(best.choice):
        name = given.table.candidates[j]
        counts[name] += 1
        sizes[name] += int(given.table.bytes[i, j])
    shares = {n: {"images": c, "bytes": sizes[n]} for n, c in counts.most_common()}
    return {
        **{key: getattr(best, key) for key in ("bytes", "bpp", "psnr", "ms_ssim", "gap")},
        "seconds_per_megapixel": taken / (1e-6 * int(given.table.pixels.sum())),
        "shares": shares,
    }


def text(rows: Sequence[Mapping[str, Any]], table: Table, minimise: Quantity) -> str:
    """The rows as a Markdown table, and Tucodec's entry of this kind with the difference of sets."""
    lines = [
        "| candidates | bpp | bytes | PSNR | MS-SSIM | decoding, s/Mpx | choice (of the bytes) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["candidates"] + (f" ({PUBLISHED})" if row["published"] else "")
        if "refused" in row:
            lines.append(f"| {name} | – | – | – | – | – | {row['refused']} |")
            continue
        shares = ", ".join(
            f"{share['images']} × {candidate} ({100 * share['bytes'] / row['bytes']:.0f} %)"
            for candidate, share in row["shares"].items()
        )
        shares += "" if row["gap"] == 0 else f"; within {row['gap']:.1g} of the optimum"
        values = (_number(row["ms_ssim"], 4), _number(row["seconds_per_megapixel"], 2))
        lines.append(
            f"| {name} | {row['bpp']:.5f} | {row['bytes']} | {row['psnr']:.3f} | {' | '.join(values)} "
            f"| {shares} |"
        )
    here = f"{len(table.images)} images, {int(table.pixels.sum()) / 1e6:.2f} Mpx"
    for entry in ENTRIES:
        if entry.minimised == minimise:
            rate = 8e-6 * entry.size / VALIDATION_MEGAPIXELS
            seconds = entry.seconds / VALIDATION_MEGAPIXELS
            lines.append(
                f"| {entry.name}, 2019 | {rate:.5f} | {entry.size} | {entry.psnr:.3f} | {entry.ms_ssim:.4f} "
                f"| {seconds:.2f} | over other images: {VALIDATION_IMAGES}, "
                f"{VALIDATION_MEGAPIXELS} Mpx; here {here} |"
            )
    return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def with_times(given: Candidates, path: str) -> Candidates:
    """The same with decoding times by the processor seconds a megapixel of `tucodec bench parts --json`.

    Candidates that were not timed there have none.

    Raises:
        ConfigError: the file holds no such times.
    """
    try:
        rows = json.loads(read_bytes(path))["rows"]
        pace = {r["codec"]: float(r["decode"]["processor_s_per_megapixel"]) for r in rows}
        if not all(0 < seconds < math.inf for seconds in pace.values()):
            raise ValueError("a time that is not above 0")
    except OSError as error:
        raise ConfigError(f"--times {path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise ConfigError(
            f"--times {path}: not of bench parts --json ({one_line(error)})"
        ) from None
    table = given.table
    own = np.array([pace.get(name, math.nan) for name in table.candidates])
    seconds = own[None] * table.pixels[:, None] / 1e6
    return replace(given, table=replace(table, seconds=seconds))


def run(arguments: argparse.Namespace) -> int:
    """`tucodec clic reach`: the table, or its rows as JSON; of several budgets one for each."""
    material = read_sources(arguments.sources)
    given = candidates(material)
    if arguments.times is not None:
        given = with_times(given, arguments.times)
    required = Requirements.of(arguments)
    if not required.given():
        raise ConfigError("without a limit there is nothing to choose: --max-bpp, --min-psnr, …")
    minimise: Quantity = "bytes"
    if arguments.maximise:
        minimise = "sse" if arguments.maximise == "psnr" else "ms_ssim"
    found = {name: reached(given, minimise, part) for name, part in required.parts().items()}
    for note in material.notes:
        print(printable(note), file=sys.stderr)
    if arguments.json:
        print(json.dumps(finite(found.get("", found))))
        return 0
    for name, rows in found.items():
        if name:
            print(f"{name} bpp")
        print(text(rows, given.table, minimise))
    return 0
