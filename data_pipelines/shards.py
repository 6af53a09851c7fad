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
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.inspection import inspect_chunk
from data_pipelines.options import BuildOptions
from data_pipelines.patch_plan import PatchPlan, Row
from data_pipelines.patches import (
    EXTENSION,
    encode_patch,
    pixel_hash,
    scaled,
)
from data_pipelines.sources import Entry, Source, fingerprint, list_entries
from data_pipelines.store import INDEX, describe_shard, json_line, named_stream, shard_name
from data_pipelines.tasks import run_tasks
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.io.images import read_image
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.io.temporary import atomic_write, temporary_folder

REJECTED = "rejected.jsonl"
_STATE = ".build"
_CHUNK = 16
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        notes = (note for chunk in chunks for note in self._notes(chunk))
        plan = PatchPlan(self.options, self.sources, self.entries, notes)
        self._write(plan)
        if not merge:
            left = sum(self._record(shard) is None for shard in range(plan.shards))
            return Summary(None, f"{left} of {plan.shards} shards to write" if left else "")
        return self._finish(plan)

    def _claim(self) -> dict[str, Any] | None:
        """Refuse an output that holds another build; otherwise claim it.

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
            (
                self.locations,
                self.out,
                f"{_STATE}/{_notes_name(chunk)}",
                self.options,
                self._chunk(chunk),
            )
            for chunk in mine
        )
        run_tasks(inspect_chunk, tasks, len(mine), self.workers, "inspect")
        return len(open_chunks) - len(mine)

    def _write(self, plan: PatchPlan) -> None:
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

    def _finish(self, plan: PatchPlan) -> Summary:
        """Write the index and the list of rejected images, then remove the notes."""
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


def _write_shard(
    locations: Sequence[str], out: str, number: int, options: BuildOptions,
    images: list[tuple[Entry, str, list[Row]]],
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
    source: Source, entry: Entry, digest: str, rows: list[Row], options: BuildOptions
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


def _notes_name(chunk: int) -> str:
    return f"images-{chunk:06d}.jsonl"
