"""What each part of the H.266 pipeline is worth, against the same encoder at its default settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tucodec.codecs.h266.codec import (
    H266,
    NO_FILTER,
    NO_MODEL,
    decode_container,
    without_filter,
)
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.library import load_filter
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.images import read_image
from lightning_tucodec.quality.curves import ImageCurves, decibels
from lightning_tucodec.quality.deltas import bd_rate
from lightning_tucodec.quality.metrics import sse
from lightning_tucodec.sets.evaluate import evaluate, find_images

QPS = (32, 35, 38, 41, 44, 47)

_TUNED = f"{H266.codec_name}:qp={{qp}},preset={{preset}}"
_TUC = f"{_TUNED},filter={NO_FILTER}"

_BOTH = "vvc:qp={qp},preset={preset},chroma_qp_offset=-4,colour=orthonormal"

VARIANTS = {
    "default": "vvc:qp={qp},preset={preset}",
    "chroma offset -4": "vvc:qp={qp},preset={preset},chroma_qp_offset=-4",
    "orthonormal colour": "vvc:qp={qp},preset={preset},colour=orthonormal",
    "both": _BOTH,
    "both, wide tools": _BOTH + ",tools=wide",
    "both, deep tools": _BOTH + ",tools=deep",
    "both, thorough": _BOTH + ",tools=thorough",
    "both, in a .tuc": _TUC + ",chroma_qp_offset=-4,tools=preset,turn=0",
    "offset and turn searched, in a .tuc": _TUC + ",tools=preset",
    "the same, deep tools": _TUC,
}
"""From the anchor on; the post-filters follow."""


def run(
    images: Sequence[str],
    filters: Sequence[str],
    preset: str,
    qps: Sequence[int],
    target_bpp: float,
    rows_file: Path,
    workers: int | None = None,
    parts: bool = True,
) -> dict[str, Any]:
    """Measure; what `rows_file` holds is not measured again. Coded files are kept beside it.

    Args:
        images: files and folders.
        filters: names or files of post-filters.
        preset: of libvvenc, for all.
        qps: four or more for BD-rates; near `target_bpp` the anchor's rates must lie within the range
            of the variants' rates.
        target_bpp: gains are measured at the anchor's rates at the QP whose mean rate is nearest.
        rows_file: see `evaluate`.
        workers: codings at a time.
        parts: also measure the variants between the anchor and the filters.

    Returns:
        `anchor_qp`, `anchor_bpp`, `images`, and `rows`, one per variant: `variant`; `gain_db`, the mean over
        images of the PSNR gain at the image's own anchor rate; `ms_ssim_db`, the same for MS-SSIM;
        `worse`, images whose PSNR gain is negative; `bd_rate_percent` and `bd_rate_ms_ssim_percent` of the
        means over images; `filtered`, images whose gate is on at the anchor's QP, and `network_db`, what
        the post-filter gains on those very files; `encode_seconds` and `decode_seconds` an image.
    """
    if len(qps) < 4:
        raise ConfigError("--qp: BD-rates need four QPs or more")
    variants = dict(VARIANTS) if parts else {"default": VARIANTS["default"]}
    for name in filters:
        path = name.replace("{", "{{").replace("}", "}}")
        variants[f"post-filter {name}"] = f"{_TUNED},filter={path}"
    for name in filters:  # fails now rather than after hours
        load_filter(name).network  # noqa: B018
    paths = find_images(images)
    keep = rows_file.with_suffix(".files")
    names = [path.name for path in paths]
    curves: dict[str, ImageCurves] = {}
    rows: dict[str, dict[str, Any]] = {}
    anchor_qp = qps[0]
    for variant, template in variants.items():
        coders = [codec(template.format(qp=qp, preset=preset)) for qp in sorted(qps)]
        measured = evaluate(paths, coders, rows_file, workers, keep)
        table = np.array(
            [[row[key] for row in measured] for key in ("bpp", "psnr", "ms_ssim")], np.float64
        ).reshape(3, len(paths), len(coders))
        curves[variant] = ImageCurves(variant, names, *table)
        if variant == "default":
            distance = np.abs(table[0].mean(0) - target_bpp)
            anchor_qp = sorted(qps)[int(distance.argmin())]
        place = sorted(qps).index(anchor_qp)
        coder = coders[place]
        own = measured[place :: len(coders)]
        files = [keep / f"{row['sha256']}.bin" for row in own]
        gains = _gains(curves["default"], curves[variant], place)
        anchor, test = curves["default"].mean(), curves[variant].mean()
        rows[variant] = {
            "variant": variant,
            "gain_db": float(gains[0].mean()),
            "ms_ssim_db": float(gains[1].mean()),
            "worse": int((gains[0] < 0).sum()),
            "bd_rate_percent": bd_rate(anchor, test).percent,
            "bd_rate_ms_ssim_percent": bd_rate(anchor, test, "ms_ssim_db").percent,
            **_network(paths, own, files, coder.model() if isinstance(coder, H266) else None),
            "encode_seconds": float(np.mean([row["encode_seconds"] for row in measured])),
            "decode_seconds": float(np.mean([row["decode_seconds"] for row in measured])),
        }
    return {
        "images": len(paths),
        "preset": preset,
        "anchor_qp": anchor_qp,
        "anchor_bpp": float(curves["default"].bpp[:, sorted(qps).index(anchor_qp)].mean()),
        "rows": list(rows.values()),
    }


def _gains(anchor: ImageCurves, test: ImageCurves, place: int) -> np.ndarray:
    """2×n: PSNR and MS-SSIM gains in dB of each image at the anchor's rate at one of its points."""
    from scipy.interpolate import PchipInterpolator

    gains = np.empty((2, len(anchor.images)))
    for image in range(len(anchor.images)):
        rate = np.log(anchor.bpp[image, place])
        order = np.argsort(test.bpp[image])
        rates = np.log(test.bpp[image][order])
        for kind, (own, theirs) in enumerate(
            ((anchor.psnr, test.psnr), (decibels(anchor.ms_ssim), decibels(test.ms_ssim)))
        ):
            at = PchipInterpolator(rates, theirs[image][order], extrapolate=False)(rate)
            gains[kind, image] = float(at) - own[image, place]
    if np.isnan(gains).any():
        raise ConfigError(f"{test.name}: its rates do not reach the anchor's; add QPs at both ends")
    return gains


def _network(
    images: Sequence[Path],
    measured: Sequence[dict[str, Any]],
    files: Sequence[Path],
    model: FilterModel | None,
) -> dict[str, Any]:
    """How many of the measured files have a filter's id in them, and its mean gain on all of them, in dB."""
    if model is None:
        return {"filtered": None, "network_db": None}
    gains, count = [], 0
    for path, row, file in zip(images, measured, files, strict=True):
        data = file.read_bytes()
        plain = decode_container(unpack(without_filter(data, model)))
        gains.append(10 * np.log10(sse(read_image(path), plain) / row["sse"]))
        count += unpack(data).model_id != NO_MODEL
    return {"filtered": count, "network_db": float(np.mean(gains))}


def table_text(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"{result['images']} images, preset {result['preset']}; gains at the anchor's rates at QP "
        f"{result['anchor_qp']} (mean {result['anchor_bpp']:.4f} bpp)",
        "",
        "| variant | PSNR gain, dB | images worse | BD-rate | MS-SSIM gain, dB | BD-rate (MS-SSIM) "
        "| filter on, its gain | encode, s | decode, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        filtered = (
            "" if row["filtered"] is None else f"{row['filtered']}, {row['network_db']:+.3f} dB"
        )
        lines.append(
            f"| {row['variant']} | {row['gain_db']:+.3f} | {row['worse']} "
            f"| {row['bd_rate_percent']:+.2f} % | {row['ms_ssim_db']:+.3f} "
            f"| {row['bd_rate_ms_ssim_percent']:+.2f} % | {filtered} "
            f"| {row['encode_seconds']:.2f} | {row['decode_seconds']:.2f} |"
        )
    return "\n".join(lines)
