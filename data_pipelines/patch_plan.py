"""Which patch of which photograph becomes which sample of which shard."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.duplicates import near_duplicates
from data_pipelines.options import BuildOptions
from data_pipelines.patches import Patch
from data_pipelines.sources import Entry, Source
from lightning_tucodec.errors import DatasetError
from lightning_tucodec.io.hashing import derive, permute


class Row(NamedTuple):
    """A planned sample: its place in the shard and its patch."""

    row: int
    patch: Patch


class PatchPlan:
    """Which patch becomes which sample, as arrays of a few bytes per patch.

    Args:
        options: of the build.
        sources: its sources.
        entries: all images.
        notes: of the images in their order (`inspection`); each is freed before the next is read.

    Attributes:
        rejected: a row for each image that is not used: `source, image, kind, reason`.
        shards: their number.

    Raises:
        DatasetError: there is no patch.
    """

    def __init__(
        self, options: BuildOptions, sources: Sequence[Source], entries: Sequence[Entry],
        notes: Iterable[dict[str, Any]],
    ) -> None:  # fmt: skip
        self.sources, self.entries = sources, entries
        self.shard_size = options.shard_size
        self.rejected: list[dict[str, Any]] = []
        self.digests: dict[int, str] = {}
        patches: dict[int, NDArray[np.int32]] = {}
        hashes: dict[int, int] = {}
        areas: dict[int, int] = {}
        self._scales = options.scales
        for number, note in enumerate(notes):
            if "kind" in note:
                self._reject(number, note["kind"], note["reason"])
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
            reason = f"same picture as {self.sources[other.source].name}/{other.name}"
            self._reject(order[lost], "duplicate", reason)
            del patches[order[lost]]
        self.rejected.sort(key=lambda row: row["number"])
        for row in self.rejected:
            del row["number"]
        self._choose(patches, options)

    def _reject(self, number: int, kind: str, reason: str) -> None:
        entry = self.entries[number]
        self.rejected.append({
            "number": number, "source": self.sources[entry.source].name, "image": entry.name,
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

    def shard(self, number: int) -> list[tuple[Entry, str, list[Row]]]:
        """The images of a shard, each with its SHA-256 and the samples that it gives."""
        first = number * self.shard_size
        block = self._patches[first : first + self.shard_size]
        rows = permute(np.arange(len(block)), len(block), derive(self._key, number))
        images: dict[int, list[Row]] = {}
        for (image, scale, x, y), row in zip(block.tolist(), rows.tolist(), strict=True):
            patch = Patch(self._scales[scale], x, y)
            images.setdefault(image, []).append(Row(row, patch))
        return [
            (self.entries[image], self.digests[image], found) for image, found in images.items()
        ]


def _even_shares(available: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """How many patches each image gives: as evenly as the available numbers allow."""
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
