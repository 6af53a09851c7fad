"""Shards to training batches: exact, elastic, resumable."""

import io
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.images import IMAGE_SUFFIXES, read_image
from lightning_tucodec.training.plan import DataPlan, derive, hash_positions


class ShardReader:
    """Samples of local shards by number, through memory maps that are opened when first used."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / "index.json").read_text())
        except FileNotFoundError:
            raise DatasetError(f"{folder}: no index.json; build it with `tucodec shards build`") from None
        self.patch = int(index["patch"])
        self.format = str(index["encoding"])
        self.names = [shard["name"] for shard in index["shards"]]
        counts = [shard["samples"] for shard in index["shards"]]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.offsets = np.concatenate([np.array(s["offsets"], np.int64) for s in index["shards"]])
        self.sizes = np.concatenate([np.array(s["sizes"], np.int64) for s in index["shards"]])
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def encoded(self, number: int) -> bytes:
        """The bytes of one sample as they lie in the tar."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        if shard not in self._maps:
            with open(self.folder / self.names[shard], "rb") as stream:
                self._maps[shard] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.offsets[number])
        return self._maps[shard][start : start + int(self.sizes[number])]

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """One patch, uint8 H×W×3."""
        data = self.encoded(number)
        if self.format == "raw":
            return np.load(io.BytesIO(data))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class _RankBatches(Dataset[dict[str, torch.Tensor]]):
    """Item k is this rank's share of global batch k, augmented; images stay uint8 until collected."""

    def __init__(
        self, reader: ShardReader, plan: DataPlan, batch_size: int, crop: int, flip: bool,
        rank: int, world_size: int,
    ) -> None:
        self.reader, self.plan, self.batch_size = reader, plan, batch_size
        self.crop, self.flip = crop, flip
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, batch: int) -> dict[str, torch.Tensor]:
        first = batch * self.batch_size
        positions = np.arange(
            first + self.rank * self.batch_size // self.world_size,
            first + (self.rank + 1) * self.batch_size // self.world_size,
        )
        numbers = self.plan.indices(positions)
        noise = hash_positions(derive(self.plan.seed & 0xFFFFFFFFFFFFFFFF, 0x617567), positions)
        room = np.uint64(self.reader.patch - self.crop + 1)
        lefts = (noise & np.uint64(0xFFFFF)) % room
        tops = ((noise >> np.uint64(20)) & np.uint64(0xFFFFF)) % room
        flips = (noise >> np.uint64(63)).astype(bool) & self.flip
        images = np.empty((len(positions), self.crop, self.crop, 3), np.uint8)
        for row, number in enumerate(numbers):
            y, x = int(tops[row]), int(lefts[row])
            pixels = self.reader.pixels(int(number))[y : y + self.crop, x : x + self.crop]
            images[row] = pixels[:, ::-1] if flips[row] else pixels
        return {
            "image": torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            "index": torch.from_numpy(positions),
        }


class _EndlessBatches:
    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        batch = self.first
        while True:
            yield batch
            batch += 1


class PlanLoader:
    """Iterates one Lightning epoch at a time over the endless plan and knows its position."""

    def __init__(self, dataset: _RankBatches, num_workers: int) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.batches_done = 0
        self._stream: Iterator[dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return -(-self.dataset.plan.samples // self.dataset.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self._stream is None:
            self._stream = iter(
                DataLoader(
                    self.dataset, batch_size=None, num_workers=self.num_workers,
                    sampler=_EndlessBatches(self.batches_done),  # type: ignore[arg-type]
                )
            )
        end = (self.batches_done // len(self) + 1) * len(self)
        while self.batches_done < end:
            batch = next(self._stream)
            self.batches_done += 1
            yield {"image": batch["image"].float().div_(255), "index": batch["index"]}

    def state_dict(self) -> dict[str, int]:
        """Position in global samples: all before it have been handed to the trainer."""
        return {"position": self.batches_done * self.dataset.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position."""
        self.batches_done = state["position"] // self.dataset.batch_size
        self._stream = None


class _WholeImages(Dataset[dict[str, Any]]):
    def __init__(self, files: list[Path], rank: int, world_size: int) -> None:
        self.files, self.rank, self.world_size = files, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.files) // self.world_size)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = (item * self.world_size + self.rank) % len(self.files)
        image = np.array(read_image(self.files[index]).transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(image).float().div_(255)[None],
            "index": torch.tensor([index]),
        }


class PatchDataModule(pl.LightningDataModule):
    """Training patches from shards, validation on whole images.

    Args:
        shards: folder made by `tucodec shards build`.
        batch_size: the global batch, over all ranks.
        crop: side of the random crop; None takes whole patches.
        num_workers: loader processes per rank.
        seed: decides order and augmentation.
        val_images: folder of whole images for validation.
        flip: mirror half of the patches left to right.
    """

    def __init__(
        self,
        shards: str,
        batch_size: int,
        crop: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        val_images: str | None = None,
        flip: bool = True,
    ) -> None:
        super().__init__()
        self.shards, self.batch_size, self.crop = shards, batch_size, crop
        self.num_workers, self.seed, self.val_images, self.flip = num_workers, seed, val_images, flip

    def train_dataloader(self) -> PlanLoader:
        """Batches of image float32 N×3×crop×crop in [0, 1] and index int64 N (global positions)."""
        reader = ShardReader(self.shards)
        crop = self.crop or reader.patch
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        if not 1 <= crop <= reader.patch:
            raise ConfigError(f"crop {crop} must lie between 1 and the patch size {reader.patch}")
        if self.batch_size < world:
            raise ConfigError(f"batch_size {self.batch_size} leaves some of {world} ranks empty")
        plan = DataPlan(len(reader), self.seed)
        dataset = _RankBatches(reader, plan, self.batch_size, crop, self.flip, rank, world)
        return PlanLoader(dataset, self.num_workers)

    def val_dataloader(self) -> Any:
        """Whole images, one a batch: image float32 1×3×H×W, index int64 1 (drop repeats by it)."""
        if self.val_images is None:
            return []
        files = sorted(
            p for p in Path(self.val_images).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
        )
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        return DataLoader(_WholeImages(files, rank, world), batch_size=None)
