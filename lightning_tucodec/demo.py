"""`tucodec demo`: the whole chain in minutes, on photographs that ship inside two dependencies.

Shards, training at two λ, export, coding to files, decoding in another process, a comparison with
JPEG, WebP, AVIF and H.266, and a picture. Everything runs through the commands a user would type.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_tucodec.codecs import library, registry
from lightning_tucodec.codecs.base import DEFAULT_MODEL, ImageCodec
from lightning_tucodec.errors import ExternalToolError, OutputError
from lightning_tucodec.io import processes
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.curves import Curve
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.quality.metrics import bits_per_pixel, sse
from lightning_tucodec.report.figures import Panel, comparison_figure, rd_figure

TRAINING_PHOTOS = (
    "astronaut.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "chelsea.png",
    "flower.jpg",
)
HELD_OUT_PHOTOS = ("coffee.png", "china.jpg")

STAGES = ((800.0, 250), (200.0, 120))
"""λ and optimiser steps; the second model starts from the first one's weights."""

CLASSICAL = {
    "JPEG": ("jpeg:q={}", (5, 10, 20, 35, 55)),
    "WebP": ("webp:q={}", (1, 10, 30, 55)),
    "AVIF": ("avif:q={}", (15, 28, 40, 55)),
    "H.266": ("vvc:preset=faster,qp={}", (44, 39, 34, 29)),
}
"""Specification of each codec and settings from low to high rate."""

MARK = ".tucodec-demo"
"""The file by which the demo knows its folder again."""

Row = dict[str, Any]


def photo_folder() -> list[Path]:
    """Folders inside scikit-image's and scikit-learn's wheels that hold photographs.

    Raises:
        ExternalToolError: one of them is not installed.
    """
    folders = []
    for package, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ExternalToolError(
                "the demo's photographs come with scikit-image and scikit-learn: "
                "pip install 'lightning-tucodec[demo]'"
            )
        folders.append(Path(spec.origin).parent / inside)
    return folders


def photos(names: Sequence[str]) -> list[Path]:
    """The named photographs."""
    folders = photo_folder()
    return [next(f / name for f in folders if (f / name).exists()) for name in names]


def tucodec(*words: str) -> str:
    """Run one command of this package in a process of its own and return what it prints.

    Raises:
        ExternalToolError: it failed.
    """
    print("$ tucodec", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "lightning_tucodec.cli", *words]
    done = processes.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ExternalToolError(f"`tucodec {words[0]}` failed with status {done.returncode}")
    return str(done.stdout)


def recipe(shards: Path, lmbda: float, steps: int, runs: Path) -> dict[str, Any]:
    """A config for `tucodec fit`: `tiny`, MSE, crops of 128 pixels, a few hundred steps."""
    return {
        "seed_everything": 0,
        "run": {"name": f"demo-{lmbda:g}", "runs_dir": str(runs)},
        "model": {
            "recipe": "transparent",
            "lmbda": lmbda,
            "preset": "tiny",
            "optimizer": "muon",
            "lr": 1e-3,
            "final_lr": 2e-5,
            "warmup_steps": 30,
            "decay_start": 0.6,
        },
        "data": {"shards": str(shards), "batch_size": 8, "crop": 128},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "max_epochs": -1,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
    }


def train(out: Path, shards: Path) -> list[Path]:
    """Train and export one model a stage; a second call finds finished runs and is quick."""
    exported = []
    previous: Path | None = None
    for lmbda, steps in STAGES:
        config = recipe(shards, lmbda, steps, out / "runs")
        if previous is not None:
            config["run"]["init_from"] = str(previous / "checkpoints" / "last.ckpt")
        path = out / f"lambda-{lmbda:g}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        tucodec("fit", "--config", str(path))
        runs = sorted((out / "runs").glob(f"demo-{lmbda:g}-*"), key=lambda p: p.stat().st_mtime)
        previous = runs[-1]
        target = out / "models" / f"demo-lambda-{lmbda:g}.safetensors"
        tucodec("export", str(previous), "-o", str(target), "--force")
        exported.append(target)
    return exported


def code_files(out: Path, model: str, held_out: list[Path]) -> list[Row]:
    """Compress photos to files, decode them in another process, compare with the encoder's own.

    Raises:
        ExternalToolError: a decoded image differs from what the encoder said it would be.
    """
    name = Path(model).stem
    coded, decoded, recon = (out / part / name for part in ("files", "decoded", "encoder"))
    printed = tucodec(
        "compress", *map(str, held_out), "-o", str(coded), "--model", model,
        "--recon", str(recon), "--json", "--force",
    )  # fmt: skip
    rows = [json.loads(line) for line in printed.splitlines()]
    tucodec(
        "decompress", *[row["output"] for row in rows], "-o", str(decoded), "--model", model,
        "--force",
    )  # fmt: skip
    for row in rows:
        stem = Path(row["file"]).stem
        shown = read_image(decoded / f"{stem}.png")
        if not np.array_equal(shown, read_image(recon / f"{stem}.png")):
            raise ExternalToolError(f"{stem}: decoded pixels differ from the encoder's")
        row["pixels"] = shown
    return rows


def code_classical(codec: ImageCodec, path: Path) -> Row:
    """One photo through one classical codec, as real bytes."""
    image = read_image(path)
    data = codec.encode(image)
    shown = codec.decode(data)
    height, width = image.shape[:2]
    return {
        "file": str(path),
        "bytes": len(data),
        "bpp": bits_per_pixel(len(data), width * height),
        "psnr": psnr_from_sse(sse(image, shown), image.size),
        "pixels": shown,
    }


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean over the photos."""
    return math.fsum(row[key] for row in rows) / len(rows)


def matched(template: str, settings: Sequence[int], path: Path, bpp: float) -> Row:
    """The photo at the setting whose rate is nearest to `bpp` from above, found by bisection.

    The rate rises from the first setting to the last; the ends are what there is beyond them.
    """
    low, high = settings[0], settings[-1]
    best = code_classical(registry.codec(template.format(high)), path)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        row = code_classical(registry.codec(template.format(middle)), path)
        if row["bpp"] >= bpp:
            high, best = middle, row
        else:
            low = middle
    return best


def evaluate_classical(held_out: Sequence[Path]) -> dict[str, list[list[Row]]]:
    """Every photo through every classical codec at every quality: name to qualities to photos."""
    from tqdm import tqdm

    results: dict[str, list[list[Row]]] = {}
    for name, (template, settings) in tqdm(CLASSICAL.items(), desc="classical", unit="codec"):
        codecs = [registry.codec(template.format(setting)) for setting in settings]
        results[name] = [[code_classical(codec, path) for path in held_out] for codec in codecs]
    return results


def draw_comparisons(
    out: Path, held_out: Sequence[Path], name: str, best: Sequence[Row]
) -> list[Path]:
    """One picture a photo: original, learned, and each classical codec at no lower a rate."""
    pictures = []
    for path, row in zip(held_out, best, strict=True):
        panels = [
            Panel("original", "", read_image(path)),
            Panel(name, _detail(row), row["pixels"]),
        ]
        for codec_name, (template, settings) in CLASSICAL.items():
            match = matched(template, settings, path, row["bpp"])
            panels.append(Panel(codec_name, _detail(match), match["pixels"]))
        target = out / f"comparison-{path.stem}.png"
        pictures.append(comparison_figure(panels, target, crop=(120, 60, 320, 240)))
    return pictures


def _detail(row: Row) -> str:
    return f"{row['bpp']:.3f} bpp, {row['psnr']:.2f} dB"


def run(out: Path) -> list[Path]:
    """Do everything; returns the pictures. A folder that the demo began is gone on with.

    Raises:
        OutputError: the folder holds something else.
    """
    started = time.perf_counter()
    mark = out / MARK
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise OutputError(f"{out}: is no folder of the demo; name one that is new or empty")
    with atomic_write(mark, "w") as stream:
        stream.write("Written by `tucodec demo`, which replaces what it finds here.\n")
    shards = out / "shards"
    tucodec(
        "shards", "build", *map(str, photos(TRAINING_PHOTOS)), "--out", str(shards),
        "--patch", "160", "--max-overlap", "0.5", "--scales", "1.0,0.6",
        "--licence", "photographs shipped with scikit-image and scikit-learn",
    )  # fmt: skip
    held_out = photos(HELD_OUT_PHOTOS)
    learned: dict[str, list[Row]] = {}
    for path in [*train(out, shards), library.find(DEFAULT_MODEL)]:
        model = library.load(path)
        label = f"{model.name} ({model.card['opt_step']:,} steps)"
        learned[label] = code_files(out, str(path), held_out)
    classical = evaluate_classical(held_out)

    curves = [
        Curve.of(name, [mean(rows, "bpp")], {"psnr": [mean(rows, "psnr")]})
        for name, rows in learned.items()
    ]
    for name, qualities in classical.items():
        bpp, psnr = ([mean(rows, key) for rows in qualities] for key in ("bpp", "psnr"))
        curves.append(Curve.of(name, bpp, {"psnr": psnr}))
    print(f"{'mean over ' + str(len(held_out)) + ' held-out photos':36} {'bpp':>7} {'PSNR':>6}")
    for curve in curves:
        for rate, quality in zip(*curve.points("psnr"), strict=True):
            print(f"{curve.name:36} {rate:7.3f} {quality:6.2f}")
    name, best = list(learned.items())[-1]
    figure, _ = rd_figure(
        curves, out / "rate-distortion.png", title="Two held-out photos, real files"
    )
    pictures = [figure, *draw_comparisons(out, held_out, name, best)]
    print("every learned file decoded in another process to the encoder's exact pixels")
    print("pictures:", *pictures)
    print(f"demo: {time.perf_counter() - started:.0f} s")
    return pictures
