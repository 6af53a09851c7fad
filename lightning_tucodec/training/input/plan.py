"""The data plan: the sample at each position of an endless training run.

A pure function of (seed, number of samples, global position). Nothing is stored per sample, so that
a run can start anywhere at once, on any number of ranks and workers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_tucodec.io.hashing import MASK_64, derive, hash_positions, permute


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
        key = derive(self.seed & MASK_64, epoch)
        return np.unique(self._samples_at(key, slots) // self.block)

    @property
    def _windows(self) -> int:
        return -(-self.samples // (self.block * self.window))

    def _epoch_indices(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        key = derive(self.seed & MASK_64, epoch)
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
