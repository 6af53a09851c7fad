"""Shards to training batches: exact, elastic, resumable; docs/data.md lists the guarantees."""

import itertools
import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from lightning_tucodec.errors import ConfigError, DatasetError, TucodecError
from lightning_tucodec.io.hashing import derive, hash_positions
from lightning_tucodec.io.images import image_files, read_image
from lightning_tucodec.io.processes import when_parent_ends
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.input.plan import DataPlan
from lightning_tucodec.training.input.shards import ShardIndex, ShardReader
from lightning_tucodec.training.runs.identity import DEFAULT_DATA, arguments

Batch = dict[str, torch.Tensor]

MIXED_SAMPLES = 16384
"""Samples that a batch is drawn from: the plan's window is as many shards as hold these."""

_DRAWN_SAMPLES = 1024  # whose order is computed at once

_PREFETCH = 2  # batches that a worker has been asked for, at most

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


class PlanLoader:
    """Batches of an endless plan, one pass over the samples at a time, from any position.

    Lightning stores `state_dict()` in its checkpoints. The position counts the batches that were
    handed out, not those that workers have prefetched. Length is known, so Lightning asks for a
    batch only when it trains on it.

    Args:
        batches: see `RankBatches`.
        num_workers: processes that decode ahead; 0 decodes in this one.
    """

    def __init__(self, batches: RankBatches, num_workers: int = 0) -> None:
        self.batches = batches
        self.num_workers = num_workers
        self.position = 0
        self._pass = len(self)
        self._shared: _SharedBatches | None = None
        self._stream: Iterator[tuple[int, int]] = iter(())

    def __len__(self) -> int:
        """Batches in one pass over the samples; the last one may reach into the next pass."""
        return -(-self.batches.plan.samples // self.batches.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield image uint8 N×crop×crop×3 and index int64 N, up to the pass's end."""
        size = self.batches.batch_size
        for _ in range(self._pass - self.position // size % self._pass):
            batch = self._next()
            self.position += size
            yield batch

    def limit(self, batches: int | float) -> None:
        """Iterate over so many batches (or that fraction of all) at a time, as Lightning will."""
        full = len(self)
        self._pass = max(1, min(batches, full) if isinstance(batches, int) else int(batches * full))

    def state_dict(self) -> dict[str, int]:
        """The position of the run; all samples before `position` were handed out."""
        plan = self.batches.plan
        return {"position": self.position, "samples": plan.samples, "seed": plan.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`, for any number of ranks and workers.

        Raises:
            ConfigError: it belongs to other shards or another seed.
        """
        for key, own in self.state_dict().items():
            if key != "position" and state.get(key, own) != own:
                raise ConfigError(
                    f"the checkpoint was made with {key} {state[key]}, now it is {own}: its place "
                    "in the data means nothing here; use the same shards and seed, or `init_from`"
                )
        self.close()
        self.position = int(state["position"])

    def close(self) -> None:
        """Stop the workers; iterating again starts new ones."""
        self._stream, self._shared = iter(()), None

    def _next(self) -> Batch:
        positions = torch.from_numpy(self.batches.positions(self.position))
        if not self.num_workers:
            pixels = np.empty(self.batches.shape, np.uint8)
            self.batches.read(self.position, pixels)
            return {**self.batches.tensors(pixels), "index": positions}
        if self._shared is None:
            self._start_workers()
        assert self._shared is not None
        try:
            worker, slot = next(self._stream)
        except TucodecError as error:
            # From a worker the message comes with a traceback around it.
            self.close()
            last = str(error).strip().splitlines()[-1]
            raise type(error)(
                last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
            ) from None
        batch = self.batches.tensors(self._shared.pixels[worker, slot])
        if self._shared.starts[worker, slot] != self.position:
            raise RuntimeError("a worker overwrote a batch before it was read")
        return {**batch, "index": positions}

    def _start_workers(self) -> None:
        self._shared = _SharedBatches(self.batches, self.num_workers)
        # The stream has no end, so that workers decode across the ends of passes as well.
        loader = DataLoader(
            self._shared,
            batch_size=None,
            sampler=_Starts(self.position, self.batches.batch_size),
            num_workers=self.num_workers,
            prefetch_factor=_PREFETCH,
            generator=torch.Generator(),  # or else starting would advance the global one
            # Forked workers share the index and the memory for batches, and end when this process
            # is killed; those of a fork server would wait for ever.
            multiprocessing_context="fork",
            worker_init_fn=partial(_end_with_parent, os.getpid()),
        )
        self._stream = iter(loader)


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


class _SharedBatches(Dataset[tuple[int, int]]):
    """Memory in which workers leave their batches for the main process, used again and again.

    Sending each batch through memory of its own, as PyTorch does, costs page faults on both sides
    that take a good part of the time of decoding. A worker has been asked for `_PREFETCH` batches
    at most while the main process copies one more out, so with one slot more than that it never
    writes where somebody reads.

    Attributes:
        pixels: uint8 workers×slots×N×crop×crop×3.
        starts: int64 workers×slots, the position of the batch in each slot.
    """

    def __init__(self, batches: RankBatches, workers: int) -> None:
        self.batches = batches
        slots = (workers, _PREFETCH + 1)
        # Anonymous, so that small limits of /dev/shm do not matter.
        pixels = mmap.mmap(-1, math.prod(slots + batches.shape))
        self.pixels = np.frombuffer(pixels, np.uint8).reshape(slots + batches.shape)
        self.starts = np.frombuffer(mmap.mmap(-1, 8 * math.prod(slots)), np.int64).reshape(slots)
        self._slot = 0  # each worker counts its own

    def __getitem__(self, start: int) -> tuple[int, int]:
        """Decode a batch; returns where it lies: worker and slot."""
        info = get_worker_info()
        assert info is not None
        place = info.id, self._slot
        self._slot = (self._slot + 1) % self.starts.shape[1]
        self.starts[place] = start
        self.batches.read(start, self.pixels[place])
        return place


def _end_with_parent(parent: int, worker: int) -> None:
    """End this worker when its parent is gone.

    PyTorch watches too, but not if the parent was killed before the worker first looked.
    """
    when_parent_ends(parent, lambda: os._exit(1))


class _Starts(Sampler[int]):
    """Global positions at which batches start, without end."""

    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.step)


LEAST_SIDE = 11
"""Pixels; the window of MS-SSIM."""


class WholeImages(Dataset[dict[str, Any]]):
    """The images of a folder, in the order of names.

    Args:
        folder: holds the images.

    Raises:
        DatasetError: no such folder, or no image in it.
    """

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise DatasetError(f"{folder}: no such folder of validation images")
        self.files = image_files(folder)
        if not self.files:
            raise DatasetError(f"{folder}: holds no images")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Image uint8 1×H×W×3, index int64 1."""
        pixels = np.ascontiguousarray(read_image(self.files[item]))[None]
        return {"image": for_transfer(pixels), "index": torch.tensor([item])}


def check_validation(config: dict[str, Any]) -> int | None:
    """Read all validation data of a resolved configuration; see `PatchDataModule.check_validation`.

    Returns:
        The number of images or patches; None without any, or with another data module, where `val_images`
        may have another meaning.

    Raises:
        TucodecError: what cannot be validated on.
    """
    path = config["data"].get("class_path", DEFAULT_DATA)
    location = arguments(config, "data").get("val_images")
    if location is None or not path.startswith("lightning_tucodec."):
        return None
    module, _, name = path.rpartition(".")
    kind: type[PatchDataModule] = getattr(import_module(module), name)
    return kind.check_validation(location)


def check_crop_size(config: dict[str, Any]) -> None:
    """Refuse crops that do not fit into the shards' patches, before a run has a folder.

    Raises:
        ConfigError: what the crop can be.
        DatasetError: the shards' index cannot be read.
    """
    if config["data"].get("class_path", DEFAULT_DATA) != DEFAULT_DATA:
        return
    data = arguments(config, "data")
    crop_within(data.get("crop"), ShardIndex.read(Storage(data["shards"])).patch)


def crop_within(crop: int | None, patch: int) -> int:
    """The side of crops, out of patches of a side; None is the whole patch.

    Raises:
        ConfigError: what the crop can be.
    """
    if crop is None:
        return patch
    if not 1 <= crop <= patch:
        raise ConfigError(f"crop {crop}: must lie between 1 and the patches' side {patch}")
    return crop


def check_images(folder: str) -> int:
    """Decode every validation image; returns their number.

    A run does so before its first step, since it would end at its first validation, hours later.

    Raises:
        TucodecError: no such folder, none in it, or one that cannot be read or measured.
    """
    images = WholeImages(folder)
    for path in images.files:
        height, width, _ = read_image(path).shape
        if min(height, width) < LEAST_SIDE:
            raise DatasetError(
                f"{path}: {width}×{height} pixels; a validation image needs {LEAST_SIDE} on each side"
            )
    return len(images)


def in_order(dataset: Dataset[Any], rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
    """This rank's items, one a batch: rank, rank + world_size, …, every rank equally many.

    Where the world size does not divide their number, the last ranks repeat the first items. Code that
    gathers results drops repeats by `index`. Lightning does not change a loader whose sampler is a
    `DistributedSampler`; it would shard any other loader, even over items that are sharded already.
    Starting the loader draws nothing from the global random generator, which the training uses.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world_size, rank, shuffle=False)
    return DataLoader(dataset, batch_size=None, sampler=sampler, generator=torch.Generator())


class PatchDataModule(pl.LightningDataModule):
    """Training patches from shards, validation on whole images.

    Bytes go to the device as they are; a module's batch is made there, see `on_after_batch_transfer`.

    `batches_class` defines the content of a sample.

    Args:
        shards: folder or fsspec URL made by `tucodec shards build`.
        batch_size: the global batch, over all ranks.
        crop: side of the random crop; None takes whole patches.
        num_workers: decoding processes per rank.
        seed: decides order and augmentation.
        val_images: folder of whole images for validation.
        flip: mirror half of the patches left to right.
        cache_dir: folder for remote shards; None: the user's cache folder.
        cache_gb: limit of that cache, 10^9 bytes.
    """

    batches_class: ClassVar[type[RankBatches]] = RankBatches

    def __init__(
        self,
        shards: str,
        batch_size: int,
        crop: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_images: str | None = None,
        flip: bool = True,
        cache_dir: str | None = None,
        cache_gb: float = 20.0,
    ) -> None:
        super().__init__()
        self.shards, self.batch_size, self.crop = shards, batch_size, crop
        self.num_workers, self.seed, self.val_images, self.flip = (
            num_workers,
            seed,
            val_images,
            flip,
        )
        self.cache_dir, self.cache_gb = cache_dir, cache_gb
        self._loader: PlanLoader | None = None

    def setup(self, stage: str) -> None:
        """Forget the loader of an earlier fit."""
        if stage == "fit":
            self.teardown(stage)

    def teardown(self, stage: str) -> None:
        """Stop the loader's workers."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def train_dataloader(self) -> PlanLoader:
        """Batches of image uint8 N×crop×crop×3 and index int64 N (global positions), on the host.

        One fit uses one loader, so that reloading does not reset the position.

        Raises:
            DatasetError: the shards cannot be used.
            ConfigError: crop, batch size or cache do not fit them.
        """
        if self._loader is not None and self.trainer is not None:
            return self._loader
        reader = ShardReader(self.shards, self.cache_dir, int(self.cache_gb * 1e9))
        rank, world_size = self._place()
        crop = crop_within(self.crop, reader.index.patch)
        if self.batch_size < world_size:
            raise ConfigError(
                f"batch_size {self.batch_size} is the global batch; it leaves some of the "
                f"{world_size} ranks without a sample"
            )
        if self.batch_size % world_size:
            rank_zero_warn(
                f"batch_size {self.batch_size} is not divisible by {world_size} ranks: their "
                "gradients are averaged with equal weights though their shares differ by one"
            )
        plan = data_plan(reader, self.seed)
        reader.check_cache(2 * (plan.window + 2))
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        batches = self.batches_class(
            reader, plan, self.batch_size, crop, self.flip, rank, world_size
        )
        self._loader = PlanLoader(batches, self.num_workers)
        if limit is not None:
            self._loader.limit(limit)
        return self._loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """What modules get: image float32 N×3×H×W in [0, 1], channels last, made on the device."""
        if batch["image"].dtype == torch.uint8:
            batch["image"] = as_floats(batch["image"])
        return batch

    @classmethod
    def check_validation(cls, location: str) -> int:
        """Read all items of `val_images` before the first step; returns their number.

        Raises:
            TucodecError: what cannot be validated on.
        """
        return check_images(location)

    def val_dataloader(self) -> Any:
        """Whole images: image uint8 1×H×W×3, index int64 1; see `in_order` on repeats."""
        if self.val_images is None:
            return []
        return in_order(WholeImages(self.val_images), *self._place())

    def test_dataloader(self) -> Any:
        """The same whole images; `tucodec test --data.val_images` names others."""
        return self.val_dataloader()

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
