"""Curves compared: Bjøntegaard deltas with their bootstrap, and values between the points of a curve."""

import contextlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, Floats, ImageCurves, Quality, paired

MIN_OVERLAP = 0.3
"""Least share of the quality range, from the lower start to the higher end of two curves, that both
must cover; below, a BD-rate says more about the extrapolation than about the codecs."""


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
    low, high, overlap = _overlap([values for _, values in sides])
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


def _overlap(ranges: Sequence[Floats]) -> tuple[float, float, float]:
    """Ends of what rising values have in common, and its share of what they span together."""
    low, high = max(values[0] for values in ranges), min(values[-1] for values in ranges)
    span = max(values[-1] for values in ranges) - min(values[0] for values in ranges)
    return low, high, max(0.0, high - low) / span


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
    _, _, overlap = _overlap([np.log(rates) for rates, _ in sides])
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
