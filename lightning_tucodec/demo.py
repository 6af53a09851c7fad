"""`tucodec demo`: the whole chain in minutes, on photographs that ship inside two dependencies.

A shipped model, trained for MSE, is fine-tuned for MS-SSIM: shards, training, export, coding to files,
decoding in another process, a comparison with the shipped families and classical codecs, and the report.
Everything runs through the commands a user would type.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_tucodec.codecs import registry
from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.errors import ExternalToolError, OutputError
from lightning_tucodec.io import processes
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.metrics import bits_per_pixel, quality
from lightning_tucodec.report.figures import Panel, comparison_figure

TRAINING_PHOTOS = (
    "astronaut.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "chelsea.png",
    "flower.jpg",
)
HELD_OUT_PHOTOS = ("coffee.png", "china.jpg")

START, STEPS, LAMBDA = "tiny-mse-2", 120, 0.09
"""The shipped model that is fine-tuned, optimiser steps, and λ of the recipe `ssim`."""

CLASSICAL = {
    "jpeg:q={}": (5, 10, 20, 35, 55),
    "webp:q={}": (1, 10, 30, 55),
    "avif:q={}": (15, 28, 40, 55),
    "vvc:preset=faster,qp={}": (44, 39, 34, 29),
}
"""Settings from low to high rate."""

MATCHED = {"JPEG": ("jpeg:q={}", 1, 60), "H.266": ("vvc:preset=faster,qp={}", 50, 25)}
"""Codecs in the pictures: specification, and settings of the lowest and the highest rate."""

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


def recipe(shards: Path, runs: Path) -> dict[str, Any]:
    """A config for `tucodec fit`: experiments/tiny_ssim.yaml, shorter."""
    return {
        "seed_everything": 0,
        "run": {"name": "demo", "runs_dir": str(runs), "init_from": START, "threads": 1},
        "model": {
            "recipe": "ssim",
            "lmbda": LAMBDA,
            "preset": "tiny",
            "codec": {"quantizer": "noise"},
            "optimizer": "muon",
            "lr": 4e-4,
            "final_lr": 0.0,
            "warmup_steps": 20,
            "decay_start": 0.0,
        },
        "data": {"shards": str(shards), "batch_size": 4, "crop": 192},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "max_epochs": -1,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
    }


def train(out: Path, shards: Path) -> tuple[Path, Path]:
    """The run's folder and the exported model; a second call finds the finished run and is quick."""
    path = out / "demo.yaml"
    path.write_text(yaml.safe_dump(recipe(shards, out / "runs"), sort_keys=False))
    tucodec("fit", "--config", str(path))
    run = max((out / "runs").glob("demo-*"), key=lambda folder: folder.stat().st_mtime)
    model = out / "models" / "demo.safetensors"
    tucodec("export", str(run), "-o", str(model), "--force")
    return run, model


def code_files(out: Path, model: str, held_out: Sequence[str]) -> None:
    """Compress photos to files, decode them in another process, compare with the encoder's own.

    Raises:
        ExternalToolError: a decoded image differs from what the encoder said it would be.
    """
    name = Path(model).stem
    coded, decoded, recon = (out / part / name for part in ("files", "decoded", "encoder"))
    printed = tucodec(
        "compress", *held_out, "-o", str(coded), "--model", model,
        "--recon", str(recon), "--json", "--force",
    )  # fmt: skip
    rows = [json.loads(line) for line in printed.splitlines()]
    tucodec(
        "decompress", *[row["output"] for row in rows], "-o", str(decoded), "--model", model,
        "--force",
    )  # fmt: skip
    for row in rows:
        stem = Path(row["file"]).stem
        shown, told = (read_image(folder / f"{stem}.png") for folder in (decoded, recon))
        if not np.array_equal(shown, told):
            raise ExternalToolError(f"{stem}: decoded pixels differ from the encoder's")


def code(codec: ImageCodec, path: Path) -> Row:
    """One photo through one codec, as real bytes."""
    image = read_image(path)
    data = codec.encode(image)
    shown = codec.decode(data)
    height, width = image.shape[:2]
    rate = bits_per_pixel(len(data), width * height)
    return {"bpp": rate, "pixels": shown, **quality(image, shown)}


def matched(template: str, low: int, high: int, path: Path, bpp: float) -> Row:
    """The photo at the setting whose rate is nearest to `bpp` from above, found by bisection.

    Args:
        template: a codec's specification.
        low: setting of the lowest rate.
        high: setting of the highest rate, which is taken where none reaches `bpp`.
        path: the photo.
        bpp: of the coding to be matched.
    """
    best = code(registry.codec(template.format(high)), path)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        row = code(registry.codec(template.format(middle)), path)
        if row["bpp"] >= bpp:
            high, best = middle, row
        else:
            low = middle
    return best


def draw_comparisons(out: Path, held_out: Sequence[Path], model: Path) -> list[Path]:
    """One picture a photo: original, before, after, and classical codecs at no lower a rate."""
    before, after = registry.codec(START), registry.codec(str(model))
    pictures = []
    for path in held_out:
        rows = {
            f"{START} (before)": code(before, path),
            f"after {STEPS} steps for MS-SSIM": (own := code(after, path)),
            **{name: matched(*how, path, own["bpp"]) for name, how in MATCHED.items()},
        }
        panels = [Panel("original", "", read_image(path))]
        panels += [Panel(name, _detail(row), row["pixels"]) for name, row in rows.items()]
        target = out / f"comparison-{path.stem}.png"
        pictures.append(comparison_figure(panels, target, crop=(120, 60, 320, 240)))
    return pictures


def _detail(row: Row) -> str:
    return f"{row['bpp']:.3f} bpp, MS-SSIM {row['ms_ssim']:.4f}"


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
        "--patch", "192", "--max-overlap", "0.5", "--scales", "1.0,0.8",
        "--licence", "photographs shipped with scikit-image and scikit-learn",
    )  # fmt: skip
    held_out = [str(path) for path in photos(HELD_OUT_PHOTOS)]
    folder, model = train(out, shards)
    code_files(out, str(model), held_out)
    results, report = out / "results.json", out / "report.html"
    classical = [how.format(value) for how, values in CLASSICAL.items() for value in values]
    codecs = (str(model), "tiny-mse", "tiny-ssim", *classical)
    kept = str(out / "coded")
    print(
        tucodec(
            "evaluate", *held_out, "--codec", *codecs, "-o", str(results), "--keep", kept, "--force"
        ),
        end="",
    )
    tucodec(
        "compare", str(results), str(folder), "-o", str(report), "--anchor", "vvc:preset=faster",
        "--title", "tucodec demo", "--images", *held_out, "--kept", kept, "--force",
    )  # fmt: skip
    pictures = [
        *(out / f"report-{quality}.png" for quality in ("psnr", "ms-ssim")),
        *draw_comparisons(out, photos(HELD_OUT_PHOTOS), model),
    ]
    print(
        "every file of the trained model decoded in another process to the encoder's exact pixels"
    )
    print("pictures:", *pictures)
    print("report:", report)
    print(f"demo: {time.perf_counter() - started:.0f} s")
    return pictures
