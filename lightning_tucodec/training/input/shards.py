"""Random access to samples of WebDataset shards: memory maps, and a cache for remote ones."""

import io
import json
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_tucodec.errors import ConfigError, DatasetError, one_line
from lightning_tucodec.io.files import home
from lightning_tucodec.io.storage import ShardCache, Storage, sha256_file

_OPEN_MAPS = 128  # each holds a file descriptor, and opening one costs less than decoding a patch


@dataclass(frozen=True)
class ShardIndex:
    """Contents of `index.json`.

    Attributes:
        patch: side of the patches, pixels.
        format: `webp`, `png` or `raw`.
        shard_size: samples in every shard but the last.
        names: shard file names.
        bytes: shard sizes.
        sha256: shard hashes, hexadecimal.
        starts: number of the first sample of each shard, and the number of all samples at the end.
        offsets: where each sample's image begins in its shard, int64.
        sizes: how many bytes it has, int64.
    """

    patch: int
    format: str
    shard_size: int
    names: tuple[str, ...]
    bytes: tuple[int, ...]
    sha256: tuple[str, ...]
    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def read(cls, storage: Storage) -> "ShardIndex":
        """Read and check the index of a folder or URL.

        Raises:
            DatasetError: there is none, it is damaged or of another version.
        """
        where = storage.path("index.json")
        try:
            index = json.loads(storage.read("index.json"))
            if index["version"] != 1:
                raise DatasetError(
                    f"{where}: version {index['version']!r:.20} is not known; update tucodec"
                )
            shards = index["shards"]
            counts = [int(shard["samples"]) for shard in shards]
            found = cls(
                patch=int(index["patch"]),
                format=str(index["format"]),
                shard_size=max(counts),
                names=tuple(str(shard["name"]) for shard in shards),
                bytes=tuple(int(shard["bytes"]) for shard in shards),
                sha256=tuple(str(shard["sha256"]) for shard in shards),
                starts=np.cumsum([0, *counts], dtype=np.int64),
                offsets=np.concatenate([np.array(s["offsets"], np.int64) for s in shards]),
                sizes=np.concatenate([np.array(s["sizes"], np.int64) for s in shards]),
            )
            problem = found._problem(counts)
        except FileNotFoundError:
            raise DatasetError(
                f"{where}: not found; build shards with `tucodec shards build`, or let an "
                "interrupted build finish"
            ) from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DatasetError(
                f"{where}: damaged index ({one_line(error)}); build it again"
            ) from None
        if problem:
            raise DatasetError(f"{where}: damaged index ({problem}); build it again")
        return found

    def _problem(self, counts: list[int]) -> str | None:
        """Refuse impossible values: names and hashes become paths, and sizes are allocated."""
        if not 1 <= self.patch < 1 << 16:
            return f"patches of {self.patch} pixels"
        if min(counts) < 1 or any(count != self.shard_size for count in counts[:-1]):
            return "shards of uneven numbers of samples"
        for name, digest in zip(self.names, self.sha256, strict=True):
            if not re.fullmatch(r"\w[\w.-]{0,199}", name, re.ASCII):
                return f"{name!r} is not the name of a shard"
            if not re.fullmatch("[0-9a-f]{64}", digest):
                return f"{name} has no SHA-256"
        if len(set(self.names)) < len(self.names):
            return "a shard is named twice"
        if not len(self.offsets) == len(self.sizes) == self.starts[-1]:
            return "counts and offsets differ"
        ends = np.repeat(np.array(self.bytes, np.int64), counts)
        inside = (self.offsets >= 0) & (self.sizes >= 0) & (self.sizes <= ends - self.offsets)
        if not inside.all():
            return "samples lie outside of their shards"
        return None

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1


class ShardReader:
    """Samples by number.

    Local shards are mapped where they lie. Remote ones are first copied whole into a cache on a
    local disk, where their hash is checked; see `ShardCache`.

    Args:
        location: folder or fsspec URL that holds `index.json`.
        cache_dir: cache for remote shards; by default `tucodec/shards` in the user's cache folder.
        cache_bytes: limit of the cache.

    Raises:
        DatasetError: no usable index, or a local shard that is missing or of another size.
    """

    def __init__(
        self, location: str, cache_dir: str | None = None, cache_bytes: int = 20 << 30
    ) -> None:
        storage = Storage(location)
        self.index = ShardIndex.read(storage)
        self.location = storage.location
        self.cache: ShardCache | None = None
        if storage.remote:
            self.cache = ShardCache(storage, Path(cache_dir or default_cache()), cache_bytes)
        else:
            self._check_sizes(storage)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return int(self.index.starts[-1])

    def encoded(self, sample: int) -> memoryview:
        """The bytes of one sample as they lie in the tar."""
        start = int(self.index.offsets[sample])
        return self.bytes_of(
            self.index.shard_of(sample), start, start + int(self.index.sizes[sample])
        )

    def bytes_of(self, shard: int, start: int, end: int) -> memoryview:
        """The bytes [start, end) of a shard."""
        return memoryview(self._map(shard))[start:end]

    def pixels(self, sample: int) -> NDArray[np.uint8]:
        """One patch, uint8 patch×patch×3, not writable.

        Raises:
            DatasetError: it cannot be decoded; the message names shard and sample.
        """
        side = self.index.patch
        data = self.encoded(sample)
        try:
            if self.index.format == "raw":
                # An npy file: the array is its end, whatever its header says about versions.
                pixels = np.frombuffer(data[-side * side * 3 :], np.uint8).reshape(side, side, 3)
            else:
                with Image.open(io.BytesIO(data), formats=[self.index.format]) as image:
                    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            if pixels.shape != (side, side, 3):
                raise ValueError(f"its shape is {pixels.shape}")
        # A damaged patch can make a decoder raise nearly anything.
        except Exception as error:
            name = self.index.names[self.index.shard_of(sample)]
            raise DatasetError(
                f"{self.location}/{name}: sample {sample} cannot be decoded ({error}); "
                "see `tucodec shards verify`"
            ) from None
        return pixels

    def fetch(self, shards: Sequence[int]) -> None:
        """Bring remote shards into the cache ahead of their use."""
        if self.cache is not None:
            for shard in shards:
                self._path(shard)

    def check_hashes(self) -> None:
        """Read every shard.

        Raises:
            DatasetError: its bytes are not those that were built.
        """
        for shard, digest in enumerate(self.index.sha256):
            path = self._path(shard)
            if sha256_file(path) != digest:
                raise DatasetError(f"{path}: damaged; see `tucodec shards verify {self.location}`")

    def check_cache(self, shards: int) -> None:
        """Raise ConfigError unless the cache can hold so many shards at a time."""
        need = shards * max(self.index.bytes)
        if self.cache is not None and self.cache.limit < min(need, sum(self.index.bytes)):
            raise ConfigError(
                f"{self.location}: the data plan reads {shards} shards at a time; raise cache_gb "
                f"to at least {need / 1e9:.1f}, or build smaller shards"
            )

    def _check_sizes(self, storage: Storage) -> None:
        for name, size in zip(self.index.names, self.index.bytes, strict=True):
            found = storage.size(name)
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise DatasetError(
                    f"{storage.path(name)}: {state}; see `tucodec shards verify {self.location}`"
                )

    def _path(self, shard: int) -> Path:
        index = self.index
        if self.cache is None:
            return Path(self.location) / index.names[shard]
        name = index.names[shard]
        try:
            return self.cache.get(name, index.bytes[shard], index.sha256[shard])
        except FileNotFoundError:
            where = f"{self.location}/{name}"
            raise DatasetError(f"{where}: is missing; see `tucodec shards verify`") from None

    def _map(self, shard: int) -> mmap.mmap:
        found = self._maps.get(shard)
        if found is not None:
            self._maps.move_to_end(shard)
            return found
        while True:
            try:
                with open(self._path(shard), "rb") as stream:
                    found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                break
            except FileNotFoundError:
                if self.cache is None:
                    raise DatasetError(f"{self._path(shard)}: vanished during training") from None
                # Another process made room between our finding the copy and opening it.
        self._maps[shard] = found
        if len(self._maps) > _OPEN_MAPS:
            self._maps.popitem(last=False)
        return found


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/tucodec/shards`, or the same below `~/.cache`.

    Raises:
        ConfigError: the user has no home folder.
    """
    own = home()
    cache = os.environ.get("XDG_CACHE_HOME") or (own and own / ".cache")
    if not cache:
        raise ConfigError("this user has no home folder to cache remote shards in; set cache_dir")
    return Path(cache) / "tucodec" / "shards"
