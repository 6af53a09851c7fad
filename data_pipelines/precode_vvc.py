"""`tucodec shards precode`: photographs through H.266 -> shards of decoded planes beside the original.

1. Each photograph is coded as a whole, at some of the settings given; the streams lie in a cache, by the
   hash of the photograph's bytes and of the codec's description. So a build that was stopped resumes, and an
   additional setting does not repeat the others.
2. Patches of the decoded pictures, at even coordinates, are dealt to shards. A shard is a function of the
   plan and the streams alone.

A sample is `training.input.precoded.Precoded` as bytes. The index is written last, as in `tucodec shards
build`.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.patches import contrast, grid, luma
from data_pipelines.sources import Entry, Source, fingerprint, list_entries
from data_pipelines.store import INDEX, describe_shard, json_line, named_stream, shard_name
from data_pipelines.tasks import run_tasks
from lightning_tucodec.codecs.h266.vvc import Vvc
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.io.hashing import derive, permute
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.input.precoded import FORMAT, Precoded

_STATE = ".build"


@dataclass(frozen=True)
class PrecodeOptions:
    """Everything besides the photographs that decides the bytes of a build.

    Attributes:
        codecs: settings, such as `vvc:qp=38`.
        per_photo: how many of them each photograph is coded at.
        patch: side of a patch, pixels, even.
        shard_size: patches in a shard (the last one may hold fewer).
        seed: decides settings, places and order.
        min_contrast: patches whose luma has a smaller standard deviation are not used.
    """

    codecs: tuple[str, ...]
    per_photo: int = 2
    patch: int = 160
    shard_size: int = 1024
    seed: int = 0
    min_contrast: float = 2.0

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        if self.patch < 2 or self.patch % 2:
            raise ConfigError(f"--patch {self.patch}: must be even, since chroma is halved")
        if self.shard_size < 1:
            raise ConfigError(f"--shard-size {self.shard_size}: must be at least 1")
        if not 1 <= self.per_photo <= len(self.codecs):
            raise ConfigError(
                f"--per-photo {self.per_photo}: there are {len(self.codecs)} settings"
            )
        for text in self.codecs:
            setting_of(text)


class _Job(NamedTuple):
    """One photograph under one setting."""

    entry: Entry
    specification: str
    stream: str


class _Piece(NamedTuple):
    """A run of patches of one coded picture that go to one shard: (row in the shard, x, y)."""

    job: _Job
    patches: list[tuple[int, int, int]]


def setting_of(specification: str) -> Vvc:
    """The H.266 setting of a specification.

    Raises:
        ConfigError: it names another codec.
    """
    found = codec(specification)
    if not isinstance(found, Vvc):
        raise ConfigError(f"{specification}: only H.266, as in vvc:qp=38, is pre-coded")
    return found


def precode(
    locations: Sequence[str],
    out: str,
    options: PrecodeOptions,
    *,
    workers: int = 1,
    cache: str | None = None,
) -> dict[str, Any]:
    """Build shards, or resume an interrupted build.

    Args:
        locations: as for `data_pipelines.shards.build`.
        out: a local folder.
        options: see `PrecodeOptions`.
        workers: processes.
        cache: folder for the coded streams; `streams` in `out` when None.

    Returns:
        The content of the index.

    Raises:
        ConfigError: an option cannot work.
        DatasetError: no photographs, or `out` holds another build.
    """
    options.check()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    storage = Storage(out)
    if storage.remote:
        raise ConfigError(f"{out}: pre-coded shards are built in a local folder")
    sources = [Source(location) for location in locations]
    entries = list_entries(sources, str(out))
    name = fingerprint(sources, entries, json.dumps(asdict(options), sort_keys=True))
    done = _claim(storage, name)
    if done is not None:
        return done
    try:
        return _advance(locations, out, options, workers, cache, sources, entries, name)
    except (FileNotFoundError, DatasetError):
        # Another process may have completed the same build and removed its records.
        done = _claim(storage, name)
        if done is None:
            raise
        return done


def _advance(
    locations: Sequence[str], out: str, options: PrecodeOptions, workers: int, cache: str | None,
    sources: list[Source], entries: list[Entry], name: str,
) -> dict[str, Any]:  # fmt: skip
    """Do what is left of a build; returns the index."""
    storage = Storage(out)
    streams = Path(cache) if cache else Path(storage.path("streams"))
    described = {text: _digest(setting_of(text).describe()) for text in options.codecs}
    jobs = []
    for number, entry in enumerate(entries):
        photo = hashlib.sha256(_read(sources[entry.source], entry)).hexdigest()[:32]
        order = permute(
            np.arange(options.per_photo), len(options.codecs), derive(options.seed, number)
        )
        chosen = [options.codecs[int(i)] for i in order]
        jobs += [
            _Job(entry, text, str(streams / f"{photo}-{described[text]}.bin")) for text in chosen
        ]
    missing = [job for job in jobs if not Path(job.stream).exists()]
    run_tasks(_code, ((locations, job) for job in missing), len(missing), workers, "code")
    shards = _deal(jobs, locations, options)
    names = [shard_name(number) for number in range(len(shards))]
    records = [f"{_STATE}/{name}.json" for name in names]
    todo = [n for n, record in enumerate(records) if storage.size(record) is None]
    tasks = ((locations, out, n, options.patch, shards[n]) for n in todo)
    run_tasks(_write_shard, tasks, len(todo), workers, "write")
    described_shards = [json.loads(storage.read(record)) for record in records]
    index = {
        "kind": "tucodec-shards",
        "version": 1,
        "fingerprint": name,
        "samples": sum(shard["samples"] for shard in described_shards),
        "bytes": sum(shard["bytes"] for shard in described_shards),
        "patch": options.patch,
        "format": FORMAT,
        "options": asdict(options),
        "codecs": {text: setting_of(text).describe() for text in options.codecs},
        "sources": [
            {
                "name": source.name,
                "images": sum(entry.source == number for entry in entries),
                "licence": source.licence() or "not stated",
            }
            for number, source in enumerate(sources)
        ],
        "shards": described_shards,
    }
    storage.write(INDEX, json_line(index))
    for record in [*records, f"{_STATE}/build.json"]:
        storage.remove(record)
    with suppress(OSError):  # gone, or used by another process
        Path(storage.path(_STATE)).rmdir()
    return index


def _claim(storage: Storage, name: str) -> dict[str, Any] | None:
    """Claim the output for this build; returns the index if the build is complete already."""
    for file in (INDEX, f"{_STATE}/build.json"):
        try:
            found: dict[str, Any] = json.loads(storage.read(file))
        except FileNotFoundError:
            continue
        except ValueError:
            raise DatasetError(f"{storage.path(file)}: damaged; remove it") from None
        if found.get("fingerprint") != name:
            raise DatasetError(
                f"{storage.location}: holds a build of other photographs or options; "
                "choose another --out or remove it"
            )
        return found if file == INDEX else None
    storage.write(f"{_STATE}/build.json", json_line({"fingerprint": name}))
    return None


def _code(locations: Sequence[str], job: _Job) -> None:
    """Code one photograph into the cache."""
    image = _photo(locations, job)
    with atomic_write(job.stream) as stream:
        stream.write(setting_of(job.specification).encode(image))


def _photo(locations: Sequence[str], job: _Job) -> Any:
    data = _read(Source(locations[job.entry.source]), job.entry)
    return read_image(named_stream(data, job.entry.name))


def _read(source: Source, entry: Entry) -> bytes:
    try:
        return source.read(entry)
    except OSError as error:
        raise DatasetError(
            f"{source.location}: {entry.name} cannot be read ({error.strerror or error})"
        ) from None


def _deal(
    jobs: list[_Job], locations: Sequence[str], options: PrecodeOptions
) -> list[list[_Piece]]:
    """Which patches of which picture go to which shard, pictures in a random order."""
    size = options.shard_size
    shards: list[list[_Piece]] = []
    count = 0
    for number in permute(np.arange(len(jobs)), len(jobs), derive(options.seed, 1)).tolist():
        job = jobs[number]
        image = _photo(locations, job)
        gray = luma(image)
        height, width = gray.shape
        key = derive(options.seed, 2, number)
        for x, y in grid(width & ~1, height & ~1, options.patch, 0.0, key):
            left, top = x & ~1, y & ~1
            part = gray[top : top + options.patch, left : left + options.patch]
            if contrast(part) < options.min_contrast:
                continue
            if count % size == 0:
                shards.append([])
            if not shards[-1] or shards[-1][-1].job is not job:
                shards[-1].append(_Piece(job, []))
            shards[-1][-1].patches.append((count % size, left, top))
            count += 1
    if not shards:
        raise DatasetError(f"no photograph offers a patch of {options.patch} pixels")
    return shards


def _write_shard(
    locations: Sequence[str], out: str, number: int, side: int, pieces: list[_Piece]
) -> None:
    """Decode what the shard needs, cut, and write tar and record."""
    from webdataset.writer import TarWriter

    storage, name = Storage(out), shard_name(number)
    path = Path(storage.path(name))
    with atomic_write(path) as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for job, patches in pieces:
            setting = setting_of(job.specification)
            image = _photo(locations, job)
            planes, _, _ = setting.decode_picture(Path(job.stream).read_bytes())
            picture = Precoded(image, planes, setting.qp, setting.colour)
            for row, x, y in patches:
                sample = picture.cut(x, y, side)
                meta = {"image": job.entry.name, "codec": job.specification, "x": x, "y": y}
                content = {FORMAT: sample.to_bytes(), "json": json_line(meta).rstrip()}
                tar.write({"__key__": f"{number:06d}-{row:06d}", **content})
    storage.write(f"{_STATE}/{name}.json", json_line(describe_shard(path, name, FORMAT)))


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
