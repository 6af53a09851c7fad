"""Measure codecs on a set of images: real bytes, quality and seconds, per image and for the set.

Every finished measurement is appended to `<output>.rows.jsonl` beside the output. Its key is made of the
image's pixels and the codec's description (name, version, command, colour path). So an evaluation that was
stopped continues, an additional codec does not repeat the others, and a new version of an encoder is
measured again.
"""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.classical.video import VideoCodec
from lightning_tucodec.codecs.colour import conversion_ceiling
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import ConfigError, ExternalToolError, OutputError, TucodecError
from lightning_tucodec.io.files import begins_with, check_targets
from lightning_tucodec.io.images import image_files, read_image
from lightning_tucodec.io.once import once
from lightning_tucodec.io.processes import (
    INTERRUPTS,
    cores,
    end_on_interrupt,
    interrupt_children,
    worker_threads,
)
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.decibels import ms_ssim_db, psnr_from_sse
from lightning_tucodec.quality.perceptual import DEFINITIONS as PERCEPTUAL
from lightning_tucodec.quality.perceptual import MEASURES, check_names

if TYPE_CHECKING:
    from lightning_tucodec.sets.allocation import Table

FORMAT = "tucodec-evaluation-1"

_HEADS = (f'{{\n "format": "{FORMAT}"', "image,codec,", "codec,images,bytes,")
"""How the files of `write_results` begin, by which an evaluation knows its own."""

_JOURNAL = '{"key": "'
"""How rows of measurements begin."""

DEFINITIONS = {
    "pixels": "digest of the original's size and pixels",
    "bpp": "8 * all bytes of the coded files, headers included / all pixels of the originals",
    "psnr": "RGB, 8 bit, pooled: squared error summed over all values of all images (CLIC)",
    "psnr_y": "BT.709 full-range luma of the 8-bit RGB, not rounded, pooled",
    "ms_ssim": "RGB, mean of the images' values weighted by their pixels (CLIC)",
    "*_mean": "mean of the images' own values, as most papers average",
    "ms_ssim_db": "-10 * log10(1 - MS-SSIM)",
    "ceiling_psnr": "pooled PSNR of the conversion to 10-bit 4:2:0 and back alone; where the codec "
    "works behind that conversion it cannot exceed it",
    "seconds": "wall clock, including the start of external programs; machines under load differ",
    "peak_memory": "bytes: largest resident set of a process that codes and decodes the largest "
    "image, or of the program it calls; interpreter and libraries are part of it",
}
"""The averaging rules, which stand in every result."""

Row = dict[str, Any]

_NUMBERS = (
    *("width", "height", "bytes", "bpp", "sse", "sse_y", "psnr", "psnr_y"),
    *("encode_seconds", "decode_seconds"),
)
_SIMILARITY = ("ms_ssim", "ms_ssim_db")
"""What every row of `measure` holds; MS-SSIM may be None."""


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files: those named, and those directly in the folders named, sorted within each; each once.

    Raises:
        ConfigError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += image_files(path)
        elif path.exists():
            found.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    if not found:
        raise ConfigError("no image was found; name image files or folders that hold some")
    return list({os.path.abspath(path): path for path in reversed(found)}.values())[::-1]


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
        with atomic_write(_kept(keep, row)) as stream:
            stream.write(data)
    return row


def measure_back(
    codec: ImageCodec, image: NDArray[np.uint8], data: bytes, metrics: Sequence[str] = ()
) -> Row:
    """Decode a coded file and compare it with the original.

    Returns:
        `width, height, bytes, bpp, sse, psnr, psnr_y, ms_ssim, ms_ssim_db, ms_ssim_scales,
        decode_seconds, sha256` (of the coded file), and the perceptual `metrics`; MS-SSIM is None for
        images with a side below 11 pixels.

    Raises:
        TucodecError: the codec cannot decode the file, or to another size.
    """
    started = clock()
    back = codec.decode(data)
    seconds = clock() - started
    return {
        **compare(image, back, len(data)),
        **{name: MEASURES[name](image, back) for name in metrics},
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


@dataclass(frozen=True)
class Part:
    """Share `index` (from 1) of `count` shares of numbered jobs."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ConfigError(f"part {self.index}/{self.count}: there are parts 1 to {self.count}")

    def holds(self, number: int) -> bool:
        """Whether a job belongs to this share; jobs of a codec are adjacent, so shares cost the same."""
        return number % self.count == self.index - 1


@dataclass(frozen=True)
class _Job:
    """One image under one codec."""

    image: Path
    codec: ImageCodec
    described: str


def evaluate(
    images: Sequence[Path],
    codecs: Sequence[ImageCodec],
    rows_file: Path,
    workers: int | None = None,
    keep: Path | None = None,
    part: Part | None = None,
    others: Iterable[Path] = (),
    metrics: Sequence[str] = (),
) -> list[Row]:
    """Measure every image under every codec, continuing what `rows_file` already holds.

    Args:
        images: files.
        codecs: at their settings.
        rows_file: JSON lines; measurements are appended as they finish.
        workers: images coded in parallel; the number of processors when None.
        keep: folder for the coded files, `<sha256 of the file>.bin`.
        part: only this share of the work, for several machines.
        others: more files of rows, which are only read.
        metrics: names of `perceptual.MEASURES`; rows that lack one are measured again.

    Returns:
        One row a pair (of the share), images outermost, in the order given: the entries of `measure` with
        `image`, `codec` and, for codecs behind our 4:2:0 conversion, `ceiling_psnr`.

    Raises:
        TucodecError: an image cannot be read or coded; names it and the codec. What is finished
            stays in `rows_file`.
    """
    described = {codec.name: _digest(codec.describe()) for codec in codecs}
    if len(described) < len(codecs):
        raise ConfigError("a codec is given twice")
    known = _read_rows(rows_file)
    for path in others:
        known.update(_read_rows(path))
    jobs = [
        _Job(path, codec, described[codec.name])
        for i, path in enumerate(images)
        for j, codec in enumerate(codecs)
        if part is None or part.holds(j * len(images) + i)
    ]
    # Threads serve: coders are other processes or release the interpreter's lock.
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not at least 1")
    load = once(_load, workers + 1)
    lock = threading.Lock()
    names = [path.name for path in images]
    unique = len(set(names)) == len(names)

    def one(job: _Job) -> Row:
        try:
            image, digest = load(job.image)
            key = f"{digest}-{job.described}"
            row = known.get(key)
            lacking = row is None or any(name not in row for name in metrics)
            if row is None or lacking or (keep is not None and not _kept(keep, row).exists()):
                row = {**(row or {}), **measure(job.codec, image, keep, metrics)}
                if isinstance(job.codec, VideoCodec) and job.codec.subsampling == "420":
                    row["ceiling_psnr"] = conversion_ceiling(image)
                with lock, rows_file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, **row}) + "\n")
            label = job.image.name if unique else str(job.image)
            return {"image": label, "codec": job.codec.name, "pixels": digest, **row}
        except TucodecError as error:
            text = str(error)
            where = "" if str(job.image) in text else f"{job.image}, {job.codec.name}: "
            raise type(error)(f"{where}{text}") from error

    with worker_threads(workers) as pool:
        futures = {pool.submit(one, job): index for index, job in enumerate(jobs)}
        rows: dict[int, Row] = {}
        for future in tqdm(as_completed(futures), "evaluate", len(jobs), disable=None):
            rows[futures[future]] = future.result()
    return [rows[index] for index in range(len(jobs))]


def _kept(keep: Path, row: Row) -> Path:
    """Where the coded file of a row lies."""
    return keep / f"{row['sha256']}.bin"


def summarise(rows: Sequence[Row], codecs: Sequence[ImageCodec]) -> list[Row]:
    """One row a codec for the whole set; see `DEFINITIONS`."""
    from lightning_tucodec.quality.metrics import bits_per_pixel

    sets = []
    for codec in codecs:
        own = [row for row in rows if row["codec"] == codec.name]
        area = [row["width"] * row["height"] for row in own]
        size, pixels = sum(row["bytes"] for row in own), sum(area)
        similar = [row["ms_ssim"] for row in own]
        weighted = plain = None
        if all(value is not None for value in similar):
            weighted = float(np.average(similar, weights=area))
            plain = float(np.mean(similar))
        entry: Row = {
            "codec": codec.name,
            "images": len(own),
            "bytes": size,
            "bpp": bits_per_pixel(size, pixels),
            "bpp_mean": _mean(own, "bpp"),
            "psnr": psnr_from_sse(sum(row["sse"] for row in own), 3 * pixels),
            "psnr_mean": _mean(own, "psnr"),
            "psnr_y": psnr_from_sse(math.fsum(row["sse_y"] for row in own), pixels),
            "psnr_y_mean": _mean(own, "psnr_y"),
            "ms_ssim": weighted,
            "ms_ssim_mean": plain,
            "ms_ssim_db": None if weighted is None else float(ms_ssim_db(weighted)),
            "encode_seconds": math.fsum(row["encode_seconds"] for row in own),
            "decode_seconds": math.fsum(row["decode_seconds"] for row in own),
        }
        entry |= {m: _mean(own, m) for m in MEASURES if all(m in row for row in own)}
        if "ceiling_psnr" in own[0]:
            squared = [
                3 * n * 10 ** (-row["ceiling_psnr"] / 10) for n, row in zip(area, own, strict=True)
            ]
            total = math.fsum(squared)
            entry["ceiling_psnr"] = psnr_from_sse(total, 3 * pixels, peak=1.0)
        sets.append(entry)
    return sets


def write_results(
    output: Path,
    rows: Sequence[Row],
    sets: Sequence[Row],
    codecs: Sequence[ImageCodec],
    specifications: Sequence[str] = (),
) -> None:
    """Everything as JSON to `output`; rows and sets as CSV beside it, in `.csv` and `.sets.csv`.

    Each row of the CSV files describes its codec, and each row of a set its averaging rule.

    Args:
        output: ends in .json.
        rows: of `evaluate`.
        sets: of `summarise`.
        codecs: those measured.
        specifications: the text that named each codec; it locates a model that was given as a file.
    """
    described = {codec.name: codec.describe() for codec in codecs}
    for codec, text in zip(codecs, specifications, strict=bool(specifications)):
        described[codec.name]["specification"] = text
    content = {
        "format": FORMAT,
        "definitions": DEFINITIONS | {k: v for k, v in PERCEPTUAL.items() if k in sets[0]},
        "codecs": described,
        "sets": sets,
        "rows": rows,
    }
    with atomic_write(output, "w") as stream:
        json.dump(finite(content), stream, indent=1, allow_nan=False)
        stream.write("\n")
    codings = {}
    for name, entry in described.items():
        command = entry.get("command") or json.dumps(entry.get("options", {}))
        codings[name] = {
            "version": entry["version"],
            "command": command,
            "colour": entry["colour"],
        }
    by_image, by_codec = _tables(output)
    _write_csv(by_image, [{**row, **codings[row["codec"]]} for row in rows])
    averaging = {"averaging": "; ".join(f"{k}: {v}" for k, v in DEFINITIONS.items())}
    lines = [{**entry, **codings[entry["codec"]], **averaging} for entry in sets]
    _write_csv(by_codec, lines)


def _tables(output: Path) -> tuple[Path, Path]:
    """Where rows and sets lie as CSV."""
    return output.with_suffix(".csv"), output.with_suffix(".sets.csv")


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path, "w") as stream:
        stream.write(text.getvalue())


def allocation_table(rows: Sequence[Row]) -> "Table":
    """The rows of an evaluation as the table that `allocation.allocate` chooses from.

    Raises:
        ConfigError: an image is too small for MS-SSIM.
    """
    from lightning_tucodec.sets.allocation import Table

    images = list(dict.fromkeys(row["image"] for row in rows))
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    shape = len(images), len(codecs)
    size = np.full(shape, -1, np.int64)
    error = np.zeros(shape, np.int64)
    similarity, seconds = np.zeros(shape), np.zeros(shape)
    pixels = np.zeros(len(images), np.int64)
    for row in rows:
        i, j = images.index(row["image"]), codecs.index(row["codec"])
        if row["ms_ssim"] is None:
            raise ConfigError(f"{row['image']}: too small for MS-SSIM (11 pixels a side)")
        size[i, j], error[i, j], similarity[i, j] = row["bytes"], row["sse"], row["ms_ssim"]
        seconds[i, j] = row["decode_seconds"]
        pixels[i] = row["width"] * row["height"]
    return Table(images, codecs, pixels, size, error, similarity, seconds)


def run(
    paths: Sequence[str],
    specifications: Sequence[str],
    out: str,
    workers: int | None = None,
    keep: str | None = None,
    memory: bool = False,
    metrics: Sequence[str] = (),
    force: bool = False,
) -> list[Row]:
    """`tucodec evaluate`: measure, write, and return the set rows.

    Results of an earlier evaluation are rewritten: their measurements stay in the rows beside them.
    """
    from lightning_tucodec.codecs import registry

    output = Path(out)
    if output.suffix != ".json":
        raise ConfigError(f"{out}: the name of the results must end in .json")
    metrics = check_names(metrics)
    specifications = registry.expand(specifications)
    codecs = registry.codecs(specifications)
    folder = Path(keep) if keep else None
    journal = output.with_suffix(".rows.jsonl")
    images = find_images(paths)
    check_targets(
        (output, *_tables(output)),
        [*images, journal],
        force,
        lambda path: begins_with(path, _HEADS),
    )
    rows = evaluate(images, codecs, journal, workers, folder, metrics=metrics)
    sets = summarise(rows, codecs)
    if memory:
        area = [row["width"] * row["height"] for row in rows[:: len(codecs)]]
        largest = images[area.index(max(area))]
        pairs = zip(sets, specifications, codecs, strict=True)
        for entry, text, coder in tqdm(pairs, "memory", len(sets), disable=None):
            entry["peak_memory"] = _known_peak_memory(text, coder, largest, journal)
    write_results(output, rows, sets, codecs, specifications)
    return sets


def peak_memory(specification: str, image: Path) -> int:
    """Bytes at the peak while a codec codes and decodes an image in a process of its own (Linux).

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

    coder = codec(specification)
    coder.decode(coder.encode(read_image(image)))
    # Not getrusage of this process, which counts the parent's memory from before the exec.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own = int(status.split("VmHWM:")[1].split()[0])
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _known_peak_memory(text: str, codec: ImageCodec, image: Path, journal: Path) -> int:
    """`peak_memory`, measured once and kept in the journal."""
    key = f"{_load(image)[1]}-{_digest(codec.describe())}-memory"
    known = _read_rows(journal)
    if key not in known:
        known[key] = {"peak_memory": peak_memory(text, image)}
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": key, **known[key]}) + "\n")
    return int(known[key]["peak_memory"])


def table_text(sets: Sequence[Row]) -> str:
    """The set rows as a text table."""
    width = max(len(entry["codec"]) for entry in sets)
    further = [name for name in MEASURES if all(name in entry for entry in sets)]
    heading = f"{'codec':{width}}      bytes     bpp    PSNR  PSNR-Y  MS-SSIM   mean PSNR"
    lines = [heading + "".join(f"  {name:>11}" for name in further)]
    for entry in sets:
        similarity = "      –" if entry["ms_ssim"] is None else f"{entry['ms_ssim']:.5f}"
        lines.append(
            f"{entry['codec']:{width}} {entry['bytes']:10d} {entry['bpp']:7.4f} "
            f"{entry['psnr']:7.3f} {entry['psnr_y']:7.3f}  {similarity}     {entry['psnr_mean']:7.3f}"
            + "".join(f"  {entry[name]:11.4f}" for name in further)
        )
    return "\n".join(lines)


def _load(path: Path) -> tuple[NDArray[np.uint8], str]:
    """An image and its `content_id`."""
    image = read_image(path)
    return image, content_id(image)


def content_id(image: NDArray[np.uint8]) -> str:
    """Identity of a picture by its content, whatever its file name: 32 hexadecimal digits of a digest."""
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:32]


def _digest(described: Mapping[str, Any]) -> str:
    """A short digest of what a codec says of itself."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _read_rows(path: Path) -> dict[str, Row]:
    """Finished rows by key; makes the file ready for more."""
    rows: dict[str, Row] = {}
    if os.path.lexists(path) and not begins_with(path, [_JOURNAL]):
        raise OutputError(f"{path}: exists and holds no measurements; name another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        stream.seek(0)
        line = "\n"
        for line in stream:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(row, dict)
                and isinstance(key := row.pop("key", None), str)
                and _whole(row)
            ):
                rows[key] = row
        # A killed process may have left half a line.
        if not line.endswith("\n"):
            stream.write("\n")
    return rows


def _whole(row: Row) -> bool:
    """Whether a row that was read holds all of a measurement, of the right kinds."""
    if isinstance(row.get("peak_memory"), int):
        return True
    numbers = all(type(row.get(key)) in (int, float) for key in _NUMBERS)
    similarity = all(row.get(key, "") is None or type(row.get(key)) is float for key in _SIMILARITY)
    digest = row.get("sha256")
    kept = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
    return numbers and similarity and kept


def _mean(rows: Sequence[Row], key: str) -> float:
    return math.fsum(row[key] for row in rows) / len(rows)


def finite(value: Any) -> Any:
    """The same for JSON, which has no infinity: the PSNR of a lossless coding becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
