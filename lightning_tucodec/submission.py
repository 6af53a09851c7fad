"""A set coded under one budget, as CLIC takes it: choose, write, decode and verify.

    submission/
        manifest.json     image, candidate, file, bytes and hashes of each; limits and totals
        streams/<n>.bin   the coded files, as the candidates' codecs wrote them

The rate that counts is the streams' bytes. Coded candidates and their measurements stay in a folder
beside (`<submission>-candidates`), so that a stopped run continues and another budget costs only the
choice.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_tucodec.allocation import Allocation, Quantity, allocate
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.evaluate import (
    Row,
    allocation_table,
    evaluate,
    find_images,
    finite,
    measure_back,
)
from lightning_tucodec.files import atomic_write
from lightning_tucodec.images import read_image, write_png

FORMAT = "tucodec-submission-1"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Limits:
    """What the set must keep to; None: no such limit.

    Attributes:
        max_bytes: sum of the streams' bytes.
        min_psnr: pooled PSNR, dB.
        min_ms_ssim: pixel-weighted MS-SSIM.
        max_seconds: sum of decoding times.
    """

    max_bytes: int | None = None
    min_psnr: float | None = None
    min_ms_ssim: float | None = None
    max_seconds: float | None = None


def byte_budget(bpp: float, pixels: int) -> int:
    """Most bytes that `pixels` pixels may take at `bpp` bits each."""
    return math.floor(Fraction(str(bpp)) * pixels / 8)


def build(
    images: Sequence[str],
    candidates: Sequence[str],
    out: Path,
    minimise: Quantity,
    limits: Limits,
    max_bpp: float | None = None,
    workers: int | None = None,
) -> Allocation:
    """Code every image with every candidate, choose, and write the submission.

    Args:
        images: files and folders.
        candidates: codec specifications.
        out: the submission's folder; a former submission in it is replaced.
        minimise: `sse` or `ms_ssim` for the best quality, or `bytes`.
        limits: what the set must keep to.
        max_bpp: a limit on bytes in bits a pixel, instead of `limits.max_bytes`.
        workers: codings at a time; all processors when None.

    Raises:
        ConfigError: no choice keeps to the limits, or the folder holds something else.
        TucodecError: an image cannot be read or coded.
    """
    if out.exists() and any(out.iterdir()) and not (out / _MANIFEST).exists():
        raise ConfigError(f"{out} holds something else than a submission; name a new folder")
    paths = find_images(images)
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError("two images have one file name; rename one")
    codecs = [codec(text) for text in dict.fromkeys(candidates)]
    beside = out.with_name(out.name + "-candidates")
    rows = evaluate(paths, codecs, beside / "rows.jsonl", workers, beside / "streams")
    table = allocation_table(rows)
    if max_bpp is not None:
        limits = replace(limits, max_bytes=byte_budget(max_bpp, int(table.pixels.sum())))
    best = allocate(table, minimise, **asdict(limits))
    chosen = [rows[i * len(codecs) + int(j)] for i, j in enumerate(best.choice)]
    shutil.rmtree(out, ignore_errors=True)
    (out / "streams").mkdir(parents=True)
    entries = []
    for index, row in enumerate(chosen):
        file = f"streams/{index}.bin"
        shutil.copyfile(beside / "streams" / f"{row['sha256']}.bin", out / file)
        keys = ("image", "codec", "width", "height", "bytes", "sse", "ms_ssim", "sha256")
        entries.append({"file": file, **{key: row[key] for key in keys}})
    used = {row["codec"] for row in chosen}
    content = {
        "format": FORMAT,
        "minimised": minimise,
        "limits": asdict(limits),
        "totals": finite(summary(best)),
        "codecs": {coder.name: coder.describe() for coder in codecs if coder.name in used},
        "images": entries,
    }
    with atomic_write(out / _MANIFEST, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    return best


def summary(best: Allocation) -> dict[str, Any]:
    """The numbers of an allocation, as `tucodec allocate --json` ends with."""
    return {
        key: getattr(best, key)
        for key in ("bytes", "bpp", "psnr", "ms_ssim", "bound", "gap", "method")
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a submission.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    try:
        content: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        for entry in content["images"]:
            if Path(entry["file"]).is_absolute() or ".." in Path(entry["file"]).parts:
                raise ValueError(f"file {entry['file']}")
    except OSError as error:
        raise ConfigError(f"{folder / _MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / _MANIFEST}: not the manifest of a submission ({error})"
        ) from None
    return content


def decode(folder: Path, out: Path) -> None:
    """Decode a submission to PNG files; needs nothing but the folder and this package.

    Raises:
        TucodecError: the manifest or a stream is damaged; names the file.
    """
    for entry in tqdm(read_manifest(folder)["images"], "decode", disable=None):
        try:
            image = codec(entry["codec"]).decode(_stream(folder, entry))
        except TucodecError as error:
            raise type(error)(f"{folder / entry['file']}: {error}") from error
        write_png(out / f"{Path(entry['image']).stem}.png", image)


def verify(folder: Path, originals: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Decode everything and measure it anew; believes nothing that the manifest says.

    Args:
        folder: the submission.
        originals: files and folders that hold the images.

    Returns:
        The measured totals (`bytes, bpp, psnr, ms_ssim, decode_seconds`) and what is wrong, a line
        each: damaged or exchanged streams, values that differ from the manifest's, missed limits.

    Raises:
        ConfigError: there is no readable manifest, or an original is missing.
    """
    manifest = read_manifest(folder)
    paths = {path.name: path for path in find_images(originals)}
    wrong: list[str] = []
    rows: list[Row] = []
    for entry in tqdm(manifest["images"], "verify", disable=None):
        name = entry["image"]
        if name not in paths:
            raise ConfigError(f"the original {name} is missing")
        try:
            data = _stream(folder, entry)
            row = measure_back(codec(entry["codec"]), read_image(paths[name]), data)
        except TucodecError as error:
            wrong.append(f"{entry['file']} ({name}): {error}")
            continue
        rows.append(row)
        wrong += [
            f"{entry['file']} ({name}): {key} is {row[key]}, not {entry[key]}"
            for key in ("bytes", "sha256", "width", "height", "sse")
            if row[key] != entry[key]
        ]
        if abs(row["ms_ssim"] - entry["ms_ssim"]) > 1e-6:
            text = f"MS-SSIM is {row['ms_ssim']:.6f}, not {entry['ms_ssim']:.6f}"
            wrong.append(f"{entry['file']} ({name}): {text}")
    listed = {entry["file"] for entry in manifest["images"]}
    present = {str(path.relative_to(folder)) for path in (folder / "streams").rglob("*")}
    wrong += [f"{file}: not in the manifest" for file in sorted(present - listed)]
    missing = set(paths) - {entry["image"] for entry in manifest["images"]}
    wrong += [f"{name}: has no stream" for name in sorted(missing)]
    if not rows:
        return {}, wrong
    table = allocation_table([{**row, "image": i, "codec": ""} for i, row in enumerate(rows)])
    totals = {
        "bytes": int(table.bytes.sum()),
        "bpp": 8 * int(table.bytes.sum()) / int(table.pixels.sum()),
        "psnr": _pooled(int(table.sse.sum()), int(table.pixels.sum())),
        "ms_ssim": float(np.average(table.ms_ssim[:, 0], weights=table.pixels)),
        "decode_seconds": math.fsum(row["decode_seconds"] for row in rows),
    }
    limits = Limits(**manifest["limits"])
    quantities: dict[Quantity, float | None] = {
        "bytes": limits.max_bytes,
        "sse": limits.min_psnr,
        "ms_ssim": limits.min_ms_ssim,
        "seconds": limits.max_seconds,
    }
    for quantity, value in quantities.items():
        if value is not None:
            total, limit = int(table.amounts(quantity).sum()), table.limit(quantity, value)
            if total > limit:
                wrong.append(f"the limit on {quantity} is missed: {total} against {limit}")
    for key in ("bytes", "bpp", "psnr", "ms_ssim"):
        told = manifest["totals"][key]
        if not math.isclose(totals[key], math.inf if told is None else told, rel_tol=1e-6):
            wrong.append(f"in total {key} is {totals[key]}, not {manifest['totals'][key]}")
    return totals, wrong


def run_allocate(arguments: argparse.Namespace) -> int:
    """`tucodec allocate`."""
    minimise: Quantity = "bytes"
    if arguments.maximise:
        minimise = "sse" if arguments.maximise == "psnr" else "ms_ssim"
    limits = Limits(
        arguments.max_bytes,
        arguments.min_psnr,
        arguments.min_ms_ssim,
        arguments.max_decode_seconds,
    )
    if arguments.max_bpp is not None and arguments.max_bytes is not None:
        raise ConfigError("give --max-bpp or --max-bytes, not both")
    if arguments.max_bpp is None and not any(v is not None for v in asdict(limits).values()):
        raise ConfigError("without a limit there is nothing to allocate: --max-bpp, --min-psnr, …")
    best = build(
        arguments.images,
        arguments.candidate,
        Path(arguments.out),
        minimise,
        limits,
        arguments.max_bpp,
        arguments.workers,
    )
    if arguments.json:
        print(json.dumps(finite(summary(best))))
        return 0
    used = Counter(entry["codec"] for entry in read_manifest(Path(arguments.out))["images"])
    for name, count in used.most_common():
        print(f"{count:6d} × {name}")
    print(
        f"{best.bytes} bytes, {best.bpp:.5f} bpp, {best.psnr:.3f} dB, MS-SSIM {best.ms_ssim:.5f}; "
        f"at most {best.gap:.2g} from the optimum ({best.method})"
    )
    return 0


def run_decode(arguments: argparse.Namespace) -> int:
    """`tucodec clic decode`."""
    decode(Path(arguments.submission), Path(arguments.out))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """`tucodec clic verify`: status 1 when anything is wrong, a line each on stderr."""
    totals, wrong = verify(Path(arguments.submission), arguments.originals)
    if arguments.json:
        print(json.dumps(finite({**totals, "wrong": wrong})))
    elif totals:
        print(", ".join(f"{key} {value:.6g}" for key, value in totals.items()))
    for line in wrong:
        print(f"tucodec: {arguments.submission}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _stream(folder: Path, entry: dict[str, Any]) -> bytes:
    """One coded file, checked against its hash.

    Raises:
        ConfigError: it is missing or not the one the manifest means.
    """
    try:
        data = (folder / entry["file"]).read_bytes()
    except OSError as error:
        raise ConfigError(str(error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ConfigError("is damaged or another file: its SHA-256 is not the manifest's")
    return data


def _pooled(error: int, pixels: int) -> float:
    return math.inf if error == 0 else 10 * math.log10(255**2 * 3 * pixels / error)
