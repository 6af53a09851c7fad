"""Quality and rate of coded images, one value an image.

The functions on tensors (`ms_ssim`, `psnr`) are differentiable and serve as training losses; that on
uint8 arrays (`sse`) is an exact integer.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tucodec.quality.decibels import MS_SSIM_WINDOW, psnr_from_sse

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli and Bovik, 2003)."""

_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_BAND = 1 << 18  # pixels; its maps take 200 bytes each


def sse(x: np.ndarray, y: np.ndarray) -> int:
    """Sum of squared differences over all values of two uint8 arrays, exact.

    Args:
        x: uint8 array of any shape.
        y: uint8 array of the same shape.

    Raises:
        ValueError: the shapes differ or an array is not uint8.
    """
    if x.dtype != np.uint8 or y.dtype != np.uint8:
        raise ValueError(f"sse needs uint8 arrays, not {x.dtype} and {y.dtype}")
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {x.shape} and {y.shape}")
    difference = np.subtract(x, y, dtype=np.int16).ravel()
    return int(np.einsum("i,i->", difference, difference, dtype=np.int64))


def as_tensor(image: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """1×3×H×W, uint8, of an H×W×3 uint8 image; shares its memory where it can."""
    writable = np.require(image, requirements=["C", "W"])  # of others PyTorch warns
    return torch.from_numpy(writable).to(device).permute(2, 0, 1)[None]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB of each image over all its values.

    Args:
        x: N×C×H×W in [0, 1].
        y: the same shape.

    Returns:
        N values; infinite where the images are equal.
    """
    x, y = map(_floats, _pair(x, y))
    return -10.0 * torch.log10((x - y).square().flatten(1).mean(1))


def ms_ssim_scales(height: int, width: int) -> int:
    """Number of scales (up to five) that fit an image: its coarsest side must hold a window.

    161 pixels on the shorter side give five, 81 four, 41 three, 21 two and 11 one; none below.
    """
    side, scales = min(height, width), 0
    while side >= MS_SSIM_WINDOW and scales < len(MS_SSIM_WEIGHTS):
        side, scales = (side + 1) // 2, scales + 1
    return scales


def ms_ssim(x: Tensor, y: Tensor, weights: Sequence[float] = MS_SSIM_WEIGHTS) -> Tensor:
    """Multi-scale structural similarity of each image.

    An 11×11 Gaussian window of σ 1.5 without padding, K = (0.01, 0.03), on each colour channel; the
    channels' values are averaged. Between scales 2×2 means; an odd side first repeats its last row
    or column, as TensorFlow's and CLIC's code does. Negative contrast-structure terms count as zero
    (and pass no gradient). Images with a side below 161 pixels use the scales that fit
    (`ms_ssim_scales`), with their exponents scaled up to the same sum. Computed in fp32 under any
    autocast; float64 stays float64. Without gradients the maps are computed for one band of rows at a time,
    to save memory.

    Args:
        x: N×C×H×W in [0, 1], or uint8 in 0 … 255.
        y: the same shape, and uint8 where x is.
        weights: exponents of the scales, finest first.

    Returns:
        N values in [0, 1], 1 for equal images; differentiable.

    Raises:
        ValueError: the shapes differ or a side is below 11 pixels.
    """
    with torch.autocast(device_type=x.device.type, enabled=False):
        x, y = _pair(x, y)
        scales = min(ms_ssim_scales(*x.shape[-2:]), len(weights))
        if scales == 0:
            raise ValueError(
                f"MS-SSIM needs sides of {MS_SSIM_WINDOW} pixels, not {tuple(x.shape[-2:])}"
            )
        # The published exponents sum to 1.0001; fewer scales keep whatever the sum is.
        share = math.fsum(weights) / math.fsum(weights[:scales])

        def whole(top: int, end: int) -> Tensor:
            a, b = (_floats(image[:, :, top:end]) for image in (x, y))
            # Sum and difference of the images say the same as the images and need four filtered
            # maps instead of five.
            return torch.cat((a + b, a - b), 1)

        rows: Callable[[int, int], Tensor] = whole
        count, _, height, width = x.shape
        # A gradient needs all maps anyway.
        banded = not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        similarity = torch.ones((), device=x.device)
        for scale in range(scales):
            last = scale == scales - 1
            step = max(2, _BAND // (count * width) & ~1) if banded else height + height % 2
            term, pair = _scale(rows, height, step, last)
            similarity = similarity * _power(term, weights[scale] * share)
            if pair is not None:
                rows, (height, width) = _rows_of(pair), pair.shape[-2:]
        return similarity.mean(1)


def pixels_ms_ssim(image: np.ndarray, shown: np.ndarray) -> float | None:
    """MS-SSIM of two H×W×3 uint8 images; None where a side is below 11."""
    if not ms_ssim_scales(*image.shape[:2]):
        return None
    with torch.no_grad():
        return float(ms_ssim(as_tensor(image), as_tensor(shown)))


def quality(image: np.ndarray, shown: np.ndarray) -> dict[str, float | None]:
    """`psnr` in dB (None for equal images) and `ms_ssim` of a decoded H×W×3 uint8 image."""
    error = sse(image, shown)
    psnr = psnr_from_sse(error, image.size) if error else None
    return {"psnr": psnr, "ms_ssim": pixels_ms_ssim(image, shown)}


def bits_per_pixel(size: int, pixels: int) -> float:
    """Bits a pixel of `size` bytes for `pixels` pixels of the original size."""
    return 8.0 * size / pixels


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both images in at least fp32, after checking the shapes; uint8 as it is."""
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"two N×C×H×W images are needed, not {tuple(x.shape)}, {tuple(y.shape)}")
    if x.dtype == y.dtype == torch.uint8:
        return x, y
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _floats(image: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; others as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _rows_of(pair: Tensor) -> Callable[[int, int], Tensor]:
    return lambda top, end: pair[:, :, top:end]


def _scale(
    rows: Callable[[int, int], Tensor], height: int, step: int, last: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean term of one scale, N×C, and x + y and x − y of the next, unless it is the last.

    Args:
        rows: gives rows [top, end) of x + y and x − y, N×2C×rows×W.
        height: of this scale.
        step: rows of a band, even; only one band's maps exist at a time.
        last: whether luminance counts.
    """
    valid = height - MS_SSIM_WINDOW + 1
    term: Tensor | float = 0.0
    smaller: Tensor | None = None
    for top in range(0, height, step):
        # Depthwise convolution on the CPU is several times faster channels-last.
        band = rows(top, top + step + MS_SSIM_WINDOW - 1).contiguous(
            memory_format=torch.channels_last
        )
        if top < valid:
            luminance, contrast = _ssim_terms(band)
            mean = (luminance * contrast if last else contrast).mean((2, 3))
            term = term + mean * (contrast.shape[2] / valid)
        if not last:
            half = _halve(band[:, :, :step])
            if step >= height:
                smaller = half
            else:  # joined at the end, the halves would exist twice
                if smaller is None:
                    shape = half.shape[0], half.shape[1], (height + 1) // 2, half.shape[3]
                    smaller = torch.empty(
                        shape, dtype=half.dtype, device=half.device,
                        memory_format=torch.channels_last,
                    )  # fmt: skip
                smaller[:, :, top // 2 : top // 2 + half.shape[2]] = half
    assert isinstance(term, Tensor)
    return term, smaller


def _ssim_terms(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps (N×C×H−10×W−10) from x + y and x − y (N×2C×H×W)."""
    c1, c2 = _K1**2, _K2**2
    moments = _blur(torch.cat((pair, pair.square()), 1))
    mean, second = moments.chunk(2, 1)
    variance = second - mean.square()
    mean_sum, mean_difference = mean.square().chunk(2, 1)
    variance_sum, variance_difference = variance.chunk(2, 1)
    # (s² − d²)/2 = 2xy and (s² + d²)/2 = x² + y² for s = x + y, d = x − y.
    luminance = (mean_sum - mean_difference + 2 * c1) / (mean_sum + mean_difference + 2 * c1)
    contrast = (variance_sum - variance_difference + 2 * c2) / (
        variance_sum + variance_difference + 2 * c2
    )
    return luminance, contrast


def _blur(maps: Tensor) -> Tensor:
    """Separable Gaussian window on every channel, no padding."""
    offsets = (
        torch.arange(MS_SSIM_WINDOW, dtype=maps.dtype, device=maps.device) - MS_SSIM_WINDOW // 2
    )
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    channels = maps.shape[1]
    maps = F.conv2d(maps, window.expand(channels, 1, 1, MS_SSIM_WINDOW), groups=channels)
    return F.conv2d(
        maps, window.view(-1, 1).expand(channels, 1, MS_SSIM_WINDOW, 1), groups=channels
    )


def _halve(maps: Tensor) -> Tensor:
    """2×2 means; an odd side first repeats its last row or column."""
    for axis in (3, 2):  # `nn.blocks.pad_to_multiple` says why not by F.pad
        if maps.shape[axis] % 2:
            maps = torch.cat([maps, maps.narrow(axis, maps.shape[axis] - 1, 1)], axis)
    return F.avg_pool2d(maps, 2)


def _power(base: Tensor, exponent: float) -> Tensor:
    """`relu(base) ** exponent` whose gradient at and below zero is zero, not NaN."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, 0.0)
