"""Measure codecs on a set of images: every image under every codec, in parallel.

Finished measurements stay in a journal beside the output (`<output>.rows.jsonl`). So an evaluation that
was stopped continues, an additional codec does not repeat the others, and a new version of an encoder is
measured again.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_tucodec.codecs.base import ImageCodec
from lightning_tucodec.codecs.classical.video import VideoCodec
from lightning_tucodec.codecs.colour import conversion_ceiling
from lightning_tucodec.coding.compiling import clock
from lightning_tucodec.errors import ConfigError, TucodecError, is_one_line
from lightning_tucodec.io.files import check_targets
from lightning_tucodec.io.images import image_files, image_size, read_image
from lightning_tucodec.io.once import once
from lightning_tucodec.io.processes import worker_threads
from lightning_tucodec.io.remarks import remarks
from lightning_tucodec.quality.perceptual import check_names
from lightning_tucodec.sets.forecast import Forecast, affordable_workers
from lightning_tucodec.sets.journal import Journal, codec_digest
from lightning_tucodec.sets.measure import (
    Row,
    content_id,
    kept_data,
    measure,
    measure_back,
    peak_memory,
)
from lightning_tucodec.sets.results import is_results, results_files, summarise, write_results


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Image files: those named, and those directly in the folders named, sorted within each; each once.

    Raises:
        ConfigError: a path does not exist or has control characters, or there is no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += image_files(path)
        elif path.exists():
            found.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    for path in found:
        if not is_one_line(str(path)):
            raise ConfigError(f"{path}: a name with control characters; rename it")
    if not found:
        raise ConfigError("no image was found; name image files or folders that hold some")
    return list({os.path.abspath(path): path for path in reversed(found)}.values())[::-1]


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
        workers: images coded in parallel; when None as many as processors and memory allow.
        keep: folder for the coded files, `<sha256 of the file>.bin`.
        part: only this share of the work, for several machines.
        others: further files of rows, which are only read.
        metrics: names of `perceptual.MEASURES`; rows that lack one are measured again, from the kept file
            where there is one.

    Returns:
        One row per pair (of the share), images outermost, in the order given: the entries of `measure` with
        `image`, `codec` and, for codecs behind our 4:2:0 conversion, `ceiling_psnr`.

    Raises:
        ImageInputError: an image cannot be read. All are read before the first is coded.
        TucodecError: an image cannot be coded; names it and the codec. What is finished stays in
            `rows_file`.
    """
    described = {codec.name: codec_digest(codec) for codec in codecs}
    if len(described) < len(codecs):
        raise ConfigError("a codec is given twice")
    journal = Journal(rows_file, others)
    jobs = [
        _Job(path, codec, described[codec.name])
        for i, path in enumerate(images)
        for j, codec in enumerate(codecs)
        if part is None or part.holds(j * len(images) + i)
    ]
    # Threads suffice: coders are other processes or release the interpreter's lock.
    sizes = {path: math.prod(image_size(path) or [0]) for path in images}
    workers = affordable_workers(max(sizes.values())) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers: {workers} is not at least 1")
    remark = remarks()

    def read(path: Path) -> tuple[NDArray[np.uint8], str]:
        return _load(
            path, lambda loss: remark(loss, path, f"{loss}; 8-bit RGB is coded and compared")
        )

    load = once(read, workers + 1)
    forecast = Forecast([(job.described, sizes[job.image]) for job in jobs], workers)
    names = [path.name for path in images]
    unique = len(set(names)) == len(names)

    def one(job: _Job) -> Row:
        try:
            digest = digests[job.image]
            key = f"{digest}-{job.described}"
            row = journal.get(key)
            lacking = row is None or any(name not in row for name in metrics)
            kept = kept_data(keep, row)
            if row is None or lacking or (keep is not None and kept is None):
                image, found = load(job.image)
                if found != digest:
                    raise ConfigError(f"{job.image}: was replaced while the evaluation ran")
                started = clock()
                if row is None or kept is None:
                    row = {**(row or {}), **measure(job.codec, image, keep, metrics)}
                else:  # a further measure needs no second coding
                    row = {**row, **measure_back(job.codec, image, kept, metrics)}
                if isinstance(job.codec, VideoCodec) and job.codec.subsampling == "420":
                    row["ceiling_psnr"] = conversion_ceiling(image)
                journal.add(key, row)
                line = forecast.finished(job.described, sizes[job.image], clock() - started)
                if line:
                    tqdm.write(line, file=sys.stderr)
            else:
                forecast.known(job.described, sizes[job.image], row)
            label = job.image.name if unique else str(job.image)
            return {"image": label, "codec": job.codec.name, "pixels": digest, **row}
        except TucodecError as error:
            text = str(error)
            where = "" if str(job.image) in text else f"{job.image}, {job.codec.name}: "
            raise type(error)(f"{where}{text}") from error

    with worker_threads(workers) as pool:
        named = list(dict.fromkeys(job.image for job in jobs))
        digests = dict(zip(named, pool.map(lambda path: load(path)[1], named), strict=True))
        futures = {pool.submit(one, job): index for index, job in enumerate(jobs)}
        rows: dict[int, Row] = {}
        for future in tqdm(as_completed(futures), "evaluate", len(jobs), disable=None):
            rows[futures[future]] = future.result()
    return [rows[index] for index in range(len(jobs))]


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
    check_targets(results_files(output), [*images, journal], force, is_results)
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


def _known_peak_memory(text: str, codec: ImageCodec, image: Path, rows_file: Path) -> int:
    """`peak_memory`, measured once and kept in the journal."""
    key = f"{_load(image)[1]}-{codec_digest(codec)}-memory"
    journal = Journal(rows_file)
    known = journal.get(key)
    if known is None:
        known = {"peak_memory": peak_memory(text, image)}
        journal.add(key, known)
    return int(known["peak_memory"])


def _load(
    path: Path, lost: Callable[[str], None] = lambda kind: None
) -> tuple[NDArray[np.uint8], str]:
    """An image and its `content_id`; `lost` as for `read_image`."""
    image = read_image(path, lost)
    return image, content_id(image)
