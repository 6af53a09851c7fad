"""Rate and quality of a whole set, as CLIC defines them, gathered over batches and processes.

Batches may have any size, also different sizes on each process. `compute` gives the value of the
set (`torchmetrics` adds the sums of the processes). PSNR is pooled over all values of all
images, so that for images of one size it is at most the mean of their PSNRs; MS-SSIM is weighted by
pixels; the rate is all bytes over all pixels. The means over images, which papers report, have
`mean` in their names.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tucodec.quality.metrics import ms_ssim, psnr


class _Sums(Metric):
    """A metric whose state is sums in double precision."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Lightning's `.half()` and `.to(dtype)` leave the sums as they are.
        self.set_dtype(torch.float64)


class PooledPSNR(_Sums):
    """PSNR in dB of the summed squared error over all values of all images.

    Images are rounded to 8 bits first, as a decoder writes them; the sum is then exact.
    """

    higher_is_better = True
    squared_error: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("squared_error", "values", **kwargs)

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Add images N×C×H×W in [0, 1]."""
        difference = _eight_bits(x_hat) - _eight_bits(x)
        self.squared_error += difference.square().sum(dtype=torch.float64)
        self.values += difference.numel()

    def compute(self) -> Tensor:
        """PSNR of the set; infinite without error."""
        return 10.0 * torch.log10(255.0**2 * self.values / self.squared_error)


class MeanPSNR(_Sums):
    """Mean over images of each image's PSNR in dB, on values rounded to 8 bits."""

    higher_is_better = True
    total: Tensor
    images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("total", "images", **kwargs)

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Add images N×C×H×W in [0, 1]."""
        self.total += psnr(_eight_bits(x_hat) / 255.0, _eight_bits(x) / 255.0).double().sum()
        self.images += len(x)

    def compute(self) -> Tensor:
        """The mean; infinite if one image has no error."""
        return self.total / self.images


class SetMSSSIM(_Sums):
    """MS-SSIM of a set.

    Args:
        weighted: by each image's pixels, as CLIC's later servers did; otherwise the plain mean over
            images, as its early ones and papers.
    """

    higher_is_better = True
    total: Tensor
    weights: Tensor

    def __init__(self, weighted: bool = True, **kwargs: Any) -> None:
        super().__init__("total", "weights", **kwargs)
        self.weighted = weighted

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Add images N×C×H×W in [0, 1]."""
        weight = x.shape[-2] * x.shape[-1] if self.weighted else 1
        values = ms_ssim(_eight_bits(x_hat) / 255.0, _eight_bits(x) / 255.0)
        self.total += weight * values.double().sum()
        self.weights += weight * len(x)

    def compute(self) -> Tensor:
        """MS-SSIM of the set."""
        return self.total / self.weights


class SetRate(_Sums):
    """Bits a pixel of a set: all bits over all pixels of the original sizes."""

    higher_is_better = False
    bits: Tensor
    pixels: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("bits", "pixels", **kwargs)

    def update(self, bits: Tensor, pixels: int) -> None:
        """Add the bits of images (a tensor of any shape is summed) and their pixels together."""
        self.bits += bits.double().sum()
        self.pixels += pixels

    def compute(self) -> Tensor:
        """Bits a pixel."""
        return self.bits / self.pixels


def _eight_bits(x: Tensor) -> Tensor:
    """Values in [0, 1] as the integers 0 … 255 a decoder would write, in fp32."""
    return (x.float() * 255.0).clamp(0.0, 255.0).round()
