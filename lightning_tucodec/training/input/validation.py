"""Whole images for validation, the same on any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_tucodec.errors import DatasetError
from lightning_tucodec.io.images import image_files, read_image
from lightning_tucodec.training.input.batches import for_transfer

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
