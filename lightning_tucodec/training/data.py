"""The data of a training: patches from shards, validation images; docs/data.md lists the guarantees."""

from importlib import import_module
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.input.batches import Batch, RankBatches, as_floats, data_plan
from lightning_tucodec.training.input.loader import PlanLoader
from lightning_tucodec.training.input.shards import ShardIndex, ShardReader
from lightning_tucodec.training.input.validation import WholeImages, check_images, in_order
from lightning_tucodec.training.runs.identity import DEFAULT_DATA, arguments


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
