"""The data plan: which sample stands at which place of an endless training run.

A pure function of (seed, number of samples, global position). Nothing is stored per sample, so that
a run can start anywhere at once, on any number of ranks and workers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def mix(values: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words that leaves no visible pattern.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = np.atleast_1d(np.asarray(values, np.uint64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive(key: int, *words: int) -> int:
    """A 64-bit key that depends on `key` and every word."""
    for word in words:
        key = int(mix((key * _GOLDEN + word + 1) & _MASK)[0])
    return key


def hash_positions(key: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each position, a function of (key, position)."""
    return mix(mix(positions.astype(np.uint64) + np.uint64(key)) ^ np.uint64(derive(key, 1)))


def permute(
    values: NDArray[np.integer[Any]], size: NDArray[np.uint64] | int, keys: NDArray[np.uint64] | int
) -> NDArray[np.uint64]:
    """A keyed pseudorandom permutation of {0, …, size − 1}, evaluated at `values` alone.

    A Feistel network on the smallest even number of bits that holds `size`, walked again while the
    result lies outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        values: where to evaluate, each below its `size`.
        size: size of the permuted set, one for all or one a value.
        keys: 64-bit key, one for all or one a value.
    """
    start = values.astype(np.uint64)
    size, keys = np.broadcast_arrays(
        np.asarray(size, np.uint64), np.asarray(keys, np.uint64), start
    )[:2]
    bits = int(size.max(initial=1) - np.uint64(1)).bit_length()
    half = np.uint64(max(1, (bits + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    result = start
    pending = np.arange(len(start))
    while len(pending):
        key = keys[pending]
        x = result[pending]
        left, right = x >> half, x & low
        for turn in range(6):
            noise = mix(right + key + np.uint64((turn + 1) * _GOLDEN & _MASK))
            left, right = right, left ^ (noise & low)
        x = (left << half) | right
        result[pending] = x
        pending = pending[x >= size[pending]]
    return result


@dataclass(frozen=True)
class DataPlan:
    """The order of samples.

    Samples are numbered as they lie in the shards. An epoch visits blocks of `block` consecutive
    samples in a pseudorandom order and shuffles the samples within windows of `window` blocks:
    storage sees block-sized sequential reads, and a batch mixes the whole window.

    Attributes:
        samples: number of samples.
        seed: any integer.
        block: consecutive samples read together.
        window: blocks that are mixed with one another.
    """

    samples: int
    seed: int = 0
    block: int = 1024
    window: int = 16

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at global positions (position = epoch · samples + place in the epoch)."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.samples)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._epoch_indices(int(epoch), places[here])
        return result

    def window_of(self, position: int) -> int:
        """Number of the window, over all epochs, that a global position lies in."""
        epoch, place = divmod(position, self.samples)
        return epoch * self._windows + place // (self.block * self.window)

    def blocks_of_window(self, window: int) -> NDArray[np.int64]:
        """Blocks that the samples of a window lie in (the shards, if blocks are shards)."""
        epoch, number = divmod(window, self._windows)
        span = self.block * self.window
        first = number * span
        slots = np.arange(first, min(first + span, self.samples))
        key = derive(self.seed & _MASK, epoch)
        return np.unique(self._samples_at(key, slots) // self.block)

    @property
    def _windows(self) -> int:
        return -(-self.samples // (self.block * self.window))

    def _epoch_indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        key = derive(self.seed & _MASK, epoch)
        span = self.block * self.window
        windows, inside = np.divmod(places, span)
        sizes = np.minimum(span, self.samples - windows * span)
        slots = windows * span + permute(
            inside, sizes, hash_positions(derive(key, 1), windows)
        ).astype(np.int64)
        return self._samples_at(key, slots)

    def _samples_at(self, key: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples at places of the epoch before the shuffle within windows."""
        blocks, rest = divmod(self.samples, self.block)
        # The incomplete last block stands at a place of its own choosing in every epoch.
        short = derive(key, 2) % (blocks + 1) * self.block
        in_short = (slots >= short) & (slots < short + rest)
        full = np.where(slots < short, slots, slots - rest)
        full = np.where(in_short, 0, full)
        number, offset = np.divmod(full, self.block)
        moved = permute(number, max(1, blocks), derive(key, 3)).astype(np.int64)
        return np.where(in_short, blocks * self.block + slots - short, moved * self.block + offset)
