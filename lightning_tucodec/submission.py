"""A set coded under one budget, as CLIC takes it: choose, write and decode.

    submission/
        manifest.json     image, candidate, file, bytes and hashes of each; limits and totals
        streams/<n>.bin   the coded files, as the candidates' codecs wrote them
        models/<id>.safetensors   the learned models that the streams need
        decode            one command: everything to PNG files, without a network

The rate that counts is the streams' bytes. Coded candidates and their measurements stay in a folder
beside (`<submission>-candidates`), so that a stopped run continues, several machines share the work,
and another budget costs only the choice.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.registry import codec, expand, model_of
from lightning_tucodec.errors import ConfigError, ExternalToolError, TucodecError
from lightning_tucodec.evaluate import (
    Part,
    Row,
    allocation_table,
    evaluate,
    find_images,
    finite,
)
from lightning_tucodec.files import atomic_write
from lightning_tucodec.images import write_png

if TYPE_CHECKING:
    from lightning_tucodec.allocation import Allocation, Quantity

FORMAT = "tucodec-submission-2"
MANIFEST = "manifest.json"

_DECODE = """\
#!/bin/sh
# Decodes this submission to PNG files in the folder $1 (default: decoded). Needs the Python package
# lightning_tucodec and no network.
exec "${PYTHON:-python3}" -m lightning_tucodec.cli clic decode "$(dirname "$0")" -o "${1:-decoded}"
"""


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


@dataclass(frozen=True)
class Candidates:
    """Images, codecs and the folder beside the submission where each pair is coded once.

    Attributes:
        paths: images, no two of one file name without its ending.
        codecs: the candidates.
        folder: `rows.jsonl`, those of parts, and `streams/<sha256>.bin`.
    """

    paths: list[Path]
    codecs: list[ImageCodec]
    folder: Path

    @classmethod
    def of(cls, images: Sequence[str], specifications: Sequence[str], out: Path) -> "Candidates":
        """Find the images and build the codecs.

        Raises:
            ConfigError: there is no image, two would be decoded to one name, or a codec is unknown.
        """
        paths = find_images(images)
        twice = [stem for stem, n in Counter(path.stem for path in paths).items() if n > 1]
        if twice:
            raise ConfigError(f"two images are called {twice[0]}; rename one")
        codecs = [codec(text) for text in expand(specifications)]
        return cls(paths, codecs, out.with_name(out.name + "-candidates"))

    def code(self, workers: int | None, part: Part | None = None) -> list[Row]:
        """Code and measure what has not been, or the share of it; one row a pair, images outermost."""
        own = "rows.jsonl" if part is None else f"rows.{part.index}-of-{part.count}.jsonl"
        others = [path for path in sorted(self.folder.glob("rows*.jsonl")) if path.name != own]
        streams = self.folder / "streams"
        return evaluate(self.paths, self.codecs, self.folder / own, workers, streams, part, others)


def build(
    candidates: Candidates,
    out: Path,
    minimise: "Quantity",
    limits: Limits,
    max_bpp: float | None = None,
    workers: int | None = None,
) -> "Allocation":
    """Code every image with every candidate, choose, and write the submission.

    Args:
        candidates: what there is to choose from.
        out: the submission's folder; a former submission in it is replaced.
        minimise: `sse` or `ms_ssim` for the best quality, or `bytes`.
        limits: what the set must keep to.
        max_bpp: a limit on bytes in bits a pixel, instead of `limits.max_bytes`.
        workers: codings at a time; all processors when None.

    Raises:
        ConfigError: no choice keeps to the limits, or the folder holds something else.
        TucodecError: an image cannot be read or coded.
    """
    # Only where something is chosen: a decoder need not wait for numba.
    from lightning_tucodec.allocation import allocate

    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ConfigError(f"{out} holds something else than a submission; name a new folder")
    rows = candidates.code(workers)
    table = allocation_table(rows)
    if max_bpp is not None:
        limits = replace(limits, max_bytes=byte_budget(max_bpp, int(table.pixels.sum())))
    best = allocate(table, minimise, **asdict(limits))
    codecs = candidates.codecs
    chosen = [rows[i * len(codecs) + int(j)] for i, j in enumerate(best.choice)]
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for folder in ("streams", "models"):
        (new / folder).mkdir(parents=True)
    entries = []
    for index, row in enumerate(chosen):
        file = f"streams/{index}.bin"
        shutil.copyfile(candidates.folder / "streams" / f"{row['sha256']}.bin", new / file)
        keys = ("image", "codec", "width", "height", "bytes", "sse", "ms_ssim", "sha256")
        entries.append({"file": file, **{key: row[key] for key in keys}})
    used = {row["codec"] for row in chosen}
    described = {}
    models: dict[str, dict[str, Any]] = {}
    for coder in codecs:
        if coder.name not in used:
            continue
        described[coder.name] = coder.describe()
        if model := model_of(coder):
            file = f"models/{model.id.hex()}.safetensors"
            model.save(new / file)
            data = (new / file).read_bytes()
            models[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            described[coder.name]["model"] = file
    content = {
        "format": FORMAT,
        "minimised": minimise,
        "limits": asdict(limits),
        "totals": finite(summary(best)),
        "codecs": described,
        "models": models,
        "images": entries,
    }
    (new / "decode").write_text(_DECODE, encoding="utf-8")
    (new / "decode").chmod(0o755)
    with atomic_write(new / MANIFEST, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    return best


def summary(best: "Allocation") -> dict[str, Any]:
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
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        for entry in content["images"]:
            described = content["codecs"][entry["codec"]]
            for file in (entry["file"], described.get("model", "models"), *content["models"]):
                if Path(file).is_absolute() or ".." in Path(file).parts:
                    raise ValueError(f"file {file}")
    except OSError as error:
        raise ConfigError(f"{folder / MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / MANIFEST}: not the manifest of a submission ({error})"
        ) from None
    return content


def decode(folder: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Decode a submission to PNG files; needs nothing but the folder and this package.

    A stream that cannot be decoded does not stop the others.

    Yields:
        For every image `file`, `image` and `seconds`, or `error`.

    Raises:
        ConfigError: there is no readable manifest.
    """
    manifest = read_manifest(folder)
    decoders: dict[str, ImageCodec] = {}
    for entry in manifest["images"]:
        row = {"file": entry["file"], "image": entry["image"]}
        name = entry["codec"]
        try:
            data = stream_of(folder, entry)
            if name not in decoders:
                decoders[name] = _decoder(folder, name, manifest["codecs"][name])
            started = time.perf_counter()
            image = decoders[name].decode(data)
            seconds = time.perf_counter() - started
            write_png(out / png_name(entry), image)
            yield {**row, "seconds": seconds}
        except TucodecError as error:
            yield {**row, "error": str(error)}


def png_name(entry: dict[str, Any]) -> str:
    """What a manifest's image is decoded to."""
    return f"{Path(entry['image']).stem}.png"


def _decoder(folder: Path, name: str, described: dict[str, Any]) -> ImageCodec:
    """The codec that decodes; a learned one from the file in the submission and nowhere else."""
    if "model" not in described:
        return codec(name)
    from lightning_tucodec.codecs.h266 import H266
    from lightning_tucodec.codecs.models import load

    file = folder / described["model"]
    if name.partition(":")[0] != H266.codec_name:
        return load(file)
    coder = codec(name)
    assert isinstance(coder, H266)
    return dataclasses.replace(coder, filter=str(file))


def stream_of(folder: Path, entry: dict[str, Any]) -> bytes:
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


def run_allocate(arguments: argparse.Namespace) -> int:
    """`tucodec allocate`."""
    out = Path(arguments.out)
    candidates = Candidates.of(arguments.images, arguments.candidate, out)
    if arguments.part:
        part = Part(*arguments.part)
        coded = candidates.code(arguments.workers, part)
        print(f"part {part.index}/{part.count}: {len(coded)} codings done")
        return 0
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
    if arguments.slurm is not None:
        _submit(arguments, candidates)
        return 0
    if arguments.dry_run:
        raise ConfigError("--dry-run belongs to --slurm")
    minimise: Quantity = "bytes"
    if arguments.maximise:
        minimise = "sse" if arguments.maximise == "psnr" else "ms_ssim"
    best = build(candidates, out, minimise, limits, arguments.max_bpp, arguments.workers)
    if arguments.json:
        print(json.dumps(finite(summary(best))))
        return 0
    entries = read_manifest(out)["images"]
    for name, count in Counter(entry["codec"] for entry in entries).most_common():
        size = sum(entry["bytes"] for entry in entries if entry["codec"] == name)
        print(f"{count:6d} × {name} ({100 * size / best.bytes:.1f} % of the bytes)")
    print(
        f"{best.bytes} bytes, {best.bpp:.5f} bpp, {best.psnr:.3f} dB, MS-SSIM {best.ms_ssim:.5f}; "
        f"at most {best.gap:.2g} from the optimum ({best.method})"
    )
    return 0


def _submit(arguments: argparse.Namespace, candidates: Candidates) -> None:
    """Array and last job to Slurm, or their commands to stdout.

    The last job does whatever a lost element of the array has left, so it waits for the array's end and
    not for its success.
    """
    count: int = arguments.slurm
    if count < 1:
        raise ConfigError(f"--slurm {count}: an array has at least one job")
    words = [*arguments.images, "--candidate", *arguments.candidate, "-o", arguments.out]
    limits = []
    for key in (
        "maximise",
        "max_bpp",
        "max_bytes",
        "min_psnr",
        "min_ms_ssim",
        "max_decode_seconds",
    ):
        value = getattr(arguments, key)
        if value is not None:
            limits += [f"--{key.replace('_', '-')}", str(value)]
    if arguments.json:
        limits.append("--json")
    log = candidates.folder / "logs"
    if not arguments.dry_run:
        log.mkdir(parents=True, exist_ok=True)
    options = ["--cpu", f"--cpus-per-task={arguments.workers or 4}"]
    array = [*options, "--job-name=candidates", "--shares", str(count), f"--output={log}/%A-%a.log"]
    job = _sbatch(array, ["--share", str(count), *words], arguments.dry_run)
    last = [*options, "--job-name=allocate", f"--output={log}/%j.log"]
    last.append(f"--dependency=afterany:{'ARRAY' if arguments.dry_run else job}")
    final = _sbatch(last, [*words, *limits], arguments.dry_run)
    print(
        f"{job}\n{final}" if arguments.dry_run else f"array {job}, then job {final}; logs in {log}"
    )


def _sbatch(options: list[str], words: list[str], dry: bool) -> str:
    """Submit slurm/allocate.sh with the site's options; the job's number, or the command if `dry`.

    Raises:
        ConfigError: the repository's launchers are not found.
        ExternalToolError: there is no sbatch, or it refuses.
    """
    from lightning_tucodec.sweeps import root

    launchers = root() / "slurm"
    command = [str(launchers / "submit.sh"), *(["--dry-run"] if dry else []), *options]
    command += ["--", str(launchers / "allocate.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["sbatch failed"]
        raise ExternalToolError(
            f"{reason[0]}; --slurm N --dry-run prints the commands for where jobs may be submitted"
        )
    return done.stdout.strip()


def run_decode(arguments: argparse.Namespace) -> int:
    """`tucodec clic decode`: status 1 when a stream could not be decoded, a line each on stderr."""
    folder, status = Path(arguments.submission), 0
    total = len(read_manifest(folder)["images"])
    rows = decode(folder, Path(arguments.out))
    for row in tqdm(rows, "decode", total, disable=None):
        if arguments.json:
            print(json.dumps(row), flush=True)
        if "error" in row:
            status = 1
            tqdm.write(f"tucodec: {folder / row['file']}: {row['error']}", file=sys.stderr)
    return status
