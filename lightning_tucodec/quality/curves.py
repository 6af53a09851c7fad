"""Rate-distortion curves: reading and comparing them."""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import cut_path, expanded, read_bytes
from lightning_tucodec.quality.decibels import ms_ssim_db

Floats = NDArray[np.float64]
Quality = Literal["psnr", "ms_ssim_db"]
MIN_OVERLAP = 0.3
"""Least share of the quality range, from the lower start to the higher end of two curves, that both
must cover; below, a BD-rate says more about the extrapolation than about the codecs."""


QUALITIES: dict[Quality, str] = {"psnr": "PSNR", "ms_ssim_db": "MS-SSIM"}
"""What people call them."""


def decibels(ms_ssim: ArrayLike) -> Floats:
    """MS-SSIM in dB as curves hold it: 120 dB at most, as a point is to be finite."""
    return ms_ssim_db(ms_ssim, 120.0)


def _usable(bpp: Floats, values: Floats) -> NDArray[np.bool_]:
    """Where both the rate and the quality are numbers that a curve can hold."""
    return np.isfinite(bpp) & (bpp > 0) & np.isfinite(values)


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


@dataclass(frozen=True)
class Curve:
    """Rate-distortion points of one codec over a set.

    Attributes:
        name: for labels.
        lines: for each quality, bits a pixel (above 0, ascending) and the values there, all finite.
        source: where the numbers are from.
        left_out: a text for each point or image without a finite value; these are not part of the curve.
    """

    name: str
    lines: Mapping[str, tuple[Floats, Floats]]
    source: str = ""
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, bpp: ArrayLike, quality: Mapping[str, ArrayLike], source: str = ""
    ) -> "Curve":
        """From points in any order; a value that is not finite leaves its point out of its own quality."""
        rates = np.asarray(bpp, np.float64)
        order = np.argsort(rates, kind="stable")
        lines, left_out = {}, []
        for key, unsorted in quality.items():
            values = np.asarray(unsorted, np.float64)[order]
            kept = _usable(rates[order], values)
            if kept.any():
                lines[key] = rates[order][kept], values[kept]
            if not kept.all():
                numbers = _listed([str(1 + index) for index in np.sort(order[~kept])])
                left_out.append(f"{_label(key)} is not finite at points {numbers} of {len(rates)}")
        return cls(name, lines, source, tuple(left_out))

    def points(self, quality: Quality) -> tuple[Floats, Floats]:
        """Rate and quality of the rising points: no point costs as much as a better one, or more.

        Raises:
            ConfigError: the curve has no such quality.
        """
        if quality not in self.lines:
            raise ConfigError(f"{self.name} has no {quality}")
        rates, values = self.lines[quality]
        before = np.maximum.accumulate(np.concatenate([[-np.inf], values[:-1]]))
        rates, values = rates[values > before], values[values > before]
        best = np.append(np.diff(rates) > 0, True)  # of equal rates
        return rates[best], values[best]


def _label(quality: str) -> str:
    return {str(key): label for key, label in QUALITIES.items()}.get(quality, quality)


UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a damaged or hostile JSON file can raise."""


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
        raise ConfigError(f"{path}: not a rate-distortion curve ({error!r:.200})") from None


@dataclass(frozen=True)
class ImageCurves:
    """Rate-distortion points of one codec, image by image.

    Attributes:
        name: the codec without the option that sets the rate.
        images: names of the n images.
        bpp: n×k.
        psnr: n×k, dB.
        ms_ssim: n×k.
        pixels: digests of the n originals' content; none where the source does not know them.
    """

    name: str
    images: Sequence[str]
    bpp: Floats
    psnr: Floats
    ms_ssim: Floats
    pixels: Sequence[str] = ()

    def whole(self, quality: Quality) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images and points that have a finite value at each other, as indices.

        The image or point that lacks the largest share of its values is removed first, an image before a
        point. Examples are a white image, whose PSNR is infinite at most rates, and a lossless setting, whose
        PSNR is infinite for all images.
        """
        values = self.psnr if quality == "psnr" else self.ms_ssim
        missing = ~_usable(self.bpp, values)
        images, points = (np.arange(length) for length in missing.shape)
        while missing.any():
            by_image, by_point = missing.mean(1), missing.mean(0)
            if by_image.max() >= by_point.max():
                keep = by_image < by_image.max()
                images, missing = images[keep], missing[keep]
            else:
                keep = by_point < by_point.max()
                points, missing = points[keep], missing[:, keep]
        return images, points

    def part(
        self, images: NDArray[np.int64], points: NDArray[np.int64] | None = None
    ) -> "ImageCurves":
        """A selection of images (with repeats if need be) and points, by their indices."""
        columns: Any = slice(None) if points is None else points
        bpp, psnr, ms_ssim = (v[images][:, columns] for v in (self.bpp, self.psnr, self.ms_ssim))
        names = [self.images[i] for i in images]
        pixels = [self.pixels[i] for i in images] if self.pixels else ()
        return ImageCurves(self.name, names, bpp, psnr, ms_ssim, pixels)

    def mean(self) -> Curve:
        """The mean over images, as in most papers: for each quality over the images of `whole`."""
        lines: dict[str, tuple[Floats, Floats]] = {}
        left_out = []
        for quality, label in QUALITIES.items():
            images, points = self.whole(quality)
            if len(images) < len(self.images):
                names = np.delete(np.array(self.images, object), images).tolist()
                left_out.append(f"{label} is not finite and leaves out {_listed(names)}")
            if len(points) < self.bpp.shape[1]:
                count = self.bpp.shape[1]
                numbers = [str(1 + n) for n in range(count) if n not in points]
                left_out.append(f"{label} is not finite at points {_listed(numbers)} of {count}")
            if not len(images) or not len(points):
                continue
            own = self.part(images, points)
            values = own.psnr.mean(0) if quality == "psnr" else decibels(own.ms_ssim.mean(0))
            lines |= Curve.of(self.name, own.bpp.mean(0), {quality: values}).lines
        source = "mean over images; MS-SSIM in dB of the mean"
        return Curve(self.name, lines, source, tuple(left_out))


def paired(
    anchor: ImageCurves, test: ImageCurves, quality: Quality
) -> tuple[ImageCurves, ImageCurves]:
    """Both curves, reduced to the images for which both have finite values of a quality, in one order.

    Images are matched by content where both curves have it, otherwise by name.

    Raises:
        ConfigError: there is none.
    """
    by_content = bool(anchor.pixels and test.pixels)
    sides = []
    for curves in (anchor, test):
        images, points = curves.whole(quality)
        keys = curves.pixels if by_content else curves.images
        sides.append(({keys[i]: i for i in images}, points))
    shared = [name for name in sides[0][0] if name in sides[1][0]]
    if not shared:
        same = sorted(set(anchor.images) & set(test.images)) if by_content else []
        why = f": {_listed(same, 2)} are other pictures in each" if same else ""
        raise ConfigError(f"{anchor.name} and {test.name} share no image{why}")
    first, second = (
        curves.part(np.array([rows[name] for name in shared]), points)
        for curves, (rows, points) in zip((anchor, test), sides, strict=True)
    )
    return first, second


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
        check_entries(rows, ("image", "codec"), ("bpp", "psnr", "ms_ssim"))
        if not rows:
            raise ValueError("no rows")
        for key in ("bpp", "bytes", "width", "height"):
            if any(isinstance(row.get(key), int | float) and row[key] <= 0 for row in rows):
                raise ValueError(f"{key} of a row is not above 0")
        codecs = list(dict.fromkeys(row["codec"] for row in rows))
        images = list(dict.fromkeys(row["image"] for row in rows))
        values = {(row["image"], row["codec"]): row for row in rows}
        contents = {row["image"]: row.get("pixels") for row in rows}
        if any(row.get("pixels") != contents[row["image"]] for row in rows):
            raise ValueError("an image with several contents")
        known = all(is_line(content) for content in contents.values())
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
        reason = f"{error!r:.200}"
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


class BDRate(NamedTuple):
    """Average rate difference at equal quality.

    Attributes:
        percent: negative where the tested curve needs less.
        low: start of the range of quality that both curves cover.
        high: end of it.
        overlap: its share of the range that either covers.
        method: interpolation of log-rate over quality.
    """

    percent: float
    low: float
    high: float
    overlap: float
    method: str


def _sides(anchor: Curve, test: Curve, quality: Quality, what: str) -> list[tuple[Floats, Floats]]:
    """Rates and qualities of both curves' rising points, of which `what` needs four.

    Raises:
        ConfigError: fewer.
    """
    sides = [curve.points(quality) for curve in (anchor, test)]
    for curve, (rates, _) in zip((anchor, test), sides, strict=True):
        if len(rates) < 4:
            raise ConfigError(f"{curve.name}: {what} needs 4 rising points, not {len(rates)}")
    return sides


def bd_rate(
    anchor: Curve,
    test: Curve,
    quality: Quality = "psnr",
    method: Literal["akima", "pchip", "cubic"] = "akima",
    min_overlap: float = MIN_OVERLAP,
) -> BDRate:
    """Bjøntegaard's delta rate, by the `bjontegaard` package.

    Raises:
        ConfigError: fewer than four rising points, or too little overlap.
    """
    import bjontegaard

    sides = _sides(anchor, test, quality, "BD-rate")
    low = max(values[0] for _, values in sides)
    high = min(values[-1] for _, values in sides)
    span = max(values[-1] for _, values in sides) - min(values[0] for _, values in sides)
    overlap = max(0.0, high - low) / span
    if overlap < min_overlap:
        raise ConfigError(
            f"{anchor.name} and {test.name} share {overlap:.0%} of their {quality} range; "
            f"a BD-rate needs {min_overlap:.0%}: code more points"
        )
    (rate_a, quality_a), (rate_b, quality_b) = sides
    percent = bjontegaard.bd_rate(
        *(rate_a, quality_a, rate_b, quality_b),
        method=method,
        require_matching_points=False,
        min_overlap=0,
    )
    return BDRate(float(percent), float(low), float(high), float(overlap), method)


def bd_quality(
    anchor: Curve,
    test: Curve,
    quality: Quality = "psnr",
    method: Literal["akima", "pchip", "cubic"] = "akima",
) -> float:
    """Bjøntegaard's delta quality: dB gained on average at equal rate, by the `bjontegaard` package.

    Raises:
        ConfigError: fewer than four rising points, or less than `MIN_OVERLAP` of the range of
            log-rate in common.
    """
    import bjontegaard

    sides = _sides(anchor, test, quality, "BD-quality")
    logs = [np.log(rates) for rates, _ in sides]
    shared = min(log[-1] for log in logs) - max(log[0] for log in logs)
    overlap = max(0.0, shared) / (max(log[-1] for log in logs) - min(log[0] for log in logs))
    if overlap < MIN_OVERLAP:
        raise ConfigError(
            f"{anchor.name} and {test.name} share {overlap:.0%} of their range of rates; "
            f"a BD-quality needs {MIN_OVERLAP:.0%}: code more points"
        )
    (rate_a, quality_a), (rate_b, quality_b) = sides
    gain = bjontegaard.bd_psnr(
        *(rate_a, quality_a, rate_b, quality_b),
        method=method,
        require_matching_points=False,
        min_overlap=0,
    )
    return float(gain)


def convex_hull(bpp: ArrayLike, quality: ArrayLike) -> tuple[Floats, Floats]:
    """The rising part of the upper convex hull of points: reachable by mixing them over a set."""
    points = sorted(zip(np.asarray(bpp).tolist(), np.asarray(quality).tolist(), strict=True))
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and y <= hull[-1][1]:
            continue
        while hull and hull[-1][0] == x:
            hull.pop()
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    array = np.array(hull, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


class BDInterval(NamedTuple):
    """A BD-rate with its bootstrap interval over the images.

    Attributes:
        estimate: over all images.
        low: lower end of the interval, percent.
        high: upper end.
        level: its nominal coverage.
        images: number of images that both curves have.
        samples: number of bootstrap samples.
        kept: number of samples that have a BD-rate; only these make the interval.
    """

    estimate: BDRate
    low: float
    high: float
    level: float
    images: int
    samples: int
    kept: int


def bd_rate_interval(
    anchor: ImageCurves,
    test: ImageCurves,
    quality: Quality = "psnr",
    method: Literal["akima", "pchip", "cubic"] = "akima",
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BDInterval:
    """BD-rate of mean curves with a percentile bootstrap over images, the same for both codecs.

    Args:
        anchor: the reference.
        test: what is compared with it.
        quality: the vertical axis.
        method: interpolation.
        samples: of the bootstrap.
        level: coverage.
        seed: of the resampling.

    Raises:
        ConfigError: the curves share no image, or see `bd_rate`.
    """
    anchor, test = paired(anchor, test, quality)
    count = len(anchor.images)
    estimate = bd_rate(anchor.mean(), test.mean(), quality, method)
    rng = np.random.default_rng(seed)
    percents = []
    for _ in range(samples):
        drawn = rng.integers(0, count, count)
        curves = anchor.part(drawn).mean(), test.part(drawn).mean()
        # A draw of images whose mean curve has no BD-rate says nothing, and stops nothing.
        with contextlib.suppress(ConfigError):
            percents.append(bd_rate(*curves, quality, method, min_overlap=1e-9).percent)
    if not percents:
        raise ConfigError(f"{anchor.name} and {test.name}: no sample of the images has a BD-rate")
    low, high = np.quantile(percents, [(1 - level) / 2, (1 + level) / 2])
    return BDInterval(estimate, float(low), float(high), level, count, samples, len(percents))


def rate_at_quality(rate: ArrayLike, quality: ArrayLike, target: float) -> float:
    """The rate (bytes or bpp) at which one image's curve reaches a quality.

    Interpolates the logarithm of the rate over quality by PCHIP, which never overshoots.

    Args:
        rate: two or more points.
        quality: one value a rate, in dB.
        target: within the qualities given.

    Raises:
        ConfigError: `target` is outside the curve.
    """
    from scipy.interpolate import PchipInterpolator

    rates, values = Curve.of("curve", rate, {"psnr": quality}).points("psnr")
    if len(rates) < 2 or not values[0] <= target <= values[-1]:
        span = f"{values[0]:.2f} … {values[-1]:.2f}" if len(values) else "nothing"
        raise ConfigError(f"{target:.2f} dB is outside the curve, which covers {span}")
    return float(math.exp(PchipInterpolator(values, np.log(rates))(target)))


def quality_at_rate(curve: Curve, bpp: float, quality: Quality = "psnr") -> float | None:
    """The quality of a curve at a rate, in dB; None outside of it.

    Interpolates over the logarithm of the rate by PCHIP, which never overshoots.
    """
    from scipy.interpolate import PchipInterpolator

    rates, values = curve.points(quality)
    if len(rates) < 2 or not rates[0] <= bpp <= rates[-1]:
        return None
    return float(PchipInterpolator(np.log(rates), values)(math.log(bpp)))
