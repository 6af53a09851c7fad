"""Perceptual measures that need no download: VMAF, XPSNR, FLIP, SSIMULACRA 2, and those of JPEG AI.

VMAF, XPSNR and PSNR-HVS are the filters of the ffmpeg in imageio-ffmpeg; FLIP, SSIMULACRA 2 and piq (FSIM,
VIF, IW-SSIM) come from PyPI (`pip install 'lightning-tucodec[perceptual]'`). LPIPS and DISTS need
torchvision's weights of AlexNet and VGG-16 in PyTorch's cache. All compare 8-bit RGB images, one number a
pair.

JPEG AI's common test conditions name MS-SSIM, VMAF, VIF, FSIM, PSNR-HVS, IW-SSIM and NLPD. `JPEG_AI` has all
but MS-SSIM, which every evaluation measures, and NLPD, which neither piq nor libvmaf offers.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.errors import ConfigError, ExternalToolError
from lightning_tucodec.io import ffmpeg
from lightning_tucodec.io.images import write_png
from lightning_tucodec.io.temporary import temporary_folder

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]

_TIMEOUT = 300.0  # seconds
_INSTALL = "pip install 'lightning-tucodec[perceptual]'"


def vmaf(original: Image, decoded: Image) -> float:
    """VMAF v0.6.1 of a picture: 0 … 100, higher is better; on BT.709 luma."""
    return _filtered(
        "libvmaf=model=version=vmaf_v0.6.1", r"VMAF score: ([-\d.]+)", original, decoded
    )


def xpsnr(original: Image, decoded: Image) -> float:
    """XPSNR of BT.709 luma in dB, higher is better (Helmrich et al., ICASSP 2020)."""
    return _filtered("xpsnr", r"XPSNR\s+y: ([-\d.]+|inf)", original, decoded)


def flip(original: Image, decoded: Image) -> float:
    """Mean LDR-FLIP at 67 pixels a degree: 0 … 1, lower is better (Andersson et al., HPG 2020)."""
    try:
        import flip_evaluator
    except ImportError:
        raise ConfigError(f"FLIP needs flip-evaluator: {_INSTALL}") from None
    values = (image.astype(np.float32) / 255 for image in (original, decoded))
    return float(flip_evaluator.evaluate(*values, "LDR", applyMagma=False)[1])


def ssimulacra2(original: Image, decoded: Image) -> float:
    """SSIMULACRA 2: 100 for equal images, 90 hardly visible, 70 high quality; higher is better."""
    try:
        from ssimulacra2 import compute_ssimulacra2
    except ImportError:
        raise ConfigError(f"SSIMULACRA 2 needs ssimulacra2: {_INSTALL}") from None
    with temporary_folder() as folder:
        paths = [folder / name for name in ("original.png", "decoded.png")]
        for path, image in zip(paths, (original, decoded), strict=True):
            write_png(path, image)
        return float(compute_ssimulacra2(*map(str, paths)))


def psnr_hvs(original: Image, decoded: Image) -> float:
    """PSNR-HVS of BT.709 luma in dB by libvmaf, higher is better (Ponomarenko et al., VPQM 2007)."""
    measure = "libvmaf=feature=name=psnr_hvs:log_fmt=json:log_path=/dev/stderr"
    value = r'"psnr_hvs_y": \{[^}]*"mean": ([-\d.]+|null)'
    return _filtered(measure, value, original, decoded)


def fsim(original: Image, decoded: Image) -> float:
    """FSIM with chroma (FSIMc) by piq: 0 … 1, higher is better (Zhang et al., TIP 2011)."""
    return _piq("fsim", _planes(original), _planes(decoded))


def vif(original: Image, decoded: Image) -> float:
    """VIF in the pixel domain of BT.709 luma by piq, higher is better (Sheikh and Bovik, TIP 2006)."""
    return _piq("vif_p", _luma(original), _luma(decoded))


def iw_ssim(original: Image, decoded: Image) -> float:
    """IW-SSIM of BT.709 luma by piq: 0 … 1, higher is better (Wang and Li, TIP 2011)."""
    return _piq("information_weighted_ssim", _luma(original), _luma(decoded))


def lpips(original: Image, decoded: Image) -> float:
    """LPIPS with AlexNet, lower is better (Zhang et al., CVPR 2018)."""
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    _need_weights("LPIPS", "AlexNet_Weights")
    x_hat, x = _planes(decoded), _planes(original)
    return float(
        learned_perceptual_image_patch_similarity(x_hat, x, net_type="alex", normalize=True)
    )


def dists(original: Image, decoded: Image) -> float:
    """DISTS, lower is better (Ding et al., PAMI 2020)."""
    from torchmetrics.functional.image.dists import deep_image_structure_and_texture_similarity

    _need_weights("DISTS", "VGG16_Weights")
    x_hat, x = _planes(decoded), _planes(original)
    return float(deep_image_structure_and_texture_similarity(x_hat, x))


def _piq(measure: str, original: "torch.Tensor", decoded: "torch.Tensor") -> float:
    """A full-reference measure of piq.

    Raises:
        ConfigError: piq is not installed, or the picture is too small for the measure.
    """
    try:
        import piq
    except ImportError:
        raise ConfigError(f"FSIM, VIF and IW-SSIM need piq: {_INSTALL}") from None
    try:
        return float(getattr(piq, measure)(decoded, original, data_range=1.0))
    except ValueError as error:
        raise ConfigError(f"{measure} of piq: {' '.join(str(error).split())}") from None


def _luma(image: Image) -> "torch.Tensor":
    """1×1×H×W in [0, 1]: BT.709 luma of the RGB values, not rounded."""
    import torch

    weights = torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)
    return (_planes(image) * weights).sum(1, keepdim=True).clamp(0, 1)


def _planes(image: Image) -> "torch.Tensor":
    """1×3×H×W in [0, 1]."""
    from lightning_tucodec.quality.metrics import as_tensor

    return as_tensor(image).float() / 255


def _need_weights(measure: str, name: str) -> None:
    """Refuse to go on where torchvision would start a download.

    Raises:
        ConfigError: its file is not in PyTorch's cache.
    """
    import torch
    import torchvision

    url = getattr(torchvision.models, name).DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise ConfigError(f"{measure} needs {path}, which this command does not fetch ({url})")


MEASURES: dict[str, Callable[[Image, Image], float]] = {
    "vmaf": vmaf,
    "xpsnr": xpsnr,
    "flip": flip,
    "ssimulacra2": ssimulacra2,
    "lpips": lpips,
    "dists": dists,
    "fsim": fsim,
    "vif": vif,
    "psnr_hvs": psnr_hvs,
    "iw_ssim": iw_ssim,
}

SMALLEST_SIDE = {
    "vmaf": 17,
    "psnr_hvs": 17,
    "ssimulacra2": 8,
    "fsim": 2,
    "vif": 41,
    "iw_ssim": 161,
    "lpips": 31,
}
"""Pixels. On smaller images the libraries fail (libvmaf by a crash), or give NaN or the best value."""

JPEG_AI = ("vmaf", "fsim", "vif", "psnr_hvs", "iw_ssim")
"""What `jpeg-ai` stands for among the names of measures."""

LOWER_IS_BETTER = frozenset({"flip", "lpips", "dists"})

DEFINITIONS = {
    "vmaf": "VMAF v0.6.1 of the still picture, BT.709 luma; mean over images; higher is better",
    "xpsnr": "XPSNR of BT.709 luma, dB; mean over images; higher is better",
    "flip": "mean LDR-FLIP at 67 pixels a degree; mean over images; lower is better",
    "ssimulacra2": "SSIMULACRA 2; mean over images; higher is better",
    "lpips": "LPIPS with AlexNet; mean over images; lower is better",
    "dists": "DISTS; mean over images; lower is better",
    "fsim": "FSIM with chroma, by piq; mean over images; higher is better",
    "vif": "VIF of BT.709 luma in the pixel domain, by piq; mean over images; higher is better",
    "psnr_hvs": "PSNR-HVS of BT.709 luma by libvmaf, dB; mean over images; higher is better",
    "iw_ssim": "IW-SSIM of BT.709 luma, by piq; mean over images; higher is better",
}


def measured(name: str, original: Image, decoded: Image) -> float | None:
    """A measure of `MEASURES`; None where it is not defined, as on images below `SMALLEST_SIDE`."""
    if min(original.shape[:2]) < SMALLEST_SIDE.get(name, 1):
        return None
    value = MEASURES[name](original, decoded)
    return None if math.isnan(value) else value


def check_names(names: Iterable[str]) -> list[str]:
    """The names without repeats; `jpeg-ai` is all of `JPEG_AI`.

    Raises:
        ConfigError: there is no such measure.
    """
    groups = ((JPEG_AI if name == "jpeg-ai" else (name,)) for name in names)
    unique = list(dict.fromkeys(name for group in groups for name in group))
    for name in unique:
        if name not in MEASURES:
            known = ", ".join([*MEASURES, "jpeg-ai"])
            raise ConfigError(f"measure {name!r} is unknown; choose among {known}")
    return unique


def _filtered(measure: str, pattern: str, original: Image, decoded: Image) -> float:
    """The number that a two-input filter of ffmpeg prints for one pair."""
    # Eight bits: with ten, xpsnr of ffmpeg 9.0 reads beyond its rows.
    said = ffmpeg.compare(measure, original, decoded, pixel_format="yuv444p", timeout=_TIMEOUT)
    found = re.search(pattern, said)
    if found is None:
        raise ExternalToolError(f"ffmpeg's filter {measure.partition('=')[0]} gave no number")
    value = found.group(1)
    return math.inf if value == "null" else float(value)
