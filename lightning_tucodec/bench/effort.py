"""What refinement at the encoder saves in bytes, and what it costs in seconds an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_tucodec.codecs.learned.codec import RefinedModel, TucModel
from lightning_tucodec.codecs.learned.refine import Refinement
from lightning_tucodec.codecs.registry import own_model
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curves import Curve, Quality
from lightning_tucodec.quality.deltas import bd_rate
from lightning_tucodec.sets.evaluate import evaluate, find_images
from lightning_tucodec.sets.measure import Row
from lightning_tucodec.sets.results import summarise

BD_POINTS = 4


def settings(efforts: Sequence[int], seconds: Sequence[float]) -> list[Refinement]:
    """The efforts above 0, then the highest one within each time."""
    return [
        *(Refinement(effort) for effort in efforts if effort),
        *(Refinement(9, seconds=limit) for limit in seconds),
    ]


def run(
    images: Sequence[str],
    names: Sequence[str],
    efforts: Sequence[int],
    seconds: Sequence[float],
    rows_file: Path,
) -> dict[str, Any]:
    """Measure, one image at a time; what `rows_file` holds is not measured again.

    Args:
        images: files and folders.
        names: models, all of one recipe, `tiny-vbr:quality=3` where there are several rates; four or
            more give a BD-rate.
        efforts: settings by effort; 0 is measured in any case.
        seconds: settings by time an image.
        rows_file: see `evaluate`.

    Returns:
        `rows`, one per setting: `setting`; `bpp`, `psnr` and `ms_ssim`, means over images, by model;
        `seconds` an image; `loss_percent`, the change of the loss in percent of its rate term (a small
        one equals the change of rate at equal quality, MSE recipe); `bd_rate_percent`.
    """
    models = [own_model(name) for name in names]
    recipes = {str(model.card.get("recipe")) for model in models}
    if len(recipes) > 1:
        raise ConfigError(f"models of different recipes ({recipes}) are no curve")
    quality: Quality = "ms_ssim_db" if recipes == {"ssim"} else "psnr"
    paths = find_images(images)
    table: list[Row] = []
    plain: list[Row] = []
    for options in [None, *settings(efforts, seconds)]:
        coders: list[TucModel | RefinedModel] = [
            model if options is None else RefinedModel(model, options) for model in models
        ]
        rows = evaluate(paths, coders, rows_file, workers=1)
        sets = summarise(rows, coders)
        plain = plain or sets
        table.append(
            {
                "setting": "effort=0" if options is None else options.name.partition(":")[2],
                "bpp": [round(entry["bpp_mean"], 4) for entry in sets],
                "psnr": [round(entry["psnr_mean"], 3) for entry in sets],
                "ms_ssim": [round(entry["ms_ssim_mean"], 5) for entry in sets],
                "seconds": sum(entry["encode_seconds"] for entry in sets) / len(rows),
                "loss_percent": _loss_percent(models, plain, sets) if quality == "psnr" else None,
                "bd_rate_percent": _bd_percent(plain, sets, quality),
            }
        )
    return {"models": [model.name for model in models], "images": len(paths), "rows": table}


def _loss_percent(models: Sequence[TucModel], plain: Sequence[Row], sets: Sequence[Row]) -> float:
    """Mean over models of the change of λ·MSE + bpp of the set, over bpp."""
    changes = []
    for model, before, after in zip(models, plain, sets, strict=True):
        values = [
            model.loss.lmbda * 10 ** (-row["psnr"] / 10) + row["bpp"] for row in (before, after)
        ]
        changes.append(100 * (values[1] - values[0]) / before["bpp"])
    return math.fsum(changes) / len(changes)


def _bd_percent(plain: Sequence[Row], sets: Sequence[Row], quality: Quality) -> float | None:
    """BD-rate of the means over images; None for fewer than four models."""
    if len(sets) < BD_POINTS:
        return None
    key = f"{quality}_mean" if quality == "psnr" else quality
    anchor, test = (
        Curve.of(name, [row["bpp_mean"] for row in rows], {quality: [row[key] for row in rows]})
        for name, rows in (("effort 0", plain), ("refined", sets))
    )
    return bd_rate(anchor, test, quality).percent


def table_text(result: dict[str, Any]) -> str:
    """The rows as a text table."""
    lines = [f"{result['images']} images, {', '.join(result['models'])}"]
    for row in result["rows"]:
        change, bd = (
            "–" if row[key] is None else f"{row[key]:+.2f} %"
            for key in ("loss_percent", "bd_rate_percent")
        )
        lines.append(
            f"{row['setting']:24} {row['seconds']:8.2f} s an image   rate at equal loss {change:>9}   "
            f"BD-rate {bd:>9}   bpp {row['bpp']}   PSNR {row['psnr']}"
        )
    return "\n".join(lines)
