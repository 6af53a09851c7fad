"""What a rank's batch holds: which samples, cropped and flipped how, as bytes."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from lightning_tucodec.io.hashing import derive, hash_positions
from lightning_tucodec.training.input.plan import DataPlan
from lightning_tucodec.training.input.shards import ShardReader

Batch = dict[str, torch.Tensor]

MIXED_SAMPLES = 16384
"""Samples that a batch is drawn from: the plan's window is as many shards as hold these."""

_DRAWN_SAMPLES = 1024  # whose order is computed at once

_AUGMENT = 0x617567  # separates the augmentation's random bits from those of the order


def data_plan(reader: ShardReader, seed: int) -> DataPlan:
    """The order in which a run sees the samples of `reader`: whole shards are the plan's blocks."""
    size = reader.index.shard_size
    return DataPlan(len(reader), seed, size, max(2, math.ceil(MIXED_SAMPLES / size)))


class RankBatches:
    """This rank's share of the global batch that starts at a global position.

    Ranks take consecutive shares; they differ by one sample at most where the world size does not
    divide the batch. Crop and flip of a sample depend on seed and global position alone.

    Args:
        reader: the samples.
        plan: their order.
        batch_size: global batch.
        crop: side of the random crop, pixels.
        flip: mirror half of the samples left to right.
        rank: this process.
        world_size: number of processes.

    Attributes:
        shape: of what `read` writes; here the pixels of the share, N×crop×crop×3.
    """

    def __init__(
        self, reader: ShardReader, plan: DataPlan, batch_size: int, crop: int, flip: bool,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.reader, self.plan, self.batch_size = reader, plan, batch_size
        self.crop, self.flip = crop, flip
        first, end = (place * batch_size // world_size for place in (rank, rank + 1))
        self._share = np.arange(first, end)
        self.shape: tuple[int, ...] = (end - first, crop, crop, 3)
        self._key = derive(plan.seed & 0xFFFFFFFFFFFFFFFF, _AUGMENT)
        self._drawn: dict[int, tuple[NDArray[np.int64], NDArray[np.uint64]]] = {}
        self._fetcher: ThreadPoolExecutor | None = None
        self._fetched_window = -1

    def positions(self, start: int) -> NDArray[np.int64]:
        """Global positions of the share, int64 N."""
        return start + self._share

    def read(self, start: int, out: NDArray[np.uint8]) -> None:
        """Decode, crop and flip the share's samples into `out`, uint8 N×crop×crop×3.

        Raises:
            DatasetError: a sample cannot be decoded.
        """
        for image, (sample, x, y, flip) in zip(out, self.places(start), strict=True):
            pixels = self.reader.pixels(sample)[y : y + self.crop, x : x + self.crop]
            image[:] = pixels[:, ::-1] if flip else pixels

    def first(self, count: int) -> torch.Tensor:
        """The first `count` crops of the plan, whatever the world size: float32 N×3×crop×crop in [0, 1]."""
        whole = RankBatches(self.reader, self.plan, count, self.crop, self.flip)
        pixels = np.empty(whole.shape, np.uint8)
        whole.read(0, pixels)
        return as_floats(torch.from_numpy(pixels)).contiguous()

    def tensors(self, pixels: NDArray[np.uint8]) -> Batch:
        """The arrays that `read` filled, as a batch that shares no memory with them: image uint8."""
        return {"image": for_transfer(pixels)}

    def places(self, start: int) -> list[tuple[int, int, int, bool]]:
        """Of each sample of the share: its number, left and top of the crop, whether to flip it."""
        if self.reader.cache is not None:
            self._fetch_ahead(start)
        samples, noise = self._draw(start)
        room = np.uint64(self.reader.index.patch - self.crop + 1)
        lefts = ((noise & np.uint64(0xFFFFF)) % room).tolist()
        tops = ((noise >> np.uint64(20) & np.uint64(0xFFFFF)) % room).tolist()
        flips = ((noise >> np.uint64(63)).astype(bool) & self.flip).tolist()
        return list(zip(samples.tolist(), lefts, tops, flips, strict=True))

    def _draw(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Samples and random bits of the share.

        They are drawn for many batches at a time, those that this worker gets next, because numpy
        costs more by the call than by the number.
        """
        if start not in self._drawn:
            worker = get_worker_info()
            step = self.batch_size * (1 if worker is None else worker.num_workers)
            most = min(_DRAWN_SAMPLES, self.plan.samples)  # every pass costs numpy calls of its own
            starts = start + step * np.arange(max(1, most // len(self._share)))
            positions = starts[:, None] + self._share
            samples = self.plan.indices(positions.ravel()).reshape(positions.shape)
            noise = hash_positions(self._key, positions)
            self._drawn = dict(zip(starts.tolist(), zip(samples, noise, strict=True), strict=True))
        return self._drawn[start]

    def _fetch_ahead(self, position: int) -> None:
        """On entering a window, one process starts to fetch the shards of the next one."""
        worker = get_worker_info()
        window = self.plan.window_of(position)
        if window == self._fetched_window or (worker is not None and worker.id > 0):
            return
        self._fetched_window = window
        if self._fetcher is None:
            self._fetcher = ThreadPoolExecutor(1)
        self._fetcher.submit(self.reader.fetch, self.plan.blocks_of_window(window + 1).tolist())


def as_floats(image: torch.Tensor) -> torch.Tensor:
    """uint8 N×H×W×3 to float32 N×3×H×W in [0, 1], channels last, on the same device."""
    return image.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def for_transfer(values: NDArray[Any]) -> torch.Tensor:
    """A copy; where there is a GPU, in memory that it reads while the host goes on."""
    if torch.cuda.is_available():
        source = torch.from_numpy(values)
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source)
    # numpy's memory, because PyTorch's is given back and mapped anew for every batch.
    return torch.from_numpy(values.copy())
