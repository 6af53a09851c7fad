"""A set coded under one budget, as CLIC takes it: choose, write and decode (`manifest` has the format).

The rate that counts is the streams' bytes. Coded candidates and their measurements stay in a folder
beside it (`<submission>-candidates`). So a stopped run continues, several machines share the work, and
another budget only repeats the choice.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.registry import codec, codecs, expand, files, model_of, split
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import ConfigError, ExternalToolError, OutputError, TucodecError
from lightning_tucodec.io.files import check_targets, launchers
from lightning_tucodec.io.images import image_size, write_png
from lightning_tucodec.io.temporary import FORMER, atomic_write, temporary_folder
from lightning_tucodec.quality.decibels import MS_SSIM_WINDOW
from lightning_tucodec.sets.contents import (
    DECODE,
    DECODE_ALL_TEXT,
    DECODE_TEXT,
    budgets,
    foreign,
    write_script,
)
from lightning_tucodec.sets.evaluate import Part, evaluate, find_images
from lightning_tucodec.sets.limits import Requirements
from lightning_tucodec.sets.manifest import FORMAT, MANIFEST, png_name, read_manifest, told_file
from lightning_tucodec.sets.measure import Row
from lightning_tucodec.sets.results import allocation_table, finite

if TYPE_CHECKING:
    from lightning_tucodec.sets.allocation import Allocation, Quantity


@dataclass(frozen=True)
class Candidates:
    """Images, codecs and the folder beside the submission where each pair is coded once.

    Attributes:
        paths: images; their file names without suffixes all differ.
        codecs: the candidates.
        folder: `rows.jsonl`, those of parts, and `streams/<sha256>.bin`.
    """

    paths: list[Path]
    codecs: list[ImageCodec]
    folder: Path

    @classmethod
    def of(cls, images: Sequence[str], specifications: Sequence[str], out: Path) -> "Candidates":
        """Find the images and build the codecs for a submission in the folder `out`.

        Raises:
            ConfigError: there is no image, one is too small for MS-SSIM, two would be decoded to one name,
                or a codec is unknown.
            OutputError: `out` holds something that must not be replaced.
        """
        paths = find_images(images)
        for path in [*paths, *(Path(file) for text in specifications for file in files(text))]:
            if path.resolve().is_relative_to(out.resolve()):
                raise OutputError(f"{path}: lies in {out}, which is to be replaced")
        _check_replaceable(out, out)
        named: dict[str, Path] = {}
        for path in paths:
            if (other := named.setdefault(path.stem, path)) is not path:
                raise ConfigError(
                    f"{other} and {path}: both would be decoded to {path.stem}.png; rename one"
                )
            size = image_size(path)
            if size is not None and min(size) < MS_SSIM_WINDOW:
                raise ConfigError(
                    f"{path}: too small for MS-SSIM, which needs {MS_SSIM_WINDOW} pixels a side"
                )
        coders = codecs(expand(specifications))
        return cls(paths, coders, out.with_name(out.name + "-candidates"))

    def code(self, workers: int | None, part: Part | None = None) -> list[Row]:
        """Code and measure what is missing, or a share of it; one row per pair, images outermost."""
        own = "rows.jsonl" if part is None else f"rows.{part.index}-of-{part.count}.jsonl"
        others = [path for path in sorted(self.folder.glob("rows*.jsonl")) if path.name != own]
        streams = self.folder / "streams"
        return evaluate(self.paths, self.codecs, self.folder / own, workers, streams, part, others)


def build(
    candidates: Candidates,
    out: Path,
    minimise: "Quantity",
    required: Requirements,
    workers: int | None = None,
) -> "dict[str, Allocation]":
    """Code every image with every candidate, choose, and write the submission.

    Args:
        candidates: what there is to choose from.
        out: the submission's folder. An earlier submission there is replaced if this program wrote every
            file of it; at any moment either the earlier or the new one exists.
        minimise: `sse` or `ms_ssim` for the best quality, or `bytes`.
        required: limits that the set must meet; with several budgets each has its own folder in `out`.
        workers: codings at a time; all processors when None.

    Returns:
        The choices by the names of their folders in `out`; "" for a single one.

    Raises:
        ConfigError: no choice meets the limits.
        OutputError: the folder holds something else.
        TucodecError: an image cannot be read or coded.
    """
    # Imported only where something is chosen: a decoder need not wait for numba.
    from lightning_tucodec.sets.allocation import allocate

    out = out.resolve()
    rows = candidates.code(workers)
    table = allocation_table(rows)
    if required.max_image_bpp is not None:
        table = table.capped(required.max_image_bpp)
    parts = required.parts()
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    # A unique name, which cannot collide with anything beside it.
    with temporary_folder(out) as work:
        new = work / "new"
        for name, part in parts.items():
            limits = asdict(part.over(int(table.pixels.sum())))
            best = found[name] = allocate(table, minimise, **limits)
            chosen = [rows[i * len(table.candidates) + int(j)] for i, j in enumerate(best.choice)]
            about = {"minimised": minimise, "limits": limits, "totals": finite(summary(best))}
            _write(new / name, candidates, chosen, about)
        if len(parts) > 1:
            write_script(new / DECODE, DECODE_ALL_TEXT)
        if reason := foreign(new):
            raise ConfigError(f"{candidates.folder}: is damaged, remove it ({reason})")
        _put(new, out)
    return found


def _write(
    new: Path, candidates: Candidates, chosen: Sequence[Row], about: Mapping[str, Any]
) -> None:
    """A submission of the chosen codings in a new folder; `about` are further keys of the manifest."""
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
    for coder in candidates.codecs:
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
        **about,
        "codecs": described,
        "models": models,
        "images": entries,
    }
    write_script(new / DECODE, DECODE_TEXT)
    with atomic_write(new / MANIFEST, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")


def _check_replaceable(folder: Path, shown: Path) -> None:
    """Raise OutputError if replacing `folder` would lose anything; the message calls it `shown`."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputError(f"{shown}: is not a folder; name another place")
    try:
        reason = foreign(folder)
    except OSError as error:
        raise OutputError(f"{shown}: {error.strerror}") from None
    if reason is not None:
        raise OutputError(
            f"{shown} holds something else than a submission of this program ({reason}); "
            "name a new folder"
        )


def _put(new: Path, out: Path) -> None:
    """Rename `new` to `out`; a former submission there ends as `FORMER` beside `new`."""
    if os.path.lexists(out):
        _check_replaceable(out, out)
        former = new.with_name(FORMER)
        out.rename(former)
        # Check again: others may have added files before the rename. If so, the caller puts it back.
        _check_replaceable(former, out)
    new.rename(out)


def summary(best: "Allocation") -> dict[str, Any]:
    """The numbers of an allocation, as `tucodec allocate --json` ends with."""
    return {
        key: getattr(best, key)
        for key in ("bytes", "bpp", "psnr", "ms_ssim", "bound", "gap", "method")
    }


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
            data = told_file(folder, entry["file"], entry)
            if name not in decoders:
                decoders[name] = _decoder(folder, name, manifest)
            started = clock()
            image = decoders[name].decode(data)
            seconds = clock() - started
            height, width = image.shape[:2]
            if (width, height) != (entry["width"], entry["height"]):
                raise ConfigError(f"decodes to {width}×{height} pixels")
            write_png(out / png_name(entry), image)
            yield {**row, "seconds": seconds}
        except TucodecError as error:
            yield {**row, "error": " ".join(str(error).split())}
        except OSError as error:
            yield {**row, "error": f"{out / png_name(entry)}: {error.strerror}"}


def _decoder(folder: Path, name: str, manifest: Mapping[str, Any]) -> ImageCodec:
    """The codec that decodes; a learned one from the file in the submission and nowhere else."""
    model = manifest["codecs"][name].get("model")
    if model is not None:
        from lightning_tucodec.codecs.h266.codec import H266
        from lightning_tucodec.codecs.library import load_coder

        told_file(folder, model, manifest["models"][model])
        if split(name)[0] != H266.codec_name:
            return load_coder(folder / model)
    coder = codec(name)
    if coder.name != name:
        raise ConfigError(f"the codec {name} is written {coder.name}")
    if model is None:
        return coder
    assert isinstance(coder, H266)
    return dataclasses.replace(coder, filter=str(folder / model))


def run_allocate(arguments: argparse.Namespace) -> int:
    """`tucodec allocate`."""
    out = Path(os.path.abspath(arguments.out))
    candidates = Candidates.of(arguments.images, arguments.candidate, out)
    if arguments.part:
        part = Part(*arguments.part)
        coded = candidates.code(arguments.workers, part)
        print(f"part {part.index}/{part.count}: {len(coded)} codings done")
        return 0
    required = Requirements.of(arguments)
    if required.budgets and arguments.max_bytes is not None:
        raise ConfigError("give --max-bpp or --max-bytes, not both")
    if not required.given():
        raise ConfigError("without a limit there is nothing to allocate: --max-bpp, --min-psnr, …")
    if arguments.slurm is not None:
        _submit(arguments, candidates)
        return 0
    if arguments.dry_run:
        raise ConfigError("--dry-run belongs to --slurm")
    minimise: Quantity = "bytes"
    if arguments.maximise:
        minimise = "sse" if arguments.maximise == "psnr" else "ms_ssim"
    found = build(candidates, out, minimise, required, arguments.workers)
    if arguments.json:
        told = {name: finite(summary(best)) for name, best in found.items()}
        print(json.dumps(told.get("", told)))
        return 0
    for name, best in found.items():
        if name:
            print(f"{name} bpp")
        _tell(read_manifest(out / name)["images"], best)
    if not (arguments.maximise or arguments.min_psnr or arguments.min_ms_ssim):
        text = "these are the smallest files, as no quality is asked for: see --maximise"
        print(f"tucodec: {text}", file=sys.stderr)
    return 0


def _tell(entries: Sequence[Row], best: "Allocation") -> None:
    """Print a choice in readable form."""
    for name, count in Counter(entry["codec"] for entry in entries).most_common():
        size = sum(entry["bytes"] for entry in entries if entry["codec"] == name)
        print(f"{count:6d} × {name} ({100 * size / best.bytes:.1f} % of the bytes)")
    print(
        f"{best.bytes} bytes, {best.bpp:.5f} bpp, {best.psnr:.3f} dB, MS-SSIM {best.ms_ssim:.5f}; "
        f"at most {best.gap:.2g} from the optimum ({best.method})"
    )


def _submit(arguments: argparse.Namespace, candidates: Candidates) -> None:
    """Submit the array and the last job to Slurm, or print their commands.

    The last job completes what lost elements of the array have left undone. So it waits for the array's
    end, not for its success.
    """
    count: int = arguments.slurm
    if count > len(candidates.paths):
        raise ConfigError(f"--slurm {count}: more jobs than images ({len(candidates.paths)})")
    words = [*arguments.images, "--candidate", *arguments.candidate, "-o", arguments.out]
    words += [word for package in arguments.trust for word in ("--trust", package)]
    limits = []
    for key in (
        "maximise",
        "max_bpp",
        "max_bytes",
        "min_psnr",
        "min_ms_ssim",
        "max_decode_seconds",
        "max_decode_seconds_per_megapixel",
        "max_image_bpp",
    ):
        value = getattr(arguments, key)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            limits += [f"--{key.replace('_', '-')}", text]
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
    folder = launchers()
    command = [str(folder / "submit.sh"), *(["--dry-run"] if dry else []), *options]
    command += ["--", str(folder / "allocate.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["sbatch failed"]
        raise ExternalToolError(
            f"{reason[0]}; --slurm N --dry-run prints the commands for where jobs may be submitted"
        )
    return done.stdout.strip()


def run_decode(arguments: argparse.Namespace) -> int:
    """`tucodec clic decode`: status 1 when a stream could not be decoded, a line each on stderr.

    Pictures of a submission for several budgets go to a folder for each, as its `decode` makes them.
    """
    folder, out, status = Path(arguments.submission), Path(arguments.out), 0
    parts = budgets(folder) or [""]
    entries = [(part, entry) for part in parts for entry in read_manifest(folder / part)["images"]]
    if out.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"-o {out}: lies in the submission, which holds only its own files; name another"
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"-o {out}: is a file; name a folder")
    targets = [out / part / png_name(entry) for part, entry in entries]
    check_targets(targets, force=arguments.force)
    rows = (
        {**row, "file": str(Path(part, row["file"]))}
        for part in parts
        for row in decode(folder / part, out / part)
    )
    for row in tqdm(rows, "decode", len(entries), disable=None):
        if arguments.json:
            print(json.dumps(row), flush=True)
        if "error" in row:
            status = 1
            tqdm.write(f"tucodec: {folder / row['file']}: {row['error']}", file=sys.stderr)
    return status
