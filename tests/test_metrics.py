import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import convolve
from scipy.signal import fftconvolve
from skimage.data import astronaut

from lightning_tucodec.quality import metrics
from lightning_tucodec.quality.decibels import ms_ssim_db, psnr_from_sse
from lightning_tucodec.quality.metrics import (
    MS_SSIM_WEIGHTS,
    bits_per_pixel,
    ms_ssim,
    ms_ssim_scales,
    psnr,
    sse,
)


def photo(height: int, width: int, quality: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph and its JPEG, 1×3×H×W."""
    image = Image.fromarray(astronaut()[:height, :width])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    pair = [np.array(image), np.array(Image.open(buffer))]
    x, y = (torch.from_numpy(array).permute(2, 0, 1)[None] / 255.0 for array in pair)
    return x, y


def clic_ms_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """CLIC's definition from its parts: 2-D windows by FFT, reflecting 2×2 means, float64."""
    a, b = (image[0].permute(1, 2, 0).double().numpy() * 255 for image in (x, y))
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = (np.outer(window, window) / window.sum() ** 2)[:, :, None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = np.ones(3)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        mean_a, mean_b, aa, bb, ab = (
            fftconvolve(m, window, mode="valid", axes=(0, 1)) for m in (a, b, a * a, b * b, a * b)
        )
        term = (2 * (ab - mean_a * mean_b) + c2) / (aa + bb - mean_a**2 - mean_b**2 + c2)
        if scale == 4:
            term = term * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        value = value * term.mean((0, 1)) ** weight
        a, b = (convolve(m, np.full((2, 2, 1), 0.25), mode="reflect")[::2, ::2] for m in (a, b))
    return float(value.mean())


@pytest.mark.parametrize("quality", [5, 30, 90])
@pytest.mark.parametrize("size", [(512, 512), (176, 256), (301, 511), (161, 165)])
def test_ms_ssim_is_clics(size: tuple[int, int], quality: int) -> None:
    x, y = photo(*size, quality)
    assert float(ms_ssim(x, y)) == pytest.approx(clic_ms_ssim(x, y), abs=1e-5)


@pytest.mark.parametrize("size", [(512, 512), (176, 256)])
def test_ms_ssim_equals_pytorch_msssim_on_even_sizes(size: tuple[int, int]) -> None:
    from pytorch_msssim import ms_ssim as independent

    x, y = photo(*size, 20)
    assert float(ms_ssim(x, y)) == pytest.approx(float(independent(x, y, data_range=1.0)), abs=1e-5)


@pytest.mark.parametrize("size", [(161, 163), (300, 512), (511, 301)])
@pytest.mark.parametrize("band", [2, 7000])
def test_ms_ssim_in_bands_is_ms_ssim(
    size: tuple[int, int], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gradient the image is one band; `test_ms_ssim_is_clics` holds the bands to CLIC's."""
    x, y = photo(*size, 20)
    expected = ms_ssim(x, y.clone().requires_grad_()).detach()
    monkeypatch.setattr(metrics, "_BAND", band)
    torch.testing.assert_close(ms_ssim(x, y), expected, atol=1e-6, rtol=0)
    a, b = ((image * 255).round().byte() for image in (x, y))
    torch.testing.assert_close(ms_ssim(a, b), expected, atol=1e-6, rtol=0)


def test_ms_ssim_of_24_megapixels_takes_less_than_a_gigabyte() -> None:
    """The whole process, its imports and the two pictures included; the kernel's own high-water mark."""
    program = """
import re, numpy as np
from lightning_tucodec.quality.metrics import quality
x = np.zeros((4000, 6000, 3), np.uint8); x[::7, ::5] = 200
y = x.copy(); y[::3] += 9
value = quality(x, y)["ms_ssim"]
assert 0 < value < 1, value
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1e9


def test_ms_ssim_gradient_and_precision() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 1, 22, 21, dtype=torch.float64)
    y = (x + 0.1 * torch.rand_like(x)).requires_grad_()
    assert torch.autograd.gradcheck(lambda image: ms_ssim(x, image), (y,))
    with torch.autocast("cpu", torch.bfloat16):
        value = ms_ssim(x.float(), y.float())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, ms_ssim(x, y).float(), atol=1e-5, rtol=0)


def test_ms_ssim_of_a_negative_has_a_finite_gradient() -> None:
    x = torch.rand(1, 3, 176, 176)
    y = (1 - x).requires_grad_()
    value = ms_ssim(x, y)
    value.sum().backward()
    assert value.item() == 0.0
    assert torch.isfinite(y.grad).all()
    assert float(ms_ssim(x, x)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("side", "scales"), [(10, 0), (11, 1), (20, 1), (21, 2), (41, 3), (81, 4), (160, 4), (161, 5)]
)
def test_small_images_have_fewer_scales(side: int, scales: int) -> None:
    assert ms_ssim_scales(side, 500) == scales
    x = torch.rand(1, 3, side, 200)
    if scales:
        assert float(ms_ssim(x, x)) == pytest.approx(1.0, abs=1e-6)
    else:
        with pytest.raises(ValueError, match="11 pixels"):
            ms_ssim(x, x)


def test_one_scale_is_ssim() -> None:
    from skimage.metrics import structural_similarity

    x, y = photo(20, 20, 10)
    a, b = (image[0].permute(1, 2, 0).double().numpy() for image in (x, y))
    expected = structural_similarity(
        *(a, b),
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    # scikit-image cuts the same border of five pixels off.
    assert float(ms_ssim(x, y)) == pytest.approx(expected, abs=1e-5)


def test_psnr_by_hand() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0] += 0.1
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, math.inf]))
    assert psnr_from_sse(65025 * 12, 12) == 0.0
    assert psnr_from_sse(0, 12) == math.inf
    assert ms_ssim_db(0.9) == pytest.approx(10.0)
    shown = ms_ssim_db([1.0, 1 + 1e-9, math.nan, -math.inf], most=120)
    np.testing.assert_array_equal(shown, [120, 120, math.nan, math.nan])
    assert ms_ssim_db(1.0) == math.inf
    assert bits_per_pixel(100, 800) == 1.0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_sse_is_exact(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    assert sse(x, y) == sum((int(a) - int(b)) ** 2 for a, b in zip(x.flat, y.flat, strict=True))


def test_sse_of_a_large_difference_does_not_overflow() -> None:
    x = np.zeros((400, 400, 3), np.uint8)
    assert sse(x, x + np.uint8(255)) == 400 * 400 * 3 * 65025


def test_sse_refuses_other_types_and_shapes() -> None:
    x = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="uint8"):
        sse(x, x.astype(float))
    with pytest.raises(ValueError, match="shapes"):
        sse(x, x[:1])
