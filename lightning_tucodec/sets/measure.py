"""Measure one image under one codec: real bytes, quality, seconds and peak memory."""

import hashlib
import multiprocessing
import resource
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import ConfigError, ExternalToolError
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.memory import keep_memory
from lightning_tucodec.io.processes import INTERRUPTS, end_on_interrupt, interrupt_children
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.decibels import ms_ssim_db, psnr_from_sse
from lightning_tucodec.quality.perceptual import measured

Row = dict[str, Any]


def measure(
    codec: ImageCodec,
    image: NDArray[np.uint8],
    keep: Path | None = None,
    metrics: Sequence[str] = (),
) -> Row:
    """Code one image, decode it, and compare.

    Args:
        codec: at its setting.
        image: H×W×3.
        keep: folder for the coded file, `<sha256>.bin`, if it is to be kept.
        metrics: names of `perceptual.MEASURES`, for further entries.

    Returns:
        The entries of `measure_back` and `encode_seconds`.

    Raises:
        TucodecError: the codec cannot code or decode this image, or returns another size.
    """
    started = clock()
    data = codec.encode(image)
    coded = clock()
    row = {**measure_back(codec, image, data, metrics), "encode_seconds": coded - started}
    if keep is not None:
        with atomic_write(_kept_file(keep, row)) as stream:
            stream.write(data)
    return row


def measure_back(
    codec: ImageCodec, image: NDArray[np.uint8], data: bytes, metrics: Sequence[str] = ()
) -> Row:
    """Decode a coded file and compare it with the original.

    Returns:
        `width, height, bytes, bpp, sse, psnr, psnr_y, ms_ssim, ms_ssim_db, ms_ssim_scales,
        decode_seconds, sha256` (of the coded file), and the perceptual `metrics`. What an image is too
        small for is None, such as MS-SSIM below 11 pixels a side.

    Raises:
        TucodecError: the codec cannot decode the file, or to another size.
    """
    started = clock()
    back = codec.decode(data)
    seconds = clock() - started
    return {
        **compare(image, back, len(data)),
        **{name: measured(name, image, back) for name in metrics},
        "decode_seconds": seconds,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def compare(image: NDArray[np.uint8], back: NDArray[np.uint8], size: int) -> Row:
    """Rate and quality of a decoded image whose coded file had `size` bytes.

    Returns:
        The entries of `measure_back` but `decode_seconds` and `sha256`.

    Raises:
        ConfigError: the sizes differ.
    """
    from lightning_tucodec.quality import metrics

    if back.shape != image.shape:
        raise ConfigError(f"decoded to {back.shape}, where the original is {image.shape}")
    height, width = image.shape[:2]
    error = metrics.sse(image, back)
    similarity = metrics.pixels_ms_ssim(image, back)
    luma = (image.astype(np.float64) - back) @ np.array([0.2126, 0.7152, 0.0722])
    luma_error = float(np.square(luma).sum())
    return {
        "width": width,
        "height": height,
        "bytes": size,
        "bpp": metrics.bits_per_pixel(size, height * width),
        "sse": error,
        "sse_y": luma_error,
        "psnr": psnr_from_sse(error, image.size),
        "psnr_y": psnr_from_sse(luma_error, height * width),
        "ms_ssim": similarity,
        "ms_ssim_db": None if similarity is None else float(ms_ssim_db(similarity)),
        "ms_ssim_scales": metrics.ms_ssim_scales(height, width),
    }


def _kept_file(keep: Path, row: Mapping[str, Any]) -> Path:
    return keep / f"{row['sha256']}.bin"


def kept_data(keep: Path | None, row: Mapping[str, Any] | None) -> bytes | None:
    """The coded file of a row, kept by `measure`; None unless it is there and whole."""
    if keep is None or row is None or "sha256" not in row:
        return None
    if not (file := _kept_file(keep, row)).is_file():
        return None
    data = file.read_bytes()
    return data if hashlib.sha256(data).hexdigest() == row["sha256"] else None


def peak_memory(specification: str, image: Path) -> int:
    """Peak memory in bytes while a codec codes and decodes an image in a separate process (Linux).

    Raises:
        TucodecError: the codec cannot.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_on_interrupt) as pool:
        try:
            return pool.submit(_own_peak_memory, specification, image).result()
        except INTERRUPTS:
            interrupt_children()
            raise
        except BrokenProcessPool:
            raise ExternalToolError(
                f"{image}, {specification}: the process that measured the memory was killed"
            ) from None


def _own_peak_memory(specification: str, image: Path) -> int:
    """`peak_memory`, inside the fresh process."""
    from lightning_tucodec.codecs.registry import codec

    keep_memory()
    coder = codec(specification)
    coder.decode(coder.encode(read_image(image)))
    # Not getrusage of this process, which counts the parent's memory from before the exec.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own = int(status.split("VmHWM:")[1].split()[0])
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def content_id(image: NDArray[np.uint8]) -> str:
    """Identity of a picture by its content, whatever its file name: 32 hexadecimal digits of a digest."""
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:32]
