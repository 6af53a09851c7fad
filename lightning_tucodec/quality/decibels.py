"""Distortions on logarithmic scales. Without PyTorch, so that curves and allocations need none."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MS_SSIM_WINDOW = 11
"""Pixels a side: smaller images have no MS-SSIM."""


def psnr_from_sse(total: int | float, values: int, peak: float = 255.0) -> float:
    """PSNR in dB of a summed squared error over `values` values; infinite for no error.

    With the sums of a whole set this is CLIC's pooled PSNR.

    Args:
        total: summed squared error.
        values: number of summed values (3 · height · width for an RGB image).
        peak: the largest value of the scale the error was measured on.
    """
    if values <= 0:
        raise ValueError("PSNR of nothing")
    return math.inf if total == 0 else 10.0 * math.log10(peak * peak * values / total)


def ms_ssim_db(ms_ssim: ArrayLike, most: float = math.inf) -> NDArray[Any]:
    """MS-SSIM on a logarithmic scale, −10·log10(1 − MS-SSIM).

    Args:
        ms_ssim: values up to 1.
        most: what 1 gives, in dB, and what no value exceeds.

    Returns:
        As many values; NaN for what is not finite.
    """
    values = np.asarray(ms_ssim, np.float64)
    with np.errstate(divide="ignore"):
        decibels = -10.0 * np.log10(np.maximum(1.0 - values, 0.0))
    return np.where(np.isfinite(values), np.minimum(decibels, most), np.nan)
