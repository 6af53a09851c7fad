"""`tucodec shards build`: photographs -> patches -> WebDataset shards and `index.json`.

A build goes through three steps, each cut into tasks whose results are files, so that it can be
killed anywhere and shared out to any number of processes and machines:

1. inspect: chunks of images are decoded; hash, size and worthwhile patches of each are noted;
2. plan: from all notes, near duplicates are removed and patches are chosen and distributed to shards;
3. write: each shard is a function of the plan and the photographs alone.

The notes lie in `.build/` of the output and vanish when `index.json` is written, which is last.
"""

import errno
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.duplicates import near_duplicates
from data_pipelines.patches import (
    EXTENSION,
    Patch,
    contrast,
    encode_patch,
    grid,
    luma,
    perceptual_hash,
    pixel_hash,
    scaled,
)
from data_pipelines.sources import Entry, Source, fingerprint, list_entries
from data_pipelines.tasks import run_tasks
from lightning_tucodec.errors import ConfigError, DatasetError, ImageInputError
from lightning_tucodec.io.files import TooLargeError
from lightning_tucodec.io.hashing import derive, permute
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.storage import Storage, sha256_file
from lightning_tucodec.io.temporary import atomic_write, temporary_folder

INDEX = "index.json"
REJECTED = "rejected.jsonl"
_STATE = ".build"
_CHUNK = 16
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class BuildOptions:
    """Everything besides the photographs that decides the bytes of a build.

    Attributes:
        patch: side of a patch, pixels.
        count: patches in all; None takes all there are.
        shard_size: patches in a shard (the last one may hold fewer).
        seed: decides the places of the patches, their choice and their order.
        encoding: `webp` (lossless), `png` or `raw`.
        long_edge: photographs are scaled down to at most this many pixels first.
        scales: further factors at which patches are cut, each ≤ 1.
        max_overlap: the most that two patches of one scale share, as a fraction of the side.
        min_contrast: patches whose luma has a smaller standard deviation (gray levels of 255) are
            flat and not used.
        duplicate_bits: photographs whose 64-bit perceptual hashes differ in at most this many bits
            are the same; −1 keeps all but byte-identical files.
    """

    patch: int = 256
    count: int | None = None
    shard_size: int = 1024
    seed: int = 0
    encoding: str = "webp"
    long_edge: int = 2000
    scales: tuple[float, ...] = (1.0,)
    max_overlap: float = 0.0
    min_contrast: float = 3.0
    duplicate_bits: int = 4

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        for name, value in (("patch", self.patch), ("shard-size", self.shard_size)):
            if value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"--count {self.count}: must be at least 1")
        if self.encoding not in EXTENSION:
            raise ConfigError(f"--format {self.encoding}: use {', '.join(EXTENSION)}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ConfigError("--scales: every scale must lie in (0, 1]")
        if not 0 <= self.max_overlap < 1:
            raise ConfigError(f"--max-overlap {self.max_overlap}: must lie in [0, 1)")
        if not 0 <= self.min_contrast <= 255:
            raise ConfigError(f"--min-contrast {self.min_contrast}: must lie in [0, 255]")
        if not -1 <= self.duplicate_bits < 64:
            raise ConfigError(f"--duplicate-bits {self.duplicate_bits}: must lie in -1 … 63")
        if self.long_edge < self.patch:
            raise ConfigError(
                f"--long-edge {self.long_edge}: leaves no room for patches of {self.patch}"
            )


class Part(NamedTuple):
    """Share number `number` (from 1) of `of` in a build by several machines."""

    number: int
    of: int

    def has(self, task: int) -> bool:
        """Whether this part does the task."""
        return task % self.of == self.number - 1


class Summary(NamedTuple):
    """The result of a call of `build`.

    Attributes:
        contents: of `index.json`; None when this part did its share but others are missing.
        missing: what the other parts still have to do, in words.
        wanted: `--count` where there were fewer patches than that, else None.
    """

    contents: dict[str, Any] | None
    missing: str = ""
    wanted: int | None = None


class _Row(NamedTuple):
    """A sample to be: its place in the shard and its patch."""

    row: int
    patch: Patch


def build(
    locations: Sequence[str],
    out: str,
    options: BuildOptions,
    *,
    workers: int = 1,
    part: Part | None = None,
    licences: Sequence[str] = (),
) -> Summary:
    """Build shards, or resume an interrupted build.

    The bytes written depend on the photographs and `options` only.

    Args:
        locations: folders, uncompressed tars, images, or fsspec URLs of folders and tars.
        out: folder or URL for the shards.
        options: see `BuildOptions`.
        workers: processes.
        part: do only this share. A part first inspects its images; once all parts have, it writes
            its shards. A call without `part` does whatever is left and writes the index.
        licences: one note for all sources, or one each; sources without one are asked for a
            LICENSE file.

    Raises:
        ConfigError: an option cannot work.
        DatasetError: no images, no space, or `out` holds another build.
    """
    options.check()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if len(licences) > 1 and len(licences) != len(locations):
        raise ConfigError(f"{len(licences)} licence notes for {len(locations)} sources")
    if part is not None and not 1 <= part.number <= part.of:
        raise ConfigError(f"--part {part.number}/{part.of}: parts are numbered 1/n to n/n")
    job = _Build(locations, out, options, workers, part or Part(1, 1), licences)
    try:
        return job.run(merge=part is None)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DatasetError(
                f"{out}: no space left ({error.strerror}); make room and run the same command "
                "again, finished shards are kept"
            ) from error
        if isinstance(error, PermissionError):
            raise DatasetError(f"{error.filename or out}: may not be read or written") from error
        raise


class _Build:
    def __init__(
        self, locations: Sequence[str], out: str, options: BuildOptions, workers: int, part: Part,
        licences: Sequence[str],
    ) -> None:  # fmt: skip
        self.locations, self.options, self.workers, self.part = locations, options, workers, part
        self.out = out
        self.storage = Storage(out)
        self.sources = [Source(location) for location in locations]
        self.entries = list_entries(self.sources, str(out))
        self.licences = list(licences) * (len(locations) if len(licences) == 1 else 1)
        settings = json.dumps(asdict(options), sort_keys=True)
        self.fingerprint = fingerprint(self.sources, self.entries, settings)

    def run(self, merge: bool) -> Summary:
        complete = self._claim()
        if complete is None:
            try:
                return self._advance(merge)
            except (FileNotFoundError, DatasetError):
                # Another process may have completed the same build and removed the notes.
                complete = self._claim()
                if complete is None:
                    raise
        self._clean()
        return self._summary(complete)

    def _advance(self, merge: bool) -> Summary:
        chunks = range(-(-len(self.entries) // _CHUNK))
        missing = self._inspect(chunks)
        if missing and not merge:
            return Summary(None, f"{missing} of {len(chunks)} chunks of images to inspect")
        plan = _Plan(self, (note for chunk in chunks for note in self._notes(chunk)))
        self._write(plan)
        if not merge:
            left = sum(self._record(shard) is None for shard in range(plan.shards))
            return Summary(None, f"{left} of {plan.shards} shards to write" if left else "")
        return self._finish(plan)

    def _claim(self) -> dict[str, Any] | None:
        """Refuse an output that holds another build; otherwise put our name on it.

        Returns:
            The index, if the build is complete already.
        """
        self.previous: dict[str, Any] = {}
        name = f"{_STATE}/build.json"
        for file in (INDEX, name):
            try:
                found = json.loads(self.storage.read(file))
            except FileNotFoundError:
                continue
            except ValueError:
                raise DatasetError(f"{self.storage.path(file)}: damaged; remove it") from None
            if found.get("fingerprint") != self.fingerprint:
                raise DatasetError(
                    f"{self.out}: holds a build of other photographs or options; "
                    "choose another --out or remove it"
                )
            if file == INDEX:
                self.previous = {shard["name"]: shard for shard in found["shards"]}
                if all(self._record(n) is not None for n in range(len(self.previous))):
                    return dict(found)
            return None
        self.storage.write(name, json_line({"fingerprint": self.fingerprint}))
        return None

    def _inspect(self, chunks: range) -> int:
        """Inspect this part's chunks; returns how many chunks of other parts are missing."""
        done = {name for name, _ in self._state_files()}
        open_chunks = [chunk for chunk in chunks if _notes_name(chunk) not in done]
        mine = [chunk for chunk in open_chunks if self.part.has(chunk)]
        tasks = (
            (self.locations, self.out, _notes_name(chunk), self.options, self._chunk(chunk))
            for chunk in mine
        )
        run_tasks(_inspect_chunk, tasks, len(mine), self.workers, "inspect")
        return len(open_chunks) - len(mine)

    def _write(self, plan: "_Plan") -> None:
        """Write this part's shards."""
        mine = [
            shard
            for shard in range(plan.shards)
            if self.part.has(shard) and self._record(shard) is None
        ]
        tasks = (
            (self.locations, self.out, shard, self.options, plan.shard(shard)) for shard in mine
        )
        run_tasks(_write_shard, tasks, len(mine), self.workers, "write")

    def _finish(self, plan: "_Plan") -> Summary:
        """Index and list of rejected images, then the notes go."""
        shards = []
        for number in range(plan.shards):
            record = self._record(number)
            if record is None:
                raise DatasetError(f"{self.out}: {shard_name(number)} vanished; run again")
            shards.append(record)
        index = {
            "kind": "tucodec-shards",
            "version": 1,
            "fingerprint": self.fingerprint,
            "samples": sum(shard["samples"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "patch": self.options.patch,
            "format": self.options.encoding,
            "options": asdict(self.options),
            "sources": [
                {
                    "name": source.name,
                    "images": sum(
                        entry.source == number and not entry.name.endswith("/")
                        for entry in self.entries
                    ),
                    "licence": (
                        self.licences[number] if self.licences else source.licence()
                    ) or "not stated",
                }
                for number, source in enumerate(self.sources)
            ],
            "rejected": dict(sorted(Counter(row["kind"] for row in plan.rejected).items())),
            "shards": shards,
        }  # fmt: skip
        self.storage.write(REJECTED, b"".join(json_line(row) for row in plan.rejected))
        self.storage.write(INDEX, json_line(index))
        self._clean()
        return self._summary(index)

    def _summary(self, index: dict[str, Any]) -> Summary:
        short = self.options.count is not None and index["samples"] < self.options.count
        return Summary(index, wanted=self.options.count if short else None)

    def _clean(self) -> None:
        for name, _ in self._state_files():
            self.storage.remove(f"{_STATE}/{name}")
        if not self.storage.remote:
            folder = Path(self.storage.location)
            with suppress(OSError):  # gone, or used by another process
                (folder / _STATE).rmdir()

    def _chunk(self, chunk: int) -> list[Entry]:
        return self.entries[chunk * _CHUNK : (chunk + 1) * _CHUNK]

    def _state_files(self) -> list[tuple[str, int]]:
        if not self.storage.remote and not Path(self.storage.path(_STATE)).is_dir():
            return []
        return Storage(self.storage.path(_STATE)).files()

    def _notes(self, chunk: int) -> list[dict[str, Any]]:
        text = self.storage.read(f"{_STATE}/{_notes_name(chunk)}")
        return [json.loads(line) for line in text.splitlines()]

    def _record(self, shard: int) -> dict[str, Any] | None:
        """What the index will say about a shard; None unless it is complete."""
        name = shard_name(shard)
        record: dict[str, Any] | None = self.previous.get(name)
        if record is None:
            try:
                record = json.loads(self.storage.read(f"{_STATE}/{name}.json"))
            except FileNotFoundError:
                return None
        return record if self.storage.size(name) == record["bytes"] else None


class _Plan:
    """Which patch becomes which sample, as arrays of a few bytes a patch.

    Args:
        job: the build.
        notes: of all images in their order; each is let go before the next is read.
    """

    def __init__(self, job: _Build, notes: Iterable[dict[str, Any]]) -> None:
        options, self.entries = job.options, job.entries
        self.shard_size = options.shard_size
        self.rejected: list[dict[str, Any]] = []
        self.digests: dict[int, str] = {}
        patches: dict[int, NDArray[np.int32]] = {}
        hashes: dict[int, int] = {}
        areas: dict[int, int] = {}
        self._scales = options.scales
        for number, note in enumerate(notes):
            if "kind" in note:
                self._reject(job, number, note["kind"], note["reason"])
                continue
            self.digests[number] = note["sha256"]
            hashes[number], areas[number] = int(note["hash"], 16), note["width"] * note["height"]
            patches[number] = np.array(note["patches"], np.int32).reshape(-1, 3)
        # The larger of two copies is kept; of equally large ones the first.
        order = sorted(patches, key=lambda number: (-areas[number], number))
        same = near_duplicates(
            [self.digests[number] for number in order],
            np.array([hashes[number] for number in order], np.uint64),
            options.duplicate_bits,
        )
        for lost, kept in same.items():
            other = self.entries[order[kept]]
            reason = f"same picture as {job.sources[other.source].name}/{other.name}"
            self._reject(job, order[lost], "duplicate", reason)
            del patches[order[lost]]
        self.rejected.sort(key=lambda row: row["number"])
        for row in self.rejected:
            del row["number"]
        self._choose(patches, options)

    def _reject(self, job: _Build, number: int, kind: str, reason: str) -> None:
        entry = self.entries[number]
        self.rejected.append({
            "number": number, "source": job.sources[entry.source].name, "image": entry.name,
            "kind": kind, "reason": reason,
        })  # fmt: skip

    def _choose(self, patches: dict[int, NDArray[np.int32]], options: BuildOptions) -> None:
        """Deal out `count` evenly over the images, put the images in a random order."""
        numbers = np.array(sorted(patches), np.int64)
        if not len(numbers):
            raise DatasetError(
                "no photograph offers a patch: all are unreadable, duplicates, flat or smaller "
                f"than {options.patch} pixels"
            )
        key = derive(options.seed, 1)
        order = numbers[permute(np.arange(len(numbers)), len(numbers), key).astype(np.int64)]
        quota = _even_shares(np.array([len(patches[int(n)]) for n in order]), options.count)
        chosen = []
        for number, share in zip(order.tolist(), quota.tolist(), strict=True):
            found = patches[number]
            pick = permute(np.arange(share), len(found), derive(key, number)).astype(np.int64)
            chosen.append(np.column_stack([np.full(share, number, np.int32), found[np.sort(pick)]]))
        self._patches = np.concatenate(chosen).astype(np.int32)
        self._key = derive(options.seed, 2)
        self.shards = -(-len(self._patches) // self.shard_size)

    def shard(self, number: int) -> list[tuple[Entry, str, list[_Row]]]:
        """The images of a shard, each with its SHA-256 and the samples that it gives."""
        first = number * self.shard_size
        block = self._patches[first : first + self.shard_size]
        rows = permute(np.arange(len(block)), len(block), derive(self._key, number))
        images: dict[int, list[_Row]] = {}
        for (image, scale, x, y), row in zip(block.tolist(), rows.tolist(), strict=True):
            patch = Patch(self._scales[scale], x, y)
            images.setdefault(image, []).append(_Row(row, patch))
        return [
            (self.entries[image], self.digests[image], found) for image, found in images.items()
        ]


def _even_shares(available: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """How many of its patches each image gives, so that none gives many while another has more."""
    if count is None or count >= available.sum():
        return available
    low, high = 0, int(available.max())
    while low < high:  # the largest level whose sum does not exceed `count`
        level = (low + high + 1) // 2
        low, high = (
            (level, high) if np.minimum(available, level).sum() <= count else (low, level - 1)
        )
    shares = np.minimum(available, low)
    more = np.flatnonzero(available > low)[: count - int(shares.sum())]
    shares[more] += 1
    return shares


def _inspect_chunk(
    locations: Sequence[str], out: str, name: str, options: BuildOptions, entries: list[Entry]
) -> None:
    sources = {entry.source: Source(locations[entry.source]) for entry in entries}
    notes = [_inspect_image(sources[entry.source], entry, options) for entry in entries]
    Storage(out).write(f"{_STATE}/{name}", b"".join(json_line(note) for note in notes))


def _inspect_image(source: Source, entry: Entry, options: BuildOptions) -> dict[str, Any]:
    """Hashes, size and worthwhile patches of one image, or why it is rejected."""
    try:
        data = source.read(entry)
        image = read_image(named_stream(data, entry.name))
    except (ImageInputError, FileNotFoundError, PermissionError) as error:
        reason = str(error).removeprefix(f"{entry.name}: ")
        return {"kind": "unreadable", "reason": reason}
    except TooLargeError as error:
        return {"kind": "unreadable", "reason": str(error.strerror)}
    digest = hashlib.sha256(data).hexdigest()
    key = derive(options.seed, int(digest[:16], 16))
    patches, flat = [], 0
    for number, scale in enumerate(options.scales):
        view = scaled(image, options.long_edge, scale)
        gray = luma(view)
        height, width = gray.shape
        corners = grid(width, height, options.patch, options.max_overlap, derive(key, number))
        for x, y in corners:
            if contrast(gray[y : y + options.patch, x : x + options.patch]) < options.min_contrast:
                flat += 1
            else:
                patches.append((number, x, y))
    height, width = image.shape[:2]
    if not patches:
        if flat:
            return {"kind": "flat", "reason": f"contrast below {options.min_contrast} everywhere"}
        return {"kind": "small", "reason": f"{width}×{height} is smaller than a patch"}
    return {
        "sha256": digest, "hash": f"{perceptual_hash(image):016x}", "width": width,
        "height": height, "patches": patches,
    }  # fmt: skip


def _write_shard(
    locations: Sequence[str], out: str, number: int, options: BuildOptions,
    images: list[tuple[Entry, str, list[_Row]]],
) -> None:  # fmt: skip
    samples: dict[int, tuple[bytes, dict[str, Any]]] = {}
    for entry, digest, rows in images:
        source = Source(locations[entry.source])
        samples.update(_cut(source, entry, digest, rows, options))
    storage, name = Storage(out), shard_name(number)
    first = number * options.shard_size
    if storage.remote:
        with temporary_folder() as folder:
            path = folder / name
            with open(path, "wb") as stream:
                _write_tar(stream, samples, first, options.encoding)
            record = describe_shard(path, name, EXTENSION[options.encoding])
            storage.upload(name, path, record["sha256"])
    else:
        path = Path(storage.path(name))
        with atomic_write(path) as stream:
            _write_tar(stream, samples, first, options.encoding)
        record = describe_shard(path, name, EXTENSION[options.encoding])
    storage.write(f"{_STATE}/{name}.json", json_line(record))


def _cut(
    source: Source, entry: Entry, digest: str, rows: list[_Row], options: BuildOptions
) -> Iterator[tuple[int, tuple[bytes, dict[str, Any]]]]:
    """Samples of one image: (row, (encoded patch, metadata))."""
    try:
        data = source.read(entry)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise DatasetError(
            f"{source.location}: {entry.name} changed during the build; put it back, or start "
            "afresh in an empty --out"
        )
    image = read_image(named_stream(data, entry.name))
    views: dict[float, NDArray[np.uint8]] = {}
    for row, patch in rows:
        if patch.scale not in views:
            views[patch.scale] = scaled(image, options.long_edge, patch.scale)
        view = views[patch.scale]
        window = view[patch.y : patch.y + options.patch, patch.x : patch.x + options.patch]
        pixels = np.ascontiguousarray(window)
        factor = min(1.0, options.long_edge / max(image.shape[:2])) * patch.scale
        meta = {
            "source": source.name, "image": entry.name, "image_sha256": digest,
            "x": patch.x, "y": patch.y, "scale": round(factor, 6), "sha256": pixel_hash(pixels),
        }  # fmt: skip
        yield row, (encode_patch(pixels, options.encoding), meta)


def _write_tar(
    stream: Any, samples: dict[int, tuple[bytes, dict[str, Any]]], first: int, encoding: str
) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(stream, encoder=False, mtime=0) as tar:
        for row in sorted(samples):
            data, meta = samples[row]
            key = f"{first + row:09d}"
            tar.write({"__key__": key, EXTENSION[encoding]: data, "json": json_line(meta).rstrip()})


def describe_shard(path: Path, name: str, extension: str) -> dict[str, Any]:
    """What the index says about a finished tar; `extension` is that of the samples' data."""
    with tarfile.open(path, "r:") as tar:
        members = [m for m in tar if m.name.endswith(f".{extension}")]
    return {
        "name": name,
        "samples": len(members),
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "offsets": [member.offset_data for member in members],
        "sizes": [member.size for member in members],
    }


def named_stream(data: bytes, name: str) -> io.BytesIO:
    """A file in memory with a name, for messages."""
    stream = io.BytesIO(data)
    stream.name = name
    return stream


def json_line(value: Any) -> bytes:
    r"""One line of JSON in UTF-8; a byte of a name that is not UTF-8 becomes JSON's escape `\udcXX`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _notes_name(chunk: int) -> str:
    return f"images-{chunk:06d}.jsonl"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"
