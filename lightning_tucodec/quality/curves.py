"""Rate-distortion curves: of a set, and image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.decibels import ms_ssim_db

Floats = NDArray[np.float64]
Quality = Literal["psnr", "ms_ssim_db"]


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
