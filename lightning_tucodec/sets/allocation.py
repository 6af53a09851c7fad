"""Choose one coding of each image so that a whole set meets its budget, with a proof of optimality.

For every image one of several codings ("candidates") is chosen so that a sum over the set is minimal
while other sums stay within limits: the multiple-choice knapsack problem. Set-level PSNR and
MS-SSIM as CLIC defines them are such sums: of squared errors, and of pixels·(1 − MS-SSIM).

Everything is compared in integers. Bytes and squared errors of uint8 images are integers; MS-SSIM
is taken in units of 2⁻²⁴, which holds every fp32 value from one half to one exactly.

`knapsack` solves problems of one limit, `branch_and_cut` those of several.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.sets.branch_and_cut import solve_limits
from lightning_tucodec.sets.knapsack import solve_one_limit

Quantity = Literal["bytes", "sse", "ms_ssim", "seconds"]
"""What can be minimised or limited: `ms_ssim` stands for the loss pixels·(1 − MS-SSIM)."""

MS_SSIM_UNITS = 1 << 24
SECONDS_UNITS = 1_000_000
_IN_WORDS: dict[Quantity, str] = {
    "bytes": "the bytes",
    "sse": "the squared error",
    "ms_ssim": "the loss 1 − MS-SSIM",
    "seconds": "the decoding time",
}


@dataclass(frozen=True)
class Table:
    """Size and distortion of every image under every candidate.

    Attributes:
        images: names of the n images.
        candidates: names of the k candidates.
        pixels: n, of the original images.
        bytes: n×k file sizes, headers included; −1 where a candidate does not exist.
        sse: n×k sums of squared errors over all RGB values of uint8 images.
        ms_ssim: n×k values.
        seconds: n×k decoding times, if known.
    """

    images: Sequence[str]
    candidates: Sequence[str]
    pixels: NDArray[np.int64]
    bytes: NDArray[np.int64]
    sse: NDArray[np.int64]
    ms_ssim: NDArray[np.float64]
    seconds: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.images), len(self.candidates))
        for name in ("bytes", "sse", "ms_ssim", "seconds"):
            values = getattr(self, name)
            if values is not None and values.shape != shape:
                raise ValueError(f"{name} is {values.shape}, not {shape}")
        if self.pixels.shape != shape[:1]:
            raise ValueError(f"pixels is {self.pixels.shape}, not {shape[:1]}")
        if not shape[0] or not (self.bytes >= 0).any(axis=1).all():
            raise ConfigError("nothing to choose from: an image has no candidate")

    def amounts(self, quantity: Quantity) -> NDArray[np.int64]:
        """The n×k integers that are summed for a quantity."""
        if quantity == "bytes":
            return self.bytes
        if quantity == "sse":
            return self.sse
        if quantity == "seconds":
            if self.seconds is None:
                raise ConfigError("the table holds no decoding times")
            return np.ceil(self.seconds * SECONDS_UNITS).astype(np.int64)
        loss = np.rint((1.0 - self.ms_ssim) * MS_SSIM_UNITS).astype(np.int64)
        return loss * self.pixels[:, None]

    def only(self, exists: NDArray[np.bool_]) -> "Table":
        """The same table restricted to these n×k candidates."""
        return replace(self, bytes=np.where(exists, self.bytes, -1))

    def capped(self, bpp: float) -> "Table":
        """The same table without files of more than `bpp` bits a pixel of their own image.

        Raises:
            ConfigError: an image has no file that small.
        """
        most = [math.floor(Fraction(str(bpp)) * int(pixels) / 8) for pixels in self.pixels]
        within = (self.bytes >= 0) & (self.bytes <= np.array(most)[:, None])
        for name, pixels, sizes, fits in zip(
            self.images, self.pixels, self.bytes, within, strict=True
        ):
            if not fits.any():
                least = 8 * int(sizes[sizes >= 0].min()) / int(pixels)
                raise ConfigError(
                    f"{name}: its smallest file has {least:.4f} bpp, above the {bpp:g} of an image; "
                    "add a coarser candidate"
                )
        return self.only(within)

    def limit(self, quantity: Quantity, value: float) -> int:
        """A limit in the integers of `amounts`.

        Args:
            quantity: what is limited.
            value: bytes; seconds; for `sse` the pooled PSNR in dB and for `ms_ssim` the
                pixel-weighted MS-SSIM that must be reached.
        """
        pixels = int(self.pixels.sum())
        if quantity == "bytes":
            return math.floor(value)
        if quantity == "seconds":
            return math.floor(value * SECONDS_UNITS)
        if quantity == "ms_ssim":
            return math.floor((1 - Fraction(str(value))) * pixels * MS_SSIM_UNITS)
        with localcontext(prec=50):
            mse = 255**2 * Decimal(10) ** (-Decimal(str(value)) / 10)
            return math.floor(mse * 3 * pixels)


def relative_gap(objective: int, bound: int) -> float:
    """How far the optimum can be below `objective`; 0 means proven optimal."""
    return (objective - bound) / max(1, objective)


@dataclass(frozen=True)
class Allocation:
    """A choice for every image, its totals and its bound.

    Attributes:
        choice: n indices into the candidates.
        bytes: of the set.
        bpp: bits a pixel of the set.
        psnr: pooled over all values of the set, dB.
        ms_ssim: weighted by pixels.
        objective: what was minimised, in the units of `Table.amounts`.
        bound: no choice within the limits is below this.
        method: how it was found.
    """

    choice: NDArray[np.int64]
    bytes: int
    bpp: float
    psnr: float
    ms_ssim: float
    objective: int
    bound: int
    method: str

    @property
    def gap(self) -> float:
        """How far the optimum can be below, see `relative_gap`."""
        return relative_gap(self.objective, self.bound)


def allocate(
    table: Table,
    minimise: Quantity,
    *,
    max_bytes: int | None = None,
    min_psnr: float | None = None,
    min_ms_ssim: float | None = None,
    max_seconds: float | None = None,
) -> Allocation:
    """Choose a candidate for every image.

    CLIC's low-rate track: `minimise="sse"` or `"ms_ssim"` with `max_bytes`; its transparent track:
    `minimise="bytes"` with `min_psnr=40, min_ms_ssim=0.993`.

    Args:
        table: sizes and distortions.
        minimise: the quantity to minimise.
        max_bytes: limit on the sum of sizes.
        min_psnr: minimum PSNR pooled over all values of the set, dB.
        min_ms_ssim: minimum MS-SSIM weighted by pixels.
        max_seconds: limit on the sum of decoding times.

    Raises:
        ConfigError: no choice meets the limits; says by how much and what would help.
    """
    given: dict[Quantity, float | None] = {
        "bytes": max_bytes,
        "sse": min_psnr,
        "ms_ssim": min_ms_ssim,
        "seconds": max_seconds,
    }
    limits = {key: table.limit(key, value) for key, value in given.items() if value is not None}
    weights = {key: table.amounts(key) for key in limits}
    exists = table.bytes >= 0
    for key, limit in limits.items():
        stated = given[key]
        assert stated is not None
        _check_reachable(table, key, weights[key], limit, stated, exists)
    cost = table.amounts(minimise)
    if len(limits) == 1:
        (key,) = limits
        solution = solve_one_limit(cost, weights[key], limits[key], exists)
    else:
        names = [_IN_WORDS[key] for key in limits]
        solution = solve_limits(cost, list(weights.values()), list(limits.values()), exists, names)
    rows = np.arange(len(table.images))
    size = int(table.bytes[rows, solution.choice].sum())
    pixels = int(table.pixels.sum())
    error = int(table.sse[rows, solution.choice].sum())
    return Allocation(
        choice=solution.choice,
        bytes=size,
        bpp=8 * size / pixels,
        psnr=psnr_from_sse(error, 3 * pixels),
        ms_ssim=float(np.average(table.ms_ssim[rows, solution.choice], weights=table.pixels)),
        objective=solution.cost,
        bound=solution.bound,
        method=solution.method,
    )


def _check_reachable(
    table: Table,
    quantity: Quantity,
    weight: NDArray[np.int64],
    limit: int,
    stated: float,
    exists: NDArray[np.bool_],
) -> None:
    """Refuse a limit that even the most favourable choice misses, with what would help.

    `stated` is the limit as it was given; `limit` is the same in integers.
    """
    filled = np.where(exists, weight, np.iinfo(np.int64).max)
    best = filled.argmin(1)
    least = int(filled.min(1).sum())
    if least <= limit:
        return
    favourite = table.candidates[int(np.bincount(best).argmax())]
    worst = table.images[int(filled.min(1).argmax())]
    pixels = int(table.pixels.sum())
    if quantity == "bytes":
        reached = f"the smallest files have {least} bytes ({8 * least / pixels:.4f} bpp)"
        wanted = f"{limit} are allowed ({8 * limit / pixels:.4f} bpp), {least - limit} fewer"
        help_ = f"add a candidate coarser than {favourite}"
    elif quantity == "sse":
        have = psnr_from_sse(max(1, least), 3 * pixels)
        reached = f"the best choice reaches {have:.3f} dB pooled PSNR"
        wanted = f"{stated:.3f} dB are asked for, {stated - have:.3f} dB more"
        help_ = f"add a candidate finer than {favourite}; {worst} has the largest error"
    elif quantity == "ms_ssim":
        have = 1 - least / (pixels * MS_SSIM_UNITS)
        reached = f"the best choice reaches an MS-SSIM of {have:.5f}"
        wanted = f"{stated:.5f} is asked for, {stated - have:.5f} more"
        help_ = f"add a candidate finer than {favourite}; {worst} loses most"
    else:
        have = least / SECONDS_UNITS
        reached = f"the fastest choice decodes in {have:.4g} s"
        wanted = f"{stated:.4g} s are allowed, {have - stated:.4g} s fewer"
        help_ = f"add a candidate faster than {favourite}; {worst} takes longest"
    raise ConfigError(f"cannot be met: {reached}, but {wanted}; {help_}")
