"""A submission measured as CLIC's server did.

The manifest is not trusted: the streams are decoded in a separate process, without
the models of this machine and without a network, and the pictures are compared with the originals.
"""

import argparse
import json
import math
import os
import site
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lightning_tucodec
from lightning_tucodec.codecs.classical.codecs import PillowCodec
from lightning_tucodec.codecs.registry import CLASSES, split
from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.io import ffmpeg, processes
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.temporary import temporary_folder
from lightning_tucodec.quality.decibels import psnr_from_sse
from lightning_tucodec.sets.allocation import Quantity, Table, relative_gap
from lightning_tucodec.sets.clic2019 import comparison
from lightning_tucodec.sets.contents import DECODE, budgets, contents, wrong_beside, wrong_files
from lightning_tucodec.sets.evaluate import find_images
from lightning_tucodec.sets.knapsack import METHODS
from lightning_tucodec.sets.limits import Requirements
from lightning_tucodec.sets.manifest import (
    MANIFEST,
    Limits,
    budget_name,
    byte_budget,
    png_name,
    read_manifest,
)
from lightning_tucodec.sets.measure import Row, compare
from lightning_tucodec.sets.results import allocation_table, finite

MAX_DECODER_BYTES = 500_000_000
"""CLIC's limit on the decoder."""


PIXELS = 1e-5
"""A learned decoder's pixels may differ by a grey level on another machine or number of threads, so
qualities may differ from the manifest's by this much. Limits apply to the measured values."""

_ISOLATED = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError("the decoder asked for the network")
sys.addaudithook(refuse)
from lightning_tucodec.cli import main
sys.exit(main(sys.argv[1:]))
"""


def verify(
    folder: Path, originals: Sequence[str], required: Requirements | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Decode everything in a clean process and measure it again.

    Args:
        folder: the submission.
        originals: files and folders that hold the images.
        required: limits that the set must meet. Those in the manifest count as well, except for the
            decoding time, which was measured elsewhere.

    Returns:
        The measured totals (`images, pixels, bytes, bpp, psnr, ms_ssim, ms_ssim_mean,
        decode_seconds, decoder_bytes`) and one line for each fault: damaged or exchanged streams,
        values that differ from the manifest's, missed limits, a decoder above `MAX_DECODER_BYTES`.

    Raises:
        ConfigError: there is no readable manifest, an original is missing, or two have the same name.
    """
    manifest = read_manifest(folder)
    required = (required or Requirements(Limits())).one()
    paths: dict[str, Path] = {}
    for path in find_images(originals):
        other = paths.setdefault(path.name, path)
        if not other.samefile(path):
            raise ConfigError(f"{other} and {path}: two originals have the same name")
    for entry in manifest["images"]:
        if entry["image"] not in paths:
            raise ConfigError(f"the original {entry['image']} is missing")
    wrong = [f"{name}: has no stream" for name in sorted(set(paths) - _names(manifest))]
    wrong += wrong_files(folder, manifest)
    wrong += _cannot_run(folder)
    rows: list[Row] = []
    with temporary_folder() as out, closing(_decode_elsewhere(folder, out)) as results:
        decoded = zip(manifest["images"], results, strict=False)
        for entry, result in tqdm(decoded, "verify", len(manifest["images"]), disable=None):
            label = f"{entry['file']} ({entry['image']})"
            if "error" in result:
                wrong.append(f"{label}: {result['error']}")
                continue
            size = (folder / entry["file"]).stat().st_size
            shown = out / png_name(entry)
            try:
                row = compare(read_image(paths[entry["image"]]), read_image(shown), size)
            except TucodecError as error:
                wrong.append(f"{label}: {error}")
                continue
            finally:
                shown.unlink(missing_ok=True)
            rows.append({**row, "decode_seconds": result["seconds"]})
            wrong += _wrong_values(label, entry, row)
            cap = required.max_image_bpp
            if cap is not None and size > byte_budget(cap, row["width"] * row["height"]):
                wrong.append(f"{label}: {row['bpp']:.4f} bpp, above the {cap:g} of an image")
    if not rows:
        return {}, wrong
    totals, table = _totals(rows)
    totals["decoder_bytes"] = decoder_bytes(folder, manifest)
    wrong += _missed(table, required.over(totals["pixels"]), "limit")
    claimed = replace(Limits(**manifest["limits"]), max_seconds=None)
    wrong += _missed(table, claimed, "claimed limit")
    if totals["decoder_bytes"] > MAX_DECODER_BYTES:
        wrong.append(f"the decoder has {totals['decoder_bytes']} bytes, over {MAX_DECODER_BYTES}")
    for key in ("bytes", "bpp", "psnr", "ms_ssim"):
        told = manifest["totals"][key]
        allowed = PIXELS if key in ("psnr", "ms_ssim") else 1e-9
        if not math.isclose(totals[key], math.inf if told is None else told, rel_tol=allowed):
            wrong.append(f"in total {key} is {totals[key]}, not {told}")
    return totals, [*wrong, *_impossible(manifest, table)]


def _impossible(manifest: dict[str, Any], table: Table) -> list[str]:
    """What a manifest claims of its choice and the measured set refutes.

    Without the candidates `verify` cannot know that no choice is better; it prints that as a claim.
    """
    quantity, told = manifest["minimised"], manifest["totals"]
    bound, gap, method = told["bound"], told["gap"], told["method"]
    wrong = []
    if method not in METHODS:
        wrong.append(f"the choice was made by {method!r}, which is no method of `allocate`")
    if bound is not None:
        reached = int(table.amounts(quantity).sum())
        if not 0 <= bound <= reached * (1 + PIXELS):
            wrong.append(f"{quantity}: {reached} is reached, which the bound {bound} excludes")
        elif gap is None or abs(relative_gap(reached, bound) - gap) > 2 * PIXELS:
            above = relative_gap(reached, bound)
            wrong.append(f"{quantity}: {reached} is {above:.3g} above the bound, not {gap}")
    return wrong


def decoder_bytes(folder: Path, manifest: dict[str, Any]) -> int:
    """What decoding needs beyond libraries from the package index (CLIC's container had those).

    The models and scripts in the submission, this package without the weights it ships, and ffmpeg's
    binary when a codec calls it.
    """
    streams = {entry["file"] for entry in manifest["images"]}
    rest = [name for name in contents(folder) if name not in streams and name != MANIFEST]
    size = sum((folder / name).lstat().st_size for name in rest)
    package = Path(lightning_tucodec.__path__[0])
    size += sum(path.stat().st_size for path in package.rglob("*.py"))
    if any(map(_calls_ffmpeg, manifest["codecs"])):
        size += Path(ffmpeg.executable()).stat().st_size
    return size


def decoder_bytes_of_all(folders: Sequence[Path]) -> int:
    """The same for several submissions that one decoder decodes: what they share counts once."""
    rest = 0
    models: dict[str, int] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        own = manifest["models"]
        models |= {told["sha256"]: told["bytes"] for told in own.values()}
        alone = decoder_bytes(folder, manifest) - sum(told["bytes"] for told in own.values())
        rest = max(rest, alone)
    return rest + sum(models.values())


def _calls_ffmpeg(name: str) -> bool:
    """Whether a codec's decoder calls ffmpeg, whatever a manifest says of it."""
    from lightning_tucodec.codecs.h266.codec import H266

    kind, _ = split(name)
    if kind not in CLASSES:
        return kind == H266.codec_name
    return not issubclass(CLASSES[kind], PillowCodec)


def _cannot_run(folder: Path) -> list[str]:
    """Whether `DECODE` in a folder lacks the right to be executed, as at most one line."""
    script = folder / DECODE
    if os.path.isfile(script) and not script.stat().st_mode & stat.S_IXUSR:
        return [f"{DECODE}: cannot be executed; chmod +x {DECODE}"]
    return []


def _names(manifest: dict[str, Any]) -> set[str]:
    return {entry["image"] for entry in manifest["images"]}


def _decode_elsewhere(folder: Path, out: Path) -> Generator[dict[str, Any], None, None]:
    """Rows of `submission.decode`, from a process that knows no model but the submission's.

    Raises:
        ConfigError: the process ended before the last image.
    """
    elsewhere = str(out / "none")
    # Packages that are installed for this user only are found through HOME.
    packages = {"PYTHONUSERBASE": site.getuserbase()}
    environment = {**os.environ, **packages, "TUCODEC_MODELS": elsewhere, "HOME": elsewhere}
    words = ["clic", "decode", str(folder), "-o", str(out), "--json"]
    count = 0
    with (
        tempfile.TemporaryFile() as errors,
        processes.child(
            # -P: import no module from the working directory, which may be the submission.
            [sys.executable, "-P", "-c", _ISOLATED, *words],
            ours=True,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
            count += 1
        if count < len(read_manifest(folder)["images"]):
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ConfigError(f"{folder}: the decoder ended early: {''.join(last)}")


def _wrong_values(label: str, entry: dict[str, Any], row: Row) -> list[str]:
    wrong = [
        f"{label}: {key} is {row[key]}, not {entry[key]}"
        for key in ("bytes", "width", "height")
        if row[key] != entry[key]
    ]
    if not math.isclose(row["sse"], entry["sse"], rel_tol=PIXELS):
        wrong.append(f"{label}: sse is {row['sse']}, not {entry['sse']}")
    if abs(row["ms_ssim"] - entry["ms_ssim"]) > PIXELS:
        wrong.append(f"{label}: MS-SSIM is {row['ms_ssim']:.6f}, not {entry['ms_ssim']:.6f}")
    return wrong


def _totals(rows: Sequence[Row]) -> tuple[dict[str, Any], Table]:
    """The set's values, and the images' own as a table of one candidate."""
    from lightning_tucodec.quality.metrics import bits_per_pixel

    table = allocation_table([{**row, "image": i, "codec": ""} for i, row in enumerate(rows)])
    pixels, size = int(table.pixels.sum()), int(table.bytes.sum())
    totals = {
        "images": len(rows),
        "pixels": pixels,
        "bytes": size,
        "bpp": bits_per_pixel(size, pixels),
        "psnr": psnr_from_sse(int(table.sse.sum()), 3 * pixels),
        "ms_ssim": float(np.average(table.ms_ssim[:, 0], weights=table.pixels)),
        "ms_ssim_mean": float(table.ms_ssim[:, 0].mean()),
        "decode_seconds": math.fsum(row["decode_seconds"] for row in rows),
    }
    return totals, table


def _missed(table: Table, limits: Limits, called: str) -> list[str]:
    """The limits that a set misses, a line each."""
    quantities: dict[Quantity, float | None] = {
        "bytes": limits.max_bytes,
        "sse": limits.min_psnr,
        "ms_ssim": limits.min_ms_ssim,
        "seconds": limits.max_seconds,
    }
    missed = []
    for quantity, value in quantities.items():
        if value is not None:
            total, limit = int(table.amounts(quantity).sum()), table.limit(quantity, value)
            if total > limit:
                missed.append(f"the {called} on {quantity} is missed: {total} against {limit}")
    return missed


def told(
    folder: Path,
    totals: dict[str, Any],
    required: Requirements,
    as_json: bool,
    wrong: Sequence[str],
    budget: str = "",
) -> None:
    """Print what `verify` measured of a submission, and what its manifest claims.

    Args:
        folder: the submission, or its part for one budget.
        totals: see `verify`.
        required: see `verify`.
        as_json: as one JSON object.
        wrong: see `verify`.
        budget: that of the part.
    """
    manifest = read_manifest(folder)
    claimed = Limits(**manifest["limits"]).given()
    if as_json:
        part = {"budget": float(budget)} if budget else {}
        print(json.dumps(finite({**part, **totals, "claimed": claimed, "wrong": wrong})))
        return
    if budget:
        print(f"{budget} bpp")
    if not totals:
        return
    print(", ".join(f"{key} {value:.6g}" for key, value in totals.items()))
    if claimed and not required.given():
        limits = ", ".join(f"{key} {value:.10g}" for key, value in claimed.items())
        print(f"limits claimed by the submission, not asked for by --max-bpp, …: {limits}")
    if (seconds := claimed.get("max_seconds")) is not None:
        print(
            f"claimed, as measured where it was made: decoded within {seconds:.6g} s; here within "
            f"{totals['decode_seconds']:.6g} s"
        )
    said = manifest["totals"]
    if said["gap"] is not None:
        print(
            f"claimed, as the candidates are not here: {manifest['minimised']} at most {said['gap']:.2g} "
            f"above the optimum ({said['method']})"
        )


def _parts(folder: Path, required: Requirements) -> dict[str, Requirements]:
    """What the parts of a submission must meet, by their folders; "" for one without parts."""
    return {name: required.only(float(name)) for name in budgets(folder)} or {"": required}


def _wrong_in_common(folder: Path, parts: Collection[str], required: Requirements) -> list[str]:
    """What is wrong with a submission for several budgets as a whole, a line each."""
    asked = [budget_name(budget) for budget in required.budgets]
    wrong = [f"has no part for {name} bpp" for name in asked if name not in parts]
    wrong += wrong_beside(folder, parts) + _cannot_run(folder)
    size = decoder_bytes_of_all([folder / name for name in parts])
    if size > MAX_DECODER_BYTES:
        wrong.append(f"the decoder has {size} bytes, over {MAX_DECODER_BYTES}")
    return wrong


def run_verify(arguments: argparse.Namespace) -> int:
    """`tucodec clic verify`: status 1 when anything is wrong, a line each on stderr."""
    required, folder, status = Requirements.of(arguments), Path(arguments.submission), 0
    parts = _parts(folder, required)
    for part, own in parts.items():
        totals, wrong = verify(folder / part, arguments.originals, own)
        told(folder / part, totals, own, arguments.json, wrong, part)
        status |= complain(str(folder / part), wrong)
    if "" in parts:
        return status
    if not arguments.json:
        size = decoder_bytes_of_all([folder / part for part in parts])
        print(f"one decoder of {size} bytes for {len(parts)} budgets")
        asked = [budget_name(budget) for budget in required.budgets]
        if asked and (others := [part for part in parts if part not in asked]):
            print(f"not asked for by --max-bpp, checked by their names alone: {', '.join(others)}")
    return status | complain(str(folder), _wrong_in_common(folder, parts, required))


def run_compare(arguments: argparse.Namespace) -> int:
    """`tucodec clic compare`: the table, also of submissions that are wrong; then status 1.

    A submission for several budgets has a line for each.
    """
    measured: dict[str, dict[str, Any]] = {}
    minimised: dict[str, Quantity] = {}
    required, status = Requirements.of(arguments), 0
    for folder in map(Path, arguments.submission):
        parts = _parts(folder, required)
        for part, own in parts.items():
            name = str(folder / part)
            totals, wrong = verify(folder / part, arguments.originals, own)
            status |= complain(name, wrong)
            if totals:
                measured[name] = totals
                minimised[name] = read_manifest(folder / part)["minimised"]
        if "" not in parts:
            status |= complain(str(folder), _wrong_in_common(folder, parts, required))
    print(json.dumps(finite(measured)) if arguments.json else comparison(measured, minimised))
    return status


def complain(name: str, wrong: Sequence[str]) -> int:
    """Print the faults of a submission, one line each on stderr; returns the exit status."""
    for line in wrong:
        print(f"tucodec: {name}: {line}", file=sys.stderr)
    return 1 if wrong else 0
